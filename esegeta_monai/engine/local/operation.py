"""A local operation: how a box of its result is computed from boxes of its operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from esegeta_monai.engine.local.reach import Axis, Box, Moved, Part, Reach, Spread
from esegeta_monai.engine.rules.operations import Operation

__all__ = ["Border", "Call", "Local", "along", "broadcast", "in_place_of", "within"]

Border = tuple[list[tuple[int, int]], float]
"""Positions to add before and after each axis of the operand, and their value."""


@dataclass(frozen=True)
class Call:
    """One call of an operation, as its row in the table of operations sees it.

    Attributes:
        operation: name and arguments; operands appear as slots.
        operands: the operands as they were in the recorded pass; only shape, dtype and device are read.
        out_shape: shape of the result.
    """

    operation: Operation
    operands: tuple[Tensor, ...]
    out_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first operand."""
        return tuple(self.operands[0].shape)

    def argument(self, name: str, position: int, default: Any = None) -> Any:
        """Return an argument by its name or by its position, the operation's first argument being 0."""
        if name in self.operation.kwargs:
            return self.operation.kwargs[name]
        return self.operation.args[position] if position < len(self.operation.args) else default


@dataclass(frozen=True)
class Local:
    """An operation whose result depends on its operands place by place.

    Attributes:
        reaches: what the result depends on, for each operand.
        compute: function of the operands' parts, the box of the result and the boxes of these parts that returns the
            result in its box. A part is None where the box of the result needs nothing of the operand.
        cost: multiplications per element of the result.
        whole_axes: axes of the result that are always computed whole, since constants lie along them.
        border: function of the box of the result and the box of the operand that returns the border to be added to the
            part of the (only) operand; None: no border.
    """

    reaches: tuple[Reach, ...]
    compute: Callable[[Sequence[Any], Box, Sequence[Box]], Tensor]
    cost: float = 1.0
    whole_axes: tuple[int, ...] = ()
    border: Callable[[Box, Box], Border] | None = None

    def widened(self, box: Box, shape: Sequence[int]) -> Box:
        """Return the box that is computed where ``box`` of a result of this shape is wanted."""
        if not self.whole_axes:
            return box
        return tuple((0, shape[i]) if i in self.whole_axes else side for i, side in enumerate(box))


def in_place_of(shape: Sequence[int], whole_axes: Sequence[int] = ()) -> Reach:
    """Return the reach of a result of the operand's shape: each element depends on the element at its own place, and on
    all along ``whole_axes``."""
    return Reach(shape, [Part(0, n) if i in whole_axes else (i, Moved(n, n)) for i, n in enumerate(shape)])


def broadcast(shape: Sequence[int], out_shape: Sequence[int]) -> Reach:
    """Return the reach of an operand of this shape that is broadcast to the result."""
    first = len(out_shape) - len(shape)
    axes: list[tuple[int, Axis]] = []
    for i, n in enumerate(shape):
        out = out_shape[first + i]
        axes.append((first + i, Moved(n, n) if n == out else Spread(out)))
    return Reach(out_shape, axes)


def within(constant: Tensor, box: Box) -> Tensor:
    """Cut a constant (*shape) that is broadcast to the result (*out) to what a box of the result needs of it."""
    first = len(box) - constant.ndim
    for i, n in enumerate(constant.shape):
        start, stop = box[first + i]
        if n != 1 and (start, stop) != (0, n):
            constant = constant.narrow(i, start, stop - start)
    return constant


def along(x: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Multiply a matrix (m, n) along one axis of length n of a tensor (…)."""
    return (x.movedim(axis, -1) @ matrix.T).movedim(-1, axis)
