"""Maps of a layer on the image's grid: which layer, how its positions lie in a window, scattered or blended.

*Blended* maps are activations: each window's map is interpolated to the window and averaged with ĝ_w.
*Scattered* maps contain gradients, which carry ĝ_w already: each window's map is spread so that its sum is kept, and
windows are added.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.network import find_layer
from esegeta_monai.objective import Objective, Request, View
from esegeta_monai.windows import OutputGrid, WindowPlan

__all__ = ["BlendedActivations", "LayerShape", "check_layer", "default_layer", "layer_shapes", "spread", "to_window"]


@dataclass(frozen=True)
class LayerShape:
    """A layer and the shape of its output for one window."""

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: int


def layer_shapes(objective: Objective) -> list[LayerShape]:
    """All layers in the order in which they finish, with the output shape for one window (without batch)."""
    found: dict[str, LayerShape] = {}
    handles = []
    window = (objective.windows or [0])[0]
    x = objective.plan.cut(objective.image, window)[None].to(objective.model.device)

    def hook_for(name: str):  # type: ignore[no-untyped-def]
        def hook(module: torch.nn.Module, args: object, output: object) -> None:
            value = output[0] if isinstance(output, (tuple, list)) and output else output
            calls = found.pop(name).calls + 1 if name in found else 1
            if isinstance(value, Tensor):
                found[name] = LayerShape(name, type(module).__name__, tuple(value.shape[1:]), calls)

        return hook

    try:
        for name, module in objective.model.network.named_modules():
            if name:
                handles.append(module.register_forward_hook(hook_for(name)))
        with torch.inference_mode():
            objective.run(x, [window])
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def default_layer(objective: Objective) -> str:
    """A layer for class activation maps where the user names none.

    The last layer with spatial resolution for a classification network; for a segmentation network the last one at
    the coarsest resolution, which has seen the widest context.

    Raises:
        MethodError: no layer gives a spatial map.
    """
    axes = network_axes(objective.plan)
    spatial = [s for s in layer_shapes(objective) if len(s.shape) == axes + 1 and math.prod(s.shape[1:]) > 1]
    spatial = [s for s in spatial if s.shape[0] > 1] or spatial
    if not spatial:
        raise MethodError("no layer of the network gives a spatial map: name one with layer=…, or use an input method")
    if len(objective.grid.shape) > 0 and math.prod(objective.grid.shape) > 1:
        coarsest = min(math.prod(s.shape[1:]) for s in spatial)
        spatial = [s for s in spatial if math.prod(s.shape[1:]) == coarsest]
    return spatial[-1].name


def check_layer(objective: Objective, layer: str | None) -> str:
    """The layer to use: the one named, which must exist, or the default one."""
    if layer is None:
        return default_layer(objective)
    if not isinstance(layer, str):
        raise UsageError(f"layer={layer!r}: give the dotted name of a module")
    find_layer(objective.model.network, layer)
    return layer


def network_axes(plan: WindowPlan) -> int:
    """Spatial axes that the network sees: one less than the image's under `SliceInferer`."""
    return len(plan.roi) - (plan.slice_axis is not None)


def with_slice_axis(values: Tensor, plan: WindowPlan) -> Tensor:
    """Puts back the axis that a 2D network does not see: (…, h, w) to (…, h, 1, w) or the like."""
    return values if plan.slice_axis is None else values.unsqueeze(values.ndim - len(plan.roi) + 1 + plan.slice_axis)


def spatial_map(values: Tensor, plan: WindowPlan, layer: str) -> Tensor:
    """Checks that a layer's (…, C, *positions) is a spatial map; gives it all axes of the window.

    Raises:
        MethodError: it is not; the way out is named.
    """
    if values.ndim < network_axes(plan) + 2:
        raise MethodError(
            f"layer {layer!r} gives {tuple(values.shape[1:])} for a window, which is no spatial map: choose an earlier "
            "layer ('esegeta-monai layers' lists them with their shapes)"
        )
    return with_slice_axis(values, plan)


def to_window(values: Tensor, plan: WindowPlan) -> Tensor:
    """Interpolates (n, C, *positions) linearly to the window (n, C, *roi)."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(plan.roi)]
    if tuple(values.shape[2:]) == plan.roi:
        return values
    return F.interpolate(values, size=plan.roi, mode=mode, align_corners=False)


def spread(values: Tensor, plan: WindowPlan) -> Tensor:
    """Spreads (n, C, *positions) over the window (n, C, *roi), each position's value shared out so that sums stay.

    ``out = U (v / Uᵀ1)`` with U the linear interpolation: column sums of U are one after the division.
    """
    if tuple(values.shape[2:]) == plan.roi:
        return values
    with torch.enable_grad():
        probe = torch.ones_like(values[:1, :1]).requires_grad_(True)
        up = to_window(probe, plan)
        (share,) = torch.autograd.grad(up, probe, torch.ones_like(up))
    return to_window(values / share, plan)


class BlendedActivations(Request):
    """Activations of a layer on the image's grid: ``Σ_w ĝ_w · up(Σ_c α_c A_w,c)``.

    Args:
        layer: dotted name.
        weights: α (k, C), or None: every channel for itself.

    The result is (k, 1, *spatial) with weights, else (C, *spatial).
    """

    everywhere = True
    backward = False

    def __init__(self, layer: str, weights: Tensor | None = None) -> None:
        self.layers, self.weights = (layer,), weights
        self.maps: Tensor | None = None

    @property
    def key(self) -> Hashable:
        return ("activations", self.layers) if self.weights is None else id(self)

    def begin(self, objective: Objective) -> None:
        self.objective = objective
        self.grid = input_grid(objective)

    def see(self, view: View) -> None:
        plan = self.objective.plan
        values = spatial_map(view.activations[self.layers[0]], plan, self.layers[0])
        if self.weights is not None:
            values = torch.einsum("kc,nc...->nk...", self.weights.to(values.device, values.dtype), values)
        up = to_window(values.to(self.objective.image.dtype), plan)
        if self.maps is None:
            self.maps = torch.zeros(
                (up.shape[1], *plan.spatial_shape), dtype=up.dtype, device=self.objective.image.device
            )
        whole = tuple(slice(0, n) for n in plan.spatial_shape)
        for window, one in zip(view.batch.windows, up):
            self.grid.add(self.maps, whole, window, one * self.grid.weight(window).to(one.device, one.dtype))

    def result(self) -> Tensor:
        assert self.maps is not None
        return self.maps if self.weights is None else self.maps[:, None]


def input_grid(objective: Objective) -> OutputGrid:
    """Blending weights on the image's own grid, whatever the network's output grid is."""
    if objective.grid.out_roi == objective.plan.roi:
        return objective.grid
    return OutputGrid(objective.plan, objective.plan.roi, objective.image.dtype, objective.image.device)
