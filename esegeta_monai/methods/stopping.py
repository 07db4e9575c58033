"""Stop drawing samples once the mean of their maps has a stated precision."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.errors import UsageError

__all__ = ["FEWEST", "RunningMean", "RunningMoments", "check_tolerance", "looks"]

FEWEST = 16
"""Samples before the first look: of fewer, the standard error is hardly known."""

CONFIDENCE = 0.95
"""Probability that a map which was stopped has the stated precision."""


def check_tolerance(method: Any) -> None:
    """Check the parameters ``tolerance`` and ``max_samples`` of a method.

    Raises:
        UsageError: the tolerance is not positive, or fewer than `FEWEST` samples are allowed.
    """
    if method.tolerance is None:
        return
    if not method.tolerance > 0 or method.max_samples < FEWEST:
        raise UsageError(
            f"tolerance={method.tolerance} must be positive, and max_samples={method.max_samples} at least {FEWEST}"
        )


def looks(most: int) -> list[int]:
    """Return the numbers of samples after which the precision is looked at: doubling counts, and the largest number.

    >>> looks(100)
    [16, 32, 64, 100]
    """
    counts = [FEWEST * 2**j for j in range(max(0, int(math.log2(most / FEWEST)) + 1))]
    return counts if counts[-1] == most else [*counts, most]


class RunningMoments:
    """Mean and squared deviations of maps (k, C, *spatial) sample by sample (Welford 1962): E[A²] − E[A]² would cancel.

    Attributes:
        count: number of samples.
        squares: sum of the squared deviations from the mean (k, C, *spatial).

    >>> moments = RunningMoments()
    >>> for value in (1.0, 2.0, 6.0):
    ...     moments.add(torch.full((1, 1, 1), value))
    >>> moments.mean.item(), moments.squares.item()
    (3.0, 14.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self.squares = torch.empty(0)

    @property
    def mean(self) -> Tensor:
        """The mean (k, C, *spatial)."""
        assert self._mean is not None
        return self._mean

    def add(self, maps: Tensor) -> None:
        """Add a sample (k, C, *spatial)."""
        self.count += 1
        if self._mean is None:
            self._mean, self.squares = maps.clone(), torch.zeros_like(maps)
            return
        step = maps - self._mean
        self._mean += step / self.count
        self.squares += step * (maps - self._mean)


class RunningMean:
    """The mean of maps (k, C, *spatial) sample by sample, with a bound of its error.

    The bound holds for all voxels and looks together with probability `CONFIDENCE`, if the means are normal: the
    remaining probability is divided among the looks, the targets and the voxels that vary (Bonferroni), with the
    quantile of Student's t.

    Args:
        most: largest number of samples.
        tolerance: largest error of a voxel relative to the largest absolute voxel, of each target.

    >>> mean = RunningMean(1000, tolerance=0.1)
    >>> generator = torch.Generator().manual_seed(0)
    >>> while not mean.add(1 + 0.01 * torch.randn(1, 1, 4, 4, generator=generator)):
    ...     pass
    >>> mean.count
    16
    """

    def __init__(self, most: int, tolerance: float) -> None:
        self.tolerance = tolerance
        self._looks = looks(most)
        self._moments = RunningMoments()

    @property
    def count(self) -> int:
        """The number of samples."""
        return self._moments.count

    @property
    def mean(self) -> Tensor:
        """The mean (k, C, *spatial)."""
        return self._moments.mean

    def add(self, maps: Tensor) -> bool:
        """Add a sample (k, C, *spatial); return True if no further one is needed or allowed."""
        self._moments.add(maps)
        if self.count == self._looks[-1]:
            return True
        return self.count in self._looks and max(self.precision()) <= self.tolerance

    def precision(self) -> list[float]:
        """Return the bound of the largest error of a voxel over the largest absolute voxel, for each target."""
        from scipy.stats import t

        squares = self._moments.squares
        voxels = max(1, int((squares != 0).sum()))
        quantile = float(t.isf((1 - CONFIDENCE) / (2 * len(self._looks) * voxels), self.count - 1))
        errors = (squares / (self.count - 1) / self.count).sqrt().flatten(1).amax(1).double() * quantile
        largest = self.mean.abs().flatten(1).amax(1).double()
        return [0.0 if e == 0 else float(e / m) if m > 0 else math.inf for e, m in zip(errors, largest)]

    def notes(self) -> dict[str, Any]:
        """Return the entries of the record: the number of samples, and for each target the bound of the error."""
        return {"n_samples": self.count, "sampling_error": self.precision()}
