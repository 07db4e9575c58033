"""A finished map, and the base class of its checks."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.score import Score
from esegeta_monai.methods.base import Method
from esegeta_monai.methods.precision import AGREES

__all__ = ["FinishedMap", "MapCheck", "NotChecked", "deviation"]

BOUND = 0.05
"""Relative deviation from the independent computation above which a map contradicts it."""


class NotChecked(Exception):  # noqa: N818 - no error: it ends a check that cannot be made
    """Raised with the reason why a map cannot be checked."""


@dataclass(frozen=True)
class FinishedMap:
    """A map of one target, and what its check reads.

    Attributes:
        method: the method that made the map.
        objective: the objective of all targets that it ran for.
        k: number of the map's target.
        values: the map (C, *spatial), before it is split by image inputs.
        notes: the method's entries of the record for this target.
        infer: function of an image (C, *spatial) that returns the prediction (K, *out) by the user's own inferer.
    """

    method: Method
    objective: Objective
    k: int
    values: Tensor
    notes: Mapping[str, Any]
    infer: Callable[[Tensor], Tensor]

    @property
    def score(self) -> Score:
        """The target's score."""
        return self.objective.scores[self.k]

    @functools.cached_property
    def precise(self) -> Objective:
        """The objective of this target alone in float64.

        Raises:
            NotChecked: the network does not run in float64.
        """
        try:
            double = self.objective.memo("float64", self.objective.in_float64)
        except Exception as error:  # a copy of any network may fail in any way
            raise NotChecked(f"the network does not run in float64 ({error})") from error
        return double.derive(scores=[self.score])

    @property
    def bound(self) -> float:
        """Deviation above which the map contradicts the independent computation.

        A map in half precision may deviate further: it correlates with float32 by at least `AGREES`.
        """
        exact = self.method.full_precision or self.notes.get("amp_fallback") is not None
        half = self.objective.model.autocast_dtype is not None and not exact
        return BOUND + (math.sqrt(2 * (1 - AGREES)) if half else 0.0)

    def unseen(self) -> Tensor:
        """Return the voxels (*spatial), bool, that are in no window of the target: F does not depend on them."""
        plan = self.objective.plan
        outside = torch.ones(plan.spatial_shape, dtype=torch.bool, device=self.values.device)
        for w in self.objective.score_windows[self.k]:
            outside[plan.place(w)] = False
        return outside

    def drawn(self, n: int) -> list[tuple[int, ...]]:
        """Draw n entries (channel, *voxel) of the map with probabilities proportional to its absolute values.

        Entries with the value of an earlier one, as in the same cell, are drawn only if there are no others.
        """
        values = self.values.detach().flatten().double().cpu()
        weights, generator, drawn = values.abs(), self.objective.generator(), []
        for _ in range(n):
            sums = weights.cumsum(0)
            at = torch.rand((), generator=generator, dtype=torch.float64) * sums[-1]
            index = torch.searchsorted(sums, at, right=True).clamp(max=len(sums) - 1)
            drawn.append(tuple(int(i) for i in torch.unravel_index(index, self.values.shape)))
            others = torch.where(values == values[index], 0.0, weights)
            weights = others if others.any() else weights
        return drawn


class MapCheck(ABC):
    """A check of a finished map by an independent computation.

    Class attributes:
        by: the independent computation, in words.
    """

    by: ClassVar[str]

    @abstractmethod
    def measure(self, done: FinishedMap) -> CheckResult:
        """Check a map.

        Raises:
            NotChecked: it cannot be checked.
        """

    def judged(self, value: float, bound: float) -> CheckResult:
        """Return the result for a deviation and its bound."""
        if value <= bound:
            return CheckResult("map", "passed", f"the map agrees with {self.by}", value)
        return self.wrong(f"the map contradicts {self.by} (by {100 * value:.3g} %)", value)

    @staticmethod
    def wrong(what: str, value: float) -> CheckResult:
        """Return the result for a map that contradicts the independent computation."""
        return CheckResult("map", "warned", f"{what}: do not use it, and report the network and the method", value)


def deviation(drawn: Tensor, expected: Tensor) -> float:
    """Return ``|drawn - expected| / |expected|`` of two tensors of equal shape, in the Euclidean norm.

    >>> deviation(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    0.5
    """
    drawn, expected = drawn.double().cpu(), expected.double().cpu()
    missed, size = float((drawn - expected).norm()), float(expected.norm())
    return 0.0 if missed == 0 else missed / size if size > 0 else math.inf


@contextmanager
def without_time_limit(objective: Objective) -> Iterator[None]:
    """Let passes inside the block neither count nor end by the time limit of the method."""
    context = objective.context
    progress = context.progress
    context.progress = type(progress)(silent=True)
    try:
        yield
    finally:
        context.progress = progress
