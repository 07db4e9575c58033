"""Completeness: which maps miss the sum that they should have, and a second run of rule methods in float64."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import RankLost, named_reason
from esegeta_monai.methods.base import Explained, Method, Outcome

__all__ = ["FLOOR", "is_incomplete", "repeated_in_float64", "warn_of_sums"]

logger = logging.getLogger("esegeta_monai")

FLOOR = 1e-4
"""A map's sum that misses by less than this share of the sum of its absolute values is complete: it is the rounding of
float32."""

KEPT_BY_BIASES = 0.5
"""Share of F that biases absorb, above which a map comes with a warning."""

RunMethods = Callable[["Sequence[Method]", Objective], "list[Outcome]"]


def is_incomplete(method: Method, gap: float | None, gap_of_map: float | None) -> bool:
    """Return True if a map misses the sum that it should have.

    Args:
        method: its ``completeness_bound`` is the permitted gap.
        gap: difference of the sums relative to the change of F; None: F does not change, or the method has no such sum.
        gap_of_map: the difference relative to the sum of the map's absolute values; None: not known.

    >>> from esegeta_monai.methods import DeepLift
    >>> [is_incomplete(DeepLift(), *gaps) for gaps in [(0.01, 0.2), (0.01, 1e-5), (None, 1.0), (None, None)]]
    [True, False, True, False]
    """
    if gap is None and gap_of_map is None:
        return False
    large = gap is None or gap > method.completeness_bound
    return large and (gap_of_map is None or gap_of_map > FLOOR)


def _incomplete(method: Method, result: Explained) -> list[bool]:
    """Return for each target whether its map is incomplete."""
    notes = [result.note(k) for k in range(len(result.maps))]
    return [is_incomplete(method, n.get("completeness_gap"), n.get("completeness_gap_of_map")) for n in notes]


def repeated_in_float64(
    methods: Sequence[Method], objective: Objective, outcomes: list[Outcome], run_methods: RunMethods
) -> list[Outcome]:
    """Run methods with ``repeats_in_float64`` whose float32 maps are incomplete again in float64.

    A copy of the network in float64 computes them. Where it fails, the map in float32 is kept, with a warning.

    Args:
        methods: the methods.
        objective: the case.
        outcomes: the outcome of each method in float32, in order.
        run_methods: runs methods in the precision of an objective.

    Returns:
        The outcome of each method, in order; maps of a second run are float64, and their notes have
        ``float64_fallback``, the reason.
    """
    context = objective.context
    if objective.image.dtype != torch.float32 or context.sample is not None:
        return outcomes
    short = [
        i
        for i, (method, outcome) in enumerate(zip(methods, outcomes))
        if method.repeats_in_float64 and outcome.result is not None and any(_incomplete(method, outcome.result))
    ]
    short = context.processes.gather(short)[0]
    if not short:
        return outcomes
    try:
        precise = objective.memo("float64", objective.in_float64)
        repeated = run_methods([methods[i] for i in short], precise)
    except Exception as error:  # a copy of any network may fail in any way
        repeated = [Outcome(error=error) for _ in short]
    outcomes = list(outcomes)
    for i, outcome in zip(short, repeated):
        first = outcomes[i].result
        assert first is not None
        if outcome.result is None:
            assert outcome.error is not None
            if isinstance(outcome.error, RankLost):
                raise outcome.error
            why = named_reason(outcome.error)
            context.progress.warn(f"{methods[i].name}: rounding of float32 shows, and float64 is not possible: {why}")
            continue
        reason = f"the float32 map misses its sum by {_missed(max(_misses(first)))}"
        logger.info("%s runs in float64: %s", methods[i].name, reason)
        outcome.result.notes |= {"float64_fallback": reason, "value": precise.image_values()}
        outcomes[i] = outcome
    return outcomes


def _misses(result: Explained) -> list[tuple[float, float]]:
    """Return for each target the gap, infinite where F does not change, and the gap relative to the map."""
    notes = [result.note(k) for k in range(len(result.maps))]
    infinite = float("inf")
    return [
        (infinite if (gap := n.get("completeness_gap")) is None else gap, n.get("completeness_gap_of_map") or 0.0)
        for n in notes
    ]


def _missed(miss: tuple[float, float]) -> str:
    gap, of_map = miss
    if gap == float("inf"):
        return f"{100 * of_map:.3g} % of its absolute values, while F does not change"
    return f"{100 * gap:.3g} %"


def warn_of_sums(method: Method, objective: Objective, result: Explained) -> None:
    """Warn of the maps of a method that miss the sum that they should have, or whose biases keep most of it."""
    for k, (score, short, miss) in enumerate(zip(objective.scores, _incomplete(method, result), _misses(result))):
        if short:
            start = f"{method.name}: the map's sum misses what it should add up to by"
            _warn_once(objective, start, f" {_missed(miss)}: {method.gap_advice}", score.label)
        share: Any = result.note(k).get("absorbed_share")
        if share is not None and abs(share) > KEPT_BY_BIASES:
            start = f"{method.name}: biases keep"
            text = f" {100 * share:.3g} % of the score, so the map shows the smaller part of it"
            _warn_once(objective, start, text, score.label)


def _warn_once(objective: Objective, start: str, text: str, label: str) -> None:
    """Warn unless a warning with the same start was given, as at other noisy images."""
    progress = objective.context.progress
    if not any(warning.startswith(f"{label}: {start}") for warning in progress.warnings):
        progress.warn(start + text, label)
