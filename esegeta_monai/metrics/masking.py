"""The map as a mask on the image, and removal by imputation."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Added
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.engine.score import WeightedScore
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.metrics.base import Metric, MetricCost, MetricInput, MetricResult, mean_interval
from esegeta_monai.metrics.faithfulness import NEEDS, NOTHING, ZERO
from esegeta_monai.metrics.removal import at_least, blind, ranking
from esegeta_monai.utils.registry import json_ready

__all__ = ["ROAD", "AverageDrop", "AverageGain", "AverageIncrease", "imputed"]


class _Masked(Metric):
    """Base class: masks the image by the map, ``x' = x₀ + m (x − x₀)``, m the positive part of the map, summed over
    channels, from its smallest to its greatest value on [0, 1].

    The target's probability is used (its mean over the mask for a target of voxels), for any output of the target.
    """

    group = "faithfulness"
    needs = NEEDS

    baseline: Any = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        baseline_for(self.baseline, local=True)

    def cost(self, objective: Objective) -> MetricCost:
        """Image and masked image, which the metrics of masks share."""
        return MetricCost(each=2, group=f"masked {json_ready(self.baseline)!r}")

    def measure(self, subject: MetricInput) -> MetricResult:
        """Undefined for a zero map, which shows only the baseline; its probability may exceed the image's."""
        if not bool(subject.map.any()):
            return MetricResult.undefined(ZERO)
        return self._judge(*self._probabilities(subject))

    @abstractmethod
    def _judge(self, before: float, after: float) -> MetricResult:
        """Compute the result from the target's probability at the image, and at the masked image."""

    def _probabilities(self, subject: MetricInput) -> tuple[float, float]:
        """Return the target's probability at the image, and at the masked image."""
        objective = subject.once(("probability", subject.target), lambda: _as_probability(subject))
        reference = baseline_for(self.baseline, local=True).draw(objective, objective.generator())

        def ask() -> tuple[float, float]:
            mask = unit_mask(subject.map).to(objective.image)
            delta = (mask - 1) * (objective.image - reference)
            before = float(objective.image_values()[0])
            return before, before + float(score_changes(objective, Added(delta[None]))[0, 0])

        key = ("masked", subject.target, id(subject.map), repr(json_ready(self.baseline)))
        # the map is stored too, so that its id is not reused
        return subject.once(key, lambda: (ask(), subject.map))[0]


def _as_probability(subject: MetricInput) -> Objective:
    objective = subject.need_objective()
    score = objective.scores[subject.target]
    if not isinstance(score, WeightedScore) or score.class_index is None:
        raise MetricError(f"{score.label} is no class, so it has no probability: use Deletion or Insertion")
    return objective.derive(scores=[score.altered(objective.n_classes, output="probability", reduction="mean")])


def unit_mask(values: Tensor) -> Tensor:
    """Sum the positive part of (C, *spatial) over channels and scale it to [0, 1]: (1, *spatial); zeros if constant."""
    mask = values.double().clamp(min=0).sum(0, keepdim=True)
    spread = mask.max() - mask.min()
    return (mask - mask.min()) / spread if float(spread) > 0 else torch.zeros_like(mask)


class AverageDrop(_Masked):
    """``max(0, p(x) − p(x')) / p(x)``: the share of the class's probability that is lost when only the masked image is
    left (Chattopadhay et al. 2018).

    Args:
        baseline: x₀, shown where the map is zero; see `esegeta_monai.engine.baselines`.
    """

    reference = "Chattopadhay et al., WACV 2018, arXiv:1710.11063"
    meaning = "Share of the class's probability that is lost when only the regions of the map are left of the image."
    higher_is_better = False

    def _judge(self, before: float, after: float) -> MetricResult:
        """[0, 1]; undefined if the probability is 0."""
        if before <= 0:
            return MetricResult.undefined("the probability is 0 already")
        return MetricResult(max(0.0, before - after) / before, notes={"before": before, "after": after})


class AverageIncrease(_Masked):
    """1 if the class's probability rises when only the masked image is left, else 0; over maps, the rate.

    Args:
        baseline: see `AverageDrop`.
    """

    reference = "Chattopadhay et al., WACV 2018, arXiv:1710.11063"
    meaning = "Share of maps that leave the class's probability higher than the whole image does."
    higher_is_better = True
    proportion = True

    def _judge(self, before: float, after: float) -> MetricResult:
        """0 or 1."""
        return MetricResult(float(after > before), notes={"before": before, "after": after})


class AverageGain(_Masked):
    """``max(0, p(x') − p(x)) / (1 − p(x))``: the counterpart of `AverageDrop` (Zhang et al. 2024).

    Args:
        baseline: see `AverageDrop`.
    """

    reference = "Zhang et al. (Opti-CAM), CVIU 2024, arXiv:2301.07002"
    meaning = "Share of 1 − probability that is gained when only the regions of the map are left of the image."
    higher_is_better = True

    def _judge(self, before: float, after: float) -> MetricResult:
        """[0, 1]; undefined if the probability is 1."""
        if before >= 1:
            return MetricResult.undefined("the probability is 1 already")
        return MetricResult(max(0.0, after - before) / (1 - before), notes={"before": before, "after": after})


ITERATIONS = 2000
"""Limit for conjugate gradients; some tens are needed."""


class ROAD(Metric):
    """Remove and debias: the target's loss when a share of the voxels is imputed from its neighbours, so that the mask
    itself carries no information (Rong et al. 2022). In units of ``|F(x) − F(x₀)|``.

    A removed voxel is the mean of its neighbours with weights 1/d² (in 2D the paper's 1/6 and 1/12), all together as
    the solution of a linear system, plus noise of 0.01 of the channel's standard deviation. Voxels of equal
    strength are removed in a random order.

    Args:
        order: ``"combined"``: (loss with the strongest removed − loss with the weakest removed) / 2; ``"morf"`` or
            ``"lerf"``: one of them, strongest or weakest first.
        shares: shares of the voxels that are removed, in (0, 1).
        baseline: x₀, for the unit only.
        noise: standard deviation, in units of each channel's.
    """

    group = "faithfulness"
    reference = "Rong et al., ICML 2022, arXiv:2202.00449"
    meaning = "Loss of the target when the strongest voxels are imputed, less the loss for the weakest, halved."
    higher_is_better = True
    needs = NEEDS

    order: Literal["combined", "morf", "lerf"] = "combined"
    shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9)
    baseline: Any = "auto"
    noise: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("combined", "morf", "lerf"):
            raise UsageError(f"ROAD: order={self.order!r}: give 'combined', 'morf' or 'lerf'")
        if not self.shares or any(not 0 < s < 1 for s in self.shares):
            raise UsageError(f"ROAD: shares={self.shares} must lie between 0 and 1")
        at_least(self, "noise", self.noise, 0)
        baseline_for(self.baseline, local=True)
        if self.order == "lerf":
            self.higher_is_better = False  # type: ignore[misc]

    def cost(self, objective: Objective) -> MetricCost:
        """The baseline, and one or two imputed images per share."""
        return MetricCost(each=1 + len(self.shares) * (2 if self.order == "combined" else 1))

    def measure(self, subject: MetricInput) -> MetricResult:
        """About -1 to 1. The interval is over the shares."""
        if not bool(subject.map.any()):
            return MetricResult.undefined(ZERO)
        objective = subject.alone
        reference = baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        full = float(score_changes(objective, Added((reference - objective.image)[None]))[0, 0])
        if blind(subject, full):
            return MetricResult.undefined(NOTHING)
        strength = subject.per_channel.sum(0).flatten()
        strongest = ranking(strength, objective.seed)
        curves: dict[str, list[float]] = {}
        for name in ("morf", "lerf") if self.order == "combined" else (self.order,):
            ranked = strongest if name == "morf" else strongest.flip(0)
            curves[name] = [self._loss(objective, ranked, share) / abs(full) for share in self.shares]
        losses = np.array(list(curves.values()))
        values = (losses[0] - losses[1]) / 2 if self.order == "combined" else losses[0]
        low, high = mean_interval(values)
        return MetricResult(
            float(values.mean()), low, high, len(values), curve={"x": list(self.shares), **_renamed(curves)}
        )

    def _loss(self, objective: Objective, ranked: Tensor, share: float) -> float:
        removed = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
        removed[ranked[: max(1, round(share * len(ranked)))]] = True
        removed = removed.reshape(objective.plan.spatial_shape)
        noisy = imputed(objective.image, removed, self.noise, objective.generator())
        return -float(score_changes(objective, Added((noisy - objective.image)[None]))[0, 0])


def _renamed(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    return {"y": next(iter(curves.values())), **(curves if len(curves) > 1 else {})}


def imputed(
    image: Tensor, removed: Tensor, noise: float, generator: torch.Generator, tolerance: float = 1e-4
) -> Tensor:
    """Impute the removed voxels of ``image``: each the weighted mean of its neighbours, weights 1/d², plus noise.

    Args:
        image: (C, *spatial).
        removed: bool (*spatial), not all True.
        noise: standard deviation in units of each channel's.
        tolerance: of the conjugate gradients' residual, relative.

    Raises:
        MetricError: the system was not solved.
    """
    dims = removed.ndim
    gone = removed.to(image.device, torch.float64)
    diagonal = _neighbours(torch.ones_like(gone)[None])[0]  # less than 1 at the edges of the volume
    known = image.double() * (1 - gone)

    def system(values: Tensor) -> Tensor:
        return gone * (diagonal * values - _neighbours(gone * values))

    wanted = gone * _neighbours(known)
    enough = tolerance * wanted.flatten(1).norm(dim=1)
    solution = _first_guess(known, 1 - gone) * gone
    solution[enough == 0] = (
        0  # all neighbours are 0, hence the solution too; a relative residual would never be small enough
    )
    residual = wanted - system(solution)
    precondition = gone / diagonal
    z = precondition * residual
    direction, rho = z, (residual * z).flatten(1).sum(1)
    for _ in range(ITERATIONS):
        going = residual.flatten(1).norm(dim=1) > enough
        if not going.any():
            break
        image_of = system(direction)
        along = (direction * image_of).flatten(1).sum(1)
        step = torch.where(going, rho / along, 0.0).reshape(-1, *(1,) * dims)
        solution, residual = solution + step * direction, residual - step * image_of
        z = precondition * residual
        before, rho = rho, (residual * z).flatten(1).sum(1)
        direction = z + torch.where(going, rho / before, 0.0).reshape(-1, *(1,) * dims) * direction
    else:
        raise MetricError(f"ROAD: the imputation did not converge within {ITERATIONS} steps of conjugate gradients")
    drawn = torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image.device, torch.float64)
    drawn = drawn * image.double().flatten(1).std(1).reshape(-1, *(1,) * dims) * noise
    return torch.where(removed.to(image.device), (solution + drawn).to(image.dtype), image)


def _neighbours(values: Tensor) -> Tensor:
    """Compute weighted means over the 8 or 26 neighbours (C, *spatial), weights 1/d²; zero beyond the edges.

    Neighbours at the same distance are summed axis by axis: torch's convolution in float64 takes five times as long.
    """
    dims = values.ndim - 1
    by_distance = [values]  # sums over neighbours that differ in 0, 1, … of the axes so far; this number is their d²
    for axis in range(1, dims + 1):
        moved = [_both_sides(v, axis) for v in by_distance]
        by_distance = [values, *(a + b for a, b in zip(by_distance[1:], moved)), moved[-1]]
    total = sum(math.comb(dims, square) * 2**square / square for square in range(1, dims + 1))
    mean = by_distance[1] / total
    for square in range(2, dims + 1):
        mean = mean.add_(by_distance[square], alpha=1 / (square * total))
    return mean


def _both_sides(values: Tensor, axis: int) -> Tensor:
    total, n = torch.zeros_like(values), values.shape[axis] - 1
    total.narrow(axis, 0, n).add_(values.narrow(axis, 1, n))
    total.narrow(axis, 1, n).add_(values.narrow(axis, 0, n))
    return total


def _first_guess(known: Tensor, weight: Tensor) -> Tensor:
    """Average known voxels at the finest scale that has any: the start of conjugate gradients."""
    dims = weight.ndim
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    if bool((weight > 0).all()) or max(weight.shape) == 1:
        return known / weight.clamp(min=torch.finfo(torch.float64).tiny)
    here = torch.where(weight > 0, known / weight.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    small = [math.ceil(n / 2) for n in weight.shape]
    pads = [p for n, m in zip(reversed(weight.shape), reversed(small)) for p in (0, 2 * m - n)]
    coarse = pool(F.pad(known[:, None], pads), 2)[:, 0]
    coarse_weight = pool(F.pad(weight[None, None], pads), 2)[0, 0]
    up = F.interpolate(_first_guess(coarse, coarse_weight)[:, None], scale_factor=2, mode="nearest")[:, 0]
    for axis, n in enumerate(weight.shape, 1):
        up = up.narrow(axis, 0, n)
    return torch.where(weight > 0, here, up)
