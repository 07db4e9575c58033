"""One picture per map: three planes through its target, with all labels needed to read it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.pictures.planes import Anatomy, largest_section
from esegeta_monai.files.pictures.scale import saturated_share, scale_of
from esegeta_monai.files.pictures.sketch import (
    CONTOURS,
    Reading,
    Sketch,
    Window,
    draw_contour,
    draw_cross,
    draw_map,
    draw_scan,
    frame,
)
from esegeta_monai.utils.files import INTENDED_USE

__all__ = ["INTENDED_USE", "draw_picture", "is_colour", "save_picture"]


def save_picture(path: str | os.PathLike[str], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Write the picture of `draw_picture` as a PNG, atomically.

    Args:
        path: the PNG.
        arguments, options: those of `draw_picture`.

    Returns:
        Description of the picture, see `draw_picture`.

    Raises:
        InputError, UsageError: see `draw_picture`.

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
    sketch, description = draw_picture(*arguments, **options)
    sketch.save(path)
    return description


def draw_picture(
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
    caption: str | None = None,
    ends: tuple[str, str] | None = None,
) -> tuple[Sketch, dict[str, Any]]:
    """Draw the axial, coronal and sagittal plane through the target's largest cross-sections, or one panel in 2D.

    Without a target's mask, or with an empty one, the planes go through the strongest point of the map. The picture
    shows the scan in grey (photographs in colour), the outline of the target, and the map. The map's opacity grows with
    its strength, so that anatomy stays visible. Signed maps go from blue through white (zero) to red, unsigned maps
    from 0 in a perceptually uniform colour map, up to the end of the scale of
    `esegeta_monai.files.pictures.scale.scale_of`. The picture states the end, and the share of the target beyond it.

    Planes follow the voxel axes and have the letters of the nearest anatomical axes; voxels have their true
    proportions. A 2D image without world coordinates (an identity affine, as in PNG files) has no letters.

    Args:
        scan: (C, *spatial) in 2D or 3D. A MetaTensor's affine gives letters, proportions and world coordinates.
        attribution: map (C or 1, *spatial) on the grid of ``scan``.
        prediction_contour: mask (*spatial) or (1, *spatial) of the target on that grid; voxels above 0.5 are outlined.
        signed: True if the sign of the map is meaningful.
        case, method, target, class_name: names to print.
        units: units of the map, for the colour bar.
        channel_names: names of the scan's channels. The channel with the strongest point is shown and named.
        window: (level, width) of the grey scale in units of the scan; None: 1st to 99th percentile of the channel.
        convention: ``radiological`` (the viewer's right is the patient's left) or ``neurological``.
        caption: what the map shows, in a sentence.
        ends: what the low and the high end of the colour scale stand for, in words.

    Returns:
        The drawing (`figure` of matplotlib, without pyplot), and its description, JSON-ready: ``channel``, ``voxel``,
        ``world`` (RAS mm or None) and ``value`` of the strongest point, ``planes`` (the voxel in all planes),
        ``limit`` of the colours, ``limit_is`` in words, ``saturated_in_target`` (share, 0 to 1, or None), ``window``
        (level, width), ``convention``, ``sides`` (plane: letters) and ``message``: None, or that the map is zero or has
        voxels that are not finite.

    Raises:
        InputError: scan, map and contour are not on one grid, or the affine is singular.
        UsageError: the convention is unknown.

    Example:
        >>> sketch, drawn = draw_picture(torch.rand(1, 8, 8), torch.ones(1, 8, 8), signed=False, case="a",
        ...                              method="Saliency", target="ClassScore")
        >>> drawn["limit"], len(sketch.figure.axes)
        (1.0, 2)
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
    shown, colour = min(reading.channel, len(image) - 1), window is None and is_colour(image)
    grey = Window(*_range(image), "all colours") if colour else _window(image[shown], window)
    planes = anatomy.planes(radiological=convention == "radiological" and oriented)

    heading = [f"{method}: {class_name or target}", f"case {case}  ·  target {target}"]
    if (len(image) > 1 and len(values) > 1) or channel_names:
        heading[1] += f"  ·  channel {shown}" + (f" ({channel_names[shown]})" if channel_names else "")
    heading += [caption] if caption else []
    axes_of = slice(2 if flat else 3)
    footing = [
        _strongest(reading, anatomy, oriented, axes_of),
        f"window: level {grey.level:.4g}, width {grey.width:.4g} ({grey.origin})",
        _orientation_text(anatomy, convention) if oriented else "orientation unknown: the image has no world affine",
        *([reading.message] if reading.message else []),
        INTENDED_USE,
    ]
    if reading.saturated is not None:
        footing.insert(1, f"{100 * reading.saturated:.2g} % of the target's voxels lie beyond the end of the colours")

    outlined = None if mask is None else f"outline: target{'' if class_name is None else f', {class_name}'}"
    sketch = Sketch([anatomy.extent(plane) for plane in planes], heading, footing, outlined, CONTOURS[signed])
    for axes, plane in zip(sketch.panels, planes):
        cuts = [anatomy.cut(channel, reading.planes, plane) for channel in (image if colour else image[shown][None])]
        draw_scan(axes, np.stack(cuts, -1) if colour else cuts[0], grey, anatomy.extent(plane))
        draw_map(axes, anatomy.cut(values[reading.channel], reading.planes, plane), reading.limit, signed)
        if mask is not None:
            draw_contour(axes, anatomy.cut(mask, reading.planes, plane), CONTOURS[signed])
        if not flat:
            draw_cross(axes, *anatomy.position(reading.planes, plane))
        frame(axes, plane, plane.name if oriented else "", oriented)
    if reading.message and reading.value == 0:
        sketch.stamp(reading.message)
    sketch.bar(reading, signed, units, ends)
    return sketch, {
        "channel": shown,
        "voxel": list(reading.voxel[axes_of]),
        "world": list(anatomy.world(reading.voxel)) if oriented else None,
        "value": reading.value,
        "planes": list(reading.planes[axes_of]),
        "limit": reading.limit,
        "limit_is": reading.limit_is,
        "saturated_in_target": reading.saturated,
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


def is_colour(image: np.ndarray) -> bool:
    """Return True if an image (C, *spatial) is a photograph: one slice of three channels of bytes, or of 0 to 1.

    Whole numbers from 0 to 255 count as bytes, and the values have to leave the lower half of their range.

    >>> rgb = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(float)
    >>> is_colour(rgb), is_colour(rgb / 255), is_colour(rgb - 20), is_colour(rgb[:2])
    (True, True, False, False)
    """
    flat = image.ndim == 3 or image.shape[3:] == (1,)
    if len(image) != 3 or not flat or not np.isfinite(image).all() or image.min() < 0:
        return False
    high = float(image.max())
    return 0.5 < high <= 1 or (127 < high <= 255 and bool((image == np.rint(image)).all()))


def _range(image: np.ndarray) -> tuple[float, float]:
    """Return level and width that show all colours of a photograph."""
    high = 1.0 if image.max() <= 1 else 255.0
    return high / 2, high


def _strongest(reading: Reading, anatomy: Anatomy, oriented: bool, axes: slice) -> str:
    """Return where the strongest point is and where the planes are, in words."""

    def at(voxel: tuple[int, ...]) -> str:
        text = f"voxel ({', '.join(map(str, voxel[axes]))})"
        return text + (", RAS ({:.1f}, {:.1f}, {:.1f}) mm".format(*anatomy.world(voxel)) if oriented else "")

    if reading.value == 0:
        return f"no strongest point; {reading.planes_are}"
    text = f"strongest point: {reading.value:.4g} at {at(reading.voxel)}"
    if reading.planes == reading.voxel or axes.stop == 2:
        return text
    return f"{text}; {reading.planes_are}: {at(reading.planes)}"


def _read(values: np.ndarray, mask: np.ndarray | None, signed: bool) -> Reading:
    """Return channel and voxel of the strongest value of (C, x, y, z), the scale's end, and the place of the planes."""
    finite = np.isfinite(values)
    strength = np.where(finite, np.abs(values) if signed else np.maximum(values, 0), 0)
    channel, *at = (int(i) for i in np.unravel_index(strength.argmax(), strength.shape))
    voxel = tuple(at)
    message = None if finite.all() else f"{int((~finite).sum())} voxels of the map are not finite and left blank"
    planes, planes_are = voxel, "planes through the strongest point"
    if mask is not None and mask.any():
        planes, planes_are = largest_section(mask), "planes through the target's largest cross-sections"
    scale = scale_of(values, signed, mask)
    if not scale.limit:
        message = message or "The map is zero everywhere" + ("" if signed else " or below")
        if mask is None or not mask.any():
            planes, planes_are = tuple(n // 2 for n in values.shape[1:]), "planes through the middle"
        return Reading(0, planes, 0.0, 1.0, scale.origin, message, planes, planes_are, None)
    saturated = saturated_share(values, scale.limit, signed, mask)
    value = float(values[channel][voxel])
    return Reading(channel, voxel, value, *scale, message, planes, planes_are, saturated)


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
