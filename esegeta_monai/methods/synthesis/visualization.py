"""Images synthesised from noise that maximise a unit, a layer or a class."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for, choice_passes
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.synthesis.backends import lucent_visualization
from esegeta_monai.methods.synthesis.canvas import (
    Canvas,
    Extent,
    Neuron,
    class_canvas,
    intensity_range,
    layer_canvas,
    read_channel,
    read_energy,
)
from esegeta_monai.methods.synthesis.parametrisation import (
    Fourier,
    Phase,
    RandomView,
    Voxels,
    per_channel,
    squash,
)
from esegeta_monai.utils.tensors import all_finite

__all__ = ["ClassImage", "FeatureVisualization"]


class _Synthesis(Method):
    """Base class of methods that synthesise images.

    The image is on the case's grid. An image of one window is at the position of that window (``place`` in the record),
    surrounded by the lowest intensity. Without a case, give an image of zeros of the desired shape and ``intensity=``:
    the grid then has unit voxels (``network_affine`` in the record).

    The record has ``curve`` (the objective at each step), ``objective_start``, ``objective_end``, ``objective_image``
    (at the case), ``objective_rise`` = (end − start) / |start|, ``intensity_range``, ``place``, and a warning if the
    rise is less than ``min_rise``.
    """

    produces = "synthesised image"
    additive = False
    units = "intensity of the network's input"

    full_precision = True  # rounding errors accumulate over iterations

    @property
    def signed(self) -> bool:
        return False


class FeatureVisualization(_Synthesis):
    """The image that excites a class, a layer, a channel or a unit most: ``max over z of E_T[F(T(x(z)))]`` (Olah et
    al. 2017), in 2D and 3D, for any number of channels.

    T are random views (shifted, scaled, rotated), so that patterns must be robust to them; ``x(z) = low + (high − low)
    σ(z)`` stays within the network's input range; z is parametrised by frequencies or voxels and optimised by Adam.

    Without ``layer`` F is the mean over the canvas of the target's output (its logit or probability, of one class; a
    target of one voxel, such as `Voxel` or `LayerNeuron`, keeps its place); the case's content does not matter, so a
    target that is empty in it is permitted. With ``layer`` F is ``mean A²``, with ``channel`` too ``mean A_c``, and
    with ``neuron`` ``A_c`` at one place, whatever the target.

    Args:
        layer: dotted name; None: the target's class.
        channel: channel of the layer; None: the whole layer.
        neuron: a voxel of the canvas that selects the unit, or ``"centre"``; None: all units of the channel.
        parametrisation: ``"fourier"`` or ``"voxel"``, see `esegeta_monai.methods.synthesis.parametrisation`;
            ``"phase"`` (MaCo, Fel et al. 2023): the magnitudes of the spectrum are those of the case on the canvas, and
            only phases change. Its start has random phases. It is not kept within the intensities: the record has the
            share of voxels outside (``outside_intensity``).
        n_iter: steps, one gradient per step.
        lr: learning rate of Adam; about the root mean square change of z per step.
        jitter: greatest shift of the views in voxels.
        scale: least and greatest scale factor of the views.
        rotate: greatest rotation of the views in degrees, in each plane.
        decay: exponent of the Fourier spectrum; None: half the number of dimensions.
        intensity: (low, high), or a pair for each channel; None: 0.5th to 99.5th percentile of the case.
        extent: ``"window"``: one window; ``"image"``: the whole image, window by window.
        min_rise: share of its start value by which the objective should rise; the record warns if it rises less.
        backend: ``"native"``, or ``"lucent"`` (2D, where torch-lucent is installed), whose own parametrisation
            and transforms are used.

    Example:
        >>> FeatureVisualization("model.0", channel=3, n_iter=64).parameters["parametrisation"]
        'fourier'
    """

    reference = "Olah, Mordvintsev & Schubert, Distill 2017, doi:10.23915/distill.00007"
    aliases = ("LayerVisualization", "CNNLayerVisualization")

    layer: str | None = None
    channel: int | None = None
    neuron: Sequence[int] | Literal["centre"] | None = None
    parametrisation: Literal["fourier", "voxel", "phase"] = "fourier"
    n_iter: int = 128
    lr: float = 0.05
    jitter: int = 4
    scale: Sequence[float] = (0.95, 1.05)
    rotate: float = 5.0
    decay: float | None = None
    intensity: Any = None
    extent: Extent = "window"
    min_rise: float = 0.25
    backend: Literal["native", "lucent"] = "native"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is None and (self.channel is not None or self.neuron is not None):
            raise UsageError("channel and neuron need a layer: also give layer=… ('esegeta-monai layers' lists them)")
        if self.neuron is not None and self.channel is None:
            raise UsageError(f"neuron={self.neuron!r} needs a channel: also give channel=…")
        if self.parametrisation == "phase" and self.backend != "native":
            raise UsageError(f"parametrisation='phase' is not one of backend={self.backend!r}: omit the backend")
        check_steps(self.n_iter, lr=self.lr)
        self._view()

    @property
    def needs_voxels(self) -> bool:
        return False

    def passes(self, objective: Objective) -> int:
        """Count a gradient per step (and a forward pass for non-linear targets), one for the shape, three values."""
        windows = len(objective.plan) if self.extent == "image" else 1
        each = self.n_iter * (1 if self.layer is not None or objective.linear else 2) + 3
        return (each * windows + 1) * (1 if self.layer is not None else objective.n_targets)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        intensity = intensity_range(objective.image, self.intensity)
        if self.layer is None:
            canvases = [class_canvas(objective, k, self.extent) for k in range(objective.n_targets)]
        else:
            layer = check_layer(objective, self.layer)
            read: Callable[[Tensor], Tensor] = read_energy
            if self.channel is not None:
                read = read_channel(layer, self.channel)
            neuron: Neuron | None = self.neuron
            canvases = [layer_canvas(objective, layer, read, self.extent, neuron)]
        images, notes = [], []
        for canvas in canvases:
            if self.backend == "lucent":
                start, end, curve = lucent_visualization(
                    canvas, intensity, self.parametrisation, self.n_iter, self.lr, self.decay
                )
            else:
                start, end, curve = self._synthesise(canvas, intensity)
            images.append(canvas.on_image(end, intensity[:, 0], objective.plan.spatial_shape))
            note = described(canvas, start, end, curve, intensity, self.min_rise, FEWER_VIEWS)
            if self.parametrisation == "phase":
                low, high = (per_channel(intensity[:, i], end) for i in (0, 1))
                note["outside_intensity"] = float(((end < low) | (end > high)).double().mean())
            notes.append(note)
        return for_targets(objective, images, notes, layer=self.layer, channel=self.channel)

    def _view(self, spacing: tuple[float, ...] | None = None) -> RandomView:
        if len(tuple(self.scale)) != 2:
            raise UsageError(f"scale={self.scale}: give the smallest and the largest factor")
        return RandomView(self.jitter, (float(self.scale[0]), float(self.scale[1])), self.rotate, spacing)

    def _synthesise(self, canvas: Canvas, intensity: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        """Return the image at the start and at the end (C, *canvas), and F at each step."""
        image, generator = canvas.image, canvas.objective.generator()
        basis: Fourier | Phase | Voxels = Voxels()
        if self.parametrisation == "fourier":
            basis = Fourier(image.shape[1:], self.decay, image.dtype, image.device)
        view = self._view(_spacing(canvas.objective))
        spread = START_STD
        if self.parametrisation == "phase":
            basis, spread = Phase(image), math.pi  # phases are then nearly uniform

        def drawn() -> Tensor:
            values = basis.image(numbers)
            return values if self.parametrisation == "phase" else squash(values, intensity)

        numbers = noise(image, generator) * spread
        numbers.requires_grad_(True)
        optimizer = torch.optim.Adam([numbers], lr=self.lr)
        start = drawn().detach()
        curve = []
        for _ in range(self.n_iter):
            with torch.enable_grad():
                seen = drawn()
                if not view.idle:
                    seen = view.show(seen, view.draw(image.shape[1:], generator))
            value, gradient = canvas.climb(seen)
            (numbers.grad,) = torch.autograd.grad(seen, numbers, -gradient)
            optimizer.step()
            curve.append(value)
        return start, drawn().detach(), curve


FEWER_VIEWS = "take more steps (n_iter), or fewer views (jitter, scale, rotate)"
START_STD = 0.05
"""Standard deviation of z at the start: the image is nearly flat, in the middle of the intensities."""


class ClassImage(_Synthesis):
    """The image with the greatest class score for its norm: ``max over I of S(I) − λ mean ((I − I₀)/h)²`` (Simonyan
    et al. 2014), h half of each channel's range of intensities; in 2D and 3D, for any number of channels.

    S is the mean over the canvas of the target's output, as in `FeatureVisualization`; without views, and with
    the norm as the only prior. It is maximised by L-BFGS from seeded noise. Without ``regularization`` the image stays
    on the sphere of norm ``rms``, which corresponds to the λ that yields this norm; under instance, group or layer
    norm, where ``f(αx) = f(x)`` and any λ shrinks the image to zero, it is the only way.

    Args:
        regularization: λ; None: chosen through ``rms``.
        rms: root mean square of (I − I₀)/h, without ``regularization``.
        baseline: I₀, see `esegeta_monai.engine.baselines`.
        n_iter: approximate number of gradients.
        intensity, extent, min_rise: see `FeatureVisualization`.

    For a linear network ``S(I) = ⟨w, I⟩``, (I − I₀)/h is proportional to h·w; with λ it is N·h·w / 2λ, N values.

    Example:
        >>> ClassImage(regularization=10.0).parameters["rms"]
        0.5
    """

    reference = "Simonyan, Vedaldi & Zisserman, ICLR workshop 2014, arXiv:1312.6034"
    aliases = ("ClassSpecificImage",)

    regularization: float | None = None
    rms: float = 0.5
    baseline: Any = "mean"
    n_iter: int = 64
    intensity: Any = None
    extent: Extent = "window"
    min_rise: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.n_iter, rms=self.rms, regularization=1 if self.regularization is None else self.regularization)

    @property
    def needs_voxels(self) -> bool:
        return False

    @property
    def passes_data_dependent(self) -> bool:
        return True

    def passes(self, objective: Objective) -> int:
        """Return an approximate count: the line search of the last step may need a few more gradients."""
        windows = len(objective.plan) if self.extent == "image" else 1
        each = (self.n_iter * (1 if objective.linear else 2) + 3) * windows + 1
        return each * objective.n_targets + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        intensity = intensity_range(objective.image, self.intensity)
        origin = baseline_for(self.baseline).draw(objective, objective.generator())
        images, notes = [], []
        for k in range(objective.n_targets):
            canvas = class_canvas(objective, k, self.extent)
            there: tuple[slice, ...] = (slice(None), *canvas.place)
            start, end, curve = self._synthesise(canvas, intensity, origin[there])
            images.append(canvas.on_image(end, intensity[:, 0], objective.plan.spatial_shape))
            notes.append(described(canvas, start, end, curve, intensity, self.min_rise))
        return for_targets(objective, images, notes)

    def _synthesise(self, canvas: Canvas, intensity: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, list[float]]:
        half = per_channel((intensity[:, 1] - intensity[:, 0]) / 2, origin)
        numbers = noise(origin, canvas.objective.generator())
        numbers = numbers if self.regularization is None else numbers * START_STD

        def image(numbers: Tensor) -> Tensor:
            if self.regularization is None:
                numbers = self.rms * numbers / numbers.square().mean().sqrt()
            return origin + half * numbers

        def loss(numbers: Tensor) -> tuple[float, Tensor]:
            with torch.enable_grad():
                seen = image(numbers)
                penalty = (self.regularization or 0.0) * numbers.square().mean()
            value, gradient = canvas.climb(seen)
            (slope,) = torch.autograd.grad([seen, penalty], numbers, [-gradient, torch.ones_like(penalty)])
            return float(penalty.detach()) - value, slope

        end, curve = descend(numbers, loss, self.n_iter)
        return image(numbers), image(end), [-v for v in curve]


def descend(start: Tensor, loss: Callable[[Tensor], tuple[float, Tensor]], n_iter: int) -> tuple[Tensor, list[float]]:
    """Minimise by L-BFGS with a strong Wolfe line search; return the end point and the loss at each evaluation.

    Args:
        start: start point, of any shape, also that of the end point; it is not changed.
        loss: maps parameters to the loss and its gradient.
        n_iter: approximate number of evaluations: a line search is completed.
    """
    numbers = start.clone().requires_grad_(True)
    curve: list[float] = []
    optimizer = torch.optim.LBFGS(
        [numbers],
        max_iter=n_iter,
        max_eval=n_iter,
        history_size=HISTORY,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        value, numbers.grad = loss(numbers)
        curve.append(value)
        return value

    optimizer.step(closure)
    return numbers.detach(), curve


HISTORY = 10
"""Pairs of images that L-BFGS keeps."""


def described(
    canvas: Canvas,
    start: Tensor,
    end: Tensor,
    curve: Sequence[float],
    intensity: Tensor,
    min_rise: float,
    remedy: str = "take more steps (n_iter)",
) -> dict[str, Any]:
    """Return the record of a synthesised image (C, *canvas), and warn if its objective did not rise.

    Args:
        remedy: the advice of the warning.

    Raises:
        MethodError: the image, or F there, is not finite.
    """
    if not all_finite(end):
        raise MethodError("the image has values that are not finite: take a smaller lr or step, or switch amp off")
    begin, reached, at_case = (canvas.value(image) for image in (start, end, canvas.image))
    if not math.isfinite(begin + reached):
        raise MethodError(f"the objective went from {begin:g} to {reached:g}: choose another target or intensity range")
    rise = (reached - begin) / abs(begin) if begin else None
    if reached <= begin or (rise is not None and rise < min_rise):
        share = "" if rise is None else f", by {rise:.3g} of its start"
        if curve and not any(curve):
            remedy = "it is zero at the start: use another seed, channel or neuron"
        canvas.objective.context.progress.warn(
            f"the objective went from {begin:.4g} to {reached:.4g}{share}; a rise of {min_rise:g} is required: "
            f"{remedy}",
            canvas.objective.scores[0].label,
        )
    return {
        "curve": [float(v) for v in curve],
        "objective_start": begin,
        "objective_end": reached,
        "objective_image": at_case,
        "objective_rise": rise,
        "intensity_range": intensity.tolist(),
        "place": [[p.start, p.stop] for p in canvas.place],
    }


def for_targets(
    objective: Objective, images: Sequence[Tensor], notes: Sequence[dict[str, Any]], **more: Any
) -> Explained:
    """Return one image per target (k, C, *spatial); a single image is repeated for all targets."""
    repeat = objective.n_targets // len(images)
    maps = torch.stack(list(images) * repeat)
    every = [{**n, **{k: v for k, v in more.items() if v is not None}} for n in notes] * repeat
    return Explained(maps, {key: [n[key] for n in every] for key in every[0]})


def noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise like an image (C, *spatial), on the CPU in float32: the same on every device."""
    return torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image.device, image.dtype)


def check_steps(n_iter: int, **positive: float) -> None:
    """Check the number of steps and parameters that must be positive.

    Raises:
        UsageError: there is no step, or a parameter is not positive.
    """
    if n_iter < 1:
        raise UsageError(f"n_iter={n_iter}: at least one step is needed")
    for name, value in positive.items():
        if value <= 0:
            raise UsageError(f"{name}={value}: must be positive")


def _spacing(objective: Objective) -> tuple[float, ...] | None:
    """Return the voxel size in mm, or None if the case has no affine of the grid's dimension."""
    affine, d = objective.case.affine, len(objective.plan.spatial_shape)
    if affine is None or len(affine) != d + 1:
        return None
    return tuple(float(n) for n in affine[:d, :d].norm(dim=0))
