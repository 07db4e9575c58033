"""Which elements of an operand each element of a result depends on, axis by axis.

A *box* is one interval per axis of a tensor, batch and channels included. Boxes follow from shapes and arguments of an
operation alone, in coordinates of the whole tensor, so that strides and borders need no alignment. A box may be larger
than what really depends on an element, never smaller.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Axis", "Box", "Interval", "Moved", "Part", "Ranges", "Reach", "Spread", "hull", "meet", "whole"]
__all__ += ["contains", "volume"]

Interval = tuple[int, int]
"""Start and stop (excluded) along one axis."""

Box = tuple[Interval, ...]
"""One interval per axis of a tensor."""


def whole(shape: Iterable[int]) -> Box:
    """Return the box of a whole tensor.

    >>> whole((1, 2))
    ((0, 1), (0, 2))
    """
    return tuple((0, int(n)) for n in shape)


def hull(a: Box | None, b: Box | None) -> Box | None:
    """Return the smallest box that contains two boxes; None stands for no box.

    >>> hull(((0, 2),), ((5, 6),))
    ((0, 6),)
    """
    if a is None or b is None:
        return b if a is None else a
    return tuple((min(p[0], q[0]), max(p[1], q[1])) for p, q in zip(a, b))


def meet(a: Box | None, b: Box | None) -> Box | None:
    """Return what two boxes have in common, or None.

    >>> meet(((0, 4),), ((3, 6),)), meet(((0, 2),), ((3, 6),))
    (((3, 4),), None)
    """
    if a is None or b is None:
        return None
    common = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b))
    return common if all(lo < hi for lo, hi in common) else None


def contains(a: Box, b: Box) -> bool:
    """Return True if box a contains box b."""
    return all(p[0] <= q[0] and q[1] <= p[1] for p, q in zip(a, b))


def volume(box: Box) -> int:
    """Return the number of elements of a box."""
    return math.prod(hi - lo for lo, hi in box)


class Axis(ABC):
    """How the positions along an axis of the result depend on those along an axis of the operand."""

    @abstractmethod
    def needs(self, start: int, stop: int) -> Interval:
        """Return the positions of the operand that these positions of the result depend on; empty: (0, 0)."""

    @abstractmethod
    def touches(self, start: int, stop: int) -> Interval | None:
        """Return the positions of the result that depend on these positions of the operand; None: none does."""


@dataclass(frozen=True)
class Moved(Axis):
    """The result at o is the operand at o + ``shift``.

    Args:
        size: length of the axis of the operand.
        out: length of the axis of the result.
        shift: in positions.
    """

    size: int
    out: int
    shift: int = 0

    def needs(self, start: int, stop: int) -> Interval:
        lo, hi = max(start + self.shift, 0), min(stop + self.shift, self.size)
        return (lo, hi) if lo < hi else (0, 0)

    def touches(self, start: int, stop: int) -> Interval | None:
        lo, hi = max(start - self.shift, 0), min(stop - self.shift, self.out)
        return (lo, hi) if lo < hi else None


@dataclass(frozen=True)
class Spread(Axis):
    """An axis of length 1 that is repeated along an axis of the result of length ``out`` (broadcasting)."""

    out: int

    def needs(self, start: int, stop: int) -> Interval:
        return (0, 1)

    def touches(self, start: int, stop: int) -> Interval | None:
        return (0, self.out)


class Ranges(Axis):
    """The result at o depends on the operand at ``lo[o] … hi[o] − 1``.

    Args:
        lo, hi: one entry per position of the result; ``lo ≥ hi``: the position depends on nothing.
    """

    def __init__(self, lo: np.ndarray, hi: np.ndarray) -> None:
        self.lo, self.hi = np.asarray(lo), np.asarray(hi)
        self._needs: dict[Interval, Interval] = {}  # intervals repeat: boxes of a grid share their sides
        self._touches: dict[Interval, Interval | None] = {}

    def needs(self, start: int, stop: int) -> Interval:
        key = (start, stop)
        if key not in self._needs:
            lo, hi = self.lo[start:stop], self.hi[start:stop]
            used = lo < hi
            self._needs[key] = (int(lo[used].min()), int(hi[used].max())) if used.any() else (0, 0)
        return self._needs[key]

    def touches(self, start: int, stop: int) -> Interval | None:
        key = (start, stop)
        if key not in self._touches:
            at = np.flatnonzero((self.lo < stop) & (self.hi > start) & (self.lo < self.hi))
            self._touches[key] = (int(at[0]), int(at[-1]) + 1) if len(at) else None
        return self._touches[key]


@dataclass(frozen=True)
class Part:
    """An axis of the operand; every element of the result needs its positions ``start … stop − 1``."""

    start: int
    stop: int


class Reach:
    """The dependence of a result on one operand.

    Args:
        out_shape: shape of the result.
        axes: for each axis of the operand the axis of the result that it belongs to and how, or a `Part`.
    """

    def __init__(self, out_shape: Sequence[int], axes: Sequence[tuple[int, Axis] | Part]) -> None:
        self.out, self.axes = whole(out_shape), tuple(axes)
        self.same = len(self.axes) == len(self.out) and all(
            isinstance(a, tuple) and a[0] == i and a[1] == Moved(n, n)
            for i, (a, (_, n)) in enumerate(zip(self.axes, self.out))
        )
        """True if each element of the result depends on the element at its own place alone."""

    def needs(self, box: Box) -> Box:
        """Return the box of the operand that a box of the result depends on; an empty side is (0, 0)."""
        if self.same:
            return box
        return tuple((a.start, a.stop) if isinstance(a, Part) else a[1].needs(*box[a[0]]) for a in self.axes)

    def touches(self, box: Box) -> Box | None:
        """Return the box of the result that depends on a box of the operand, or None."""
        if self.same:
            return box
        reached = list(self.out)
        for (start, stop), a in zip(box, self.axes):
            if isinstance(a, Part):
                if stop <= a.start or a.stop <= start:
                    return None
                continue
            at, axis = a
            touched = axis.touches(start, stop)
            if touched is None:
                return None
            reached[at] = (max(reached[at][0], touched[0]), min(reached[at][1], touched[1]))
            if reached[at][0] >= reached[at][1]:
                return None
        return tuple(reached)
