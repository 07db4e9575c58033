"""Integrals of the gradient along a path from a baseline to the image."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for, choice_passes, describe_baseline
from esegeta_monai.engine.batch import Gradient
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method, completeness

__all__ = ["IntegratedGradients", "quadrature"]

Rule = Literal["gausslegendre", "riemann_trapezoid", "riemann_middle", "riemann_left", "riemann_right"]


class IntegratedGradients(Method):
    """``a = (x − x₀) · ∫₀¹ ∂F/∂x(x₀ + α (x − x₀)) dα`` (Sundararajan et al. 2017).

    Complete: the sum of the map is ``F(x) − F(x₀)`` up to the quadrature error, which is recorded.

    Args:
        baseline: x₀, see `esegeta_monai.engine.baselines`; ``"auto"`` avoids zero where a norm layer would
            make the integral over the path zero.
        n_steps: gradients evaluated with a fixed rule.
        method: the quadrature rule, in Captum's names.
        tolerance: if given, the path is divided into segments, and the segment of greatest error (known, since the
            integral over a segment is the difference of F at its ends) is bisected, reusing all samples, until the
            relative completeness gap is at most ``tolerance`` or ``max_steps`` gradients are used. Errors that cancel
            do not count: the root of the sum of their squares must be as small.
        max_steps: the greatest number of gradients with ``tolerance``.
        multiply_by_inputs: False: the mean gradient on the path, without the factor ``x − x₀``, as in Captum; it is no
            share of a sum.

    Memory: two maps per target for fixed steps, ``SEGMENTS + 2`` with ``tolerance``, for any number of steps.

    Example:
        >>> IntegratedGradients(tolerance=1e-3, baseline="blur(sigma=4)").parameters["n_steps"]
        32
    """

    map_check = "path"
    reference = "Sundararajan et al., ICML 2017, arXiv:1703.01365"
    produces = "input map"
    additive = True
    reads_image_value = True
    gap_advice = (
        "take more steps (tolerance=1e-3), or another baseline: under instance, group or layer norm the "
        "gradient on a path from zero is zero"
    )

    baseline: Any = "auto"
    n_steps: int = 32
    method: Rule = "gausslegendre"
    tolerance: float | None = None
    max_steps: int = 1024
    multiply_by_inputs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        of_factor(self)
        check_steps(self.n_steps)
        if self.tolerance is not None and (self.tolerance <= 0 or self.max_steps <= SEGMENTS):
            raise UsageError(f"tolerance={self.tolerance} must be positive, and max_steps more than {SEGMENTS}")
        quadrature(self.method, 1)

    @property
    def units(self) -> str:
        return "target per voxel" if self.multiply_by_inputs else "target per unit of image intensity"

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        baseline = baseline_for(self.baseline)
        x, x0 = objective.image, baseline.draw(objective, objective.generator())
        dx = x - x0
        if self.tolerance is None:
            ends = torch.stack([objective.value(x0[None])[:, 0], objective.image_values()], 1)
            maps = self._fixed(objective, x0, dx)
            steps = self.n_steps
        else:
            maps, ends, steps = _adaptive(objective, x0, dx, self.tolerance, self.max_steps)
        shares = maps.mul_(dx) if self.multiply_by_inputs else maps * dx
        sums = completeness(shares, ends[:, 1] - ends[:, 0])
        notes = {**sums, "steps": steps, **describe_baseline(baseline, ends[:, 0])}
        return Explained(maps, notes)

    @property
    def passes_data_dependent(self) -> bool:
        return self.tolerance is not None

    def passes(self, objective: Objective) -> int:
        """Count the gradients, ``max_steps`` with ``tolerance``, and a forward pass for each if the target is
        non-linear."""
        each = 1 if objective.linear else 2
        points = 1 + self.n_steps * each if self.tolerance is None else self.max_steps * each
        return points * len(objective.windows) + choice_passes(self.baseline, objective)

    def _fixed(self, objective: Objective, x0: Tensor, dx: Tensor) -> Tensor:
        nodes, weights = quadrature(self.method, self.n_steps)
        maps = objective.new_maps()
        own = objective.linear  # otherwise each step begins with a prediction, which needs all processes
        with objective.context.processes.summed([maps]) if own else nullcontext():
            for part, gradient in gradients_on_path(objective, x0, dx, nodes, own=own):
                for j, alpha in enumerate(part):
                    maps.add_(gradient.maps[:, j], alpha=weights[alpha])
                del gradient  # frees its memory before the next one is computed
        return maps


def of_factor(method: Any) -> None:
    """Make a path method without the factor ``x − x₀`` not additive: its map is a mean gradient, no share of a sum."""
    if not method.multiply_by_inputs:
        method.additive = False


def check_steps(n_steps: int) -> None:
    """Check that there is at least one step.

    Raises:
        UsageError: ``n_steps`` is below 1.
    """
    if n_steps < 1:
        raise UsageError(f"n_steps={n_steps}: at least one step is needed")


SEGMENTS = 8


@dataclass
class _Segment:
    """A part [a, b] of the path: its trapezoid map, and the integral (k,) that the map times dx should sum to."""

    a: float
    b: float
    intervals: int
    map: Tensor
    integral: Tensor

    def middles(self) -> list[float]:
        """Return the nodes that halve the intervals."""
        h = (self.b - self.a) / self.intervals
        return [self.a + (j + 0.5) * h for j in range(self.intervals)]

    def error(self, dx: Tensor) -> Tensor:
        """Return the difference between the map's sum and the known integral (k,), float64."""
        return (self.map * dx).flatten(1).sum(1, dtype=torch.float64).cpu() - self.integral


def _adaptive(
    objective: Objective, x0: Tensor, dx: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, int]:
    """Integrate by a nested trapezoid rule with local bisection.

    Returns:
        Mean gradients (k, C, *spatial), F at both ends (k, 2), and the number of gradients.
    """
    edges = [j / SEGMENTS for j in range(SEGMENTS + 1)]
    segments: list[_Segment] = []
    before: tuple[Tensor, Tensor] | None = None
    for part, gradient in gradients_on_path(objective, x0, dx, edges):
        for j, alpha in enumerate(part):
            here, value = gradient.maps[:, j], gradient.values[:, j]
            if before is None:
                first = value
            else:
                trapezoid = 0.5 / SEGMENTS * (before[0] + here)
                segments.append(_Segment(alpha - 1 / SEGMENTS, alpha, 1, trapezoid, value - before[1]))
            before = here, value
    assert before is not None
    ends = torch.stack([first, before[1]], 1)
    scale = (ends[:, 1] - ends[:, 0]).abs().clamp(min=torch.finfo(ends.dtype).tiny)
    steps = len(edges)
    errors = torch.stack([s.error(dx) for s in segments])  # signed, (segments, k)

    while not _within(errors / scale, tolerance):
        worst = int((errors.abs() / scale).amax(1).argmax())
        segment = segments[worst]
        middles = segment.middles()
        if steps + len(middles) > max_steps:
            if bool((errors.sum(0).abs() / scale > tolerance).any()):
                objective.context.progress.warn(
                    f"the completeness gap is above tolerance={tolerance:g} after {steps} steps (max_steps={max_steps})"
                )
            break
        segment.map /= 2
        for part, gradient in gradients_on_path(objective, x0, dx, middles):
            for j in range(len(part)):
                segment.map += (segment.b - segment.a) / (2 * segment.intervals) * gradient.maps[:, j]
        segment.intervals *= 2
        steps += len(middles)
        errors[worst] = segment.error(dx)
    maps = segments[0].map
    for segment in segments[1:]:
        maps += segment.map
    return maps, ends, steps


def _within(errors: Tensor, tolerance: float) -> bool:
    """True if the segments' relative errors (segments, k) are small, in sum and without cancelling."""
    return float(torch.maximum(errors.sum(0).abs(), errors.square().sum(0).sqrt()).max()) <= tolerance


def gradients_on_path(
    objective: Objective, x0: Tensor, dx: Tensor, nodes: list[float], *, own: bool = False
) -> Iterator[tuple[list[float], Gradient]]:
    """Yield gradients at ``x₀ + α dx`` for the α in ``nodes``, as many at a time as fill a window batch.

    Args:
        x0, dx: (C, *spatial).
        own: True: yield only this process's part of each, see `Objective.gradient`.
    """
    size = max(1, objective.window_batch // max(1, len(objective.windows)))
    points = x0.new_empty((min(size, len(nodes)), *x0.shape))
    for turn, start in enumerate(range(0, len(nodes), size)):
        part = nodes[start : start + size]
        for point, alpha in zip(points, part):
            torch.add(x0, dx, alpha=alpha, out=point)
        yield part, objective.gradient(points[: len(part)], turn if own else None)


def quadrature(rule: str, n: int) -> tuple[list[float], dict[float, float]]:
    """Return nodes on [0, 1] and the weight of each node.

    >>> nodes, weights = quadrature("riemann_middle", 2)
    >>> nodes, sum(weights.values())
    ([0.25, 0.75], 1.0)
    """
    if rule == "gausslegendre":
        x, w = np.polynomial.legendre.leggauss(n)
        nodes, weights = (x + 1) / 2, w / 2
    elif rule == "riemann_trapezoid":
        nodes, weights = np.linspace(0, 1, max(n, 2)), np.full(max(n, 2), 1 / (max(n, 2) - 1))
        weights[[0, -1]] /= 2
    elif rule in ("riemann_middle", "riemann_left", "riemann_right"):
        shift = {"riemann_middle": 0.5, "riemann_left": 0.0, "riemann_right": 1.0}[rule]
        nodes, weights = (np.arange(n) + shift) / n, np.full(n, 1 / n)
    else:
        raise UsageError(f"method={rule!r}: give gausslegendre or riemann_trapezoid, _middle, _left, _right")
    return [float(a) for a in nodes], {float(a): float(b) for a, b in zip(nodes, weights)}
