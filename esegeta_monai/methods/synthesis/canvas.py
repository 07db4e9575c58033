"""The canvas of a synthesised image, and the objective that is maximised.

Synthesis maximises an ordinary `Objective`: a layer, a channel or a unit is the "prediction" of `LayerOutput`, with a
score that is linear in it, so that windows, blending and gradients are those of every other method.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.layer_maps import LayerOutput
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.score import Score, WeightedScore
from esegeta_monai.engine.window_loop import WindowedNetwork
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.plan import Slices, WindowPlan, last_axes
from esegeta_monai.errors import MethodError, UsageError

__all__ = ["Canvas", "Extent", "Neuron", "class_canvas", "intensity_range", "layer_canvas"]
__all__ += ["layer_model", "layer_objective", "read_channel", "read_energy", "weighted", "window_of"]

Extent = Literal["window", "image"]
Neuron = Sequence[int] | Literal["centre"]


@dataclass
class Canvas:
    """The grid of a synthesised image, and its objective.

    Attributes:
        objective: has one score, on the canvas's grid; its image is the case's part there.
        place: position of the canvas in the case's image, as slices.
    """

    objective: Objective
    place: Slices

    @property
    def image(self) -> Tensor:
        """The part of the case's image on the canvas (C, *canvas)."""
        return self.objective.image

    def value(self, image: Tensor) -> float:
        """Return F at an image (C, *canvas)."""
        return float(self.objective.value(image.detach()[None])[0, 0])

    def climb(self, image: Tensor) -> tuple[float, Tensor]:
        """Return F and its gradient (C, *canvas) at an image (C, *canvas)."""
        gradient = self.objective.gradient(image.detach()[None])
        return float(gradient.values[0, 0]), gradient.maps[0, 0]

    def on_image(self, image: Tensor, outside: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the synthesised image (C, *canvas) at its place on the case's grid, ``outside`` (C,) around it: (C,
        *shape)."""
        whole = outside.reshape(-1, *(1,) * len(shape)).expand(-1, *shape).clone()
        whole[last_axes(self.place)] = image
        return whole


def class_canvas(objective: Objective, k: int, extent: Extent) -> Canvas:
    """Return a canvas for the mean of target k's output; a target of one voxel (`Voxel`, `LayerNeuron`) keeps its
    place.

    Raises:
        MethodError: the target has no class whose output could be averaged.
    """
    score = weighted(objective.scores[k])
    window = None if extent == "image" else window_of(objective, objective.score_windows[k])
    plan, image, place, condition = _cut(objective, window)
    shape = _output_shape(objective.model, objective, plan, image, condition)
    mask = torch.ones(shape, dtype=torch.bool, device=image.device)
    if score.voxels == 1 and score.mask.ndim:
        if window is None:
            mask = torch.zeros_like(mask)
            mask[score.box] = score.mask
        else:
            seen = objective.grid.cut(score.mask.to(mask.device), score.box, window)
            mask = seen if objective.plan.whole else seen[objective.grid.inside(window)]
    more: dict[str, Any] = {"plan": plan, "image": image, "condition": condition, "out_shape": shape}
    return Canvas(objective.derive(scores=[score.over(mask)], prediction=None, **more), place)


def layer_canvas(
    objective: Objective,
    layer: str,
    read: Callable[[Tensor], Tensor],
    extent: Extent,
    neuron: Neuron | None = None,
    window: int | None = None,
) -> Canvas:
    """Return a canvas for the mean over positions of ``read`` of a layer, or for its value at one position.

    Args:
        layer: dotted name.
        read: maps the layer's output (n, C, *positions) or (n, C) to one channel.
        neuron: voxel of the canvas that selects the unit, ``"centre"`` for the middle; None: all units.
        window: index of the window of the case; None: the window nearest to the middle.
    """
    if extent == "window" and window is None:
        window = window_of(objective)
    plan, image, place, condition = _cut(objective, window if extent == "window" else None)
    return Canvas(layer_objective(objective, layer, read, plan, image, condition, neuron), place)


def layer_objective(
    objective: Objective,
    layer: str,
    read: Callable[[Tensor], Tensor],
    plan: WindowPlan,
    image: Tensor,
    condition: Tensor | None = None,
    neuron: Neuron | None = None,
) -> Objective:
    """Return the objective of `layer_canvas` on the grid of ``plan`` and ``image`` (C, *spatial)."""
    model = layer_model(objective.model, layer, read)
    shape = _output_shape(model, objective, plan, image, condition)
    mask = torch.ones(shape, dtype=torch.bool, device=image.device)
    if neuron is not None and shape:
        mask = torch.zeros_like(mask)
        mask[_position(neuron, shape)] = True
    score = WeightedScore(mask, 0, 1, reduction="mean", label=layer)
    more: dict[str, Any] = {"model": model, "plan": plan, "image": image, "condition": condition, "out_shape": shape}
    return objective.derive(scores=[score], prediction=None, **more)


def layer_model(model: Model, layer: str, read: Callable[[Tensor], Tensor]) -> Model:
    """Return a model whose output is ``read`` of the layer's output (n, C, *positions) or (n, C)."""
    other = copy.copy(model)
    other.network, other.output = LayerOutput(model.network, layer, read), None
    return other


def read_energy(values: Tensor) -> Tensor:
    """Return ``mean_c A_c²`` (n, 1, *positions), the objective of a whole layer (Olah et al. 2017, Mordvintsev et al.
    2015)."""
    return values.square().mean(1, keepdim=True)


def read_channel(layer: str, channel: int) -> Callable[[Tensor], Tensor]:
    """Return a function that reads channel c of a layer's map: (n, C, *positions) to (n, 1, *positions)."""

    def read(values: Tensor) -> Tensor:
        if isinstance(channel, bool) or not 0 <= channel < values.shape[1]:
            raise UsageError(f"channel={channel}: layer {layer!r} has {values.shape[1]} channels, from 0 on")
        return values[:, channel : channel + 1]

    return read


def weighted(score: Score) -> WeightedScore:
    """Check that a score is one class's output under a mask, and return it.

    Raises:
        MethodError: it is not.
    """
    if isinstance(score, WeightedScore):
        return score
    raise MethodError(
        f"{score.label} is not the output of a single class, so it is not defined for other images: use a target such "
        "as ClassScore or MultiClassMask, or layer=…"
    )


def intensity_range(
    image: Tensor, given: Sequence[Any] | None, percentiles: tuple[float, float] = (0.5, 99.5)
) -> Tensor:
    """Return the intensity range of the network's input, (C, 2): least and greatest value per channel.

    Args:
        image: the preprocessed case (C, *spatial), used if ``given`` is None.
        given: ``(low, high)``, or such a pair for each channel.
        percentiles: percentiles of the case; where they coincide, as in a sparse image, its extremes.

    Raises:
        UsageError: not as many pairs as channels, or low is not below high.
        MethodError: a channel of the case is constant.
    """
    channels = image.shape[0]
    if given is not None:
        wrong = UsageError(f"intensity={given!r}: give (low, high), or {channels} such pairs, numbers, low below high")
        try:
            pairs = torch.as_tensor(given, dtype=torch.float64)
        except (TypeError, ValueError) as error:
            raise wrong from error
        if pairs.shape == (2,):
            pairs = pairs.expand(channels, 2)
        if pairs.shape != (channels, 2) or not bool(((pairs[:, 0] < pairs[:, 1]) & pairs.isfinite().all(1)).all()):
            raise wrong
        return pairs.to(image.device, image.dtype)
    rows = []
    for c, values in enumerate(image.detach().flatten(1).cpu().numpy()):
        low, high = (float(v) for v in np.percentile(values, percentiles))
        if not low < high:
            low, high = float(values.min()), float(values.max())
        if not low < high:
            raise MethodError(
                f"channel {c} of the image is constant, so its intensity range is unknown: give intensity=(low, high)"
            )
        rows.append([low, high])
    return torch.tensor(rows, dtype=image.dtype, device=image.device)


def window_of(objective: Objective, seen: Sequence[int] = ()) -> int:
    """Return the window nearest to the image's middle among ``seen``, or among all if that is empty."""
    middle = [n / 2 for n in objective.plan.spatial_shape]

    def distance(window: int) -> float:
        place = objective.plan.place(window)
        return math.dist([(p.start + p.stop) / 2 for p in place], middle)

    return min(seen or range(len(objective.plan)), key=distance)


def _cut(objective: Objective, window: int | None) -> tuple[WindowPlan, Tensor, Slices, Tensor | None]:
    """Return plan, image, place in the case and condition of the canvas; ``window`` None: the whole image."""
    plan = objective.plan
    if window is None:
        return plan, objective.image, tuple(slice(0, n) for n in plan.spatial_shape), objective.condition
    if plan.with_coord and len(plan) > 1:
        raise MethodError("the network reads the position of its window (with_coord=True): use extent='image'")
    place = plan.place(window)
    condition = None if objective.condition is None else objective.condition[last_axes(place)]
    return plan.single(), objective.image[last_axes(place)], place, condition


def _output_shape(
    model: Model, objective: Objective, plan: WindowPlan, image: Tensor, condition: Tensor | None
) -> tuple[int, ...]:
    """Return the spatial shape of the model's output for the canvas; runs one window."""
    probe = WindowedNetwork(model, image, plan, condition=condition, context=objective.context)
    with torch.no_grad():
        out = probe.run(probe.window(0), [0])
    return OutputGrid(plan, tuple(out.shape[2:]), image.dtype).shape


def _position(neuron: Neuron, shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(neuron, str):
        return tuple(n // 2 for n in shape)
    if len(neuron) != len(shape) or any(not 0 <= i < n for i, n in zip(neuron, shape)):
        raise UsageError(f"neuron={tuple(neuron)} is outside the canvas {tuple(shape)}")
    return tuple(int(i) for i in neuron)
