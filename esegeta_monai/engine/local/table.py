"""The table of operations: what each one's result depends on, place by place.

An operation that is not in the table, or that looks at the whole tensor (a norm over space, attention, a flattened
image), has no row: its result depends on everything, which is always true.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from esegeta_monai.engine.local import shapes, spatial
from esegeta_monai.engine.local.operation import Call, Local, broadcast, in_place_of, within
from esegeta_monai.engine.local.reach import Box, Moved, Part, Reach
from esegeta_monai.engine.rules.operations import Slot, map_tensors

__all__ = ["SPLITS", "local_of", "pieces"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _words(
    """add sub rsub mul div rdiv neg positive abs pow rpow float_power square sqrt rsqrt reciprocal exp expm1 exp2 log
    log1p log2 log10 sin cos tan atan sinh cosh asinh erf erfc sigmoid tanh hardsigmoid logsigmoid log_sigmoid softsign
    tanhshrink softshrink hardshrink relu relu6 leaky_relu elu celu selu gelu silu mish softplus hardtanh hardswish
    rrelu threshold clamp clamp_min clamp_max maximum minimum addcmul addcdiv lerp where masked_fill isnan isinf
    isfinite gt ge lt le eq ne not_equal greater greater_equal less less_equal logical_and logical_or logical_not
    logical_xor bitwise_and bitwise_or bitwise_not sign round floor ceil trunc to float double type type_as contiguous
    clone detach data dropout alpha_dropout feature_dropout feature_alpha_dropout cpu cuda as_tensor"""
)
"""Functions of the elements at one place; operands and constants are broadcast. Dropout is off: the recording refuses
it otherwise."""

_REDUCTIONS = _words("mean sum amax amin std var norm vector_norm logsumexp any all prod argmax argmin")
_ALONG = _words("softmax log_softmax softmin normalize cumsum")
"""Operations along one axis whose result has the operand's shape."""
SPLITS = _words("chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind")


def _elementwise(call: Call) -> Local | None:
    op, reaches = call.operation, []
    for operand in call.operands:
        reaches.append(broadcast(operand.shape, call.out_shape))

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        def cut(value: Any) -> Any:
            return map_tensors(lambda constant: within(constant, box), value)

        return _called(op, cut(op.args), cut(op.kwargs), parts)

    return Local(tuple(reaches), compute)


def _called(op: Any, args: Any, kwargs: Any, parts: Sequence[Any]) -> Tensor:
    """Call an operation with other constants; operands are never written to."""
    changed = dataclasses.replace(op, args=args, kwargs=kwargs)
    result: Tensor = changed.function(*parts)
    return result


def _plain(call: Call, reach: Reach, whole_axes: tuple[int, ...] = (), cost: float = 1.0) -> Local | None:
    """Return an operation of one operand that is called on a part as on the whole."""
    if len(call.operands) != 1:
        return None

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        result: Tensor = call.operation.function(*parts)
        return result

    return Local((reach,), compute, cost, whole_axes)


def _per_channel(call: Call) -> Local | None:
    """Operations with one constant per channel: PReLU, batch norm and instance norm with stored statistics."""
    op = call.operation
    if len(call.operands) != 1 or len(call.shape) < 2:
        return None
    if op.name == "instance_norm" and op.argument("use_input_stats", True):
        return None

    def compute(parts: Sequence[Any], box: Box, boxes: Sequence[Box]) -> Tensor:
        start, stop = box[1]

        def cut(constant: Tensor) -> Tensor:
            return constant if constant.numel() == 1 else constant[start:stop]

        return _called(op, map_tensors(cut, op.args), map_tensors(cut, op.kwargs), parts)

    return Local((in_place_of(call.shape),), compute)


def _layer_norm(call: Call) -> Local | None:
    """Norms over the last axis, that of channels; over several axes they look at space."""
    if len(call.operation.argument("normalized_shape")) > 1:
        return None
    axes = (len(call.shape) - 1,)
    return _plain(call, in_place_of(call.shape, axes), axes)


def _linear(call: Call) -> Local | None:
    """A linear layer along the last axis."""
    op, last = call.operation, len(call.shape) - 1
    weight = op.argument("weight")
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(op.argument("bias"), Slot):
        return None
    axes = [(i, Moved(n, n)) for i, n in enumerate(call.shape[:-1])]
    return _plain(call, Reach(call.out_shape, [*axes, Part(0, call.shape[-1])]), (last,), float(weight.shape[1]))


def _along(call: Call) -> Local | None:
    """Operations along one axis."""
    default, at = (1, 2) if call.operation.name == "normalize" else (None, 1)
    dim = call.argument("dim", at, default)
    if type(dim) is not int:
        return None
    axes = (dim % len(call.shape),)
    return _plain(call, in_place_of(call.shape, axes), axes)


def _reduction(call: Call) -> Local | None:
    """Reductions over stated axes."""
    at = 2 if call.operation.name in ("norm", "vector_norm") else 1
    dim = call.argument("dim", at, call.argument("axis", 99))
    dims = [dim] if type(dim) is int else dim
    if not isinstance(dims, (tuple, list)) or not dims or not all(type(i) is int for i in dims):
        return None
    n = len(call.shape)
    reduced = {i % n for i in dims}
    kept = len(call.out_shape) == n
    if not kept and len(call.out_shape) != n - len(reduced):
        return None
    axes: list[Any] = []
    for i, size in enumerate(call.shape):
        out = i if kept else i - sum(j < i for j in reduced)
        axes.append(Part(0, size) if i in reduced else (out, Moved(size, size)))
    return _plain(call, Reach(call.out_shape, axes))


_ROWS: dict[str, Callable[[Call], Local | None]] = {
    "conv": spatial.conv,
    "conv_transpose": spatial.conv_transpose,
    "max_pool": spatial.max_pool,
    "avg_pool": spatial.avg_pool,
    "adaptive_avg_pool": functools.partial(spatial.adaptive_pool, maximum=False),
    "adaptive_max_pool": functools.partial(spatial.adaptive_pool, maximum=True),
    "interpolate": spatial.interpolate,
    "pad": spatial.pad,
    "constant_pad_nd": spatial.pad,
    "batch_norm": _per_channel,
    "instance_norm": _per_channel,
    "prelu": _per_channel,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "linear": _linear,
    "getitem": shapes.getitem,
    "narrow": shapes.narrow,
    "select": shapes.select,
    "cat": shapes.cat,
    "flip": shapes.flip,
    "roll": shapes.roll,
    "pixel_shuffle": shapes.pixel_shuffle,
    **dict.fromkeys(("repeat", "tile"), shapes.repeat),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), shapes.expand),
    **dict.fromkeys(("permute", "transpose", "movedim", "t"), shapes.permute),
    **dict.fromkeys(
        ("view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze", "ravel"),
        shapes.reshape,
    ),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(_ALONG, _along),
    **dict.fromkeys(_REDUCTIONS, _reduction),
}
"""For each operation the function that returns its `Local`; names as `canonical_name` gives them."""


def local_of(call: Call) -> Local | None:
    """Return how an operation is computed place by place; None: its result depends on the whole of its operands."""
    row = _ROWS.get(call.operation.name)
    if row is None or call.operation.kwargs.get("out") is not None:
        return None
    return row(call)


def pieces(call: Call, results: Sequence[Tensor]) -> list[Local | None]:
    """Return how each result of a split, of any shape, is computed."""
    if len(call.operands) != 1:
        return [None] * len(results)
    unbind = call.operation.name == "unbind"
    position = 1 if unbind else 2
    dim, start, rows = call.argument("dim", position, 0), 0, []
    if not isinstance(dim, int):
        return [None] * len(results)
    for i, result in enumerate(results):
        one = Call(call.operation, call.operands, tuple(result.shape))
        if unbind:
            rows.append(shapes.select(one, dim, i))
        else:
            rows.append(shapes.piece(one, dim, start))
            start += result.shape[dim]
    return rows
