"""Maps of a layer on the image's grid: which layer, how its positions lie in a window, scattered or blended.

*Blended* maps are activations: each window's map is interpolated to the window and averaged with ĝ_w.
*Scattered* maps contain gradients, which carry ĝ_w already: each window's map is spread so that its sum is kept, and
windows are added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.interpolation import area_matrix, interpolate, line_matrix
from esegeta_monai.network import capture, find_layer, handed_on, note_versions, select_output
from esegeta_monai.objective import Batch, Objective, Request, View
from esegeta_monai.orientation import channels_last, grid_of
from esegeta_monai.windows import OutputGrid, WindowPlan

__all__ = ["BlendedActivations", "LayerOutput", "LayerShape", "check_layer", "default_layer", "layer_shapes", "spread"]
__all__ += ["to_window"]


@dataclass(frozen=True)
class LayerShape:
    """A layer and what it gives for one window.

    Attributes:
        name: dotted name.
        kind: class of the module.
        shape: of the output, without batch.
        grid: (C, *positions) where the output lies on a grid in the window, tokens included; else None.
        calls: how often the layer runs in one forward pass; the last output is what methods see.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    calls: int


def layer_shapes(objective: Objective) -> list[LayerShape]:
    """All layers that run, in the order in which they finish; the last one is the network itself, without a name."""
    model, window = objective.model, (objective.windows or [0])[0]
    x = objective.plan.cut(objective.image, window)[None].to(model.device)
    with torch.inference_mode(), _seen(objective) as found:
        objective.run(x, [window])
    return list(found.values())


@contextmanager
def _seen(objective: Objective, kept: dict[str, tuple[Tensor, int]] | None = None) -> Iterator[dict[str, LayerShape]]:
    """Hooks that write down each layer that runs on one window, removed afterwards.

    Args:
        kept: where the outputs go that lie on a grid, with how often they had been written to; one that a layer handed
            on as it came is none of its own and does not go there.
    """
    found: dict[str, LayerShape] = {}
    before: dict[str, list[int]] = {}
    handles = []
    model, roi = objective.model, network_roi(objective.plan)

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if name == "":
                output = select_output(output, model.output)
            value = output[0] if isinstance(output, (tuple, list)) and output else output
            calls = found.pop(name).calls + 1 if name in found else 1
            if isinstance(value, Tensor):
                shape = tuple(value.shape[1:])
                grid = grid_of(model.network, name, shape, roi) if len(value) == 1 else None
                found[name] = LayerShape(name, type(module).__name__, shape, grid, calls)
                own = grid is not None and not value.is_inference()
                if kept is not None and own and not handed_on(value, args, before[name]):
                    kept[name] = (value, value._version)

        return hook

    try:
        for name, module in model.network.named_modules():
            if kept is not None:
                handles.append(note_versions(module, name, before))
            handles.append(module.register_forward_hook(hook_for(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def default_layer(objective: Objective) -> str:
    """A layer for class activation maps where the user names none.

    The last block with spatial resolution for a classification network; for a segmentation network the last block at
    the coarsest resolution, which has seen the widest context. Blocks are preferred to what is inside them; layers
    that repeat the network's output, do nothing in evaluation mode, or run several times only serve where there is
    nothing else; one whose positions the target does not depend on (behind the last attention of a transformer that
    reads its class token) does not serve at all, and where none of a resolution does, the next one is looked through.

    One forward pass of one window and the backward pass to the layer tell. It is looked for once an objective: methods
    that run together share it.

    Raises:
        MethodError: no layer gives a spatial map that the target depends on.
    """
    if objective.default_layer is None:
        objective.default_layer = _find_default_layer(objective)
    return objective.default_layer


def _find_default_layer(objective: Objective) -> str:
    modules = dict(objective.model.network.named_modules())
    windows = (objective.windows or [0])[:1]
    batch = Batch(objective, windows, [0], objective.cotangents(windows))
    kept: dict[str, tuple[Tensor, int]] = {}
    with torch.enable_grad(), _seen(objective, kept) as found:
        out = batch.forward(batch.image.detach().requires_grad_(True))
    *layers, network = found.values()
    grids = {s.name: s.grid for s in layers if s.grid is not None and math.prod(s.grid[1:]) > 1}
    useful = {
        s.name: grids[s.name]
        for s in layers
        if s.name in grids
        and grids[s.name][0] > 1
        and s.shape != network.shape
        and s.calls == 1
        and not isinstance(modules[s.name], _IDLE)
    }
    for some in (useful, {name: grid for name, grid in grids.items() if name not in useful}):
        for name in _by_preference(some, modules, is_map=math.prod(objective.grid.shape) > 1):
            value, written = kept.get(name, (None, 0))
            if value is None or value._version != written:  # not what the layer gave, or no longer
                if _depends_alone(batch, name):
                    return name
            elif _depends(batch, out, value, name, retain=True):
                return name
    raise MethodError(
        "the target depends on no layer with a spatial map by a differentiable path: name one with layer=…, or use an "
        "input method"
    )


_IDLE = (nn.Identity, nn.modules.dropout._DropoutNd)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _by_preference(
    grids: Mapping[str, tuple[int, ...]], modules: Mapping[str, nn.Module], *, is_map: bool
) -> Iterator[str]:
    """Layers of the coarsest resolution first where the output is a map, else those of the last one; of each the
    outermost first, and of these the last."""
    sizes = {name: math.prod(grid[1:]) for name, grid in grids.items()}
    for size in sorted(set(sizes.values())) if is_map else dict.fromkeys(reversed(sizes.values())):
        alike = (name for name in reversed(sizes) if sizes[name] == size)
        yield from sorted(alike, key=lambda name: _nesting(name, modules))


def _nesting(name: str, modules: Mapping[str, nn.Module]) -> int:
    """The number of blocks round a layer; plain containers do not count."""
    parts = name.split(".")
    return sum(type(modules[".".join(parts[:i])]) not in _CONTAINERS for i in range(1, len(parts)))


def _depends(batch: Batch, out: Tensor, value: Tensor, layer: str, *, retain: bool = False) -> bool:
    """Whether some target has a gradient at the layer's positions, in a window that it sees."""
    if not value.requires_grad or not out.requires_grad:
        return False
    (gradient,) = batch.gradients(out, [value], retain=retain)
    return gradient is not None and bool(spatial_map(gradient, batch.objective, layer, lead=2).any())


def _depends_alone(batch: Batch, layer: str) -> bool:
    """`_depends` by a forward pass of its own, which records the layer's output whatever is written into it later."""
    with torch.enable_grad(), capture(batch.objective.model.network, [layer]) as captured:
        out = batch.forward(batch.image.detach().requires_grad_(True))
    return _depends(batch, out, captured[layer], layer)


def check_layer(objective: Objective, layer: str | None) -> str:
    """The layer to use: the one named, which must exist, or the default one."""
    if layer is None:
        return default_layer(objective)
    if not isinstance(layer, str):
        raise UsageError(f"layer={layer!r}: give the dotted name of a module")
    find_layer(objective.model.network, layer)
    return layer


def with_slice_axis(values: Tensor, plan: WindowPlan) -> Tensor:
    """Puts back the axis that a 2D network does not see: (…, h, w) to (…, h, 1, w) or the like."""
    return values if plan.slice_axis is None else values.unsqueeze(values.ndim - len(plan.roi) + 1 + plan.slice_axis)


def spatial_map(values: Tensor, objective: Objective, layer: str, *, lead: int = 1) -> Tensor:
    """A layer's values (*lead axes, …) as a map (*lead axes, C, *positions) with all axes of the window.

    Tokens (…, T, C) of a transformer are put on their grid, a class token in front aside; maps whose channels come last
    are turned round.

    Args:
        lead: number of axes in front: 1 for activations (n, …), 2 for gradients (k, n, …).

    Raises:
        MethodError: it is no spatial map; the way out is named.
    """
    on_grid = _on_grid(values, objective.model.network, layer, network_roi(objective.plan), lead)
    return with_slice_axis(on_grid, objective.plan)


def network_roi(plan: WindowPlan) -> tuple[int, ...]:
    """Shape of a window as the network sees it: without the axis that `SliceInferer` takes away."""
    return tuple(n for axis, n in enumerate(plan.roi) if axis != plan.slice_axis)


def _on_grid(values: Tensor, network: nn.Module, layer: str, roi: Sequence[int], lead: int) -> Tensor:
    shape = tuple(values.shape[lead:])
    grid = grid_of(network, layer, shape, roi)
    if grid is None:
        raise MethodError(
            f"layer {layer!r} gives {shape} for a window, which is no spatial map, or not known to be one: choose "
            "another layer ('esegeta-monai layers' lists them with their shapes)"
        )
    if len(shape) == 2:
        positions = math.prod(grid[1:])
        values = values.narrow(-2, shape[0] - positions, positions).unflatten(-2, grid[1:])
    return values.movedim(-1, lead) if len(shape) == 2 or channels_last(network, layer, shape, roi) else values


def to_window(values: Tensor, plan: WindowPlan) -> Tensor:
    """Interpolates (n, C, *positions) linearly to the window (n, C, *roi)."""
    if tuple(values.shape[2:]) == plan.roi:
        return values
    return interpolate(values, [line_matrix(0, n, p, n, values.dtype) for p, n in zip(values.shape[2:], plan.roi)])


def spread(values: Tensor, plan: WindowPlan) -> Tensor:
    """Spreads (n, C, *positions) over the window (n, C, *roi), each position's value shared out so that sums stay.

    ``out = U v`` with U the linear interpolation, or the mean over a cell where the layer is finer than the window, its
    columns divided by their sums.
    """
    positions, roi = tuple(values.shape[2:]), plan.roi
    if positions == roi:
        return values
    if any(p > n for p, n in zip(positions, roi)):
        matrices = [area_matrix(n, p, torch.float64) for p, n in zip(positions, roi)]
    else:
        matrices = [line_matrix(0, n, p, n, torch.float64) for p, n in zip(positions, roi)]
    return interpolate(values, [m / m.sum(0) for m in matrices])


class BlendedActivations(Request):
    """Activations of a layer on the image's grid: ``Σ_w ĝ_w · up(Σ_c α_c A_w,c)``.

    Args:
        layer: dotted name.
        weights: α (k, C); or None: every channel for itself; or ``"sum"`` or ``"mean"``: one map of all channels.

    The result is (k, 1, *spatial) with weights α, else (C or 1, *spatial).
    """

    everywhere = True
    backward = False
    summed = ("maps",)

    def __init__(self, layer: str, weights: Tensor | Literal["sum", "mean"] | None = None) -> None:
        self.layers, self.weights = (layer,), weights
        self.maps: Tensor | None = None

    @property
    def key(self) -> Hashable:
        return id(self) if isinstance(self.weights, Tensor) else ("activations", self.layers, self.weights)

    def begin(self, objective: Objective) -> None:
        self.objective = objective
        self.grid = input_grid(objective)

    def see(self, view: View) -> None:
        plan = self.objective.plan
        values = spatial_map(view.activations[self.layers[0]], self.objective, self.layers[0])
        if isinstance(self.weights, str):
            values = values.sum(1, keepdim=True) if self.weights == "sum" else values.mean(1, keepdim=True)
        elif self.weights is not None:
            values = torch.einsum("kc,nc...->nk...", self.weights.to(values.device, values.dtype), values)
        up = to_window(values.to(self.objective.image.dtype), plan)
        if self.maps is None:
            self.maps = torch.zeros(
                (up.shape[1], *plan.spatial_shape), dtype=up.dtype, device=self.objective.image.device
            )
        whole = tuple(slice(0, n) for n in plan.spatial_shape)
        for window, one in zip(view.batch.windows, up):
            self.grid.blend(self.maps, whole, window, one)

    def result(self) -> Tensor:
        assert self.maps is not None
        return self.maps[:, None] if isinstance(self.weights, Tensor) else self.maps


def input_grid(objective: Objective) -> OutputGrid:
    """Blending weights on the image's own grid, whatever the network's output grid is."""
    if objective.grid.out_roi == objective.plan.roi:
        return objective.grid
    return OutputGrid(objective.plan, objective.plan.roi, objective.image.dtype, objective.image.device)


def position_weights(objective: Objective, window: int, positions: Sequence[int]) -> Tensor:
    """ĝ_w on a layer's positions: the mean over each position's cell. It is one for a volume of one window."""
    weight = input_grid(objective).weight(window)[None]
    return F.interpolate(weight[None], size=tuple(positions), mode="area")[0, 0]


def channel_axis(objective: Objective, layer: str, values: Tensor) -> int:
    """Where a layer's raw output (n, …) has its channels: the last axis of tokens and Swin blocks, else the first.

    Raises:
        MethodError: it is no spatial map.
    """
    spatial_map(values, objective, layer)
    roi, shape = network_roi(objective.plan), tuple(values.shape[1:])
    tokens = len(shape) == 2 and len(roi) > 1
    return -1 if tokens or channels_last(objective.model.network, layer, shape, roi) else 1


class LayerOutput(nn.Module):
    """A network whose output is one of its layers: each window's map at the window's own resolution, every voxel having
    the unit whose cell holds it; or a vector, where the layer gives one.

    What a target of a layer is bound to. Layers keep the names that they have in the network.

    Args:
        network: the network.
        layer: dotted name.
        read: what becomes of the layer's map (n, C, *positions), or vector (n, C), before it is brought to the
            window's resolution; None: nothing.
    """

    def __init__(self, network: nn.Module, layer: str, read: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.network, self.layer, self.read = network, layer, read
        find_layer(network, layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(n, C, *roi), or (n, C)."""
        with capture(self.network, [self.layer]) as captured:
            self.network(x, *args, **kwargs)
        if self.layer not in captured:
            raise MethodError(f"layer {self.layer!r} is not used in the forward pass: choose another")
        values = captured[self.layer]
        if values.ndim > 2:
            values = _on_grid(values, self.network, self.layer, x.shape[2:], 1)
        values = values if self.read is None else self.read(values)
        return values if values.ndim == 2 else F.interpolate(values, size=x.shape[2:], mode="nearest-exact")

    def get_submodule(self, target: str) -> nn.Module:
        """A layer by its name in the network."""
        return self.network.get_submodule(target)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """The network's modules by their names in it; the root is this module."""
        yield "", self
        for name, module in self.network.named_modules(*args, **kwargs):
            if name:
                yield name, module
