"""One picture per map: three planes through its strongest point, with all labels needed to read it."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.pictures.planes import Anatomy, Plane
from esegeta_monai.utils.files import INTENDED_USE

__all__ = ["INTENDED_USE", "save_picture"]

PERCENTILE = 99.5
SIGNED = LinearSegmentedColormap.from_list("blue-white-red", ["#0b3fd1", "#ffffff", "#d1120b"])
UNSIGNED = colormaps["inferno"]
CONTOURS = {True: "#ffe000", False: "#00e0ff"}  # signed: away from blue and red; unsigned: away from inferno
INK, PAPER, MIDDLE_GREY = "#161616", "#ffffff", 0.35
OPACITY, OPAQUE_AT = 0.8, 0.5  # full opacity from half of the limit on

DPI, GAP, MARGIN, BAR, SWATCH = 120, 0.55, 0.35, 1.4, 0.5  # in inches, except DPI
PLANES_WIDTH, PLANES_HEIGHT, LEAST_WIDTH = 10.5, 4.6, 8.0


class Reading(NamedTuple):
    """The strongest point of a map and its colour scale."""

    channel: int
    voxel: tuple[int, ...]
    value: float
    limit: float
    limit_is: str
    message: str | None


class Window(NamedTuple):
    """The grey scale: black at level − width / 2, white at level + width / 2."""

    level: float
    width: float
    origin: str


def save_picture(
    path: str | os.PathLike[str],
    scan: torch.Tensor,
    attribution: torch.Tensor,
    prediction_contour: torch.Tensor | None = None,
    *,
    signed: bool,
    case: str,
    method: str,
    target: str,
    class_name: str | None = None,
    units: str = "attribution",
    channel_names: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
    convention: Literal["radiological", "neurological"] = "radiological",
) -> dict[str, Any]:
    """Write a PNG: axial, coronal and sagittal plane through the strongest point of the map, or one panel in 2D.

    The picture shows the scan in grey, the outline of the prediction, and the map. The map's opacity grows with its
    strength, so that anatomy stays visible. Signed maps go from blue through white (zero) to red, up to the 99.5th
    percentile of |a| on either side; unsigned maps from 0 to their 99.5th percentile in a perceptually uniform colour
    map. If the percentile is zero, it is taken over non-zero voxels, and the colour bar states this.

    Planes follow the voxel axes and have the letters of the nearest anatomical axes; voxels have their true
    proportions. A 2D image without world coordinates (an identity affine, as in PNG files) has no letters.

    Args:
        path: the PNG, written atomically.
        scan: (C, *spatial) in 2D or 3D. A MetaTensor's affine gives letters, proportions and world coordinates.
        attribution: map (C or 1, *spatial) on the grid of ``scan``.
        prediction_contour: mask (*spatial) or (1, *spatial) on that grid; voxels above 0.5 are outlined.
        signed: True if the sign of the map is meaningful.
        case, method, target, class_name: names to print.
        units: units of the map, for the colour bar.
        channel_names: names of the scan's channels. The channel with the strongest point is shown and named.
        window: (level, width) of the grey scale in units of the scan; None: 1st to 99th percentile of the channel.
        convention: ``radiological`` (the viewer's right is the patient's left) or ``neurological``.

    Returns:
        Description of the picture, JSON-ready: ``channel``, ``voxel``, ``world`` (RAS mm or None), ``value``, ``limit``
        of the colours, ``window`` (level, width), ``convention``, ``sides`` (plane: letters) and ``message``: None, or
        that the map is zero or has voxels that are not finite.

    Raises:
        InputError: scan, map and contour are not on one grid, or the affine is singular.
        UsageError: the convention is unknown.

    Example:
        >>> import tempfile
        >>> scan = MetaTensor(torch.rand(1, 10, 10, 10), affine=torch.diag(torch.tensor([-2.0, 2.0, 2.0, 1.0])))
        >>> attribution = torch.zeros(1, 10, 10, 10)
        >>> attribution[0, 9, 4, 5] = -3.0
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     drawn = save_picture(folder + "/a.png", scan, attribution, signed=True, case="case_1",
        ...                          method="Saliency", target="MultiClassMask", class_name="tumour")
        >>> drawn["world"], drawn["sides"]["axial"]
        ([-18.0, 8.0, 10.0], {'left': 'R', 'right': 'L', 'bottom': 'P', 'top': 'A'})
    """
    if convention not in ("radiological", "neurological"):
        raise UsageError(f"convention is radiological or neurological, not {convention!r}")
    image, values = _array(scan), _array(attribution)
    contour = None if prediction_contour is None else _array(prediction_contour)
    flat = image.ndim == 3
    _check(image, values, contour)
    anatomy, oriented = _anatomy(scan, image)
    if flat:
        image, values = image[..., None], values[..., None]
    mask = None if contour is None else (contour > 0.5).reshape(image.shape[1:])

    reading = _read(values, mask, signed)
    shown = min(reading.channel, len(image) - 1)
    grey = _window(image[shown], window)
    planes = anatomy.planes(radiological=convention == "radiological" and oriented)

    heading = [f"{method}: {class_name or target}", f"case {case}  ·  target {target}"]
    if len(image) > 1 or channel_names:
        heading[1] += f"  ·  channel {shown}" + (f" ({channel_names[shown]})" if channel_names else "")
    place = "no strongest point" if reading.value == 0 else f"strongest point: {reading.value:.4g} at "
    if reading.value != 0:
        place += f"voxel ({', '.join(map(str, reading.voxel[: 2 if flat else 3]))})"
        place += ", RAS ({:.1f}, {:.1f}, {:.1f}) mm".format(*anatomy.world(reading.voxel)) if oriented else ""
    footing = [
        place,
        f"window: level {grey.level:.4g}, width {grey.width:.4g} ({grey.origin})",
        _orientation_text(anatomy, convention) if oriented else "orientation unknown: the image has no world affine",
        *([reading.message] if reading.message else []),
        INTENDED_USE,
    ]

    outlined = None if mask is None else f"outline: prediction{'' if class_name is None else f', {class_name}'}"
    sketch = _Sketch([anatomy.extent(plane) for plane in planes], heading, footing, outlined, CONTOURS[signed])
    for axes, plane in zip(sketch.panels, planes):
        _draw_scan(axes, anatomy.cut(image[shown], reading.voxel, plane), grey, anatomy.extent(plane))
        _draw_map(axes, anatomy.cut(values[reading.channel], reading.voxel, plane), reading.limit, signed)
        if mask is not None:
            _draw_contour(axes, anatomy.cut(mask, reading.voxel, plane), CONTOURS[signed])
        if reading.value != 0:
            _draw_cross(axes, *anatomy.position(reading.voxel, plane))
        _frame(axes, plane, plane.name if oriented else "", oriented)
    if reading.message and reading.value == 0:
        sketch.stamp(reading.message)
    sketch.bar(reading, signed, units)
    sketch.save(Path(path))
    return {
        "channel": shown,
        "voxel": list(reading.voxel[: 2 if flat else 3]),
        "world": list(anatomy.world(reading.voxel)) if oriented else None,
        "value": reading.value,
        "limit": reading.limit,
        "window": [grey.level, grey.width],
        "convention": convention if oriented else None,
        "sides": {plane.name: plane.sides for plane in planes} if oriented else {},
        "message": reading.message,
    }


# ---- content --------------------------------------------------------------------------------------------------------


def _array(tensor: torch.Tensor) -> np.ndarray:
    plain = tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor
    return plain.detach().cpu().float().numpy()


def _check(image: np.ndarray, values: np.ndarray, contour: np.ndarray | None) -> None:
    if image.ndim not in (3, 4):
        raise InputError(f"a scan to draw is (C, *spatial) in 2D or 3D, got {image.shape}")
    if values.shape[1:] != image.shape[1:] or len(values) not in (1, len(image)):
        raise InputError(f"the map {values.shape} does not lie on the grid of the scan {image.shape}")
    if contour is not None and contour.shape not in (image.shape[1:], (1, *image.shape[1:])):
        raise InputError(f"the prediction {contour.shape} does not lie on the grid of the scan {image.shape}")


def _anatomy(scan: torch.Tensor, image: np.ndarray) -> tuple[Anatomy, bool]:
    affine, oriented = display_affine(scan)
    size = image.shape[1:]
    return Anatomy(size if len(size) == 3 else (*size, 1), affine), oriented


def display_affine(scan: torch.Tensor) -> tuple[np.ndarray, bool]:
    """Return the 4x4 affine for drawing a scan (C, *spatial), and True if its orientation is known.

    The affine maps voxels to RAS mm. For a 2D image without world coordinates (an identity affine, as in PNG files) it
    is a rotation that shows the image upright.
    """
    affine = np.eye(4)
    if isinstance(scan, MetaTensor):
        affine = np.array(to_affine_nd(3, scan.affine.detach().cpu().numpy()), dtype=np.float64)
        if scan.meta.get(MetaKeys.SPACE) == SpaceKeys.LPS:
            affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    if scan.ndim == 4:
        return affine, isinstance(scan, MetaTensor)
    if not np.array_equal(affine[:3, :3], np.eye(3)):
        return affine, True
    # Readers of photographs give (x, y), arrays are (row, column); either way y and rows count downwards.
    name = str(scan.meta.get(ImageMetaKey.FILENAME_OR_OBJ, "")) if isinstance(scan, MetaTensor) else ""
    x_first = name.lower().endswith((".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"))
    down = [[1, 0, 0, 0], [0, -1, 0, 0]] if x_first else [[0, 1, 0, 0], [-1, 0, 0, 0]]
    return np.array([*down, [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64), False


def _read(values: np.ndarray, mask: np.ndarray | None, signed: bool) -> Reading:
    """Return channel and voxel of the strongest value of (C, *spatial), and the limit of the colour scale."""
    finite = np.isfinite(values)
    strength = np.where(finite, np.abs(values) if signed else np.maximum(values, 0), 0)
    channel, *voxel = (int(i) for i in np.unravel_index(strength.argmax(), strength.shape))
    message = None if finite.all() else f"{int((~finite).sum())} voxels of the map are not finite and left blank"
    if not strength.any():
        message = message or "The map is zero everywhere" + ("" if signed else " or below")
        inside = (
            np.argwhere(mask) if mask is not None and mask.any() else np.array([[n - 1 for n in values.shape[1:]]]) / 2
        )
        return Reading(0, tuple(int(i) for i in inside.mean(axis=0)), 0.0, 1.0, "no scale", message)
    limit, limit_is = float(np.percentile(strength, PERCENTILE)), f"{PERCENTILE}th percentile"
    if limit == 0:
        limit, limit_is = (
            float(np.percentile(strength[strength > 0], PERCENTILE)),
            f"{PERCENTILE}th percentile of non-zero voxels",
        )
    return Reading(channel, tuple(voxel), float(values[channel][tuple(voxel)]), limit, limit_is, message)


def _window(image: np.ndarray, given: tuple[float, float] | None) -> Window:
    if given is not None:
        return Window(float(given[0]), float(given[1]), "as given")
    finite = image[np.isfinite(image)]
    low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
    return Window(float(low + high) / 2, float(high - low) or 1.0, "1st to 99th percentile")


def _orientation_text(anatomy: Anatomy, convention: str) -> str:
    side = "left" if convention == "radiological" else "right"
    text = f"{convention} convention: the patient's {side} is on the viewer's right"
    if anatomy.tilt > 1:
        text += f"; oblique scan: letters name the nearest axes, up to {anatomy.tilt:.0f}° away"
    return text


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _colours(values: np.ndarray, limit: float, signed: bool) -> np.ndarray:
    """Return RGBA of map values; opacity grows with strength, so zero is transparent."""
    part = np.nan_to_num(values) / limit
    rgba = SIGNED((part.clip(-1, 1) + 1) / 2) if signed else UNSIGNED(part.clip(0, 1))
    strength = np.abs(part) if signed else part
    rgba[..., 3] = OPACITY * (strength / OPAQUE_AT).clip(0, 1)
    rgba[~np.isfinite(values), 3] = 0
    return rgba


def _draw_scan(axes: Axes, cut: np.ndarray, grey: Window, extent: tuple[float, float]) -> None:
    low, high = grey.level - grey.width / 2, grey.level + grey.width / 2
    box = (0, extent[0], 0, extent[1])
    axes.imshow(cut.T, cmap="gray", vmin=low, vmax=high, origin="lower", extent=box, interpolation="antialiased")


def _draw_map(axes: Axes, cut: np.ndarray, limit: float, signed: bool) -> None:
    axes.imshow(
        _colours(cut.T, limit, signed), origin="lower", extent=axes.images[0].get_extent(), interpolation="nearest"
    )


def _draw_contour(axes: Axes, cut: np.ndarray, colour: str) -> None:
    if cut.any():
        padded = np.pad(cut, 1).astype(np.float32)  # closes the outline at the border
        _, width, _, height = axes.images[0].get_extent()
        x = (np.arange(padded.shape[0]) - 0.5) * width / cut.shape[0]
        y = (np.arange(padded.shape[1]) - 0.5) * height / cut.shape[1]
        lines = axes.contour(x, y, padded.T, levels=[0.5], colors=[colour], linewidths=1.3)
        lines.set_path_effects([patheffects.withStroke(linewidth=2.6, foreground="black")])


def _draw_cross(axes: Axes, across: float, up: float) -> None:
    """Draw a cross-hair around the point."""
    _, width, _, height = axes.images[0].get_extent()
    gap = 0.05 * max(width, height)
    style: dict[str, Any] = {"color": "white", "linewidth": 0.8, "alpha": 0.75}
    for start, end in ((0, across - gap), (across + gap, width)):
        axes.plot((start, end), (up, up), **style) if start < end else None
    for start, end in ((0, up - gap), (up + gap, height)):
        axes.plot((across, across), (start, end), **style) if start < end else None


def _frame(axes: Axes, plane: Plane, name: str, lettered: bool) -> None:
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


class _Sketch:
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
        top = self._lines(heading, (14, 10))
        bottom = self._lines([*([outlined] if outlined else []), *footing], (9.5,))
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

    def bar(self, reading: Reading, signed: bool, units: str) -> None:
        """Draw the colour scale on grey, as it appears on anatomy, with its units."""
        high = min(self._tall, 2.8)
        axes = self._axes(self.width - BAR + 0.1, self._centre - high / 2, 0.18, high)
        ramp = np.linspace(-reading.limit if signed else 0, reading.limit, 256)[:, None]
        box = (0, 1, float(ramp[0, 0]), reading.limit)
        axes.imshow(np.full((1, 1), MIDDLE_GREY), cmap="gray", vmin=0, vmax=1, extent=box, aspect="auto")
        axes.imshow(_colours(ramp, reading.limit, signed), origin="lower", extent=box, aspect="auto")
        axes.yaxis.tick_right()
        axes.set(xticks=(), ylim=box[2:])
        if reading.value == 0:
            axes.set_yticks([0.0], ["0"])
        else:
            ticks = [-reading.limit, 0.0, reading.limit] if signed else [0.0, reading.limit / 2, reading.limit]
            axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.tick_params(labelsize=9, colors=INK, length=3)
        axes.set_title(textwrap.fill(units, 18), size=9, color=INK, loc="left", parse_math=False)
        note = textwrap.fill(f"colours end at the {reading.limit_is}", 20) if reading.value else ""
        axes.text(0, -0.03, note, transform=axes.transAxes, va="top", size=7.5, color=INK)

    def stamp(self, message: str) -> None:
        """Write a prominent message across the planes."""
        box = {"facecolor": PAPER, "edgecolor": INK, "boxstyle": "round,pad=0.5"}
        x = (self.width - BAR) / 2 / self.width
        self.figure.text(x, self._centre / self.height, message, size=13, ha="center", va="center", color=INK, bbox=box)

    def save(self, path: Path) -> None:
        """Write the PNG atomically."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            self.figure.savefig(
                temporary, format="png", dpi=DPI, metadata={"Description": INTENDED_USE, "Software": None}
            )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _lines(self, texts: Sequence[str], sizes: Sequence[float]) -> list[tuple[str, float]]:
        """Wrap texts to the figure; return each line with its font size (the last size repeats)."""
        lines = []
        for number, text in enumerate(texts):
            size = sizes[min(number, len(sizes) - 1)]
            characters = int((self.width - 2 * MARGIN) * 72 / (0.56 * size))
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
