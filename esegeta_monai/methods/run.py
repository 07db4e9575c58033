"""Running methods, alone or together, so that they share passes over the windows."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Sequence
from typing import Any

from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import SampleComplete
from esegeta_monai.engine.sweep import Request, sweep
from esegeta_monai.methods.base import Explained, Method, Outcome, Passes
from esegeta_monai.methods.completeness import repeated_in_float64, warn_of_sums
from esegeta_monai.methods.precision import run_precisely

__all__ = ["grouped", "run", "run_together", "shares_passes"]


def run(method: Method, objective: Objective) -> Explained:
    """Run one method.

    Raises:
        Exception: whatever ended the method.
    """
    (outcome,) = run_together([method], objective)
    if outcome.error is not None:
        if objective.context.sample is not None:
            objective.context.sample.scores = outcome.scores  # for the method that runs this one
        raise outcome.error
    assert outcome.result is not None
    return outcome.result


def run_together(methods: Sequence[Method], objective: Objective) -> list[Outcome]:
    """Run several methods side by side, each in the precision that is enough for it.

    See `esegeta_monai.methods.precision`. A method that fails does not end the others. Rule methods whose map misses
    its sum in float32 run again in float64.

    Returns:
        The outcome of each method, in order.
    """
    outcomes = run_precisely(methods, objective, _run_side_by_side)
    outcomes = repeated_in_float64(methods, objective, outcomes, _run_side_by_side)
    for method, outcome in zip(methods, outcomes):
        if outcome.result is not None:
            warn_of_sums(method, objective, outcome.result)
    return outcomes


def _run_side_by_side(methods: Sequence[Method], objective: Objective) -> list[Outcome]:
    """Run several methods in one precision; one sweep serves what they request in the same round.

    A sweep that fails is repeated for each method alone, so that only the cause of the failure fails.
    """
    outcomes = [Outcome() for _ in methods]
    running: dict[int, Passes] = {}
    requests: dict[int, Request] = {}

    def failed(i: int, error: Exception) -> None:
        sample = objective.context.sample
        outcomes[i].error = error
        outcomes[i].scores = sample.take() if sample is not None and isinstance(error, SampleComplete) else None

    def step(i: int, passes: Passes, answer: Any) -> None:
        try:
            requests[i] = passes.send(answer)
            running[i] = passes
        except StopIteration as stop:
            outcomes[i].result = _explained(stop.value)
        except Exception as error:  # the caller raises or records it
            failed(i, error)

    for i, method in enumerate(methods):
        try:
            value = method.attribute(objective)
        except Exception as error:  # as above
            failed(i, error)
            continue
        if isinstance(value, Generator):
            step(i, value, None)
        else:
            outcomes[i].result = _explained(value)
    while running:
        current = running
        now = _due({i: requests[i] for i in sorted(current)})
        running = {i: passes for i, passes in current.items() if i not in now}
        for i, answer in _answers(objective, now).items():
            if isinstance(answer, Exception):
                failed(i, answer)
            else:
                step(i, current[i], answer)
    return outcomes


def _due(requests: dict[int, Request]) -> dict[int, Request]:
    """Choose the requests of the next sweep: those for gradients wait while some method still reads activations before
    it requests gradients too, since one backward pass serves all."""
    if not any(r.before_gradient for r in requests.values()):
        return requests
    return {i: r for i, r in requests.items() if not r.backward}


def _answers(objective: Objective, requests: dict[int, Request]) -> dict[int, Any]:
    """Serve requests in one sweep; where it fails, serve each alone and return errors in place of results."""
    try:
        return dict(zip(requests, sweep(objective, list(requests.values()))))
    except Exception as error:  # becomes the outcome of the one method that asked
        if len(requests) == 1:
            return dict.fromkeys(requests, error)
    return {i: answer for i, request in requests.items() for answer in _answers(objective, {i: request}).values()}


def _explained(value: Explained | Tensor) -> Explained:
    return value if isinstance(value, Explained) else Explained(value)


def shares_passes(method: Method) -> bool:
    """Return True if a method requests sweeps over the windows, which other methods can share."""
    return inspect.isgeneratorfunction(type(method).attribute)


def grouped(methods: Sequence[Method]) -> list[list[Method]]:
    """Group methods, in order; those that can share passes form one group, at the place of the first."""
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
