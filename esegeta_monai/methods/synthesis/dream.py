"""Images synthesised from the case: enhanced by a layer (DeepDream), or inverted from its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.score import WeightedScore
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.synthesis.canvas import (
    Canvas,
    intensity_range,
    layer_canvas,
    layer_model,
    layer_objective,
    read_channel,
    read_energy,
    weighted,
    window_of,
)
from esegeta_monai.methods.synthesis.parametrisation import per_channel
from esegeta_monai.methods.synthesis.visualization import (
    _Synthesis,
    check_steps,
    descend,
    described,
    for_targets,
    noise,
)
from esegeta_monai.utils.tensors import all_finite

__all__ = ["DeepDream", "InvertedRepresentation"]


class DeepDream(_Synthesis):
    """The case's image with the network's response to it amplified (Mordvintsev et al. 2015), in 2D and 3D, window by
    window over the whole image.

    From the image, ``x ← x + step · (high − low) · g / rms(g)``, g = ∂F/∂x, kept within the image's intensities; first
    on a smaller copy of the image, then, with the changes so far enlarged, on larger ones (octaves), so that patterns
    of several sizes appear. With ``layer`` F is ``mean A²``, with ``channel`` too ``mean A_c``, blended over windows
    and averaged over the image; otherwise F is the target under its frozen mask, which shrinks with the image.

    Args:
        layer: dotted name; None: the target.
        channel: channel of the layer; None: the whole layer.
        octaves: number of sizes of the image.
        octave_scale: factor between consecutive sizes; sizes below 8 voxels are left out.
        n_iter: steps per octave; 0 leaves the image unchanged.
        step: root mean square change of voxels per step, as a share of the intensity range.
        jitter: greatest random cyclic shift of the image in voxels before each step, against patterns of windows and
            strides; with ``layer`` only, since masks are not shifted.
        intensity: (low, high), or a pair for each channel; None: the image's extremes.
        min_rise: share of its start value by which the objective should rise; the record warns if it rises less.

    A copy smaller than the network's window is padded with its own edge. The record also has
    ``correlation_with_image`` and ``octave_shapes``.

    Example:
        >>> DeepDream("model.1", octaves=2).parameters["octave_scale"]
        1.4
    """

    reference = "Mordvintsev, Olah & Tyka, Google Research blog 2015, 'Inceptionism'"

    layer: str | None = None
    channel: int | None = None
    octaves: int = 3
    octave_scale: float = 1.4
    n_iter: int = 10
    step: float = 0.01
    jitter: int = 4
    intensity: Any = None
    min_rise: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is None and self.channel is not None:
            raise UsageError("channel needs a layer: also give layer=… ('esegeta-monai layers' lists them)")
        if self.octaves < 1 or self.octave_scale <= 1:
            raise UsageError(f"octaves={self.octaves}, octave_scale={self.octave_scale}: at least 1, and more than 1")
        if self.n_iter < 0 or self.jitter < 0:
            raise UsageError(f"n_iter={self.n_iter}, jitter={self.jitter}: neither can be negative")
        check_steps(1, step=self.step)

    @property
    def needs_voxels(self) -> bool:
        return self.layer is None

    @property
    def passes_data_dependent(self) -> bool:
        return True

    def passes(self, objective: Objective) -> int:
        """Return an upper bound: windows that the target's mask does not overlap are not run."""
        windows = [len(self._plan(objective, shape)) for shape in self._shapes(objective)]
        each = self.n_iter * (1 if self.layer is not None or objective.linear else 2)
        return (each * sum(windows) + 3 * windows[-1] + self.octaves) * (
            1 if self.layer is not None else objective.n_targets
        )

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        intensity = intensity_range(objective.image, self.intensity, (0, 100))
        layer = None if self.layer is None else check_layer(objective, self.layer)
        shapes, images, notes = self._shapes(objective), [], []
        for k in range(1 if layer is not None else objective.n_targets):
            canvases = [self._canvas(objective, k, layer, shape) for shape in shapes]
            image, curve = self._dream(canvases, intensity)
            images.append(image)
            note = described(canvases[-1], objective.image, image, curve, intensity, self.min_rise)
            note |= {"correlation_with_image": correlation(image, objective.image), "octave_shapes": shapes}
            notes.append(note)
        return for_targets(objective, images, notes, layer=layer, channel=self.channel)

    def _shapes(self, objective: Objective) -> list[list[int]]:
        """Return the octaves' shapes, smallest first. Axes that the network does not see keep their length."""
        plan, shapes = objective.plan, []
        for octave in reversed(range(self.octaves)):
            factor = self.octave_scale**octave
            fixed = [n == 1 or axis == plan.slice_axis for axis, n in enumerate(plan.spatial_shape)]
            shape = [n if keep else round(n / factor) for n, keep in zip(plan.spatial_shape, fixed)]
            if octave == 0 or all(n >= SMALLEST or keep for n, keep in zip(shape, fixed)):
                shapes.append(shape)
        return shapes

    def _plan(self, objective: Objective, shape: Sequence[int]) -> WindowPlan:
        plan = objective.plan
        return plan if tuple(shape) == plan.spatial_shape else plan.resized(shape)

    def _canvas(self, objective: Objective, k: int, layer: str | None, shape: Sequence[int]) -> Canvas:
        """Return one octave's objective, whose image is the case's at that size."""
        plan, image = self._plan(objective, shape), resize(objective.image, shape)
        place = tuple(slice(0, n) for n in plan.spatial_shape)
        if plan is not objective.plan and objective.condition is not None:
            raise MethodError("the network reads a condition volume, which has no smaller copy: use octaves=1")
        if layer is not None:
            read = read_energy if self.channel is None else read_channel(layer, self.channel)
            return Canvas(layer_objective(objective, layer, read, plan, image, objective.condition), place)
        score = objective.scores[k]
        if self.octaves == 1 and not isinstance(score, WeightedScore):
            return Canvas(objective.derive(scores=[score], prediction=None), place)
        over = weighted(score).over(_mask(objective, k, plan, shape))
        out_shape = objective.grid.shape if plan.whole or plan is objective.plan else shape
        return Canvas(
            objective.derive(scores=[over], prediction=None, plan=plan, image=image, out_shape=out_shape), place
        )

    def _dream(self, canvases: Sequence[Canvas], intensity: Tensor) -> tuple[Tensor, list[float]]:
        generator = canvases[-1].objective.generator()
        curve: list[float] = []
        x = detail = torch.zeros_like(canvases[0].image)
        for canvas in canvases:
            image = canvas.image
            low, high = (per_channel(intensity[:, i], image) for i in (0, 1))
            x = (image + resize(detail, image.shape[1:])).clamp(low, high)
            axes = [a for a in range(1, image.ndim) if image.shape[a] > 1]
            for _ in range(self.n_iter):
                jitter = self.jitter if self.layer is not None else 0
                shifts = torch.randint(-jitter, jitter + 1, (len(axes),), generator=generator).tolist()
                value, gradient = canvas.climb(x.roll(shifts, axes))
                gradient = gradient.roll([-s for s in shifts], axes)
                curve.append(value)
                felt = gradient[gradient != 0]
                if not len(felt):
                    canvas.objective.context.progress.warn(
                        "DeepDream: the gradient is zero everywhere, so nothing can be added"
                    )
                    break
                x = (x + self.step * (high - low) * gradient / felt.square().mean().sqrt()).clamp(low, high)
            detail = x - image
        return x, curve


SMALLEST = 8
"""Voxels along an axis of the smallest octave."""


class InvertedRepresentation(_Synthesis):
    """The image whose activations match the case's: ``min over x of |Φ(x) − Φ₀|²/|Φ₀|² + λ_α mean |r|^α + λ_TV mean
    |∇r|^β``, Φ₀ = Φ(case), ``r = (x − middle)/h`` in half ranges of intensity (Mahendran & Vedaldi 2015), in 2D and 3D.

    It shows which information about the case the layer retains. The window nearest to the image's middle among those
    that the target sees is inverted, by L-BFGS from seeded noise.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        alpha: α; large values penalise single extreme voxels.
        alpha_weight: λ_α.
        tv_weight: λ_TV, of the total variation; 0: none.
        beta: β of the total variation: 2 for smooth images, 1 for piecewise constant ones.
        n_iter: approximate number of gradients.
        intensity: (low, high), or a pair for each channel; None: 0.5th to 99.5th percentile of the case.
        max_share: share of the start distance above which the record warns about the final distance.

    The record has ``curve`` (the loss at each evaluation), ``distance_start``, ``distance_end`` (the first
    term), ``distance_share`` = end / start, ``correlation_with_image``, ``intensity_range`` and ``place``.

    Example:
        >>> InvertedRepresentation("model.0", tv_weight=0).parameters["alpha"]
        6.0
    """

    reference = "Mahendran & Vedaldi, CVPR 2015, arXiv:1412.0035"

    layer: str | None = None
    alpha: float = 6.0
    alpha_weight: float = 1e-3
    tv_weight: float = 1e-2
    beta: float = 2.0
    n_iter: int = 128
    intensity: Any = None
    max_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.n_iter, alpha=self.alpha, beta=self.beta, max_share=self.max_share)
        if self.alpha_weight < 0 or self.tv_weight < 0:
            raise UsageError(f"alpha_weight={self.alpha_weight}, tv_weight={self.tv_weight}: neither can be negative")

    @property
    def needs_voxels(self) -> bool:
        return self.layer is None  # the default layer depends on the target

    @property
    def passes_data_dependent(self) -> bool:
        return True

    def passes(self, objective: Objective) -> int:
        """Return an approximate count: the line search of the last step may need a few more gradients."""
        return self.n_iter + 4

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial), the same for every target."""
        layer = check_layer(objective, self.layer)
        intensity = intensity_range(objective.image, self.intensity)
        window = window_of(objective, objective.windows)
        read = _Distance(objective, layer, window)
        canvas = layer_canvas(objective, layer, read, "window", window=window)
        middle, half = (per_channel(v, canvas.image) for v in _middle_and_half(intensity))
        start = START_STD * noise(canvas.image, objective.generator())

        def loss(numbers: Tensor) -> tuple[float, Tensor]:
            with torch.enable_grad():
                penalty = self._penalty(numbers)
                (slope,) = torch.autograd.grad(penalty, numbers)
            value, gradient = canvas.climb(middle + half * numbers)
            return value + float(penalty.detach()), slope + half * gradient

        numbers, curve = descend(start, loss, self.n_iter)
        image = middle + half * numbers
        if not all_finite(image):
            raise MethodError("the image has values that are not finite: switch amp off, or choose another layer")
        begin, end = canvas.value(middle + half * start), canvas.value(image)
        if end > self.max_share * begin:
            objective.context.progress.warn(
                f"{layer}: the layer's distance to the case fell from {begin:.4g} to {end:.4g} only; a share of "
                f"{self.max_share:g} is required: use more steps (n_iter), or smaller weights"
            )
        notes = {
            "curve": curve,
            "distance_start": begin,
            "distance_end": end,
            "distance_share": end / begin if begin else None,
            "correlation_with_image": correlation(image, canvas.image),
            "intensity_range": intensity.tolist(),
            "place": [[p.start, p.stop] for p in canvas.place],
        }
        whole = canvas.on_image(image, intensity[:, 0], objective.plan.spatial_shape)
        return for_targets(objective, [whole], [notes], layer=layer)

    def _penalty(self, r: Tensor) -> Tensor:
        """Compute ``λ_α mean |r|^α + λ_TV mean |∇r|^β`` with forward differences inside the image."""
        total = self.alpha_weight * r.abs().pow(self.alpha).mean()
        if self.tv_weight:
            steps = torch.zeros_like(r)
            for axis in range(1, r.ndim):
                last = r.narrow(axis, r.shape[axis] - 1, 1)
                steps = steps + r.diff(dim=axis, append=last).square()
            total = total + self.tv_weight * steps.clamp(min=FLAT).pow(self.beta / 2).mean()
        return total


START_STD = 0.1
"""Standard deviation of the noise from which an inversion starts, in half ranges of intensity."""
FLAT = 1e-12
"""|∇r|² below which an image counts as flat, since its root has no gradient at zero."""


class _Distance:
    """``|Φ − Φ₀|²/|Φ₀|²`` at every position, so that no position counts more than another where the layer's grid does
    not divide the window's."""

    def __init__(self, objective: Objective, layer: str, window: int) -> None:
        kept: list[Tensor] = []

        def keep(values: Tensor) -> Tensor:
            kept.append(values)
            return values

        probe = objective.derive(model=layer_model(objective.model, layer, keep), grid=objective.grid)
        with torch.no_grad():
            probe.run(probe.window(window), [window], all_channels=True)
        self.reference = kept[0]
        self.energy = self.reference.square().sum(1).mean()
        if not bool(self.energy > 0):
            raise MethodError(f"layer {layer!r} is zero for the case, so there is nothing to invert: choose another")

    def __call__(self, values: Tensor) -> Tensor:
        far = (values - self.reference).square().sum(1, keepdim=True) / self.energy
        return far.flatten(1).mean(1).reshape(-1, *(1,) * (far.ndim - 1)).expand_as(far)


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Compute Pearson's correlation of two images (C, *spatial) over all entries; None if one is constant."""
    a, b = (v.flatten().double() - v.double().mean() for v in (a, b))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else None


def resize(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Resize (C, *spatial) to another grid: cell means where it shrinks, linear interpolation where it grows."""
    if tuple(image.shape[1:]) == tuple(shape):
        return image
    if all(n <= m for n, m in zip(shape, image.shape[1:])):
        return F.interpolate(image[None], tuple(shape), mode="area")[0]
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(shape)]
    return F.interpolate(image[None], tuple(shape), mode=mode, align_corners=False)[0]


def _mask(objective: Objective, k: int, plan: WindowPlan, shape: Sequence[int]) -> Tensor:
    """Return target k's mask on an octave's prediction: voxels that it covers by more than half, or the most."""
    score, grid = objective.scores[k], objective.grid
    whole = torch.zeros(grid.shape, dtype=torch.bool, device=objective.image.device)
    whole[score.box] = score.mask
    if plan is objective.plan or not grid.shape:
        return whole
    if grid.shape != objective.plan.spatial_shape:
        raise MethodError(f"the prediction {grid.shape} is on another grid than the image: use octaves=1")
    share = resize(whole[None].float(), shape)[0]
    small = share > 0.5 if bool((share > 0.5).any()) else share == share.max()
    if not plan.whole:
        return small
    return F.pad(small, [p for pair in reversed(plan.pads) for p in pair])


def _middle_and_half(intensity: Tensor) -> tuple[Tensor, Tensor]:
    return (intensity[:, 0] + intensity[:, 1]) / 2, (intensity[:, 1] - intensity[:, 0]) / 2
