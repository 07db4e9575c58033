"""Runs methods, alone or together, so that they share passes over the windows."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor

from esegeta_monai.engine.objective import Objective, Request
from esegeta_monai.methods.base import Explained, Method, Passes
from esegeta_monai.methods.precision import run_precisely

__all__ = ["grouped", "run", "run_together", "shares_passes"]


def run(method: Method, objective: Objective) -> Explained:
    """One method alone."""
    outcome = run_together([method], objective)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def run_together(methods: Sequence[Method], objective: Objective) -> dict[int, Explained | Exception]:
    """Several methods in lock-step, each in the precision that is enough for it (`esegeta_monai.methods.precision`).

    Returns results by position in ``methods``; a method that fails leaves its exception as its result.
    """
    return run_precisely(methods, objective, _lock_step)


def _lock_step(methods: Sequence[Method], objective: Objective) -> dict[int, Explained | Exception]:
    """Several methods in one precision: what they ask of the windows in the same round is done in one sweep.

    A method that fails leaves its exception as its result; a sweep that fails is done again for each method alone, so
    that only the culprit fails.
    """
    results: dict[int, Explained | Exception] = {}
    running: dict[int, Passes] = {}
    asked: dict[int, Request] = {}

    def step(i: int, passes: Passes, answer: Any) -> None:
        try:
            asked[i] = passes.send(answer)
            running[i] = passes
        except StopIteration as stop:
            results[i] = _explained(stop.value, methods[i], objective)
        except Exception as error:  # kept as the method's result, which the caller raises or records
            results[i] = error

    for i, method in enumerate(methods):
        try:
            outcome = method.attribute(objective)
        except Exception as error:  # as above
            results[i] = error
            continue
        if isinstance(outcome, Generator):
            step(i, outcome, None)
        else:
            results[i] = _explained(outcome, method, objective)
    while running:
        current = running
        now = _due({i: asked[i] for i in sorted(current)})
        running = {i: passes for i, passes in current.items() if i not in now}
        for i, answer in _answers(objective, now).items():
            if isinstance(answer, Exception):
                results[i] = answer
            else:
                step(i, current[i], answer)
    return results


def _due(asked: dict[int, Request]) -> dict[int, Request]:
    """What is asked for in the next sweep: gradients wait while some method has yet to look at activations before it
    asks for them too, since one backward pass serves all."""
    if not any(r.before_gradient for r in asked.values()):
        return asked
    return {i: r for i, r in asked.items() if not r.backward}


def _answers(objective: Objective, asked: dict[int, Request]) -> dict[int, Any]:
    try:
        return dict(zip(asked, objective.sweep(list(asked.values()))))
    except Exception as error:  # kept as the result of the one method that asked
        if len(asked) == 1:
            return dict.fromkeys(asked, error)
    return {i: answer for i, request in asked.items() for answer in _answers(objective, {i: request}).values()}


def _explained(value: Explained | Tensor, method: Method, objective: Objective) -> Explained:
    """What a method returned, with a warning where its completeness gap is above `GAP`."""
    explained = value if isinstance(value, Explained) else Explained(value)
    gaps = explained.notes.get("completeness_gap") or []
    for score, gap in zip(objective.scores, gaps):
        start = f"{method.name}: the map's sum misses what it should add up to by"
        told = any(w.startswith(f"{score.label}: {start}") for w in objective.monitor.warnings)  # at other noisy images
        if gap is not None and gap > GAP and not told:
            objective.monitor.warn(f"{start} {100 * gap:.0f} %: {method.gap_advice}", score.label)
    return explained


GAP = 0.05
"""The relative completeness gap above which a map comes with a warning."""


def shares_passes(method: Method) -> bool:
    """Whether a method asks for sweeps over the windows that others can share."""
    return inspect.isgeneratorfunction(type(method).attribute)


def grouped(methods: Sequence[Method]) -> list[list[Method]]:
    """Methods in their order; those that can share passes come together, at the place of the first."""
    groups: list[list[Method]] = []
    sharing: list[Method] = []
    for method in methods:
        if shares_passes(method):
            if not sharing:
                groups.append(sharing)
            sharing.append(method)
        else:
            groups.append([method])
    return groups
