"""The drawing of a picture: planes, map, outline, colour bar and text on one figure, without pyplot."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from esegeta_monai.files.pictures.planes import Plane
from esegeta_monai.utils.files import INTENDED_USE, atomic

SIGNED = LinearSegmentedColormap.from_list("blue-white-red", ["#0b3fd1", "#ffffff", "#d1120b"])
UNSIGNED = colormaps["inferno"]
CONTOURS = {True: "#ffe000", False: "#00e0ff"}  # signed: away from blue and red; unsigned: away from inferno
INK, PAPER, MIDDLE_GREY = "#161616", "#ffffff", 0.35
OPACITY, OPAQUE_AT = 0.7, 0.4  # OPACITY from this share of the limit on

DPI, GAP, MARGIN, BAR, SWATCH = 120, 0.55, 0.35, 1.4, 0.5  # in inches, except DPI
PLANES_WIDTH, PLANES_HEIGHT, LEAST_WIDTH = 10.5, 4.6, 8.0


class Reading(NamedTuple):
    """The strongest point of a map and its colour scale; ``planes``: the voxel through which the planes are drawn."""

    channel: int
    voxel: tuple[int, ...]
    value: float
    limit: float
    limit_is: str
    message: str | None
    planes: tuple[int, ...]
    planes_are: str
    saturated: float | None


class Window(NamedTuple):
    """The grey scale: black at level − width / 2, white at level + width / 2."""

    level: float
    width: float
    origin: str


def colours(values: np.ndarray, limit: float, signed: bool) -> np.ndarray:
    """Return RGBA of map values of any shape; opacity grows with strength, so zero is transparent."""
    part = np.nan_to_num(values) / limit
    rgba = SIGNED((part.clip(-1, 1) + 1) / 2) if signed else UNSIGNED(part.clip(0, 1))
    strength = np.abs(part) if signed else part
    rgba[..., 3] = OPACITY * (strength / OPAQUE_AT).clip(0, 1)
    rgba[~np.isfinite(values), 3] = 0
    return rgba


def draw_scan(axes: Axes, cut: np.ndarray, grey: Window, extent: tuple[float, float]) -> None:
    """Draw a plane of the scan: (across, up) in grey, or (across, up, 3) in colour."""
    low, high = grey.level - grey.width / 2, grey.level + grey.width / 2
    box = (0, extent[0], 0, extent[1])
    if cut.ndim == 3:
        part = ((cut.swapaxes(0, 1) - low) / ((high - low) or 1)).clip(0, 1)
        axes.imshow(part, origin="lower", extent=box, interpolation="antialiased")
        return
    axes.imshow(cut.T, cmap="gray", vmin=low, vmax=high, origin="lower", extent=box, interpolation="antialiased")


def draw_map(axes: Axes, cut: np.ndarray, limit: float, signed: bool) -> None:
    axes.imshow(
        colours(cut.T, limit, signed), origin="lower", extent=axes.images[0].get_extent(), interpolation="nearest"
    )


def draw_contour(axes: Axes, cut: np.ndarray, colour: str) -> None:
    if cut.any():
        padded = np.pad(cut, 1).astype(np.float32)  # closes the outline at the border
        _, width, _, height = axes.images[0].get_extent()
        x = (np.arange(padded.shape[0]) - 0.5) * width / cut.shape[0]
        y = (np.arange(padded.shape[1]) - 0.5) * height / cut.shape[1]
        lines = axes.contour(x, y, padded.T, levels=[0.5], colors=[colour], linewidths=1.3)
        lines.set_path_effects([patheffects.withStroke(linewidth=2.6, foreground="black")])


def draw_cross(axes: Axes, across: float, up: float) -> None:
    """Draw a cross-hair around the point."""
    _, width, _, height = axes.images[0].get_extent()
    gap = 0.05 * max(width, height)
    style: dict[str, Any] = {"color": "white", "linewidth": 0.8, "alpha": 0.75}
    for start, end in ((0, across - gap), (across + gap, width)):
        axes.plot((start, end), (up, up), **style) if start < end else None
    for start, end in ((0, up - gap), (up + gap, height)):
        axes.plot((across, across), (start, end), **style) if start < end else None


def frame(axes: Axes, plane: Plane, name: str, lettered: bool) -> None:
    _, width, _, height = axes.images[0].get_extent()
    axes.set(xlim=(width, 0) if plane.mirrored and lettered else (0, width), ylim=(0, height), xticks=(), yticks=())
    axes.set_aspect("equal")
    for spine in axes.spines.values():
        spine.set_visible(False)
    if not lettered:
        return
    places = {"left": (-0.02, 0.5, "right", "center"), "right": (1.02, 0.5, "left", "center")}
    places |= {"bottom": (0.5, -0.015, "center", "top"), "top": (0.5, 1.015, "center", "bottom")}
    for side, (x, y, ha, va) in places.items():
        axes.text(x, y, plane.sides[side], transform=axes.transAxes, ha=ha, va=va, size=12, weight="bold", color=INK)
    axes.text(0, 1.015, name, transform=axes.transAxes, ha="left", va="bottom", size=9, color=INK)


class Sketch:
    """A figure of panels at one scale in mm, with text above and below and a colour bar at the right; no pyplot."""

    def __init__(
        self,
        extents: Sequence[tuple[float, float]],
        heading: Sequence[str],
        footing: Sequence[str],
        outlined: str | None,
        outline_colour: str,
    ) -> None:
        across, up = sum(extent[0] for extent in extents), max(extent[1] for extent in extents)
        scale = min((PLANES_WIDTH - GAP * len(extents)) / across, PLANES_HEIGHT / up)  # inches per mm
        drawn = across * scale + GAP * (len(extents) - 1)
        self.width = max(drawn + 2 * MARGIN + BAR, LEAST_WIDTH)
        top = self._lines(heading, (14, 10), self.width)
        below = [*([outlined] if outlined else []), *footing]
        bottom = self._lines(below, (9.5,), self.width - BAR)  # the words under the colour bar reach down beside them
        middle = up * scale + 2 * MARGIN
        self.height = sum(size * 1.45 / 72 for _, size in top + bottom) + middle + 0.35
        self.figure = Figure(figsize=(self.width, self.height), dpi=DPI, facecolor=PAPER)
        FigureCanvasAgg(self.figure)

        y = self.height - 0.12
        for line, size in top:
            y -= size * 1.45 / 72
            self._write(MARGIN, y, line, size, weight="bold" if size == top[0][1] else "normal")
        centre = y - middle / 2
        y -= middle
        for number, (line, size) in enumerate(bottom):
            y -= size * 1.45 / 72
            swatch = SWATCH if outlined and number == 0 else 0.0
            self._write(MARGIN + swatch, y, line, size)
            if swatch:
                self._stroke(MARGIN, y + size / 144, outline_colour)

        self.panels: list[Axes] = []
        x = MARGIN + max(0.0, (self.width - BAR - 2 * MARGIN - drawn) / 2)
        for wide, high in extents:
            self.panels.append(self._axes(x, centre - high * scale / 2, wide * scale, high * scale, facecolor="black"))
            x += wide * scale + GAP
        self._centre, self._tall = centre, up * scale

    def bar(self, reading: Reading, signed: bool, units: str, ends: tuple[str, str] | None = None) -> None:
        """Draw the colour scale on grey, as it appears on anatomy, with its units.

        Args:
            reading: limit of the scale.
            signed: True if the scale goes from -limit to limit.
            units: units of the map.
            ends: what the low and the high end stand for, in words.
        """
        high = min(self._tall, 2.8)
        axes = self._axes(self.width - BAR + 0.1, self._centre - high / 2, 0.18, high)
        ramp = np.linspace(-reading.limit if signed else 0, reading.limit, 256)[:, None]
        box = (0, 1, float(ramp[0, 0]), reading.limit)
        axes.imshow(np.full((1, 1), MIDDLE_GREY), cmap="gray", vmin=0, vmax=1, extent=box, aspect="auto")
        axes.imshow(colours(ramp, reading.limit, signed), origin="lower", extent=box, aspect="auto")
        axes.yaxis.tick_right()
        axes.set(xticks=(), ylim=box[2:])
        if reading.value == 0:
            axes.set_yticks([0.0], ["0"])
        else:
            ticks = [-reading.limit, 0.0, reading.limit] if signed else [0.0, reading.limit / 2, reading.limit]
            axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.tick_params(labelsize=9, colors=INK, length=3)
        axes.set_title(textwrap.fill(units, 18), size=9, color=INK, loc="left", parse_math=False)
        notes = [f"colours end at the {reading.limit_is}"] if reading.value else []
        if ends is not None:
            notes = [f"top: {ends[1]}", f"{'bottom' if signed else 'zero'}: {ends[0]}", *notes]
        note = "\n".join(textwrap.fill(line, 22) for line in notes)
        axes.text(0, -0.03, note, transform=axes.transAxes, va="top", size=7.5, color=INK)

    def stamp(self, message: str) -> None:
        """Write a prominent message across the planes."""
        box = {"facecolor": PAPER, "edgecolor": INK, "boxstyle": "round,pad=0.5"}
        x = (self.width - BAR) / 2 / self.width
        self.figure.text(x, self._centre / self.height, message, size=13, ha="center", va="center", color=INK, bbox=box)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG atomically."""
        with atomic(Path(path)) as temporary:
            self.figure.savefig(
                temporary, format="png", dpi=DPI, metadata={"Description": INTENDED_USE, "Software": None}
            )

    def _lines(self, texts: Sequence[str], sizes: Sequence[float], width: float) -> list[tuple[str, float]]:
        """Wrap texts to a width in inches; return each line with its font size (the last size repeats)."""
        lines = []
        for number, text in enumerate(texts):
            size = sizes[min(number, len(sizes) - 1)]
            characters = int((width - 2 * MARGIN) * 72 / (0.56 * size))
            lines += [(line, size) for line in textwrap.wrap(text, characters) or [""]]
        return lines

    def _write(self, x: float, y: float, text: str, size: float, weight: str = "normal") -> None:
        where = (x / self.width, y / self.height)
        self.figure.text(*where, text, size=size, weight=weight, color=INK, ha="left", va="bottom", parse_math=False)

    def _stroke(self, x: float, y: float, colour: str) -> None:
        ends = (x / self.width, (x + SWATCH - 0.1) / self.width)
        outline = [patheffects.withStroke(linewidth=4, foreground="black")]
        level = (y / self.height, y / self.height)
        self.figure.add_artist(Line2D(ends, level, color=colour, linewidth=2, path_effects=outline))

    def _axes(self, x: float, y: float, width: float, height: float, **style: Any) -> Axes:
        box = (x / self.width, y / self.height, width / self.width, height / self.height)
        return self.figure.add_axes(box, **style)
