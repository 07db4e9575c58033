"""Labels of axes: where the axes of a tensor inside a network come from.

An axis comes from an axis of the window, from the batch, or from channels; a reshape makes axes of several parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

__all__ = ["ROWS", "SPREAD", "UNKNOWN", "Axis", "Label", "Part", "clear_label", "label_of", "put_label", "window_label"]

ROWS = -1
"""Source of the batch axis."""
UNKNOWN = -2
"""Source of an axis without a known source."""
SPREAD = -3
"""Source of an axis that a layer has made of one position: any axis of the window agrees with it."""


@dataclass(frozen=True)
class Part:
    """A factor of an axis, as a reshape makes them.

    Attributes:
        source: spatial axis of the window; `ROWS`; None: channels or anything else that is no position.
        size: number of entries.
        step: positions from one entry to the next, where a reshape has split the axis; else 1.
        whole: number of positions of the axis that it was split from.
        flipped: True: the entries run against the window.
        rolled: by how many positions the entries are rolled, as in shifted windows.
        pad: entries at either end that padding has added.
    """

    source: int | None
    size: int
    step: int = 1
    whole: int = 0
    flipped: bool = False
    rolled: int = 0
    pad: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if not self.whole:
            object.__setattr__(self, "whole", self.size)

    @property
    def coarse(self) -> bool:
        """True if the entries cover the whole axis of the window; else they are positions within a patch of it."""
        return self.step * self.size == self.whole

    @property
    def plain(self) -> Part:
        """The same without its resolution, if it covers the axis."""
        return replace(self, step=1, whole=self.size, pad=(0, 0)) if self.coarse else self

    def resized(self, n: int) -> Part:
        """Return the part with another number of positions."""
        return replace(self, size=n, step=1, whole=n, pad=(0, 0))


@dataclass(frozen=True)
class Axis:
    """An axis: its parts, the outermost first.

    Attributes:
        parts: its parts; none for an axis of length 1.
        before, after: entries in front of and behind them that belong to no position, such as a class token.
    """

    parts: tuple[Part, ...] = ()
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """Length of the axis."""
        return math.prod(p.size for p in self.parts) + self.before + self.after

    @property
    def sources(self) -> set[int | None]:
        """Sources of its parts."""
        return {p.source for p in self.parts}


@dataclass(frozen=True)
class Label:
    """The axes of a tensor.

    Attributes:
        axes: one for each axis.
        fixed: (spatial axis, index, length) of each axis of the window along which one slice was taken.
        through: names of the layers that it was computed by.
    """

    axes: tuple[Axis, ...]
    fixed: tuple[tuple[int, int, int], ...] = ()
    through: frozenset[str] = frozenset()

    @property
    def known(self) -> bool:
        """True if the source of every axis is known."""
        return not any(p.source in (UNKNOWN, SPREAD) for a in self.axes for p in a.parts)


def other(size: int) -> Axis:
    """Return an axis of channels."""
    return Axis((Part(None, size),) if size > 1 else ())


def unknown(size: int) -> Axis:
    """Return an axis without a known source."""
    return Axis((Part(UNKNOWN, size),) if size > 1 else ())


def window_label(shape: Sequence[int]) -> Label:
    """Return the label of windows (n, C, *roi)."""
    sources = (ROWS, None, *range(len(shape) - 2))
    return Label(tuple(Axis((Part(s, n),)) for s, n in zip(sources, shape)))


_NAME = "_esegeta_axes"


def label_of(value: Any) -> Label | None:
    """Return the label of a tensor; None: it is a constant, or was computed outside the trace."""
    return getattr(value, _NAME, None)


def put_label(value: Tensor, label: Label | None) -> None:
    """Give a tensor of any shape its label."""
    setattr(value, _NAME, label)


def clear_label(value: Tensor) -> None:
    """Remove the label of a tensor of any shape."""
    if hasattr(value, _NAME):
        delattr(value, _NAME)
