"""Complexity: simplicity of the map. All metrics are normalised, so that volumes of any size are comparable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.metrics.base import Metric, MetricInput, MetricResult, magnitude

__all__ = ["EffectiveComplexity", "Entropy", "Sparseness"]

ZERO = "the map is zero everywhere"


class _Complexity(Metric):
    """Base class: uses the magnitude of the map, summed over channels; controls are sparse by construction."""

    group = "complexity"
    compared = False


class Sparseness(_Complexity):
    """The Gini index of ``|a|``: ``Σ_i (2i − n − 1) a_(i) / (n Σ a)``, a_(i) ascending (Chalasani et al. 2020)."""

    reference = "Chalasani et al., ICML 2020, arXiv:1810.06583"
    meaning = "Gini index of the map: 0 all voxels equal, 1 all in one voxel; Gaussian noise has 0.41."
    higher_is_better = True

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1): at most 1 − 1/n; undefined for a zero map."""
        values = magnitude(subject.map).flatten().sort().values
        n, total = len(values), float(values.sum())
        if total == 0:
            return MetricResult.undefined(ZERO)
        rank = torch.arange(1, n + 1, dtype=torch.float64, device=values.device)
        return MetricResult(float(((2 * rank - n - 1) * values).sum()) / (n * total))


class Entropy(_Complexity):
    """``−Σ_v p ln p / ln n`` with ``p = |a| / Σ |a|`` over n voxels (Bhatt et al. 2020, over its maximum)."""

    aliases = ("Complexity",)
    reference = "Bhatt et al., IJCAI 2020, arXiv:2005.00631"
    meaning = "Entropy of the map over that of a flat one: 1 spread over everything, 0 all in one voxel."
    higher_is_better = False

    def measure(self, subject: MetricInput) -> MetricResult:
        """[0, 1]; undefined for a zero map."""
        values = magnitude(subject.map).flatten()
        total = float(values.sum())
        if total == 0:
            return MetricResult.undefined(ZERO)
        return MetricResult(float(-torch.special.xlogy(values / total, values / total).sum()) / math.log(len(values)))


class EffectiveComplexity(_Complexity):
    """The share of voxels, strongest first, that holds ``mass`` of the map (after Nguyen & Martínez).

    The paper counts features above an absolute threshold, which depends on the map's units; a share of its mass does
    not.

    Args:
        mass: the share of ``Σ |a|`` that they hold.
    """

    reference = "Nguyen & Martínez 2020, arXiv:2007.07584"
    meaning = "Share of the voxels that holds 90 % of the map (or the given mass); small: easy to read."
    higher_is_better = False

    mass: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mass <= 1:
            raise UsageError(f"EffectiveComplexity: mass={self.mass} is a share between 0 and 1")

    def measure(self, subject: MetricInput) -> MetricResult:
        """(0, 1]; undefined for a zero map."""
        values: Tensor = magnitude(subject.map).flatten().sort(descending=True).values
        held = values.cumsum(0)
        if float(held[-1]) == 0:
            return MetricResult.undefined(ZERO)
        needed = int((held < self.mass * held[-1] * (1 - 1e-12)).sum()) + 1
        return MetricResult(needed / len(values), notes={"voxels": needed})
