"""Integrated gradients along paths that are not straight: through scale space, and where the network is calm."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.baselines import baseline_for, describe_baseline, gaussian_blur
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method, relative_gap
from esegeta_monai.objective import Objective

__all__ = ["BlurIG", "GuidedIG"]


@dataclass(eq=False, repr=False)
class BlurIG(Method):
    """``a = ∫ ∂F/∂x(L(x, σ)) · dL/dσ dσ`` from σ to 0, L(x, σ) the image blurred by a Gaussian (Xu et al. 2020).

    The path needs no baseline: it ends where nothing is left of the details. Complete: the sum of the map is
    ``F(x) − F(L(x, σ))``, up to the error of the trapezoid rule, which the record states.

    Args:
        sigma: where the path begins, in voxels; None: a quarter of the shortest window side.
        n_steps: segments of the path, equal in σ.

    Example:
        >>> BlurIG(sigma=4, n_steps=20).parameters
        {'sigma': 4, 'n_steps': 20}
    """

    reference = "Xu et al., CVPR 2020, arXiv:2004.03383"

    sigma: float | None = None
    n_steps: int = 32
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1 or (self.sigma is not None and self.sigma <= 0):
            raise UsageError(f"BlurIG: n_steps={self.n_steps} and sigma={self.sigma} must be positive")

    def passes(self, objective: Objective) -> int:
        """The ends of all segments; a forward pass each more for non-linear targets."""
        return (self.n_steps + 1) * len(objective.windows) * (1 if objective.linear else 2)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        sigma = self.sigma or min(r for r in objective.plan.roi if r > 1) / 4
        maps = objective.new_maps()
        before: tuple[Tensor, Tensor] | None = None
        values = []
        for step in range(self.n_steps + 1):
            width = sigma * (1 - step / self.n_steps)
            point = gaussian_blur(objective.image, width) if width else objective.image
            gradient = objective.gradient(point[None])
            values.append(gradient.values[:, 0])
            if before is not None:
                maps += (before[1] + gradient.maps[:, 0]) / 2 * (point - before[0])
            before = point, gradient.maps[:, 0]
        gap = relative_gap(maps, values[-1], values[0])
        return Explained(
            maps, {"completeness_gap": gap, "sigma_voxels": sigma, "baseline_value": [float(v) for v in values[0]]}
        )


@dataclass(eq=False, repr=False)
class GuidedIG(Method):
    """Integrated gradients along a path that moves first the voxels whose gradient is smallest, within a band round the
    straight path (Kapishnikov et al. 2021), so that noise of steep regions beside the image's own is not collected.

    At step α the L1 distance to the image is ``(1 − α) |x − x₀|₁``; each voxel's own share of its way stays within
    ``α ± max_dist``. The path depends on the target, and each has its own. Gradients at the ends of each step are
    averaged. Complete up to the error of that rule, which the record states.

    Args:
        baseline: x₀, see `esegeta_monai.baselines`.
        n_steps: steps.
        fraction: of the voxels that are moved at a time.
        max_dist: half the width of the band; 0 is the straight path.
    """

    reference = "Kapishnikov et al., CVPR 2021, arXiv:2106.09788"

    baseline: Any = "auto"
    n_steps: int = 64
    fraction: float = 0.25
    max_dist: float = 0.02
    name: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1 or not 0 < self.fraction <= 1 or not 0 <= self.max_dist <= 1:
            raise UsageError(
                f"GuidedIG: n_steps={self.n_steps} must be positive, fraction={self.fraction} in (0, 1], "
                f"max_dist={self.max_dist} in [0, 1]"
            )

    def passes(self, objective: Objective) -> int:
        """The ends of all steps on each target's own path; a forward pass each more for non-linear targets."""
        k = objective.n_targets
        return k * (self.n_steps + 1) * len(objective.windows) * (1 if objective.linear else 2)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        baseline = baseline_for(self.baseline)
        x0 = baseline.draw(objective, objective.generator())
        own = torch.arange(objective.n_targets)
        points = x0.expand(objective.n_targets, *x0.shape).clone()
        maps = objective.new_maps()
        here = objective.gradient(points)
        start = here.values[own, own]
        for step in range(self.n_steps):
            gradients = here.maps[own, own]
            moved = torch.stack(
                [
                    self._move(point, x0, objective.image, g, (step + 1) / self.n_steps)
                    for point, g in zip(points, gradients)
                ]
            )
            here = objective.gradient(moved)
            maps += (gradients + here.maps[own, own]) / 2 * (moved - points)
            points = moved
        gap = relative_gap(maps, here.values[own, own], start)
        return Explained(maps, {"completeness_gap": gap, "steps": self.n_steps, **describe_baseline(baseline, start)})

    def _move(self, point: Tensor, x0: Tensor, x1: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """The next point of the path, at a share ``1 − alpha`` of the whole L1 distance from the image."""
        if alpha == 1:
            return x1.clone()
        low = torch.lerp(x0, x1, max(alpha - self.max_dist, 0.0))
        high = torch.lerp(x0, x1, min(alpha + self.max_dist, 1.0))
        point = torch.where((x1 - point).abs() > (x1 - low).abs(), low, point)  # too far behind: to the band's edge
        steepness = gradient.abs().masked_fill((x1 - point).abs() <= (x1 - high).abs(), math.inf)
        missing = float((x1 - point).abs().sum(dtype=torch.float64))
        missing -= (1 - alpha) * float((x1 - x0).abs().sum(dtype=torch.float64))
        flat = steepness.flatten()
        rank = max(1, math.ceil(self.fraction * flat.numel()))
        while missing > 0:
            threshold = flat.kthvalue(min(rank, flat.numel())).values
            calm = (steepness <= threshold) & steepness.isfinite()
            way = (high - point) * calm
            room = float(way.abs().sum(dtype=torch.float64))
            if room >= missing or bool(threshold.isinf()):
                return point + way * min(1.0, missing / room) if room else point
            point = torch.where(calm, high, point)
            steepness = steepness.masked_fill(calm, math.inf)
            flat = steepness.flatten()
            missing -= room
        return point
