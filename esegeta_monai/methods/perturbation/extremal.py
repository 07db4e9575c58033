"""Extremal perturbations: the mask of a given area that preserves, or deletes, the target most."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.plan import Slices
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.synthesis.backends import flat_only, torchray_masks
from esegeta_monai.utils.registry import json_ready

__all__ = ["ExtremalPerturbation", "SmoothMask"]


class ExtremalPerturbation(Method):
    """The smooth mask m of area a that maximises ``F(x₀ + m (x − x₀))`` (Fong et al. 2019), in 2D and 3D.

    ``max over m of ±F(x')/|F(x) − F(x₀)| − λ mean (sort(m) − r_a)²``, r_a being 1 for the greatest share a of the cells
    and 0 for the others; λ grows from 1 to 1000 during optimisation by Adam. m comes from a coarse grid by a smooth
    maximum of Gaussians and linear interpolation; at the end it is raised to the power that makes its mean a. The area
    is a share of the box of windows that the target sees, and so is the mask: voxels outside cannot matter. Memory is
    that of one window batch, a map and the volume.

    ``"delete"`` starts from the share a of cells where F rises most with m at the image itself; ``"preserve"``, as the
    paper's code, from 0.5 everywhere. Networks are not trained on such blends of image and x₀, nor on images reduced to
    a share a: on ``brain_lesion_classification`` these score higher than the image, and the mask may converge
    anywhere. ``"delete"`` changes only a share a, and is the variant to trust unless x₀ is a plausible image.

    Args:
        areas: one or several shares in (0, 1); with several, the map is the mean of the masks.
        variant: ``"preserve"``: the region that suffices; ``"delete"``: the region without which F drops most.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
        n_iter: gradients per area.
        step: voxels per cell of the coarse grid; None: a twelfth of the shortest side of the box, at least 1.
        sigma: width of the Gaussians in voxels; None: ``step``.
        lr: learning rate of Adam.
        backend: ``"native"``, or ``"torchray"`` (2D, where TorchRay is installed): its masks and optimisation, with
            ``baseline`` ``"blur"`` or ``"zero"``, for the same F.

    The record has per area the area reached, F with the mask preserved and with it deleted, and these as shares of
    ``F(x) − F(x₀)``.

    Example:
        >>> ExtremalPerturbation(areas=(0.05, 0.1)).parameters["variant"]
        'delete'
    """

    reference = "Fong, Patrick & Vedaldi, ICCV 2019, arXiv:1910.08485"
    produces = "input map"
    additive = False
    full_precision = True  # rounding errors accumulate over iterations

    areas: float | Sequence[float] = 0.1
    variant: Literal["preserve", "delete"] = "delete"
    baseline: Any = "blur"
    n_iter: int = 200
    step: int | None = None
    sigma: float | None = None
    lr: float = 0.05
    backend: Literal["native", "torchray"] = "native"

    def __post_init__(self) -> None:
        super().__post_init__()
        areas = self._areas()
        if not areas or any(not 0 < a < 1 for a in areas):
            raise UsageError(f"areas={self.areas}: give shares between 0 and 1")
        if self.n_iter < 1 or self.lr <= 0:
            raise UsageError(f"n_iter={self.n_iter}, lr={self.lr}: both must be positive")
        if (self.step is not None and self.step < 1) or (self.sigma is not None and not self.sigma > 0):
            raise UsageError(f"step={self.step}, sigma={self.sigma}: give voxels, at least 1 and above 0, or None")
        if self.backend == "torchray" and self.baseline not in ("blur", "zero"):
            raise UsageError(f"backend='torchray' has baseline 'blur' or 'zero', not {self.baseline!r}")
        if self.backend == "torchray" and self.step is not None and self.step % 2 == 0:
            raise UsageError(f"step={self.step}: backend='torchray' builds its masks with an odd step only")

    @property
    def signed(self) -> bool:
        return False

    @property
    def units(self) -> str:
        return "mask: 1 where the image is kept" if self.variant == "preserve" else "mask: 1 where it is deleted"

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        if self.backend == "torchray":
            flat_only(self.backend, objective.image.shape)
        baseline = baseline_for(self.baseline)
        x0 = baseline.draw(objective, objective.generator())
        maps = objective.new_maps(1)
        areas: list[list[dict[str, float]]] = [[] for _ in maps]
        for k in range(objective.n_targets):
            game = _Single(objective.derive(scores=[objective.scores[k]]), x0)
            for area in self._areas():
                mask, notes = self._mask(game, area)
                maps[k][game.inside] += mask / len(self._areas())
                areas[k].append(notes)
        return Explained(maps, {"areas_found": areas, "baseline": json_ready(baseline.record())})

    def passes(self, objective: Objective) -> int:
        """Count a gradient per iteration, one at the start of deletion (and a forward pass for each if a target is
        non-linear), three values, and F(image) where the prediction was made in another precision."""
        gradients = self.n_iter * len(self._areas()) + (self.backend == "native" and self.variant == "delete")
        passes = gradients * (1 if objective.linear else 2) + 2 * len(self._areas()) + 1 + objective.recompute_value
        return sum(len(s) for s in objective.score_windows) * passes

    def _areas(self) -> list[float]:
        return [float(a) for a in (self.areas if isinstance(self.areas, Sequence) else [self.areas])]

    def _mask(self, game: _Single, area: float) -> tuple[Tensor, dict[str, float]]:
        """Return the mask (*box) of one area, and its notes."""
        if self.backend == "torchray":
            return self._described(game, area, self._peer_mask(game, area))
        smooth = SmoothMask(game.shape, self.step, self.sigma)
        cells = math.prod(smooth.grid)
        if not 0 < round(area * cells) < cells:
            raise UsageError(
                f"areas: {area:g} of a mask of {cells} cells is none or all of them: take another area, or a smaller "
                "step"
            )
        parameters = self._start(game, smooth, area).requires_grad_(True)
        optimizer = torch.optim.Adam([parameters], lr=self.lr)
        keeps = self.variant == "preserve"
        for i in range(self.n_iter):
            with torch.enable_grad():
                coarse = smooth.coarse(parameters)
                mask = smooth.fine(coarse)
                weight = WEIGHT * FACTOR ** (i / self.n_iter)
                constraint = weight * _area_error(coarse, area)
            # the sign of the goal and that of d x'/d m change together: the loss has the slope −∂F/∂m in both variants
            slope = -game.slope(mask.detach() if keeps else 1 - mask.detach())
            ones = torch.ones_like(constraint)
            (parameters.grad,) = torch.autograd.grad([mask, constraint], parameters, [slope, ones])
            optimizer.step()
            with torch.no_grad():
                parameters.clamp_(0, 1)
        with torch.no_grad():
            mask = _of_area(smooth.fine(smooth.coarse(parameters)), area)
        return self._described(game, area, mask)

    def _start(self, game: _Single, smooth: SmoothMask, area: float) -> Tensor:
        """Return the start: 0.5 everywhere; for deletion only in the share ``area`` of cells where F rises most with
        m."""
        even = torch.full(smooth.grid, 0.5, dtype=game.dx.dtype, device=game.dx.device, requires_grad=True)
        if self.variant == "preserve":
            return even.detach()
        with torch.enable_grad():
            mask = smooth.fine(smooth.coarse(even))
        (slope,) = torch.autograd.grad(mask, even, game.slope_at_image)
        start = torch.zeros(even.numel(), dtype=even.dtype, device=even.device)
        start[slope.flatten().topk(math.ceil(area * even.numel())).indices] = 0.5
        return start.reshape(even.shape)

    def _peer_mask(self, game: _Single, area: float) -> Tensor:
        """Return TorchRay's mask, optimised for the whole image. F is the mean over the target's voxels, since
        TorchRay's weight of the area is chosen for one logit."""
        (score,) = game.objective.scores
        voxels = 1 if getattr(score, "reduction", "sum") == "mean" else score.voxels

        def climb(image: Tensor) -> tuple[float, Tensor]:
            gradient = game.objective.gradient(image.detach().to(game.x0)[None])
            return float(gradient.values[0, 0]) / voxels, gradient.maps[0, 0] / voxels

        given = {"step": self.step, "sigma": self.sigma}
        options = {name: value for name, value in given.items() if value is not None}
        image, blurred = game.objective.image, self.baseline == "blur"
        (mask,) = torchray_masks(
            image, climb, [area], self.variant, self.n_iter, blurred, game.objective.seed, **options
        )
        return mask[game.box]

    def _described(self, game: _Single, area: float, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
        kept, without = game.value(mask), game.value(1 - mask)
        values = {"value_kept": kept, "value_without": without}
        shares = {"kept": game.share(kept), "left_without": game.share(without)}
        return mask, {"area": area, "area_reached": float(mask.mean()), **values, **shares}


WEIGHT, FACTOR = 1.0, 1000.0
"""Weight of the area constraint at the start, small so that the target determines the region, and the factor by which
it has grown at the end, large so that the area is reached."""


class _Single:
    """One target at blends of x₀ and x by a mask on the box of the windows that it sees."""

    def __init__(self, objective: Objective, x0: Tensor) -> None:
        self.objective, self.x0, self.dx = objective, x0, objective.image - x0
        places = [objective.plan.place(w) for w in objective.windows]
        self.box: Slices = tuple(
            slice(min(p[axis].start for p in places), max(p[axis].stop for p in places)) for axis in range(x0.ndim - 1)
        )
        self.inside: tuple[Any, ...] = (slice(None), *self.box)
        self.shape = tuple(b.stop - b.start for b in self.box)
        self.start = float(objective.value(x0[None])[0, 0])
        self.rise = float(objective.image_values()[0]) - self.start
        if self.rise == 0:
            raise MethodError("F is the same at the baseline and at the image: choose another baseline")
        if self.rise < 0:
            objective.context.progress.warn(
                "the baseline scores higher than the image, so that hardly any region can be kept or deleted: choose "
                "another baseline",
                objective.scores[0].label,
            )

    def image(self, mask: Tensor) -> Tensor:
        """Compute ``x₀ + m (x − x₀)`` (C, *spatial) for a mask m (*box)."""
        x = self.x0.clone()
        x[self.inside] += mask * self.dx[self.inside]
        return x

    def slope(self, mask: Tensor) -> Tensor:
        """Compute ``∂F/∂m / |F(x) − F(x₀)|`` (*box)."""
        gradient = self.objective.gradient(self.image(mask)[None]).maps[0, 0]
        return (gradient[self.inside] * self.dx[self.inside]).sum(0) / abs(self.rise)

    @functools.cached_property
    def slope_at_image(self) -> Tensor:
        """Compute `slope` (*box) for a mask of ones."""
        return self.slope(self.x0.new_ones(self.shape))

    def value(self, mask: Tensor) -> float:
        """``F(x')``."""
        return float(self.objective.value(self.image(mask)[None])[0, 0])

    def share(self, value: float) -> float:
        """Compute ``(F − F(x₀)) / (F(x) − F(x₀))``."""
        return (value - self.start) / self.rise


class SmoothMask:
    """Masks from few parameters: a smooth maximum of Gaussian bumps on a coarse grid, interpolated linearly.

    ``m(u) = smax_v k(u − v) p(v)``, ``k(d) = exp(−|d|²/2σ²)`` up to 2σ, ``smax a = Σ a e^{Ta} / Σ e^{Ta}``, T = 20.

    Args:
        shape: spatial shape of the mask.
        step: voxels per cell; None: a twelfth of the shortest side.
        sigma: width of a bump in voxels; None: ``step``.
    """

    temperature = 20.0

    def __init__(self, shape: Sequence[int], step: int | None = None, sigma: float | None = None) -> None:
        self.shape = tuple(shape)
        step = step or max(1, min((n for n in shape if n > 1), default=1) // 12)
        self.grid = tuple(math.ceil(n / step) for n in shape)
        sigma = (sigma or step) / step
        self.radius = math.ceil(2 * sigma)
        near = range(-self.radius, self.radius + 1)
        offsets = [o for o in itertools.product(near, repeat=len(self.grid)) if math.hypot(*o) <= 2 * sigma]
        self.bumps = [(o, math.exp(-sum(d * d for d in o) / (2 * sigma**2))) for o in offsets]

    def coarse(self, parameters: Tensor) -> Tensor:
        """Compute the mask on the coarse grid from parameters of the same shape."""
        padded = F.pad(parameters, (self.radius,) * (2 * parameters.ndim))
        values = []
        for offset, height in self.bumps:
            place = tuple(slice(self.radius + o, self.radius + o + n) for o, n in zip(offset, self.grid))
            values.append(height * padded[place])
        stacked = torch.stack(values)
        return (stacked * torch.softmax(self.temperature * stacked, 0)).sum(0)

    def fine(self, coarse: Tensor) -> Tensor:
        """Interpolate a coarse mask to the mask (*shape)."""
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(self.shape)]
        return F.interpolate(coarse[None, None], self.shape, mode=mode, align_corners=False)[0, 0]


def _area_error(mask: Tensor, area: float) -> Tensor:
    """Return ``mean (sort(m) − r_a)²``: zero where exactly a share ``area`` of the mask is 1 and the rest 0."""
    ordered = mask.flatten().sort().values
    wanted = torch.zeros_like(ordered)
    wanted[len(ordered) - round(area * len(ordered)) :] = 1
    return (ordered - wanted).square().mean()


def _of_area(mask: Tensor, area: float) -> Tensor:
    """Return the power of a mask, between its 16th root and 16th power, whose mean is nearest to ``area``."""
    low, high = -4.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float((mask**2**middle).mean()) > area else (low, middle)
    return mask**2 ** ((low + high) / 2)
