"""Integrated gradients along curved paths: through scale space, and along voxels of small gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for, choice_passes, describe_baseline, gaussian_blur
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, Method, completeness
from esegeta_monai.utils.tensors import all_finite

__all__ = ["BlurIG", "GuidedIG"]


class BlurIG(Method):
    """``a = ∫ ∂F/∂x(L(x, σ)) · dL/dσ dσ`` from σ to 0, L(x, σ) the image blurred by a Gaussian (Xu et al. 2020).

    The path needs no baseline: it begins at an image without details. Complete: the sum of the map is
    ``F(x) − F(L(x, σ))``, up to the error of the trapezoid rule, which the record states.

    Args:
        sigma: where the path begins, in voxels; None: a quarter of the shortest window side.
        n_steps: segments of the path, equal in σ.
        tolerance: if given, segments are bisected repeatedly while their error (known, since F at their ends is known)
            exceeds ``tolerance / n_steps`` of ``F(x) − F(L(x, σ))``.
        max_steps: the greatest number of gradients with ``tolerance``.

    Example:
        >>> BlurIG(sigma=4, n_steps=20).parameters
        {'sigma': 4, 'n_steps': 20}
    """

    reference = "Xu et al., CVPR 2020, arXiv:2004.03383"
    produces = "input map"
    additive = True
    units = "target per voxel"
    reads_image_value = True
    gap_advice = "take more steps, or give tolerance=1e-3"

    sigma: float | None = None
    n_steps: int = 32
    tolerance: float | None = None
    max_steps: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1 or (self.sigma is not None and self.sigma <= 0):
            raise UsageError(f"BlurIG: n_steps={self.n_steps} and sigma={self.sigma} must be positive")
        _check_tolerance(self.tolerance, self.max_steps, self.n_steps)

    @property
    def passes_data_dependent(self) -> bool:
        return self.tolerance is not None

    def passes(self, objective: Objective) -> int:
        """Count the ends of all segments, ``max_steps`` with ``tolerance``, and a forward pass for each if a target is
        non-linear."""
        points = self.n_steps + 1 if self.tolerance is None else self.max_steps
        return points * len(objective.windows) * (1 if objective.linear else 2)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        sigma = self.sigma or min(r for r in objective.plan.roi if r > 1) / 4

        def at(share: float) -> Tensor:
            return gaussian_blur(objective.image, sigma * (1 - share)) if share < 1 else objective.image

        maps = objective.new_maps()
        here = start = _point(objective, at(0.0))
        path = _Bisected(objective, self.tolerance, self.max_steps, self.n_steps)
        path.change = objective.image_values().cpu() - start.values
        for step in range(self.n_steps):
            there = _point(objective, at((step + 1) / self.n_steps))
            maps += path.segment(at, step / self.n_steps, here, (step + 1) / self.n_steps, there)
            here = there
        path.warn()
        notes = {"sigma_voxels": sigma, "steps": path.steps, "baseline_value": [float(v) for v in start.values]}
        return Explained(maps, {**completeness(maps, here.values - start.values), **notes})


class GuidedIG(Method):
    """Integrated gradients along a path that first moves the voxels of smallest gradient, within a band around the
    straight path (Kapishnikov et al. 2021), so that the map collects less noise from regions of large gradient.

    At step α the L1 distance to the image is ``(1 − α) |x − x₀|₁``; the share of its way that each voxel has moved
    stays within ``α ± max_dist``. Each target has its own path. Gradients at the ends of each step are averaged.
    Complete up to the error of that rule, which is recorded.

    Moving voxels of small gradient first leads along the kinks of ReLU, so the error of that rule does not vanish with
    more steps (1.4 % after 1024 on a small ReLU network), but it does with ``tolerance``.

    Args:
        baseline: x₀, see `esegeta_monai.engine.baselines`.
        n_steps: steps.
        fraction: share of the voxels that are moved at a time.
        max_dist: half the width of the band; 0 is the straight path.
        tolerance: if given, the path stays the same, and steps are bisected repeatedly while their error (known, since
            F at their ends is known) exceeds ``tolerance / n_steps`` of ``F(x) − F(x₀)``.
        max_steps: the greatest number of gradients with ``tolerance``.
    """

    reference = "Kapishnikov et al., CVPR 2021, arXiv:2106.09788"
    produces = "input map"
    additive = True
    units = "target per voxel"
    reads_image_value = True
    gap_advice = "take more steps, or give tolerance=1e-3"

    baseline: Any = "auto"
    n_steps: int = 64
    fraction: float = 0.25
    max_dist: float = 0.02
    tolerance: float | None = None
    max_steps: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_steps < 1 or not 0 < self.fraction <= 1 or not 0 <= self.max_dist <= 1:
            raise UsageError(
                f"GuidedIG: n_steps={self.n_steps} must be positive, fraction={self.fraction} in (0, 1], "
                f"max_dist={self.max_dist} in [0, 1]"
            )
        _check_tolerance(self.tolerance, self.max_steps, self.n_steps)

    @property
    def passes_data_dependent(self) -> bool:
        return self.tolerance is not None

    def passes(self, objective: Objective) -> int:
        """Count the ends of all steps on each target's own path, ``max_steps`` with ``tolerance``, and a forward pass
        for each if the target is non-linear."""
        points = self.n_steps + 1 if self.tolerance is None else self.max_steps
        each = len(objective.windows) * (1 if objective.linear else 2)
        return objective.n_targets * points * each + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        baseline = baseline_for(self.baseline)
        x0 = baseline.draw(objective, objective.generator())
        own = torch.arange(objective.n_targets)
        points = x0.expand(objective.n_targets, *x0.shape).clone()
        maps = objective.new_maps()
        here = objective.gradient(points)
        start = here.values[own, own]
        paths = [_Bisected(objective, self.tolerance, self.max_steps, self.n_steps, k) for k in range(len(maps))]
        for path, change in zip(paths, objective.image_values().cpu() - start):
            path.change = change[None]
        for step in range(self.n_steps):
            gradients, values = here.maps[own, own], here.values[own, own]
            if not all_finite(gradients):
                raise MethodError(
                    f"GuidedIG: the gradient is not finite at step {step} of {self.n_steps}, so the path cannot go on: "
                    "choose another baseline, such as baseline='blur(sigma=4)'"
                )
            moved = torch.stack(
                [
                    self._move(point, x0, objective.image, g, (step + 1) / self.n_steps)
                    for point, g in zip(points, gradients)
                ]
            )
            here = objective.gradient(moved)
            for k, path in enumerate(paths):
                ends = [
                    _Point(points[k], gradients[k : k + 1], values[k : k + 1]),
                    _Point(moved[k], here.maps[k, k][None], here.values[k, k][None]),
                ]
                maps[k] += path.segment(_line(points[k], moved[k]), 0.0, ends[0], 1.0, ends[1])[0]
            points = moved
        for path in paths:
            path.warn()
        sums = completeness(maps, here.values[own, own] - start)
        steps = [path.steps for path in paths]
        return Explained(maps, {**sums, "steps": steps, **describe_baseline(baseline, start)})

    def _move(self, point: Tensor, x0: Tensor, x1: Tensor, gradient: Tensor, alpha: float) -> Tensor:
        """Return the next point (C, *spatial) of the path, at a share ``1 − alpha`` of the L1 distance to the image."""
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
        for _ in range(math.ceil(flat.numel() / rank)):  # each round moves `rank` voxels or more to the band's edge
            if not missing > 0:
                break
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


@dataclass
class _Point:
    """A point (C, *spatial) of a path, with gradients (k, C, *spatial) and values (k,) there."""

    x: Tensor
    gradients: Tensor
    values: Tensor


def _point(objective: Objective, x: Tensor, target: int | None = None) -> _Point:
    gradient = objective.gradient(x[None])
    rows = slice(None) if target is None else slice(target, target + 1)
    return _Point(x, gradient.maps[rows, 0], gradient.values[rows, 0])


def _line(start: Tensor, end: Tensor) -> Callable[[float], Tensor]:
    return lambda share: torch.lerp(start, end, share)


def _check_tolerance(tolerance: float | None, max_steps: int, n_steps: int) -> None:
    if tolerance is not None and (tolerance <= 0 or max_steps <= n_steps):
        raise UsageError(
            f"tolerance={tolerance} must be positive, and max_steps={max_steps} more than n_steps={n_steps}"
        )


class _Bisected:
    """The trapezoid rule per segment, each bisected where its sum differs from the change of F.

    Each segment may use an equal share of the remaining gradients, so that early segments do not use all.

    Args:
        target: index of the target of this path; None: all.
    """

    def __init__(
        self, objective: Objective, tolerance: float | None, max_steps: int, n_steps: int, target: int | None = None
    ) -> None:
        self.objective, self.tolerance, self.target = objective, tolerance, target
        self.segments, self.left = n_steps, max_steps - n_steps - 1
        self.max_steps, self.steps = max_steps, n_steps + 1
        self.allowed = math.inf if tolerance is None else tolerance / n_steps
        self.change = torch.ones(1)
        self.missed = False

    def segment(self, at: Callable[[float], Tensor], a: float, start: _Point, b: float, end: _Point) -> Tensor:
        """Return the integral (k, C, *spatial) from ``at(a)`` to ``at(b)``, bisecting the worst part first."""
        parts = [(self._error(start, end), a, start, b, end)]
        share, self.segments = self.left // self.segments, self.segments - 1
        while share > 0 and (worst := max(parts, key=lambda p: p[0]))[0] > self.allowed:
            parts.remove(worst)
            _, low, first, high, last = worst
            middle = _point(self.objective, at((low + high) / 2), self.target)
            parts.append((self._error(first, middle), low, first, (low + high) / 2, middle))
            parts.append((self._error(middle, last), (low + high) / 2, middle, high, last))
            share, self.left, self.steps = share - 1, self.left - 1, self.steps + 1
        self.missed |= max(p[0] for p in parts) > self.allowed
        return torch.stack([_trapezoid(first, last) for _, _, first, _, last in parts]).sum(0)

    def _error(self, start: _Point, end: _Point) -> float:
        """Return the error of the trapezoid rule relative to F's change over the whole path."""
        if self.tolerance is None:
            return 0.0
        missed = _trapezoid(start, end).flatten(1).sum(1, dtype=torch.float64).cpu() - (end.values - start.values)
        return float((missed / self.change).abs().nan_to_num(0.0, math.inf).max())

    def warn(self) -> None:
        """Warn if ``max_steps`` was reached before ``tolerance``."""
        if self.missed:
            self.objective.context.progress.warn(
                f"some segments miss more than their part of tolerance={self.tolerance:g} after {self.steps} steps "
                f"(max_steps={self.max_steps})"
            )


def _trapezoid(start: _Point, end: _Point) -> Tensor:
    return (start.gradients + end.gradients) / 2 * (end.x - start.x)
