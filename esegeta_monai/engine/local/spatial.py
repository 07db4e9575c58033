"""Local operations with a neighbourhood: convolution, pooling, interpolation, padding.

Each function returns a `Local`, or None where the operation looks at the whole tensor or its arguments are not known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.local.operation import Border, Call, Local, along
from esegeta_monai.engine.local.reach import Axis, Box, Moved, Part, Ranges, Reach
from esegeta_monai.engine.rules.operations import Slot

__all__ = ["adaptive_pool", "avg_pool", "conv", "conv_transpose", "interpolate", "max_pool", "pad"]

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
CHANNEL = 1


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """Return one integer per axis from one integer, or from one per axis."""
    if isinstance(value, (tuple, list, torch.Size)):
        return tuple(int(v) for v in value) if len(value) == axes else (int(value[0]),) * axes
    return (int(value),) * axes


class _Strided:
    """Neighbourhoods along each axis: the result at o reads ``o · stride − padding + dilation · j``, 0 ≤ j < size."""

    def __init__(
        self, shape: Sequence[int], out: Sequence[int], size: Any, stride: Any, padding: Any, dilation: Any
    ) -> None:
        d = len(shape) - 2
        self.shape, self.out = tuple(shape), tuple(out)
        self.size, self.stride, self.padding = _each(size, d), _each(stride, d), _each(padding, d)
        self.dilation = _each(dilation, d)
        self.extent = tuple(dil * (k - 1) + 1 for dil, k in zip(self.dilation, self.size))
        self.axes: list[Axis] = []
        for i in range(d):
            first = np.arange(out[2 + i]) * self.stride[i] - self.padding[i]
            n = shape[2 + i]
            self.axes.append(Ranges(first.clip(0, n), (first + self.extent[i]).clip(0, n)))

    def read(self, axis: int, start: int, stop: int) -> tuple[int, int]:
        """Return the positions that a part of the result reads, those beyond the border included."""
        s, p = self.stride[axis], self.padding[axis]
        return start * s - p, (stop - 1) * s - p + self.extent[axis]

    def border(self, value: float) -> Callable[[Box, Box], Border]:
        """Return the function that finds the padding of a part of the operand."""

        def find(box: Box, part: Box) -> Border:
            amounts = [(0, 0), (0, 0)]
            for i, (out, (lo, hi)) in enumerate(zip(box[2:], part[2:])):
                first, last = self.read(i, *out)
                amounts.append((lo - first, last - hi))
            return amounts, value

        return find

    def reach(self, channels: Part | tuple[int, Axis]) -> Reach:
        """Return what the result depends on."""
        n = self.shape[0]
        return Reach(self.out, [(0, Moved(n, n)), channels, *((2 + i, a) for i, a in enumerate(self.axes))])


def _spatial_axes(call: Call) -> int | None:
    """Return the number of spatial axes of an operand with batch and channels; None if it has no batch."""
    d = call.operands[0].ndim - 2
    name = str(getattr(call.operation.func, "__name__", ""))
    stated = next((int(c) for c in name if c.isdigit()), d)
    return d if d == stated and 1 <= d <= 3 and len(call.operands) == 1 else None


def conv(call: Call) -> Local | None:
    """Convolution with constant weights; the padding is that of the call (other modes are a `pad` before it)."""
    d, op = _spatial_axes(call), call.operation
    weight, bias = op.argument("weight"), op.argument("bias")
    if d is None or not isinstance(weight, Tensor) or isinstance(bias, Slot):
        return None
    stride, dilation, groups = op.argument("stride", 1), op.argument("dilation", 1), int(op.argument("groups", 1))
    padding = op.argument("padding", 0)
    size = tuple(weight.shape[2:])
    if padding == "valid":
        padding = 0
    elif padding == "same":  # an odd voxel is added after the image
        padding = tuple(dil * (k - 1) // 2 for dil, k in zip(_each(dilation, d), size))
    at = _Strided(call.shape, call.out_shape, size, stride, padding, dilation)

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        return CONV[d](parts[0], weight, bias, at.stride, 0, at.dilation, groups)

    cost = float(weight[0].numel())
    return Local((at.reach(Part(0, call.shape[1])),), compute, cost, (CHANNEL,), at.border(0.0))


def conv_transpose(call: Call) -> Local | None:
    """Transposed convolution with constant weights; positions that only ``output_padding`` adds hold the bias."""
    d, op = _spatial_axes(call), call.operation
    weight, bias = op.argument("weight"), op.argument("bias")
    if d is None or not isinstance(weight, Tensor) or isinstance(bias, Slot):
        return None
    groups, size = int(op.argument("groups", 1)), tuple(weight.shape[2:])
    stride, padding = _each(op.argument("stride", 1), d), _each(op.argument("padding", 0), d)
    dilation = _each(op.argument("dilation", 1), d)
    extent = [dil * (k - 1) for dil, k in zip(dilation, size)]
    axes: list[tuple[int, Axis] | Part] = [(0, Moved(call.shape[0], call.shape[0])), Part(0, call.shape[1])]
    for i in range(d):
        at, n = np.arange(call.out_shape[2 + i]) + padding[i], call.shape[2 + i]
        lo, hi = -((extent[i] - at) // stride[i]), at // stride[i] + 1
        axes.append((2 + i, Ranges(lo.clip(0, n), hi.clip(0, n))))

    def border(box: Box, part: Box) -> Border:
        amounts = [(0, 0), (0, 0)]
        for (start, stop), (lo, hi), s, p, e in zip(box[2:], part[2:], stride, padding, extent):
            first, last = lo * s - p, (hi - 1) * s - p + e
            amounts.append((max(0, -((start - first) // s)), max(0, -((last - (stop - 1)) // s))))
        return amounts, 0.0

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        out = CONV_TRANSPOSE[d](parts[0], weight, bias, stride, 0, 0, groups, dilation)
        amounts, _ = border(box, boxes[0])
        for i in range(d):
            start, stop = box[2 + i]
            first = (boxes[0][2 + i][0] - amounts[2 + i][0]) * stride[i] - padding[i]
            out = out.narrow(2 + i, start - first, stop - start)
        return out

    share = math.prod(call.shape[2:]) / math.prod(call.out_shape[2:])
    cost = share * weight.numel() / weight.shape[1] / groups
    return Local((Reach(call.out_shape, axes),), compute, cost, (CHANNEL,), border)


def max_pool(call: Call) -> Local | None:
    """Max pooling; where it returns indices, they count positions of the whole tensor."""
    d, op = _spatial_axes(call), call.operation
    if d is None or op.argument("return_indices") or not call.operands[0].is_floating_point():
        return None
    size, stride = op.argument("kernel_size"), op.argument("stride")
    at = _Strided(call.shape, call.out_shape, size, stride, op.argument("padding", 0), op.argument("dilation", 1))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        pooled: Tensor = MAX_POOL[d](parts[0], at.size, at.stride, 0, at.dilation)
        return pooled

    n = call.shape[1]
    return Local((at.reach((1, Moved(n, n))),), compute, math.prod(at.size), (), at.border(-math.inf))


def avg_pool(call: Call) -> Local | None:
    """Average pooling: sums of neighbourhoods over the divisor that each position has in the whole tensor."""
    d, op = _spatial_axes(call), call.operation
    if d is None:
        return None
    padding = op.argument("padding", 0)
    at = _Strided(call.shape, call.out_shape, op.argument("kernel_size"), op.argument("stride"), padding, 1)
    divisor, include = op.argument("divisor_override"), bool(op.argument("count_include_pad", True))
    counts: list[np.ndarray] = []
    for i in range(d):
        n, p = call.shape[2 + i], at.padding[i]
        first = np.arange(call.out_shape[2 + i]) * at.stride[i] - p
        last = np.minimum(first + at.size[i], n + p)
        counts.append(last - first if include else last.clip(0, n) - first.clip(0, n))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        part: Tensor = parts[0]
        here = [c[start:stop] for c, (start, stop) in zip(counts, box[2:])]
        if divisor or all(len(set(c.tolist())) == 1 for c in here):
            over = divisor or math.prod(int(c[0]) for c in here)
            return _sums(part, at, over)
        total = _sums(part, at, 1)
        for i, c in enumerate(here):
            total = total / torch.as_tensor(c, dtype=total.dtype, device=total.device).reshape(-1, *(1,) * (d - 1 - i))
        return total

    n = call.shape[1]
    return Local((at.reach((1, Moved(n, n))),), compute, math.prod(at.size), (), at.border(0.0))


def _sums(x: Tensor, at: _Strided, divisor: int) -> Tensor:
    """Return sums of neighbourhoods over a divisor (n, C, *out), of a tensor (n, C, *spatial) with its border."""
    if len(at.size) == 3:
        return F.avg_pool3d(x, at.size, at.stride, divisor_override=divisor)
    if len(at.size) == 2:
        return F.avg_pool2d(x, at.size, at.stride, divisor_override=divisor)
    return F.avg_pool2d(x[:, :, None], (1, *at.size), (1, *at.stride), divisor_override=divisor)[:, :, 0]


def adaptive_pool(call: Call, maximum: bool) -> Local | None:
    """Adaptive pooling: position o of M is the mean, or the maximum, of ⌊oN/M⌋ … ⌈(o+1)N/M⌉ − 1 of N positions."""
    d = _spatial_axes(call)
    if d is None or call.operation.argument("return_indices"):
        return None
    bins = []
    for n, m in zip(call.shape[2:], call.out_shape[2:]):
        at = np.arange(m)
        bins.append((at * n // m, -(-(at + 1) * n // m)))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        for i, (lo, hi) in enumerate(bins):
            (start, stop), first, axis = box[2 + i], boxes[0][2 + i][0], 2 + i
            sides = [(int(a) - first, int(b) - first) for a, b in zip(lo[start:stop], hi[start:stop])]
            if maximum:
                x = torch.cat([x.narrow(axis, a, b - a).amax(axis, keepdim=True) for a, b in sides], axis)
                continue
            matrix = x.new_zeros(len(sides), x.shape[axis])
            for row, (a, b) in enumerate(sides):
                matrix[row, a:b] = 1 / (b - a)
            x = along(x, axis, matrix)
        return x

    axes: list[tuple[int, Axis] | Part] = [(i, Moved(n, n)) for i, n in enumerate(call.shape[:2])]
    axes += [(2 + i, Ranges(lo, hi)) for i, (lo, hi) in enumerate(bins)]
    return Local((Reach(call.out_shape, axes),), compute, math.prod(call.shape[2:]) / math.prod(call.out_shape[2:]))


def interpolate(call: Call) -> Local | None:
    """Interpolation, with the coordinates that the whole tensor has: they come from torch itself, axis by axis."""
    d, mode = _spatial_axes(call), str(call.operation.argument("mode", "nearest"))
    if d is None:
        return None
    if mode == "area":
        return adaptive_pool(call, maximum=False)
    matrices = [_line(call, axis, mode) for axis in range(d)]
    if any(tuple(m.shape) != (call.out_shape[2 + i], call.shape[2 + i]) for i, m in enumerate(matrices)):
        return None
    axes: list[tuple[int, Axis] | Part] = [(i, Moved(n, n)) for i, n in enumerate(call.shape[:2])]
    for i, matrix in enumerate(matrices):
        used = matrix.cpu().numpy() != 0
        n = used.shape[1]
        axes.append((2 + i, Ranges(used.argmax(1), n - used[:, ::-1].argmax(1))))
    picks = mode.startswith("nearest")

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        for i, matrix in enumerate(matrices):
            (start, stop), (lo, hi) = box[2 + i], boxes[0][2 + i]
            here = matrix[start:stop, lo:hi]
            if picks:
                x = x.index_select(2 + i, here.argmax(1))
            elif here.shape[0] != here.shape[1] or not torch.equal(here, torch.eye(len(here)).to(here)):
                x = along(x, 2 + i, here)
        return x

    return Local((Reach(call.out_shape, axes),), compute, 2.0**d)


def _line(call: Call, axis: int, mode: str) -> Tensor:
    """Return the weights (M, N) with which torch interpolates N positions of one axis to M."""
    op, n = call.operation, call.shape[2 + axis]
    like = call.operands[0]
    unit = torch.eye(n, dtype=like.dtype, device=like.device)
    options: dict[str, Any] = {}
    for name in ("align_corners", "recompute_scale_factor"):
        if op.argument(name) is not None:
            options[name] = op.argument(name)
    size, scale = op.argument("size"), op.argument("scale_factor")
    pick = _picker(axis)
    if mode == "bicubic" or op.argument("antialias"):  # there is none in one dimension
        options["antialias"] = bool(op.argument("antialias"))
        sizes = {"size": (n, pick(size))} if size is not None else {"scale_factor": (1.0, pick(scale))}
        return F.interpolate(unit[None, None], mode=mode, **sizes, **options)[0, 0].T
    mode = "linear" if mode.endswith("linear") else mode
    one = {"size": pick(size)} if size is not None else {"scale_factor": pick(scale)}
    return F.interpolate(unit[None], mode=mode, **one, **options)[0].T


def _picker(axis: int) -> Callable[[Any], Any]:
    def pick(value: Any) -> Any:
        return value[axis] if isinstance(value, (tuple, list, torch.Size)) else value

    return pick


def pad(call: Call) -> Local | None:
    """Padding of every mode, by numbers that may be negative."""
    amounts = list(call.argument("pad", 1))
    mode = str(call.argument("mode", 2, "constant")) if call.operation.name == "pad" else "constant"
    value = call.argument("value", 3 if call.operation.name == "pad" else 2, None) or 0.0
    n_axes = call.operands[0].ndim
    if len(call.operands) != 1 or isinstance(value, (Slot, Tensor)):
        return None
    sides = [(0, 0)] * n_axes
    for i in range(len(amounts) // 2):
        sides[n_axes - 1 - i] = (int(amounts[2 * i]), int(amounts[2 * i + 1]))
    if mode != "constant":
        return _pad_by_index(call, sides, mode)
    axes: list[tuple[int, Axis] | Part] = [
        (i, Moved(n, out, -before)) for i, ((before, _), n, out) in enumerate(zip(sides, call.shape, call.out_shape))
    ]

    def border(box: Box, part: Box) -> Border:
        added = [
            (lo - (start - before), stop - before - hi)
            for (start, stop), (lo, hi), (before, _) in zip(box, part, sides)
        ]
        return added, float(value)

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        return x

    return Local((Reach(call.out_shape, axes),), compute, 1.0, (), border)


def _pad_by_index(call: Call, sides: Sequence[tuple[int, int]], mode: str) -> Local:
    """Padding that repeats positions of the operand; torch itself gives them, axis by axis."""
    positions: dict[int, Tensor] = {}
    axes: list[tuple[int, Axis] | Part] = []
    for i, (n, (before, after)) in enumerate(zip(call.shape, sides)):
        if not before and not after:
            axes.append((i, Moved(n, n)))
            continue
        line = torch.arange(n, dtype=torch.float64, device=call.operands[0].device)[None, None]
        positions[i] = F.pad(line, (before, after), mode=mode)[0, 0].long()
        lo = positions[i].cpu().numpy()
        axes.append((i, Ranges(lo, lo + 1)))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        x: Tensor = parts[0]
        for i, at in positions.items():
            start, stop = box[i]
            x = x.index_select(i, at[start:stop] - boxes[0][i][0])
        return x

    return Local((Reach(call.out_shape, axes),), compute)
