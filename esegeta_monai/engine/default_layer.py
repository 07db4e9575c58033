"""The default layer of layer methods."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_frames import check_calls, frames_of, traced_layers
from esegeta_monai.engine.network.frames import TracedLayer
from esegeta_monai.engine.network.hooks import LayerCall, capture, find_layer, first_tensor_or_none, on_output
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
        calls: number of calls in one forward pass.
        steps: True: a call reads what an earlier one has computed, so that the calls are no views of the window.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    grid: tuple[int, ...] | None
    calls: int
    steps: bool = False


def layer_shapes(objective: Objective) -> list[LayerShape]:
    """List all layers that run, in the order in which they finish; the last is the network, with an empty name."""
    layers = traced_layers(objective).values()
    return [LayerShape(s.name, s.kind, s.shape, _grid(s), s.calls, s.sequential) for s in layers if s.shape is not None]


def _grid(layer: TracedLayer) -> tuple[int, ...] | None:
    """Return (C, *positions) of the map of a layer; None: it has none, or its calls are no views of the window."""
    frames = [f for f in layer.frames if f is not None]
    if len(frames) < layer.calls or (layer.calls > 1 and layer.sequential):
        return None
    grid = list(frames[-1].grid)
    for d, _, n in frames[-1].fixed:  # each call sees one slice
        grid[d + 1] = n
    return tuple(grid) if not frames[-1].fixed or layer.calls > 1 else None


@contextmanager
def _recorded_outputs(objective: Objective, names: Collection[str]) -> Iterator[dict[str, tuple[Tensor, int]]]:
    """Record the latest output of layers while the block runs, each with its `write_count`; omits a layer that returns
    its argument unchanged."""
    outputs: dict[str, tuple[Tensor, int]] = {}

    def record(call: LayerCall) -> None:
        value = first_tensor_or_none(call.output)
        if value is not None and not value.is_inference() and not call.returns_argument(value):
            outputs[call.name] = (value, write_count(value))

    modules = dict(objective.model.network.named_modules())
    with on_output({n: modules[n] for n in names}, record):
        yield outputs


def default_layer(objective: Objective) -> str:
    """Choose the layer for class activation maps when the user names none.

    For a classification network, it is the last block with spatial resolution; for a segmentation network, the last
    block at the coarsest resolution, which has the widest receptive field. Blocks are preferred to their inner layers.
    Layers that repeat the network's output or are the identity in evaluation mode are used only if no other layer
    qualifies; a layer that runs several times only if no layer that runs once does, and if its calls are views of the
    window. Layers whose positions do not affect the target (after the last attention of a
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
    *layers, network = layer_shapes(objective)
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
    with torch.enable_grad(), _recorded_outputs(objective, grids) as outputs:
        out = batch.forward(batch.image.detach().requires_grad_(True))
    several = {s.name for s in layers if s.calls > 1}
    once = {name: grid for name, grid in grids.items() if name not in useful and name not in several}
    for group in (useful, once, {name: grid for name, grid in grids.items() if name in several}):
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
    frame = frames_of(objective, layer)[-1]
    return gradient is not None and frame.fits(gradient, 2) and bool(frame.to_map(gradient, 2).any())


def _depends_alone(objective: Objective, batch: Batch, layer: str) -> bool:
    """Compute `_depends` with a separate forward pass, which protects the layer's output from later writes."""
    with torch.enable_grad(), capture(batch.network.model.network, [layer], of_windows=False) as captured:
        out = batch.forward(batch.image.detach().requires_grad_(True))
    return _depends(objective, batch, out, captured.each[layer][-1], layer)


def check_layer(objective: Objective, layer: str | None, *, several: bool = False) -> str:
    """Return the given layer, or the default one for None.

    Args:
        objective: network and window plan.
        layer: dotted name, or None.
        several: True: the method adds up the maps of all calls of the layer, each in its own frame.

    Raises:
        UsageError: no such layer.
        MethodError: no layer qualifies as the default, or the layer runs several times and the method cannot read it.
    """
    if layer is None:
        layer = default_layer(objective)
    if not isinstance(layer, str):
        raise UsageError(f"layer={layer!r}: give the dotted name of a module")
    find_layer(objective.model.network, layer)
    check_calls(objective, layer, several=several)
    return layer
