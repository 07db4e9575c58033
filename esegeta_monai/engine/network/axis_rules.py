"""How each operation of torch moves the axes of a tensor: from the labels of its operands to those of its results.

A rule gets the arguments of the operation by name, and its results, whose shapes it reads. An operation that is not in
`RULES` gives results without known axes; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.network.axes import SPREAD, Axis, Label, Part, label_of, other, unknown

__all__ = ["RULES", "combined"]

Rule = Callable[[dict[str, Any], Sequence[Tensor]], list[Label | None]]


def combined(operands: Sequence[Tensor], shape: Sequence[int]) -> Label:
    """Return the label of an operation entry by entry on tensors of any shape, with broadcasting."""
    axes = []
    labels = [label for t in operands if (label := label_of(t)) is not None]
    for i, n in enumerate(shape):
        back = len(shape) - i
        there = [a for label in labels if len(label.axes) >= back and (a := label.axes[-back]).size == n]
        axes.append(_agreed(there, n))
    taken = {p.source for a in axes for p in a.parts}
    fixed: dict[int, tuple[int, int, int] | None] = {}
    for label in labels:
        for entry in label.fixed:
            fixed[entry[0]] = entry if fixed.get(entry[0], entry) == entry else None
    kept = tuple(sorted(e for d, e in fixed.items() if e is not None and d not in taken))
    return Label(tuple(axes), kept)


def _agreed(axes: Sequence[Axis], n: int) -> Axis:
    """Return what axes of equal length have in common; unknown if they contradict each other."""
    axes = [a for a in axes if a.parts] if n == 1 else axes
    axes = [a for a in axes if a.sources != {SPREAD}] or axes
    if not axes:
        return other(n)
    first = axes[0]
    if all(a == first for a in axes):
        return first
    if all(a.sources <= {None} for a in axes):
        return other(n)
    plain = [replace(a, parts=tuple(p.plain for p in a.parts)) for a in axes]
    return plain[0] if all(p == plain[0] for p in plain) else unknown(n)


def _written(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    """Label what is copied into another tensor."""
    source = given["src"]
    return [combined([source], outputs[0].shape) if label_of(source) is not None else None]


def _put(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    """Label a tensor where a mask of entries was set to one value."""
    whole, values = given["self"], given["values"]
    indices = [i for i in given["indices"] if i is not None]
    mask = indices[0] if len(indices) == 1 and indices[0].dtype == torch.bool else None
    if mask is None or values.numel() != 1 or len(given["indices"]) - 1 + mask.ndim != whole.ndim:
        return [None]
    return [combined([whole, mask], outputs[0].shape)]


def _label(given: dict[str, Any], *names: str) -> Label | None:
    return next((label for n in names if (label := label_of(given.get(n))) is not None), None)


def _keep(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    """Keep the axes of the first operand."""
    return [_label(given, "self", "input", "src", "query")]


def _resized(axis: Axis, n: int) -> Axis:
    """Return an axis after a convolution, pooling or interpolation along it."""
    if axis.size == n:
        return axis
    if axis.size == 1 and not axis.parts:  # a reshape has lost where the one position came from
        return Axis((Part(SPREAD, n),))
    if len(axis.parts) != 1 or axis.before or axis.after or axis.parts[0].rolled or not axis.parts[0].coarse:
        return unknown(n)
    return Axis((axis.parts[0].resized(n),))


def _resize(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label, shape = _label(given, "self", "input"), outputs[0].shape
    if label is None or len(label.axes) != len(shape):
        return [None]
    return [replace(label, axes=tuple(map(_resized, label.axes, shape)))]


def _convolved(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    (label,) = _resize(given, outputs)
    if label is None:
        return [None]
    return [replace(label, axes=(label.axes[0], other(outputs[0].shape[1]), *label.axes[2:]))]


def _padded(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label, shape = _label(given, "self"), outputs[0].shape
    if label is None:
        return [None]
    pads = list(given.get("pad") or given.get("padding") or [])
    axes = []
    for i, axis in enumerate(label.axes):
        k = 2 * (len(label.axes) - 1 - i)
        new = _resized(axis, shape[i])
        if k + 1 < len(pads) and new != axis and new.parts:
            pad = axis.parts[0].pad
            new = replace(new, parts=(replace(new.parts[0], pad=(pad[0] + pads[k], pad[1] + pads[k + 1])),))
        axes.append(new)
    return [replace(label, axes=tuple(axes))]


def _reshaped(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    return [replace(label, axes=tuple(_split(label.axes, tuple(outputs[0].shape))))]


def _split(axes: Sequence[Axis], shape: Sequence[int]) -> list[Axis]:
    """Distribute axes over the axes of another shape of as many entries, in row-major order."""
    result: list[Axis] = []
    i = 0
    while i < len(axes) or len(result) < len(shape):
        block, sizes = [], []
        have = want = 1
        if i < len(axes):
            block.append(axes[i])
            have, i = axes[i].size, i + 1
        if len(result) < len(shape):
            sizes.append(shape[len(result)])
            want = sizes[0]
        while have != want:
            if have < want:
                block.append(axes[i])
                have, i = have * axes[i].size, i + 1
            else:
                sizes.append(shape[len(result) + len(sizes)])
                want *= sizes[-1]
        result += [block[0]] if len(block) == len(sizes) == 1 else _distributed(block, sizes)
    return result


def _distributed(block: Sequence[Axis], sizes: Sequence[int]) -> list[Axis]:
    many = [a for a in block if a.size > 1]
    if len(many) == 1 and sum(n > 1 for n in sizes) == 1:  # only axes of length 1 come or go
        return [many[0] if n > 1 else Axis() for n in sizes]
    if any(a.before or a.after for a in many):
        return [unknown(n) for n in sizes]
    parts = [p for a in many for p in a.parts]
    result = []
    for n in sizes:
        taken: list[Part] = []
        while n > 1:
            part = parts.pop(0)
            if n % part.size == 0:
                n //= part.size
            elif part.size % n == 0:
                inner = part.size // n
                parts.insert(0, replace(part, size=inner))
                part, n = replace(part, size=n, step=part.step * inner), 1
            else:
                return [unknown(n) for n in sizes]
            taken.append(part)
        result.append(Axis(tuple(_joined(taken))))
    return result


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Join neighbours that a reshape has split."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if last is not None and part.source is None and last.source is None:
            result[-1] = Part(None, last.size * part.size)
        elif last is not None and last.step == part.step * part.size and _same_axis(last, part):
            result[-1] = replace(last, size=last.size * part.size, step=part.step)
        else:
            result.append(part)
    return result


def _same_axis(a: Part, b: Part) -> bool:
    return replace(a, size=1, step=1) == replace(b, size=1, step=1)


def _ordered(order: Callable[[dict[str, Any], int], Sequence[int]]) -> Rule:
    def rule(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
        label = _label(given, "self")
        if label is None:
            return [None]
        return [replace(label, axes=tuple(label.axes[i] for i in order(given, len(label.axes))))]

    return rule


def _swapped(given: dict[str, Any], n: int) -> list[int]:
    order = list(range(n))
    a, b = (given.get("dim0", -2), given.get("dim1", -1)) if n > 1 else (0, 0)
    order[a], order[b] = order[b], order[a]
    return order


def _turned(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    axes, (a, b) = list(label.axes), given.get("dims", (0, 1))
    for _ in range(given.get("k", 1) % 4):  # a quarter turn: flip along b, then swap
        axes[b] = _flip(axes[b])
        axes[a], axes[b] = axes[b], axes[a]
    return [replace(label, axes=tuple(axes))]


def _flip(axis: Axis) -> Axis:
    if axis.before or axis.after:
        return unknown(axis.size)
    if any(p.rolled for p in axis.parts):
        return unknown(axis.size)
    return replace(axis, parts=tuple(replace(p, flipped=not p.flipped, pad=p.pad[::-1]) for p in axis.parts))


def _flipped(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    dims = {d % len(label.axes) for d in given["dims"]}
    return [replace(label, axes=tuple(_flip(a) if i in dims else a for i, a in enumerate(label.axes)))]


def _rolled(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label, dims = _label(given, "self"), given.get("dims")
    if label is None or not dims:
        return [None]
    axes = list(label.axes)
    for shift, d in zip(given["shifts"], dims):
        axis = axes[d]
        if axis.sources <= {None} and not axis.before and not axis.after:
            continue
        if len(axis.parts) != 1 or axis.before or axis.after or axis.parts[0].size != axis.parts[0].whole:
            return [None]
        part = axis.parts[0]
        axes[d] = replace(axis, parts=(replace(part, rolled=(part.rolled + shift) % part.size),))
    return [replace(label, axes=tuple(axes))]


def _inserted(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    axes = list(label.axes)
    axes.insert(given["dim"] % (len(axes) + 1), Axis())
    return [replace(label, axes=tuple(axes))]


def _squeezed(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    dims = given.get("dim")
    chosen = range(len(label.axes)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {d % len(label.axes) for d in chosen}
    kept = (a for i, a in enumerate(label.axes) if i not in gone or a.size > 1)
    return [replace(label, axes=tuple(kept))]


def _expanded(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    """Label the copies along axes of `expand` and `repeat`: positions are not copied."""
    label, shape = _label(given, "self"), outputs[0].shape
    if label is None:
        return [None]
    new = len(shape) - len(label.axes)
    axes = [
        a if a.size == n else other(n) if a.size == 1 or a.sources <= {None} else unknown(n)
        for a, n in zip(label.axes, shape[new:])
    ]
    return [replace(label, axes=(*(other(n) for n in shape[:new]), *axes))]


def _without(label: Label, dims: Any, keep: bool) -> Label:
    """Return a label after the reduction of some axes, None or empty: of all."""
    every = range(len(label.axes))
    gone = {d % len(label.axes) for d in ([dims] if isinstance(dims, int) else dims or every)}
    axes = (_resized(a, 1) if i in gone else a for i, a in enumerate(label.axes) if keep or i not in gone)
    return replace(label, axes=tuple(axes))


def _reduced(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    return [_without(label, given.get("dim"), bool(given.get("keepdim", False)))] * len(outputs)


def _cut(axis: Axis, start: int, stop: int, step: int) -> Axis:
    """Return a slice of an axis."""
    n = axis.size
    length = len(range(start, stop, step))
    if (start, stop, step) == (0, n, 1):
        return axis
    if axis.sources <= {None}:
        return other(length)
    if step == 1 and start in (0, axis.before) and stop in (n, n - axis.after) and (axis.before or axis.after):
        return replace(axis, before=axis.before - start, after=axis.after - (n - stop))
    if length == 1 or len(axis.parts) != 1 or axis.before or axis.after or axis.parts[0].rolled:
        return unknown(length)
    part, cut = axis.parts[0], (start, n - stop)
    resized, pad = part.resized(length), part.pad
    if not part.coarse:
        return unknown(length)
    if step > 1:  # every other position, as where patches are merged
        return Axis((resized,)) if start < step and stop > n - step else unknown(length)
    if cut[0] <= pad[0] and cut[1] <= pad[1]:
        return Axis((replace(resized, pad=(pad[0] - cut[0], pad[1] - cut[1])),))
    if abs(cut[0] - cut[1]) <= 1:  # the middle, as where the output of unpadded convolutions is matched
        return Axis((resized,))
    return unknown(length)  # a part of the window


def _sliced(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    d = given.get("dim", 0) % len(label.axes)
    axes = list(label.axes)
    start, stop, step = slice(given.get("start"), given.get("end"), given.get("step", 1)).indices(axes[d].size)
    source = axes[d]
    axes[d] = _cut(source, start, stop, step)
    fixed = label.fixed
    if len(range(start, stop, step)) == 1:
        fixed = _fixed(label, source, start)
        axes[d] = Axis()
    return [Label(tuple(axes), fixed)]


def _fixed(label: Label, axis: Axis, index: int) -> tuple[tuple[int, int, int], ...]:
    """Return the fixed slices after one entry of an axis was taken."""
    part = axis.parts[0] if len(axis.parts) == 1 and not axis.before and not axis.after else None
    if part is None or part.source is None or part.source < 0 or not part.coarse or part.rolled:
        return label.fixed
    place = part.size - 1 - index if part.flipped else index
    return tuple(sorted([*label.fixed, (part.source, place, part.size)]))


def _selected(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    label = _label(given, "self")
    if label is None:
        return [None]
    d = given["dim"] % len(label.axes)
    fixed = _fixed(label, label.axes[d], given["index"] % label.axes[d].size)
    return [Label((*label.axes[:d], *label.axes[d + 1 :]), fixed)]


def _unbound(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    return [_selected({**given, "dim": given.get("dim", 0), "index": i}, [o])[0] for i, o in enumerate(outputs)]


def _parts(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    d, start, labels = given.get("dim", 0), 0, []
    for output in outputs:
        stop = start + output.shape[d]
        labels += _sliced({**given, "dim": d, "start": start, "end": stop, "step": 1}, [output])
        start = stop
    return labels


def _joined_tensors(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    """Label a concatenation: channels of several tensors, slices put together, or tokens with a class token."""
    tensors = [t for t in given["tensors"] if t.numel()]
    d = given.get("dim", 0) % outputs[0].ndim
    labels = [label_of(t) for t in tensors]
    known = [label for label in labels if label is not None]
    rest = [_agreed([k.axes[i] for k in known], n) for i, n in enumerate(outputs[0].shape)]
    fixed = known[0].fixed if all(k.fixed == known[0].fixed for k in known) else ()
    along = [label.axes[d] if label is not None else None for label in labels]
    if all(a is None or a.sources <= {None} for a in along):
        rest[d] = other(outputs[0].shape[d])
        source = _in_order(known) if len(known) == len(tensors) and all(t.shape[d] == 1 for t in tensors) else None
        if source is not None:
            rest[d] = Axis((Part(source, len(tensors)),))
        return [Label(tuple(rest), fixed)]
    here = [i for i, a in enumerate(along) if a is not None]
    rest[d] = unknown(outputs[0].shape[d])
    if len(here) == 1:
        axis = along[here[0]]
        assert axis is not None
        front = sum(t.shape[d] for t in tensors[: here[0]])
        rest[d] = replace(axis, before=axis.before + front, after=outputs[0].shape[d] - axis.size - front + axis.after)
    return [Label(tuple(rest), fixed)]


def _in_order(labels: Sequence[Label]) -> int | None:
    """Return the spatial axis whose slices are all of these tensors, in order; None: there is none."""
    for d in {e[0] for label in labels for e in label.fixed}:
        if [e for label in labels for e in label.fixed if e[0] == d] == [
            (d, i, len(labels)) for i in range(len(labels))
        ]:
            return d
    return None


def _stacked(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    d = given.get("dim", 0) % outputs[0].ndim
    labels = [label_of(t) for t in given["tensors"]]
    known = [label for label in labels if label is not None]
    shape = [n for i, n in enumerate(outputs[0].shape) if i != d]
    axes = [_agreed([k.axes[i] for k in known], n) for i, n in enumerate(shape)]
    source = _in_order(known) if len(known) == len(labels) else None
    axes.insert(d, other(len(labels)) if source is None else Axis((Part(source, len(labels)),)))
    fixed = known[0].fixed if all(k.fixed == known[0].fixed for k in known) else ()
    return [Label(tuple(axes), tuple(e for e in fixed if e[0] != source))]


def _product(rows: str, columns: str) -> Rule:
    def rule(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
        a, b, shape = label_of(given[rows]), label_of(given[columns]), outputs[0].shape
        axes = [other(n) for n in shape]
        if a is not None:
            axes[:-1] = a.axes[:-1]
        if b is not None:
            axes[-1] = b.axes[-1]
            if len(shape) == 3:
                axes[0] = _agreed([label.axes[0] for label in (a, b) if label is not None], shape[0])
        fixed = a.fixed if a is not None else b.fixed if b is not None else ()
        return [Label(tuple(axes), fixed)]

    return rule


def _attended(given: dict[str, Any], outputs: Sequence[Tensor]) -> list[Label | None]:
    query, value = _label(given, "query"), _label(given, "value")
    if query is None or value is None:
        return [None]
    return [replace(query, axes=(*query.axes[:-1], value.axes[-1]))]


RULES: dict[str, Rule] = {}


def _register(rule: Rule, names: str) -> None:
    RULES.update(dict.fromkeys(names.split(), rule))


_register(_keep, "_softmax _log_softmax _to_copy clone contiguous detach alias lift_fresh _prelu_kernel")
_register(_keep, "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit cudnn_batch_norm")
_register(_keep, "_native_batch_norm_legit_no_training miopen_batch_norm native_dropout _native_multi_head_attention")
_register(_keep, "batch_norm_elemt _batch_norm_no_update _batch_norm_with_update _fused_rms_norm")
# torch 2.8 does not mark all of these, or not their forms in place, as pointwise
_register(_keep, "leaky_relu elu celu selu hardtanh mish rrelu_with_noise hardswish log_sigmoid_forward")
_register(_keep, "channel_shuffle native_channel_shuffle")
_register(_written, "copy")
_register(_put, "index_put")
_register(_convolved, "convolution _convolution convolution_overrideable mkldnn_convolution cudnn_convolution")
_register(_convolved, "cudnn_convolution_transpose miopen_convolution slow_conv_transpose2d slow_conv_transpose3d")
_register(_convolved, "pixel_shuffle pixel_unshuffle")
_register(_resize, "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d")
_register(_resize, "_adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d fractional_max_pool2d")
_register(_resize, "upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d")
_register(_resize, "_upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa")
_register(_resize, "upsample_nearest1d upsample_linear1d _upsample_nearest_exact1d")
_register(_padded, "constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d")
_register(_padded, "replication_pad2d replication_pad3d")
_register(_reshaped, "view _unsafe_view _reshape_alias view_copy")
_register(_ordered(lambda given, n: [d % n for d in given["dims"]]), "permute")
_register(_ordered(_swapped), "transpose t")
_register(_turned, "rot90")
_register(_flipped, "flip")
_register(_rolled, "roll")
_register(_inserted, "unsqueeze")
_register(_squeezed, "squeeze")
_register(_expanded, "expand repeat")
_register(_reduced, "mean sum amax amin max min prod logsumexp var std norm linalg_vector_norm var_mean any all argmax")
_register(_sliced, "slice")
_register(_selected, "select")
_register(_unbound, "unbind")
_register(_parts, "split split_with_sizes chunk")
_register(_joined_tensors, "cat")
_register(_stacked, "stack")
_register(_product("self", "mat2"), "mm bmm")
_register(_product("mat1", "mat2"), "addmm")
_register(_product("batch1", "batch2"), "baddbmm")
_register(_attended, "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention")
_register(_attended, "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention")
