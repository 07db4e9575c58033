"""Data for the viewer of a page: the volumes of a case within a budget of bytes, and their metadata."""

from __future__ import annotations

import base64
import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps

from esegeta_monai.errors import InputError
from esegeta_monai.files.pictures.picture import is_colour
from esegeta_monai.files.pictures.sketch import SIGNED
from esegeta_monai.output.report.case_volumes import CaseVolumes, read_case, view_of
from esegeta_monai.output.report.collect import CaseResults, Result
from esegeta_monai.output.report.map_entry import first_map, map_entry, mark_nil
from esegeta_monai.output.report.memo import Memo, content_key, file_key
from esegeta_monai.output.report.volumes import Packed, Steps, View, pack

__all__ = ["BUDGET", "Embedded", "embed"]

BUDGET = 4_300_000
"""Largest number of characters of all volumes of a case; the whole page is then smaller than 5 MB."""
LEVELS = ((2047, 4095), (511, 1023), (127, 1023))
"""Steps of maps on either side of zero, and grey levels of scans; the first pair that fits the budget is used."""
MOST_VOXELS = 30_000_000
"""Largest number of voxels of all volumes before compression, which a browser can hold in memory."""
METAL = 3071.0
"""Largest intensity of a CT in the page, in Hounsfield units; everything above is metal."""
RIM = 2
"""Width in voxels of the margin around the shown part."""

PALETTES = (
    ("blue – white – red, inferno", SIGNED, "inferno"),
    ("purple – orange, viridis", "PuOr_r", "viridis"),
    ("brown – teal, cividis", "BrBG", "cividis"),
    ("cool – warm, hot", "coolwarm", "hot"),
)
"""Colour maps (name, signed maps, unsigned maps); all but the first and last do not rely on red against green."""


@dataclass
class Embedded:
    """The volumes of a page, and the data that its viewer reads.

    Attributes:
        data: JSON-ready; viewer/README.md describes it.
        volumes: by the ids that ``data`` uses.
        notes: what a reader has to know about them, such as downsampling.
        view: the grid of the page.
    """

    data: dict[str, Any]
    volumes: dict[str, Packed] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    view: View | None = None
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Number of characters of all volumes."""
        return sum(len(volume.text) for volume in self.volumes.values())


def embed(
    case: CaseResults,
    *,
    radiological: bool = True,
    budget: int = BUDGET,
    effort: int = 6,
    memo: Memo | None = None,
) -> Embedded:
    """Embed the volumes of a case at the highest resolution that fits the budget.

    Downsampled volumes are means over blocks of voxels; ``notes`` states the size of the blocks. Each map of the data
    has its scale limit, its strongest voxel, and as ``place`` its index in ``case.explained``. A file that cannot be
    read is listed in ``notes``. ``memo`` has what was made for other pages of the same files.
    """
    embedded, memo = Embedded({"maps": [], "scan": None, "palettes": []}), memo or Memo()
    shown = [(i, r) for i, r in enumerate(case.explained) if r.map is not None and not r.synthesised]
    views = []
    for path, result in [*((r.map, r) for _, r in shown), (case.scan, None)]:
        try:
            views += [] if path is None else [view_of(path, result)]
        except InputError as error:
            embedded.notes.append(str(error))
    if not views:
        return embedded
    affine, view = views[0]
    count = len(shown) + len({r.target for _, r in shown}) + 1
    view = view.coarser(np.prod(view.shown) * count / MOST_VOXELS)
    volumes = read_case(case, shown, affine, view, memo)
    while True:
        for levels in LEVELS:  # fewer steps of the colour scale cost less than fewer voxels
            expected = _estimate(volumes, levels, memo)
            if expected <= budget or max(view.shown) == 1:
                embedded = _embed(case, volumes, view, levels, radiological, effort, memo)
                expected = embedded.bytes
                if expected <= budget or max(view.shown) == 1:
                    break
        else:
            view = view.coarser(max(1.05, expected / budget))
            volumes = read_case(case, shown, affine, view, memo)
            continue
        break
    if max(view.blocks) > 1:
        blocks, mm = " x ".join(map(str, view.blocks)), " x ".join(f"{s:.3g}" for s in view.spacing)
        embedded.notes.insert(
            0,
            f"Shown are means over blocks of {blocks} voxels ({mm} mm), so that this page stays small; "
            "the NIfTI files have every voxel.",
        )
    return embedded


def _estimate(volumes: CaseVolumes, levels: tuple[int, int], memo: Memo) -> float:
    """Return about how many characters all volumes need, from every eighth slice of each."""

    def sample(values: np.ndarray) -> tuple[np.ndarray, float]:
        part = values[..., min(3, values.shape[2] - 1) :: 8]
        return part, values.shape[2] / part.shape[2]

    total = 0.0
    for channel in volumes.scan:
        part, factor = sample(channel)
        total += factor * len(pack(_grey_levels(part, levels[1])[0]).text)
    for _, _, channels, _ in volumes.maps:
        parts, factor = [sample(channel)[0] for channel in channels], sample(channels[0])[1]
        peak = max(float(np.abs(channel).max(initial=0)) for channel in channels)
        key = ("estimate", tuple(map(content_key, parts)), peak, levels[0])
        total += factor * memo.get(key, partial(_length, channels, parts, levels[0]))
    return total


def _length(channels: list[np.ndarray], parts: list[np.ndarray], levels: int) -> int:
    """Return how many characters parts of the channels of a map need."""
    steps = Steps.of(np.stack(channels), float(np.percentile(np.abs(np.stack(parts)), 99.5)), levels)
    return sum(len(pack(steps.encode(part)).text) for part in parts)


def _grey_levels(values: np.ndarray, levels: int, most: float = math.inf) -> tuple[np.ndarray, float, float]:
    """Return a channel of the scan as whole numbers from 0 to ``levels``, and the intensities that these stand for."""
    low, high = float(values.min()), min(float(values.max()), most)
    steps = (values.clip(low, high) - low) / ((high - low) or 1.0) * levels
    return np.rint(steps).astype(np.uint16), low, high


def _embed(
    case: CaseResults,
    volumes: CaseVolumes,
    view: View,
    levels: tuple[int, int],
    radiological: bool,
    effort: int,
    memo: Memo,
) -> Embedded:
    embedded = Embedded({}, view=view, notes=list(volumes.notes))
    arrays = embedded.arrays

    def add(values: np.ndarray) -> str:
        name = f"v{len(arrays)}"
        arrays[name] = values
        return name

    scan = _scan_entry(volumes, levels[1], add)
    masks = {path: None if mask is None else add(mask) for path, mask in volumes.masks.items()}
    maps: list[dict[str, Any]] = []
    for place, result, values, names in volumes.maps:
        mask = masks[result.mask] if result.mask is not None else None
        entry = _kept_entry(case, result, values, volumes, view, levels[0], add, memo)
        maps.append({"place": place, "mask": mask, "channels": names, **entry})
    mark_nil(maps)
    channels: list[str] = max((entry["channels"] for entry in maps), key=len, default=[])
    start = next((entry["start"] for entry in maps), [n // 2 for n in view.shown])
    box = _box([*(values != 0 for values in arrays.values() if values.dtype != np.uint16), *_seen(volumes)], view)
    corner = [b.start for b in box]
    embedded.arrays = {name: values[box] for name, values in arrays.items()}
    embedded.volumes = {
        name: memo.get(("pack", content_key(values), effort), partial(pack, values, effort))
        for name, values in embedded.arrays.items()
    }
    offset = np.eye(4)
    offset[:3, 3] = corner

    def moved(voxel: list[int]) -> list[int]:
        return [min(max(v - b.start, 0), b.stop - b.start - 1) for v, b in zip(voxel, box)]

    for entry in maps:
        entry["peak"], entry["start"] = moved(entry["peak"]), moved(entry["start"])
    embedded.data = {
        "size": [b.stop - b.start for b in box],
        "spacing": list(view.spacing),
        "affine": (view.shown_affine @ offset).tolist(),
        "oriented": view.oriented,
        "planes": [
            {"name": p.name, "across": p.across, "up": p.up, "through": p.through, "mirrored": p.mirrored, **p.sides}
            for p in view.planes(radiological)
        ],
        "channels": channels,
        "scan": scan,
        "maps": maps,
        "start": moved(start),
        "first": first_map(maps),
        "palettes": [
            {"name": name, "signed": _colours(signed), "unsigned": _colours(unsigned)}
            for name, signed, unsigned in PALETTES
        ],
    }
    return embedded


def _kept_entry(
    case: CaseResults,
    result: Result,
    values: list[np.ndarray],
    volumes: CaseVolumes,
    view: View,
    levels: int,
    add: Callable[[np.ndarray], str],
    memo: Memo,
) -> dict[str, Any]:
    """Return `map_entry`, of the memo if the files and the record are the same."""
    files = (file_key(result.map), file_key(result.mask), file_key(case.scan))
    record = json.dumps(result.record.to_json(), default=str, sort_keys=True)
    key = ("entry", files, record, (result.target, result.method), view.key, levels, len(values))

    def make() -> tuple[dict[str, Any], list[np.ndarray]]:
        arrays: list[np.ndarray] = []

        def keep(array: np.ndarray) -> str:
            arrays.append(array)
            return ""

        return map_entry(result, values, volumes, levels, keep), arrays

    entry, arrays = memo.get(key, make)
    return {**copy.deepcopy(entry), "volumes": [add(array) for array in arrays]}


def _seen(volumes: CaseVolumes) -> list[np.ndarray]:
    """Return where each channel of the scan is above its 1st percentile, which is black in the first view."""
    return [channel > np.percentile(channel, 1) for channel in volumes.scan]


def _scan_entry(volumes: CaseVolumes, levels: int, add: Callable[[np.ndarray], str]) -> dict[str, Any] | None:
    """Return the scan for the viewer: channels as whole numbers between two intensities, and their grey scales.

    ``hounsfield`` is True if the intensities look like those of a CT: air far below zero.
    """
    if not volumes.scan:
        return None
    image = np.stack(volumes.scan)
    hounsfield = len(image) == 1 and -2100 < image.min() < -500
    colour = is_colour(image)
    channels = []
    for values in volumes.scan:
        steps, low, high = _grey_levels(values, levels, METAL if hounsfield else math.inf)
        window = np.percentile(values, (1, 99)) if not colour else (0.0, 1.0 if image.max() <= 1 else 255.0)
        if not window[1] > window[0]:
            window = (low, high)
        channels.append({"id": add(steps), "low": low, "high": high, "window": [float(w) for w in window]})
    return {"channels": channels, "levels": levels, "hounsfield": bool(hounsfield), "colour": colour}


def _colours(name: Any) -> str:
    """Return the 256 colours of a colour map as base64 of RGB bytes."""
    table = (colormaps[name] if isinstance(name, str) else name)(np.arange(256) / 255)[:, :3]
    return base64.b64encode(np.rint(table * 255).astype(np.uint8).tobytes()).decode("ascii")


def _box(seen: list[np.ndarray], view: View) -> tuple[slice, slice, slice]:
    """Return the bounding box of the voxels that are True in some volume, with a margin of `RIM`."""
    some = np.zeros(view.shown, dtype=bool)
    for values in seen:
        some |= values
    box = []
    for axis, size in enumerate(view.shown):
        where = np.flatnonzero(some.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (int(where[0]) - RIM, int(where[-1]) + 1 + RIM) if where.size else (0, size)
        box.append(slice(max(0, low), min(size, high)))
    return box[0], box[1], box[2]
