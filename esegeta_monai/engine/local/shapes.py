"""Local operations that move elements: slices, permutations, changes of shape, concatenation, pixel shuffles.

Each function returns a `Local`, or None where the operation mixes places or its arguments are not known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.local.operation import Call, Local
from esegeta_monai.engine.local.reach import Axis, Box, Moved, Part, Ranges, Reach
from esegeta_monai.engine.rules.operations import Slot

__all__ = ["cat", "expand", "flip", "getitem", "narrow", "permute", "piece", "pixel_shuffle"]
__all__ += ["repeat", "reshape", "roll", "select"]


def _lengths(box: Box) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)


def _taken(call: Call, picks: Sequence[tuple[int | None, int, int]], steps: Sequence[int]) -> Local:
    """Return the operation that takes, of each axis of the operand, positions in order, or a single position.

    Args:
        call: the call.
        picks: for each axis of the operand the axis of the result (None: it is dropped), and first and last position.
        steps: distance of the positions taken along each axis.
    """
    axes: list[tuple[int, Axis] | Part] = []
    for (out, first, _), step, n in zip(picks, steps, call.shape):
        if out is None:
            axes.append(Part(first, first + 1))
        elif step == 1:
            axes.append((out, Moved(n, call.out_shape[out], first)))
        else:
            at = first + step * np.arange(call.out_shape[out])
            axes.append((out, Ranges(at, at + 1)))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        index = tuple(slice(None, None, step) for step in steps)
        x: Tensor = parts[0]
        return x[index].reshape(_lengths(box))

    return Local((Reach(call.out_shape, axes),), compute)


def getitem(call: Call) -> Local | None:
    """Indexing by integers, slices, None and an ellipsis."""
    index = call.argument("index", 1)
    items = list(index) if isinstance(index, tuple) else [index]
    if any(not (v is None or v is Ellipsis or isinstance(v, (int, slice))) or isinstance(v, bool) for v in items):
        return None
    taken = sum(isinstance(v, (int, slice)) for v in items)
    rest = [slice(None)] * (len(call.shape) - taken)
    where = items.index(Ellipsis) if Ellipsis in items else len(items)
    items = [*items[:where], *rest, *items[where + 1 :]]
    picks: list[tuple[int | None, int, int]] = []
    steps: list[int] = []
    out = 0
    for item in items:
        if item is None:
            out += 1
            continue
        n = call.shape[len(picks)]
        if isinstance(item, int):
            picks.append((None, item % n, item % n))
            steps.append(1)
            continue
        start, stop, step = item.indices(n)
        picks.append((out, start, stop))
        steps.append(step)
        out += 1
    return _taken(call, picks, steps)


def narrow(call: Call) -> Local | None:
    """`Tensor.narrow`."""
    dim, start = call.argument("dim", 1), call.argument("start", 2)
    if not isinstance(dim, int) or not isinstance(start, int):
        return None
    return piece(call, dim, start % max(1, call.shape[dim]))


def piece(call: Call, dim: int, start: int) -> Local:
    """Return the operation that takes positions along one axis, from ``start``, as many as the result has."""
    dim %= len(call.shape)
    picks = [(i, start if i == dim else 0, 0) for i in range(len(call.shape))]
    return _taken(call, picks, [1] * len(call.shape))


def select(call: Call, dim: Any = None, index: Any = None) -> Local | None:
    """`Tensor.select`; ``dim`` and ``index`` replace those of the call."""
    dim = call.argument("dim", 1) if dim is None else dim
    index = call.argument("index", 2) if index is None else index
    if not isinstance(dim, int) or not isinstance(index, int):
        return None
    dim %= len(call.shape)
    at = index % call.shape[dim]
    picks = [(None, at, at) if i == dim else (i - (i > dim), 0, 0) for i in range(len(call.shape))]
    return _taken(call, picks, [1] * len(call.shape))


def permute(call: Call) -> Local | None:
    """Permutations of axes: `permute`, `transpose`, `movedim` and ``t``."""
    name, n = call.operation.name, len(call.shape)
    if name == "permute":
        given = call.argument("dims", 1)
        order = list(given) if isinstance(given, (tuple, list)) else list(call.operation.args[1:])
    elif name in ("t", "T"):
        order = list(range(n))[::-1]
    elif name == "transpose":
        a, b = call.argument("dim0", 1), call.argument("dim1", 2)
        order = list(range(n))
        order[a], order[b] = order[b], order[a]
    else:
        source, destination = call.argument("source", 1), call.argument("destination", 2)
        moved = np.moveaxis(np.empty(range(1, n + 1)), source, destination)  # axis i has the length i + 1
        order = [size - 1 for size in moved.shape]
    order = [int(i) % n for i in order]
    if sorted(order) != list(range(n)):
        return None
    axes = [(order.index(i), Moved(size, size)) for i, size in enumerate(call.shape)]

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        return x.permute(order)

    return Local((Reach(call.out_shape, axes),), compute)


def flip(call: Call) -> Local | None:
    """`Tensor.flip`."""
    given = call.argument("dims", 1)
    dims = [given] if isinstance(given, int) else list(given)
    dims = [*dims, *(call.operation.args[2:] if isinstance(given, int) else ())]
    flipped = {int(i) % len(call.shape) for i in dims}
    axes: list[tuple[int, Axis] | Part] = []
    for i, n in enumerate(call.shape):
        at = np.arange(n)[::-1]
        axes.append((i, Ranges(at, at + 1)) if i in flipped else (i, Moved(n, n)))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        return x.flip(sorted(flipped))

    return Local((Reach(call.out_shape, axes),), compute)


def roll(call: Call) -> Local | None:
    """`torch.roll` along stated axes."""
    shifts, dims = call.argument("shifts", 1), call.argument("dims", 2)
    if dims is None or dims == ():
        return None
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [dims] if isinstance(dims, int) else list(dims)
    at: dict[int, np.ndarray] = {}
    for shift, dim in zip(shifts, dims):
        axis = dim % len(call.shape)
        at[axis] = np.roll(at.get(axis, np.arange(call.shape[axis])), shift)
    return _indexed(call, at)


def _indexed(call: Call, at: dict[int, np.ndarray]) -> Local:
    """Return the operation that takes positions of the operand along some axes."""
    axes: list[tuple[int, Axis] | Part] = [
        (i, Ranges(at[i], at[i] + 1)) if i in at else (i, Moved(n, n)) for i, n in enumerate(call.shape)
    ]

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        for i, positions in at.items():
            here = positions[box[i][0] : box[i][1]] - boxes[0][i][0]
            x = x.index_select(i, torch.from_numpy(here).to(x.device))
        return x

    return Local((Reach(call.out_shape, axes),), compute)


def repeat(call: Call) -> Local | None:
    """`Tensor.repeat` and `torch.tile`, of as many axes as the operand has."""
    if len(call.shape) != len(call.out_shape):
        return None
    lengths = zip(call.shape, call.out_shape)
    return _indexed(call, {i: np.arange(out) % n for i, (n, out) in enumerate(lengths) if n != out})


def expand(call: Call) -> Local | None:
    """`Tensor.expand` and `expand_as`."""
    first = len(call.out_shape) - len(call.shape)
    axes: list[tuple[int, Axis] | Part] = []
    for i, n in enumerate(call.shape):
        out = call.out_shape[first + i]
        axes.append((first + i, Moved(n, n)) if n == out else Part(0, 1))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        return x.expand(_lengths(box))

    return Local((Reach(call.out_shape, axes),), compute)


def cat(call: Call) -> Local | None:
    """Concatenation; constants may be among the tensors."""
    items, dim = call.argument("tensors", 0), int(call.argument("dim", 1, 0))
    n = len(call.out_shape)
    dim %= n
    tensors = [call.operands[v.index] if isinstance(v, Slot) else v for v in items]
    if any(t.ndim != n for t in tensors):  # torch skips an empty tensor of one axis
        return None
    starts = np.cumsum([0, *(t.shape[dim] for t in tensors)]).tolist()
    reaches: dict[int, Reach] = {}
    for item, t, start in zip(items, tensors, starts):
        if isinstance(item, Slot):
            axes = [(i, Moved(m, call.out_shape[i], -start if i == dim else 0)) for i, m in enumerate(t.shape)]
            reaches[item.index] = Reach(call.out_shape, axes)

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        pieces = []
        for item, start in zip(items, starts):
            if isinstance(item, Slot):
                part = parts[item.index]
            else:
                lo, hi = max(box[dim][0] - start, 0), min(box[dim][1] - start, item.shape[dim])
                part = item[tuple(slice(lo, hi) if i == dim else slice(*side) for i, side in enumerate(box))]
                part = part if lo < hi else None
            if part is not None:
                pieces.append(part)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    return Local(tuple(reaches[i] for i in range(len(reaches))), compute)


def reshape(call: Call) -> Local | None:
    """Changes of shape: axes are kept, split, or merged."""
    if any(isinstance(value, torch.dtype) for value in call.operation.args):
        return None  # other numbers, not another shape
    groups = _groups(call.shape, call.out_shape)
    axes: list[tuple[int, Axis] | Part] = [Part(0, n) for n in call.shape]
    wide: list[int] = []
    for ins, outs in groups:
        ins, outs = [i for i in ins if call.shape[i] > 1], [o for o in outs if call.out_shape[o] > 1]
        if len(ins) == len(outs) == 1:
            n = call.shape[ins[0]]
            axes[ins[0]] = (outs[0], Moved(n, n))
        elif len(outs) == 1 and ins:  # axes merge: the outermost one is cut, the others are whole
            inner = math.prod(call.shape[i] for i in ins[1:])
            at = np.arange(call.out_shape[outs[0]]) // inner
            axes[ins[0]] = (outs[0], Ranges(at, at + 1))
        elif len(ins) == 1 and outs:  # an axis splits: the outermost part is cut
            inner = math.prod(call.out_shape[o] for o in outs[1:])
            at = np.arange(call.out_shape[outs[0]]) * inner
            axes[ins[0]] = (outs[0], Ranges(at, at + inner))
            wide += outs[1:]
        else:
            wide += outs

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        sizes, cuts = list(_lengths(box)), []
        for ins, outs in groups:
            ins, outs = [i for i in ins if call.shape[i] > 1], [o for o in outs if call.out_shape[o] > 1]
            if len(outs) == 1 and len(ins) > 1:
                inner = math.prod(call.shape[i] for i in ins[1:])
                sizes[outs[0]] = parts[0].shape[ins[0]] * inner
                cuts.append((outs[0], box[outs[0]][0] - boxes[0][ins[0]][0] * inner))
        x = parts[0].reshape(sizes)
        for axis, start in cuts:
            x = x.narrow(axis, start, box[axis][1] - box[axis][0])
        return x

    return Local((Reach(call.out_shape, axes),), compute, 1.0, tuple(wide))


def _groups(shape: Sequence[int], out: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest groups of adjacent axes of two shapes that have equal numbers of elements.

    >>> _groups((2, 3, 4), (6, 4))
    [([0, 1], [0]), ([2], [1])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = o = 0
    while i < len(shape) or o < len(out):
        ins, outs = [i] if i < len(shape) else [], [o] if o < len(out) else []
        i, o = i + len(ins), o + len(outs)
        while (a := math.prod(shape[j] for j in ins)) != (b := math.prod(out[j] for j in outs)):
            if a < b:
                ins.append(i)
                i += 1
            else:
                outs.append(o)
                o += 1
        groups.append((ins, outs))
    return groups


def pixel_shuffle(call: Call) -> Local | None:
    """`torch.nn.functional.pixel_shuffle`, in two dimensions."""
    r = call.argument("upscale_factor", 1)
    if not isinstance(r, int) or len(call.shape) != 4:
        return None
    axes: list[tuple[int, Axis] | Part] = [(0, Moved(call.shape[0], call.shape[0])), Part(0, call.shape[1])]
    for i in (2, 3):
        at = np.arange(call.out_shape[i]) // r
        axes.append((i, Ranges(at, at + 1)))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x = torch.nn.functional.pixel_shuffle(parts[0], r)
        for i in (2, 3):
            x = x.narrow(i, box[i][0] - boxes[0][i][0] * r, box[i][1] - box[i][0])
        return x

    return Local((Reach(call.out_shape, axes),), compute, 1.0, (1,))
