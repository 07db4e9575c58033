"""The default layer of layer methods."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_maps import network_roi, spatial_map
from esegeta_monai.engine.network.hooks import LayerCall, capture, find_layer, on_output
from esegeta_monai.engine.network.layout import grid_of
from esegeta_monai.engine.network.model import select_output
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.utils.upstream import write_count

__all__ = ["LayerShape", "check_layer", "default_layer", "layer_shapes"]


@dataclass(frozen=True)
class LayerShape:
    """A layer and the shape of its output for one window.

    Attributes:
        name: dotted name.
        kind: class of the module.
        shape: shape of the output, without batch.
        grid: (C, *positions) if the output is a map of the window, tokens included; else None.
        calls: number of calls in one forward pass; methods use the last output.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    calls: int


def layer_shapes(objective: Objective) -> list[LayerShape]:
    """List all layers that run, in the order in which they finish; the last is the network, with an empty name."""
    window = (objective.windows or [0])[0]
    with torch.inference_mode(), _record_layers(objective) as shapes:
        objective.run(objective.window(window), [window])
    return list(shapes.values())


@contextmanager
def _record_layers(
    objective: Objective, outputs: dict[str, tuple[Tensor, int]] | None = None
) -> Iterator[dict[str, LayerShape]]:
    """Record the shape of each layer that runs on one window while the block runs.

    Args:
        outputs: receives the outputs that are maps of the window, each with its `write_count`; omits a layer that
            returns its argument unchanged.
    """
    shapes: dict[str, LayerShape] = {}
    model, roi = objective.model, network_roi(objective.plan)

    def record(call: LayerCall) -> None:
        name, output = call.name, call.output
        if name == "":
            output = select_output(output, model.output, 2 + len(roi))
        value = output[0] if isinstance(output, (tuple, list)) and output else output
        calls = shapes.pop(name).calls + 1 if name in shapes else 1
        if isinstance(value, Tensor):
            shape = tuple(value.shape[1:])
            grid = grid_of(model.network, name, shape, roi) if len(value) == 1 else None
            shapes[name] = LayerShape(name, type(call.module).__name__, shape, grid, calls)
            own = grid is not None and not value.is_inference() and not call.returns_argument(value)
            if outputs is not None and own:
                outputs[name] = (value, write_count(value))

    with on_output(dict(model.network.named_modules()), record):
        yield shapes


def default_layer(objective: Objective) -> str:
    """Choose the layer for class activation maps when the user names none.

    For a classification network, it is the last block with spatial resolution; for a segmentation network, the last
    block at the coarsest resolution, which has the widest receptive field. Blocks are preferred to their inner layers.
    Layers that repeat the network's output, are the identity in evaluation mode, or run several times are used only
    if no other layer qualifies. Layers whose positions do not affect the target (after the last attention of a
    transformer that reads its class token) are excluded; if this excludes a whole resolution, the next one is searched.

    The search costs one forward pass of one window and backward passes to the candidates. It runs once per objective,
    so methods that run together share the result.

    Raises:
        MethodError: the target depends on no layer with a spatial map.
    """
    return objective.memo("default layer", lambda: _find_default_layer(objective))


def _find_default_layer(objective: Objective) -> str:
    modules = dict(objective.model.network.named_modules())
    windows = (objective.windows or [0])[:1]
    batch = Batch(objective, windows, [0], objective.cotangents(windows))
    outputs: dict[str, tuple[Tensor, int]] = {}
    with torch.enable_grad(), _record_layers(objective, outputs) as shapes:
        out = batch.forward(batch.image.detach().requires_grad_(True))
    *layers, network = shapes.values()
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
    for group in (useful, {name: grid for name, grid in grids.items() if name not in useful}):
        for name in _by_preference(group, modules, is_map=math.prod(objective.grid.shape) > 1):
            value, written = outputs.get(name, (None, 0))
            if value is None or write_count(value) != written:  # not recorded, or overwritten since
                if _depends_alone(objective, batch, name):
                    return name
            elif _depends(objective, batch, out, value, name, retain=True):
                return name
    raise MethodError(
        "the target depends on no layer with a spatial map by a differentiable path: name one with layer=…, or use an "
        "input method"
    )


_IDLE = (
    nn.Identity,
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _by_preference(
    grids: Mapping[str, tuple[int, ...]], modules: Mapping[str, nn.Module], *, is_map: bool
) -> Iterator[str]:
    """Yield layers by preference: by resolution, then the outermost, then the last.

    If the output is a map, the coarsest resolution comes first; else the resolution of the last layer.
    """
    sizes = {name: math.prod(grid[1:]) for name, grid in grids.items()}
    for size in sorted(set(sizes.values())) if is_map else dict.fromkeys(reversed(sizes.values())):
        alike = (name for name in reversed(sizes) if sizes[name] == size)
        yield from sorted(alike, key=lambda name: _nesting(name, modules))


def _nesting(name: str, modules: Mapping[str, nn.Module]) -> int:
    """Count the blocks around a layer, without plain containers."""
    parts = name.split(".")
    return sum(type(modules[".".join(parts[:i])]) not in _CONTAINERS for i in range(1, len(parts)))


def _depends(
    objective: Objective, batch: Batch, out: Tensor, value: Tensor, layer: str, *, retain: bool = False
) -> bool:
    """Return True if some target has a non-zero gradient at the layer's positions in one of its windows."""
    if not value.requires_grad or not out.requires_grad:
        return False
    (gradient,) = batch.gradients(out, [value], retain=retain)
    return gradient is not None and bool(spatial_map(gradient, objective, layer, lead=2).any())


def _depends_alone(objective: Objective, batch: Batch, layer: str) -> bool:
    """Compute `_depends` with a separate forward pass, which protects the layer's output from later writes."""
    with torch.enable_grad(), capture(batch.network.model.network, [layer]) as captured:
        out = batch.forward(batch.image.detach().requires_grad_(True))
    return _depends(objective, batch, out, captured[layer], layer)


def check_layer(objective: Objective, layer: str | None) -> str:
    """Return the given layer, or the default one for None.

    Raises:
        UsageError: no such layer.
        MethodError: no layer qualifies as the default.
    """
    if layer is None:
        return default_layer(objective)
    if not isinstance(layer, str):
        raise UsageError(f"layer={layer!r}: give the dotted name of a module")
    find_layer(objective.model.network, layer)
    return layer
