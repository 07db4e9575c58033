"""The layers of an objective's network: how often each runs on one window, and where its output lies in the window.

The network is traced once for each shape of a window (`esegeta_monai.engine.network.frames.trace_layers`), whatever the
number of cases and methods.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.declared_axes import DeclaredAxes
from esegeta_monai.engine.network.frames import Frame, TracedLayer, TracedLayers, assemble, module_names, trace_layers
from esegeta_monai.engine.network.hooks import find_layer, unreadable
from esegeta_monai.engine.network.model import out_of_memory, select_output
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import Progress, RunContext
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import EsegetaError, MethodError

__all__ = ["check_calls", "maps_of_calls", "only_frame", "spatial_map", "traced_layers"]

_TRACES: WeakKeyDictionary[nn.Module, dict[Any, TracedLayers]] = WeakKeyDictionary()


def network_roi(plan: WindowPlan) -> tuple[int, ...]:
    """Return the shape of a window as the network sees it: without the axis that `SliceInferer` removes."""
    return tuple(n for axis, n in enumerate(plan.roi) if axis != plan.slice_axis)


def traced_layers(objective: Objective) -> TracedLayers:
    """Return all layers that run on one window, by name, in the order in which they finish.

    The trace runs the network on two copies of a window, or on one where two fail. It is made once for each network and
    shape of a window, and is not counted among the passes of a method.
    """
    return objective.memo("traced layers", lambda: _traced(objective))


def _traced(objective: Objective) -> TracedLayers:
    model, plan = objective.model, objective.plan
    known = _TRACES.setdefault(model.network, {})
    modules = (*map(id, model.network.modules()), *module_names(model.network))
    key = (plan.roi, plan.slice_axis, objective.image.shape[0], str(model.output), tuple(model.inputs), modules)
    if key not in known:
        known[key] = _trace(objective)
    return with_declared(known[key], model.layer_axes, len(network_roi(plan)))


def with_declared(layers: TracedLayers, declared: Mapping[str, str], dims: int) -> TracedLayers:
    """Return traced layers with the axes that the user has stated, by layer.

    Raises:
        UsageError: the axes do not fit a layer's output.
        MethodError: the trace has found other axes, or the layer does not run.
    """
    if not declared:
        return layers
    changed = TracedLayers(layers.names)
    changed.update(layers)
    changed.inputs = layers.inputs
    for name, pattern in declared.items():
        traced = layers.get(name)
        if traced is None:
            raise MethodError(f"layer {name!r}, whose axes are given, is not used in the forward pass")
        changed[traced.name] = DeclaredAxes(pattern).apply(traced, dims)
    return changed


def _trace(objective: Objective) -> TracedLayers:
    model, roi = objective.model, network_roi(objective.plan)
    context = RunContext(Progress(silent=True), objective.context.processes, window_batch=objective.window_batch)
    quiet = objective.derive(context=context)
    window = (objective.windows or [0])[0]
    x = objective.window(window)

    def run(rows: int) -> TracedLayers:
        many = torch.cat([x] * rows)
        return trace_layers(
            model.network,
            roi,
            lambda: quiet.run(many, [window] * rows),
            lambda out: select_output(out, model.output, 2 + len(roi)),
        )

    if not objective.plan.whole:
        try:
            return run(2)
        except RuntimeError as error:  # the network takes one window at a time, or there is no memory for two
            if not isinstance(error, EsegetaError) and not out_of_memory(error):
                raise _untraced(error) from error
    try:
        return run(1)
    except RuntimeError as error:
        if isinstance(error, EsegetaError) or out_of_memory(error):
            raise
        raise _untraced(error) from error


def _untraced(error: RuntimeError) -> MethodError:
    return MethodError(
        f"the operations of the network cannot be followed, so it is not known where its layers lie "
        f"({' '.join(str(error).split())[:200]}; torch.func transforms such as vmap hide them): use an input method"
    )


def check_calls(objective: Objective, layer: str, *, several: bool) -> None:
    """Check that a method can read a layer that runs as often as this one does.

    Args:
        objective: network and window plan.
        layer: dotted name.
        several: True: the method adds up the maps of several calls, each in its own frame.

    Raises:
        MethodError: the layer runs several times and the method reads one call, or the calls are no views of the
            window; or the windows are not known.
    """
    if objective.model.inferer is not None or layer not in traced_layers(objective):
        return
    traced = traced_layers(objective)[layer]
    if traced.calls < 2:
        return
    runs = f"layer {layer!r} runs {traced.calls} times in a pass"
    if traced.sequential:
        raise MethodError(f"{runs}, each call on what an earlier one has computed: {_way_out(objective)}")
    if any(f is None for f in traced.frames):
        raise MethodError(f"{runs}, and it is not known where the output of each call lies: {_way_out(objective)}")
    if not several:
        raise MethodError(f"{runs}, but the method reads one call: {_way_out(objective)}")


def _way_out(objective: Objective) -> str:
    once = [s.name for s in traced_layers(objective).values() if s.calls == 1 and s.name and _is_map(s)]
    example = f", such as {once[-1]!r}" if once else ""
    return f"choose a layer that runs once{example} ('esegeta-monai layers' lists them), or an input method"


def _is_map(layer: TracedLayer) -> bool:
    frame = layer.frames[0]
    return frame is not None and not frame.fixed and math.prod(frame.grid[1:]) > 1


def frames_of(objective: Objective, layer: str) -> list[Frame]:
    """Return the frame of each call of a layer.

    Raises:
        MethodError: the layer has no spatial map, or it is not known where its output lies.
    """
    traced = traced_layers(objective).get(layer)
    if traced is None:
        raise MethodError(f"layer {layer!r} is not used in the forward pass: choose another")
    frames = [f for f in traced.frames if f is not None]
    if traced.transform is not None:
        raise MethodError(unreadable(layer, traced.transform))
    if len(frames) < traced.calls:
        raise MethodError(_no_map(layer, traced.shape))
    return frames


def _no_map(layer: str, shape: Any) -> str:
    return (
        f"layer {layer!r} gives {shape} for a window, which is no spatial map, or not known to be one: choose another "
        "layer ('esegeta-monai layers' lists them with their shapes), or state its axes, such as layer_axes={"
        f"{layer!r}: 'n x y z c'}} (--layer-axes '{layer}: n x y z c')"
    )


def only_frame(objective: Objective, layer: str) -> Frame:
    """Return the frame of a layer that runs once and sees the whole window.

    Raises:
        MethodError: it runs several times, sees one slice, or has no spatial map.
    """
    check_calls(objective, layer, several=False)
    (frame,) = frames_of(objective, layer)
    if frame.fixed:
        raise MethodError(f"layer {layer!r} sees one slice of the window only: {_way_out(objective)}")
    return frame


def with_slice_axis(values: Tensor, plan: WindowPlan) -> Tensor:
    """Restore the axis that a 2D network does not see: (…, h, w) to, for example, (…, h, 1, w)."""
    return values if plan.slice_axis is None else values.unsqueeze(values.ndim - len(plan.roi) + 1 + plan.slice_axis)


def spatial_map(values: Tensor, objective: Objective, layer: str, *, lead: int = 1) -> Tensor:
    """Convert values of a layer that runs once (*leading axes, …) to a map (*leading axes, C, *positions).

    The channels are moved to the front, tokens are placed on their grid, without a class token, and axes are put in the
    order of the window, flips undone.

    Args:
        values: activations or gradients of the layer, in its own shape.
        objective: network and window plan.
        layer: dotted name.
        lead: number of leading axes: 1 for activations (n, …), 2 for gradients (k, n, …).

    Raises:
        MethodError: the layer has no spatial map, or runs several times; the message names the alternative.
    """
    return with_slice_axis(_to_map(only_frame(objective, layer), values, layer, lead), objective.plan)


def _to_map(frame: Frame, values: Tensor, layer: str, lead: int) -> Tensor:
    if not frame.fits(values, lead):
        raise MethodError(
            f"layer {layer!r} gives {tuple(values.shape[lead - 1 :])} for these windows, not the shape that it gives "
            "for others: choose another layer"
        )
    return frame.to_map(values, lead)


def map_of_last_call(values: Sequence[Tensor], objective: Objective, layer: str) -> Tensor:
    """Convert the activations (n, …) of the last call of a layer to a map (n, C, *positions) of the window.

    For a method that has verified that it needs this call. Arguments are those of `maps_of_calls`.

    Raises:
        MethodError: the layer has no spatial map.
    """
    frame = traced_layers(objective)[layer].frames[-1]
    if frame is None or frame.fixed:
        raise MethodError(_no_map(layer, tuple(values[-1].shape[1:])))
    return with_slice_axis(_to_map(frame, values[-1], layer, 1), objective.plan)


def maps_of_calls(values: Sequence[Tensor], objective: Objective, layer: str, *, lead: int = 1) -> list[Tensor]:
    """Convert the values (*leading axes, …) of each call to maps of the window (*leading axes, C, *positions).

    Calls that saw one slice each are put together. Arguments are those of `spatial_map`, with one tensor per call.

    Raises:
        MethodError: as `spatial_map`, or the slices of the calls are not those of the window.
    """
    check_calls(objective, layer, several=True)
    frames = frames_of(objective, layer)
    if len(values) != len(frames):
        raise MethodError(
            f"layer {layer!r} runs {len(values)} times on this window, but {len(frames)} times on another: "
            f"{_way_out(objective)}"
        )
    maps = assemble(frames, [_to_map(f, v, layer, lead) for f, v in zip(frames, values)])
    if maps is None:
        raise MethodError(f"the calls of layer {layer!r} do not see all slices of the window: {_way_out(objective)}")
    return [with_slice_axis(m, objective.plan) for m in maps]


def channel_axis(objective: Objective, layer: str) -> int:
    """Return the channel axis of a layer's raw output (n, …), for a layer that runs once.

    Raises:
        MethodError: the output is no spatial map, or the layer runs several times.
    """
    return only_frame(objective, layer).channel


def map_of_layer(
    network: nn.Module,
    layer: str,
    values: Tensor,
    x: Tensor,
    args: Any,
    kwargs: Any,
    declared: Mapping[str, str] | None = None,
) -> Tensor:
    """Convert a layer's output (n, …) for windows x (n, C, *roi) to (n, C, *positions), without an objective.

    Raises:
        MethodError: as `spatial_map`.
    """
    find_layer(network, layer)
    known = _TRACES.setdefault(network, {})
    key = ("call", tuple(x.shape[1:]), (*map(id, network.modules()), *module_names(network)))
    frame = known[key][layer].frames[0] if key in known else None
    if key not in known or (frame is not None and not frame.fits(values)):
        known[key] = trace_layers(network, x.shape[2:], lambda: network(x.detach(), *args, **kwargs))
    stated = {n: axes for n, axes in (declared or {}).items() if n == layer}
    traced = with_declared(known[key], stated, x.ndim - 2)[layer]
    frame = traced.frames[0]
    if traced.calls > 1:
        raise MethodError(
            f"layer {layer!r} runs {traced.calls} times in a pass, but the target reads one call: choose a layer that "
            "runs once ('esegeta-monai layers' lists them)"
        )
    if frame is None or frame.fixed:
        raise MethodError(_no_map(layer, traced.shape))
    return _to_map(frame, values, layer, 1)
