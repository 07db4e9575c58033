"""Small pictures of a report: of a synthesised image, and of a target for the index."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.image import imsave
from scipy.ndimage import binary_erosion

from esegeta_monai.files.pictures.sketch import colours
from esegeta_monai.output.report.embed import Embedded
from esegeta_monai.output.report.map_entry import first_map
from esegeta_monai.output.report.volumes import Steps, View, open_volume, read_volume

__all__ = ["label_thumbnail", "picture_of", "png_uri", "thumbnail"]

LARGEST = 168
"""Length of the longer side of a thumbnail in pixels."""


def picture_of(path: Path) -> str:
    """Draw the middle planes of a synthesised image in grey, side by side, as a data URI.

    Raises:
        InputError: the file cannot be read.
    """
    image = open_volume(path)
    view = View.of(image.shape, image.affine, True)
    while max(view.shown) > 160:
        view = view.coarser(1.5)
    values = read_volume(path, image.affine, view, slice(1))[0]
    low, high = np.percentile(values, (1, 99))
    grey = ((values - low) / ((high - low) or 1)).clip(0, 1)
    cuts = [_upright(grey, plane) for plane in _planes_or_flat(view)]
    tall = max(cut.shape[0] for cut in cuts)
    sheet = [
        np.pad(cut, (((tall - cut.shape[0]) // 2, tall - cut.shape[0] - (tall - cut.shape[0]) // 2), (2, 2)))
        for cut in cuts
    ]
    return png_uri(np.hstack(sheet))


def thumbnail(embedded: Embedded, target: str | None = None) -> str | None:
    """Draw the first plane at a target's largest cross-section, as a data URI for the index.

    The scan is in grey or in colour; over it lies the map of the first view, or the target's first one, with the
    target's outline.

    Args:
        embedded: volumes of the case.
        target: label of the target; None: that of the first view.

    Returns:
        None if there is neither scan nor map.
    """
    data = embedded.data
    if embedded.view is None or not data.get("planes"):
        return None
    of_target = [m for m in data["maps"] if m["target"] == target or target is None]
    entry = of_target[first_map(of_target)] if of_target else None
    plane, start = data["planes"][0], data["start"] if entry is None else entry["start"]

    def cut(name: str) -> np.ndarray:
        part = np.moveaxis(embedded.arrays[name], plane["through"], 0)[start[plane["through"]]]
        part = part if plane["across"] < plane["up"] else part.T
        return (part[::-1] if plane["mirrored"] else part).T[::-1]

    scan, layers = data["scan"], []
    if scan:
        shown = scan["channels"][:3] if scan["colour"] else scan["channels"][:1] * 3
        for channel in shown:
            low, high = channel["window"]
            values = channel["low"] + cut(channel["id"]) / scan["levels"] * (channel["high"] - channel["low"])
            layers.append(((values - low) / ((high - low) or 1)).clip(0, 1))
    elif entry is None:
        return None
    picture = np.stack(layers, -1) if layers else np.zeros((*cut(entry["volumes"][0]).shape, 3)) if entry else None
    assert picture is not None
    if entry is not None and entry["limit"]:
        steps = Steps(entry["levels"], entry["knee"], entry["extreme"])
        values = steps.decode(cut(entry["volumes"][entry["channel"]]))
        rgba = colours(values, entry["limit"], entry["signed"])
        alpha = np.where(np.abs(values) < entry["threshold"] * entry["limit"], 0, rgba[..., 3:][..., 0])[..., None]
        picture = picture * (1 - alpha) + rgba[..., :3] * alpha
    if entry is not None and entry["mask"]:
        mask = cut(entry["mask"]).astype(bool)
        picture[mask & ~binary_erosion(mask)] = (1, 0.88, 0)
    wide, high = (data["size"][plane[axis]] * data["spacing"][plane[axis]] for axis in ("across", "up"))
    scale = LARGEST / max(wide, high)
    rows, columns = (max(1, round(scale * extent)) for extent in (high, wide))
    at = np.ix_(np.arange(rows) * len(picture) // rows, np.arange(columns) * picture.shape[1] // columns)
    return png_uri(picture[at])


def label_thumbnail(image: np.ndarray, label: np.ndarray | None) -> str:
    """Draw the plane of an image on which a label is largest, with its outline, as a data URI; else the middle plane.

    Args:
        image: first channel in grey (C, *spatial), 2D or 3D, on the network's grid.
        label: above 0 is outlined (*spatial); None: there is no map.
    """
    values, marked = image[0], None if label is None or not (label > 0).any() else label > 0
    if values.ndim == 3:
        areas = None if marked is None else marked.sum((0, 1))
        at = values.shape[2] // 2 if areas is None else int(areas.argmax())
        values, marked = values[..., at], None if marked is None else marked[..., at]
    low, high = np.percentile(values, (1, 99))
    picture = np.repeat(((values - low) / ((high - low) or 1)).clip(0, 1)[..., None], 3, -1)
    if marked is not None:
        picture[marked & ~binary_erosion(marked)] = (1, 0.88, 0)
    picture = picture.transpose(1, 0, 2)[::-1]
    scale = LARGEST / max(picture.shape[:2])
    rows, columns = (max(1, round(scale * n)) for n in picture.shape[:2])
    chosen = np.ix_(np.arange(rows) * len(picture) // rows, np.arange(columns) * picture.shape[1] // columns)
    return png_uri(picture[chosen])


def _planes_or_flat(view: View) -> Iterator[tuple[int, int, int]]:
    for across, up, through in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        if min(view.shown[across], view.shown[up]) > 1:
            yield across, up, through


def _upright(values: np.ndarray, plane: tuple[int, int, int]) -> np.ndarray:
    across, up, through = plane
    cut = values.transpose(through, up, across)[values.shape[through] // 2]
    return cut[::-1, ::-1]  # up is up; the patient's right is on the viewer's left


def png_uri(picture: np.ndarray) -> str:
    """Return a picture of 0 to 1, grey (rows, columns) or colour (rows, columns, 3), as a data URI."""
    file = io.BytesIO()
    imsave(file, picture, cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
