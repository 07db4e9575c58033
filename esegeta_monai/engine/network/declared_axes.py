"""Axes of a layer's output as the user states them, for layers where they cannot be found out.

A trace follows the axes of the window through a network (`esegeta_monai.engine.network.frames`). It cannot follow an
operation of one's own, an index computed from the data, or values that leave torch. The user then states the axes in
one line: ``"n x y z c"`` for channels last, or ``"n 1+(x=4 y=4 z=2) c"`` for tokens after a class token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from esegeta_monai.engine.network.axes import ROWS, Axis, Part
from esegeta_monai.engine.network.frames import Frame, TracedLayer
from esegeta_monai.errors import MethodError, UsageError

__all__ = ["DeclaredAxes", "layer_axes_of"]

SPATIAL = "xyz"
TOKEN = re.compile(r"(?:(\d+)\+)?\(([^()]*)\)(?:\+(\d+))?|(\S+)")
GROUPED = re.compile(r"(-?)([xyz])=(\d+)|(n)")


class DeclaredAxes:
    """The axes of a layer's raw output, parsed from a pattern.

    Args:
        pattern: one word per axis of the output, the first to the last: ``n`` windows, ``c`` channels, ``x``, ``y``,
            ``z`` the first, second and third spatial axis of the window, each once; ``-x``: runs against the window;
            ``1``: an axis of length 1. An axis made of several is written ``(x=4 y=4 z=2)``, the slowest first, with
            the number of positions of each; ``1+(...)`` and ``(...)+1`` are entries in front or behind that belong to
            no position, such as a class token.

    Raises:
        UsageError: the pattern cannot be read.

    >>> DeclaredAxes("n x y z c").dims, DeclaredAxes("n 1+(x=4 y=4 z=2) c").dims
    (3, 3)
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = " ".join(pattern.split())
        axes: list[tuple[int, list[tuple[str, int | None]], int]] = []  # entries before, (name, size), entries after
        for before, group, after, word in TOKEN.findall(self.pattern):
            if word:
                if not re.fullmatch(r"n|c|1|-?[xyz]", word):
                    raise self._error(f"{word!r} is no axis")
                axes.append((0, [(word, 1 if word == "1" else None)], 0))
                continue
            parts: list[tuple[str, int | None]] = []
            for part in group.split():
                match = GROUPED.fullmatch(part)
                if match is None:
                    raise self._error(f"{part!r} in parentheses has no length: write x=4")
                flip, name, size, rows = match.groups()
                parts.append((rows, None) if rows else (flip + name, int(size)))
            axes.append((int(before or 0), parts, int(after or 0)))
        names = [name.lstrip("-") for _, parts, _ in axes for name, _ in parts if name != "1"]
        self.dims = sum(name in SPATIAL for name in names)
        expected = sorted(["n", "c", *SPATIAL[: self.dims]])
        if sorted(names) != expected or not self.dims:
            raise self._error("it must name n, c, and x, y (and z) once each")
        if not any(name == "n" for name, _ in axes[0][1]):
            raise self._error("the first axis is that of the windows, n")
        self._axes = axes

    def _error(self, why: str) -> UsageError:
        return UsageError(
            f"axes {self.pattern!r} cannot be read: {why}; examples: 'n x y z c' (channels last), "
            "'n 1+(x=4 y=4 z=2) c' (tokens of 4 x 4 x 2 positions after a class token)"
        )

    def frame(self, layer: str, shape: Sequence[int] | None, dims: int) -> Frame:
        """Return the frame of a layer whose output has this shape.

        Args:
            layer: dotted name, for messages.
            shape: shape of the output without its first axis; None: it is no tensor.
            dims: number of spatial axes of a window.

        Raises:
            UsageError: the shape or the window contradicts the pattern.
        """
        says = f"layer {layer!r}: axes {self.pattern!r} do not fit"
        if shape is None or len(shape) + 1 != len(self._axes):
            raise UsageError(f"{says} the output's {0 if shape is None else len(shape) + 1} axes")
        if self.dims != dims:
            raise UsageError(f"{says} a window of {dims} spatial axes")
        axes, roles, channel, flips = [], [], 0, []
        for i, (before, parts, after) in enumerate(self._axes):
            at: list[int | None] = []
            made: list[Part] = []
            for name, size in parts:
                plain = name.lstrip("-")
                # an axis of length 1 is a second factor of the channels
                source = SPATIAL.index(plain) if plain in SPATIAL else ROWS if plain == "n" else None
                if name != plain and source is not None:
                    flips.append(source)
                length = size if size is not None else 1 if source == ROWS else shape[i - 1]
                # beside others in one axis the number of windows is open, which a part of length 1 would deny
                made.append(Part(source, 2 if source == ROWS and len(parts) > 1 else length))
                at.append(source)
                if plain == "c":
                    channel = i
            length = before + after + math.prod(p.size for p in made if p.source != ROWS)
            if i and length != shape[i - 1]:
                raise UsageError(f"{says} its shape {tuple(shape)}: axis {i} has {shape[i - 1]} entries, not {length}")
            axes.append(Axis(tuple(made), before, after))
            roles.append(tuple(at))
        return Frame(tuple(axes), tuple(roles), channel, tuple(sorted(flips)), (), dims)

    def apply(self, traced: TracedLayer, dims: int) -> TracedLayer:
        """Return the layer with this frame for each of its calls whose own is not known.

        Raises:
            UsageError: the pattern does not fit.
            MethodError: the trace has followed the axes and found others.
        """
        frame = self.frame(traced.name, traced.shape, dims)
        for known in traced.frames:
            if known is not None and (known.grid, known.flips) != (frame.grid, frame.flips):
                raise MethodError(
                    f"layer {traced.name!r}: axes {self.pattern!r} give the map (channels first) "
                    f"{_words(frame)}, but the network's own operations show {_words(known)}: omit them"
                )
        frames: list[Frame | None] = [known or frame for known in traced.frames]
        return replace(traced, frames=frames)


def _words(frame: Frame) -> str:
    flipped = f", axes {', '.join(SPATIAL[d] for d in frame.flips)} reversed" if frame.flips else ""
    return f"{tuple(frame.grid)}{flipped}"


def layer_axes_of(value: Mapping[str, str] | None) -> dict[str, str]:
    """Check the axes of layers by name, and return them as a dictionary.

    Raises:
        UsageError: no mapping of names to patterns, or a pattern that cannot be read.

    >>> layer_axes_of({"blocks.0": "n x y z c"})
    {'blocks.0': 'n x y z c'}
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        raise UsageError(f"layer_axes={value!r}: give a dictionary of layer name to axes, such as 'n x y z c'")
    return {str(layer): DeclaredAxes(pattern).pattern for layer, pattern in value.items()}
