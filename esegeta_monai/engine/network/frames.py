"""The frame of a layer's call: where the entries of its output lie in the window.

`trace_layers` runs a network once and follows the axes (`esegeta_monai.engine.network.axis_trace`). From this,
`Frame.to_map` puts the output of each call of a layer into the frame of the window: channels in front, tokens on
their grid, axes in the order of the window, flips undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.axes import ROWS, Axis, Label, Part, clear_label, put_label, window_label
from esegeta_monai.engine.network.axis_trace import AxisTrace, tensors_in
from esegeta_monai.engine.network.hooks import INPUT, LayerCall, first_tensor_or_none, on_output
from esegeta_monai.engine.network.model import out_of_memory
from esegeta_monai.errors import EsegetaError
from esegeta_monai.utils.upstream import active_transform

__all__ = ["Frame", "TracedLayer", "TracedLayers", "assemble", "module_names", "trace_layers"]


@dataclass(frozen=True)
class Frame:
    """Where the entries of a layer's raw output (n, …) lie in the window.

    Attributes:
        axes: the raw axes, the batch first.
        roles: per raw axis the parts' roles: `ROWS`, a spatial axis of the window, or None for channels.
        channel: the raw axis that has the channels.
        flips: spatial axes that run against the window.
        fixed: (spatial axis, index, length) of each axis along which the call saw one slice.
        dims: number of spatial axes.
    """

    axes: tuple[Axis, ...]
    roles: tuple[tuple[int | None, ...], ...]
    channel: int
    flips: tuple[int, ...]
    fixed: tuple[tuple[int, int, int], ...]
    dims: int

    @property
    def grid(self) -> tuple[int, ...]:
        """(C, *positions) of the map that `to_map` returns; 1 on axes along which the call saw one slice."""
        sizes: list[list[int]] = [[] for _ in range(self.dims + 1)]
        for axis, roles in zip(self.axes, self.roles):
            for part, role in zip(axis.parts, roles):
                if role != ROWS:
                    sizes[0 if role is None else role + 1].append(part.size)
        return tuple(math.prod(s) for s in sizes)

    def placed(self, values: Tensor) -> Tensor:
        """Put a map (…, C, *positions) from `to_map` where its slice lies, with zeros in all other slices."""
        for d, index, n in self.fixed:
            axis = values.ndim - self.dims + d
            wide = values.new_zeros(*values.shape[:axis], n, *values.shape[axis + 1 :])
            wide.narrow(axis, index, 1).copy_(values)
            values = wide
        return values

    @property
    def plain(self) -> bool:
        """True if the first axis is that of the windows alone."""
        return all(r == ROWS for r in self.roles[0]) and all(ROWS not in r for r in self.roles[1:])

    def fits(self, values: Tensor, lead: int = 1) -> bool:
        """Return True if raw values (*leading axes, n, …) have the shape that the layer gave when it was traced."""
        shape = values.shape[lead - 1 :]
        if len(shape) != len(self.axes):
            return False
        for length, axis, roles in zip(shape, self.axes, self.roles):
            rest = math.prod(p.size for p, r in zip(axis.parts, roles) if r != ROWS)
            rows = [p.size for p, r in zip(axis.parts, roles) if r == ROWS]
            windows, left = divmod(length - axis.before - axis.after, rest)
            alone = not rows or (rows == [1] and rest > 1)  # traced with one window: the order of the axes is open
            if left or (alone and windows != 1):
                return False
        return True

    def to_map(self, values: Tensor, lead: int = 1) -> Tensor:
        """Put raw values (*leading axes, n, …) into the window's frame: (*leading axes, n, C, *positions).

        Args:
            values: activations (n, …) or gradients (k, n, …) of the layer.
            lead: 1 for activations, 2 for gradients.
        """
        extra = lead - 1
        targets: list[tuple[tuple[int, ...], int]] = []  # (place in the map, axis of the unflattened values)
        sizes: list[int] = list(values.shape[:extra])
        for i, (axis, roles) in enumerate(zip(self.axes, self.roles)):
            length = values.shape[extra + i]
            if axis.before or axis.after:
                length -= axis.before + axis.after
                values = values.narrow(extra + i, axis.before, length)
            rest = math.prod(p.size for p, r in zip(axis.parts, roles) if r != ROWS)
            for number, (part, role) in enumerate(zip(axis.parts, roles)):
                place = (0,) if role == ROWS else (1,) if role is None else (2 + role, -part.step)
                targets.append(((*place, number) if role is None else place, len(sizes)))
                sizes.append(length // rest if role == ROWS else part.size)
        values = values.reshape(sizes)
        order = [axis for _, axis in sorted(targets)]
        lengths = [[sizes[a] for place, a in sorted(targets) if place[0] == target] for target in range(2 + self.dims)]
        values = values.permute(*range(extra), *order)
        values = values.reshape(*sizes[:extra], *(math.prod(s) for s in lengths))
        return values.flip([lead + 1 + d for d in self.flips]) if self.flips else values


def frame_of(label: Label, dims: int) -> Frame | None:
    """Return the frame of a layer's output, or None if its axes are not, or not certainly, those of a map.

    Args:
        label: label of the output.
        dims: number of spatial axes of the window.
    """
    axes = [a if a.parts else Axis((Part(None, 1),), a.before, a.after) for a in label.axes]
    if any((p.source is not None and p.source < ROWS) or p.rolled for a in axes for p in a.parts):
        return None
    inside = [all(p.source is None or not p.coarse for p in a.parts) for a in axes]
    named = [i for i, a in enumerate(axes) if inside[i] and None in a.sources and a.size > 1]
    channels = named or [i for i, a in enumerate(axes) if inside[i] and a.size > 1]
    missing = set(range(dims)) - {p.source for i, a in enumerate(axes) if i not in channels[:1] for p in a.parts}
    missing -= {d for d, _, _ in label.fixed}
    single = [i for i, a in enumerate(axes) if a.size == 1 and a.sources <= {None}]
    if len(channels) != 1 and not (not channels and single):
        return None
    channel = channels[0] if channels else single[1 if single[0] == 0 and len(single) > 1 else 0]
    single = [i for i in single if i != channel]
    roles: list[list[int | None]] = []
    for i, axis in enumerate(axes):
        at = [p.source for p in axis.parts]
        spatial = [s for s in at if s is not None and s >= 0]
        if i == channel:
            at = [None] * len(at)
        elif None in at and axis.size > 1:  # positions made finer by channels, as in a pixel shuffle
            if len(spatial) != 1 or at[0] != spatial[0] or ROWS in at:
                return None
            axes[i] = Axis((Part(spatial[0], axis.size, flipped=axis.parts[0].flipped),))
            if axis.before or axis.after or axis.parts[0].flipped:
                return None
            at = [spatial[0]]
        roles.append(at)
    if not any(ROWS in r for r in roles):  # traced with one window
        if single and single[0] == 0:
            axes[0], roles[0], single = Axis((Part(ROWS, 1),)), [ROWS], single[1:]
        else:
            axes[0], roles[0] = Axis((Part(ROWS, 1), *axes[0].parts), axes[0].before, axes[0].after), [ROWS, *roles[0]]
    for d in sorted(missing):
        if not single:
            return None
        i = single.pop(0)
        axes[i], roles[i] = Axis((Part(d, 1),)), [d]
    parts: dict[int, list[Part]] = {}
    for i, (axis, at) in enumerate(zip(axes, roles)):
        for part, role in zip(axis.parts, at):
            if role is not None and i != channel:
                parts.setdefault(role, []).append(part)
        if (axis.before or axis.after) and (i == channel or ROWS in at):
            return None
    if any(not _covers(p) for p in parts.values()) or any(d not in parts for d in set(range(dims)) - _slices(label)):
        return None
    if any(d in parts for d in _slices(label)):
        return None
    flips = tuple(d for d, p in sorted(parts.items()) if d != ROWS and p[0].flipped and p[0].whole > 1)
    return Frame(tuple(axes), tuple(map(tuple, roles)), channel, flips, label.fixed, dims)


def _slices(label: Label) -> set[int]:
    return {d for d, _, _ in label.fixed}


def _covers(parts: Sequence[Part]) -> bool:
    """Return True if parts are positions of one axis that cover it at equal distances."""
    ordered = sorted(parts, key=lambda p: -p.step)
    if not ordered[0].coarse or len({(p.whole, p.flipped) for p in ordered}) > 1:
        return False
    return all(a.step == b.step * b.size for a, b in pairwise(ordered))


@dataclass
class TracedLayer:
    """A layer in a trace.

    Attributes:
        name: dotted name.
        kind: class of the module.
        shape: shape of its last output, without batch; None: no tensor.
        frames: the frame of each call; None: it is no map, or not known to be one.
        transform: the transform of ``torch.func`` that it runs inside, such as vmap; None: there is none.
        sequential: True: a call reads what an earlier call has computed, so that the calls are steps of one
            computation, not views of the window.
    """

    name: str
    kind: str
    shape: tuple[int, ...] | None = None
    frames: list[Frame | None] = field(default_factory=list)
    sequential: bool = False
    transform: str | None = None

    @property
    def calls(self) -> int:
        """Number of calls in one forward pass."""
        return len(self.frames)


class TracedLayers(dict[str, TracedLayer]):
    """The layers that ran, in the order in which they finish, by their first name; other names of a module work too.

    A name with the ending `INPUT` finds the first input of a layer, which is not among the items.

    Args:
        names: the first name of each module, by all of its names.

    Attributes:
        inputs: the first inputs of the layers that ran, by their first name with the ending.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = {n + end: first + end for n, first in names.items() for end in ("", INPUT)}
        self.inputs: dict[str, TracedLayer] = {}

    def __missing__(self, name: str) -> TracedLayer:
        layer: TracedLayer | None = self.get(name)
        if layer is None:
            raise KeyError(name)
        return layer

    def __contains__(self, name: object) -> bool:
        return self.get(str(name)) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """Return a layer by any of its names, or the default if it did not run."""
        first = self.names.get(name, name)
        return self.inputs.get(first, default) if first.endswith(INPUT) else super().get(first, default)

    def clear(self) -> None:
        """Forget all layers and their inputs."""
        super().clear()
        self.inputs.clear()


def module_names(network: nn.Module) -> dict[str, str]:
    """Return the first name of each module of a network, by all of its names."""
    first = {id(module): name for name, module in network.named_modules()}
    return {name: first[id(module)] for name, module in network.named_modules(remove_duplicate=False)}


def trace_layers(
    network: nn.Module, roi: Sequence[int], run: Callable[[], Any], select: Callable[[Any], Any] = lambda output: output
) -> TracedLayers:
    """Follow the axes of the window through a network; the layers are in the order in which they finish.

    Args:
        network: called by ``run`` with windows (n, C, *roi), by position, by name, or in a dictionary or list.
        roi: shape of a window.
        run: runs the network once.
        select: the tensor to read from the network's own output.
    """
    layers = TracedLayers(module_names(network))
    trace = AxisTrace()
    inputs: list[Tensor] = []
    inside: list[nn.Module] = []  # a network may call itself

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        inside.append(module)
        if len(inside) > 1:
            return
        layers.clear()  # a pass that fails in inference mode is repeated
        for value in tensors_in((args, kwargs)):
            if value.ndim == len(roi) + 2 and tuple(value.shape[2:]) == tuple(roi):
                put_label(value, window_label(value.shape))
                inputs.append(value)

    def leave(*_: Any) -> None:
        inside.pop()

    def record(call: LayerCall) -> None:
        at_input = call.name.endswith(INPUT)
        table = layers.inputs if at_input else layers
        layer = table.pop(call.name, None) or TracedLayer(call.name, type(call.module).__name__)
        table[call.name] = layer
        layer.transform = active_transform()
        value = first_tensor_or_none(select(call.output) if call.name == "" else call.output)
        layer.shape = None if value is None or not value.ndim else tuple(value.shape[1:])
        label = None if value is None else trace.label(value)
        frame: Frame | None = None
        if value is not None and label is not None:
            layer.sequential |= call.name.removesuffix(INPUT) in label.through
            if not at_input:
                put_label(value, replace(label, through=label.through | {call.name}))
            known = label.known and len(label.axes) == value.ndim
            frame = frame_of(label, len(roi)) if known else None
        layer.frames.append(frame)

    handles = [
        network.register_forward_pre_hook(enter, with_kwargs=True),
        network.register_forward_hook(leave, always_call=True),
    ]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it hides the layers inside
        hooked = {n: m for n, m in network.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
        hooked |= {n + INPUT: m for n, m in hooked.items() if n}
        with on_output(hooked, record), trace:
            try:
                with torch.inference_mode():
                    run()
            except RuntimeError as error:
                if isinstance(error, EsegetaError) or out_of_memory(error):
                    raise
                with torch.inference_mode(False), torch.no_grad():  # it uses gradients in its forward pass
                    run()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()
        for value in chain(network.parameters(), network.buffers(), inputs):
            clear_label(value)
    return layers


def assemble(frames: Sequence[Frame], maps: Sequence[Tensor]) -> list[Tensor] | None:
    """Put maps of calls that each saw one slice together; None: the slices are not complete.

    Args:
        frames: the frame of each call.
        maps: the map of each call (…, n, C, *positions), from `Frame.to_map`.

    Returns:
        One map per view of the window: the maps themselves, if each call saw all of it.
    """
    views: list[dict[tuple[tuple[int, int, int], ...], Tensor]] = []
    for frame, values in zip(frames, maps):
        place = tuple((d, n) for d, _, n in frame.fixed)
        for view in views:
            alike = place == tuple((d, n) for d, _, n in next(iter(view)))
            if frame.fixed and alike and frame.fixed not in view:
                view[frame.fixed] = values
                break
        else:
            views.append({frame.fixed: values})
    results = []
    for view in views:
        first = next(iter(view))
        if not first:
            results.append(view[first])
            continue
        if len(first) > 1 or len(view) != first[0][2]:
            return None
        d, _, n = first[0]
        slices = [view[((d, i, n),)] for i in range(n)]
        results.append(torch.cat(slices, slices[0].ndim - frames[0].dims + d))
    return results
