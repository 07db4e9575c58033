"""Data for the viewer of a page: the volumes of a case within a budget of bytes, and their metadata."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imsave

from esegeta_monai.errors import InputError
from esegeta_monai.files.pictures.picture import SIGNED
from esegeta_monai.output.report.collect import CaseResults, Result
from esegeta_monai.output.report.volumes import Packed, View, limit_of, open_volume, pack, read_volume

__all__ = ["BUDGET", "Embedded", "embed", "picture_of", "thumbnail"]

BUDGET = 4_300_000
"""Largest number of characters of all volumes of a case; the whole page is then smaller than 5 MB."""
LEVELS = (127, 63, 31)
"""Steps of a map's colour scale on either side of zero; the first number that fits the budget is used."""
MOST_VOXELS = 30_000_000
"""Largest number of voxels of all volumes before compression, which a browser can hold in memory."""
MOST_CHANNELS = 8
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
    """The volumes of a page, and the data that its script reads."""

    data: dict[str, Any]
    volumes: dict[str, Packed] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    view: View | None = None
    scan: np.ndarray | None = None

    @property
    def bytes(self) -> int:
        """Number of characters of all volumes."""
        return sum(len(volume.text) for volume in self.volumes.values())


def embed(case: CaseResults, *, radiological: bool = True, budget: int = BUDGET) -> Embedded:
    """Embed the volumes of a case at the highest resolution that fits the budget.

    Downsampled volumes are means over blocks of voxels; ``notes`` states the size of the blocks. Each map of the data
    has its scale limit, its strongest voxel, and as ``place`` its index in ``case.explained``. A file that cannot be
    read is listed in ``notes``.
    """
    embedded = Embedded({"maps": [], "scan": [], "palettes": []})
    shown = [(i, r) for i, r in enumerate(case.explained) if r.map is not None and not r.synthesised]
    views = []
    for path, result in [*((r.map, r) for _, r in shown), (case.scan, None)]:
        try:
            views += [] if path is None else [_view(path, result)]
        except InputError as error:
            embedded.notes.append(str(error))
    if not views:
        return embedded
    affine, view = views[0]
    count = len(shown) + len({r.target for _, r in shown}) + 1
    view = view.coarser(np.prod(view.shown) * count / MOST_VOXELS)
    for levels in LEVELS:  # fewer steps of the colour scale cost less than fewer voxels
        embedded = _embed(case, shown, affine, view, levels, radiological)
        if embedded.bytes <= budget:
            break
    while embedded.bytes > budget and max(view.shown) > 1:
        view = view.coarser(max(1.05, embedded.bytes / budget))
        embedded = _embed(case, shown, affine, view, levels, radiological)
    if max(view.blocks) > 1:
        blocks, mm = " x ".join(map(str, view.blocks)), " x ".join(f"{s:.3g}" for s in view.spacing)
        embedded.notes.insert(
            0,
            f"Shown are means over blocks of {blocks} voxels ({mm} mm), so that this page stays small; "
            "the NIfTI files have every voxel.",
        )
    return embedded


def _view(path: Path, result: Result | None) -> tuple[np.ndarray, View]:
    """Return the affine with which the case is drawn, and the view that follows from it."""
    image = open_volume(path)
    display = (result.record.display if result is not None else None) or {}
    flat = len(image.shape) < 3 or image.shape[2] == 1
    affine = np.asarray(display.get("affine", image.affine), dtype=np.float64)
    oriented = bool(display.get("oriented", not (flat and np.array_equal(affine[:3, :3], np.eye(3)))))
    if not oriented and "affine" not in display:  # rows count downwards
        affine = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)
    return affine, View.of(image.shape, affine, oriented)


def _embed(
    case: CaseResults, shown: list[tuple[int, Result]], affine: np.ndarray, view: View, levels: int, radiological: bool
) -> Embedded:
    embedded = Embedded({}, view=view)
    arrays: dict[str, np.ndarray] = {}

    def add(values: np.ndarray) -> str:
        name = f"v{len(arrays)}"
        arrays[name] = values
        return name

    def read(path: Path, most: int | None = None) -> list[np.ndarray]:
        try:
            return read_volume(path, affine, view, slice(most))
        except InputError as error:
            embedded.notes.append(str(error))
            return []

    kept = _strongest([result.map for _, result in shown if result.map is not None], affine, view)
    grey = read(case.scan) if case.scan else []
    scan = [add(np.rint(grey[c]).astype(np.uint8)) for c in kept.get(len(grey), range(min(len(grey), MOST_CHANNELS)))]
    channels: list[str] = []
    masks: dict[Path, str | None] = {}
    maps: list[dict[str, Any]] = []
    for place, result in shown:
        assert result.map is not None
        values = read(result.map)
        if not values:
            continue
        names = result.record.channel_names or []
        names = names if len(names) == len(values) else [f"channel {c}" for c in range(len(values))]
        if len(values) in kept:
            chosen = kept[len(values)]
            note = (
                f"Maps with {len(values)} channels are shown with the {MOST_CHANNELS} channels that are strongest over "
                f"all maps: numbers {', '.join(map(str, chosen))}."
            )
            embedded.notes += [note] if note not in embedded.notes else []
            values, names = [values[c] for c in chosen], [names[c] for c in chosen]
        if len(values) > len(channels):
            channels = names
        if result.mask is not None and result.mask not in masks:
            voxels = _mask(read(result.mask, 1))
            masks[result.mask] = None if voxels is None else add(voxels)
        mask = masks[result.mask] if result.mask is not None else None
        maps.append({"place": place, "mask": mask, "channels": names, **_entry(result, values, levels, add)})
    first = next((arrays[name] for name in masks.values() if name is not None), None)
    start = _start(first, maps, view)
    box = _box(list(arrays.values()), view)
    corner = [b.start for b in box]
    embedded.volumes = {name: pack(values[box]) for name, values in arrays.items()}
    embedded.scan = arrays[scan[0]][box] if scan else None
    offset = np.eye(4)
    offset[:3, 3] = corner
    for entry in maps:
        entry["peak"] = [p - c for p, c in zip(entry["peak"], corner)]
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
        "start": [min(max(s - b.start, 0), b.stop - b.start - 1) for s, b in zip(start, box)],
        "levels": levels,
        "palettes": [
            {"name": name, "signed": _colours(signed), "unsigned": _colours(unsigned)}
            for name, signed, unsigned in PALETTES
        ],
    }
    return embedded


def _strongest(paths: list[Path], affine: np.ndarray, view: View) -> dict[int, list[int]]:
    """Choose the shown channels of maps with more than `MOST_CHANNELS`, by number of channels.

    All maps with the same number of channels show the same ones, so that a channel's name stands for one channel. They
    are the strongest in the mean over the maps, with equal weight per map.
    """
    shares: dict[int, np.ndarray] = {}
    for path in paths:
        try:
            image = open_volume(path)
            if len(image.shape) < 4 or image.shape[3] <= MOST_CHANNELS:
                continue
            strength = np.array([float(np.abs(v).sum()) for v in read_volume(path, affine, view)])
        except InputError:  # noted when the map is embedded
            continue
        shares[len(strength)] = shares.get(len(strength), 0) + strength / (strength.sum() or 1)
    return {n: sorted(np.argsort(-s, kind="stable")[:MOST_CHANNELS].tolist()) for n, s in shares.items()}


def _entry(result: Result, values: list[np.ndarray], levels: int, add: Callable[[np.ndarray], str]) -> dict[str, Any]:
    """Return a map for the viewer: its volumes, the end of its scale, its strongest voxel."""
    signed = result.record.signed is not False
    together = np.stack(values)
    limit = limit_of(together, signed)
    strength = np.abs(together) if signed else np.maximum(together, 0)
    channel, *peak = (int(n) for n in np.unravel_index(int(strength.argmax()), strength.shape))
    scale = levels / limit if limit else 0.0
    return {
        "volumes": [add(np.rint((v * scale).clip(-levels, levels)).astype(np.int8)) for v in values],
        "target": result.target,
        "method": result.method,
        "signed": signed,
        "limit": limit,
        "units": result.record.units or "attribution",
        "peak": peak,
        "channel": channel,
        "value": float(together[channel][tuple(peak)]),
    }


def _box(arrays: list[np.ndarray], view: View) -> tuple[slice, slice, slice]:
    """Return the bounding box of the voxels that are not black in every volume, with a margin of `RIM`."""
    seen = np.zeros(view.shown, dtype=bool)
    for values in arrays:
        seen |= values != 0
    box = []
    for axis, size in enumerate(view.shown):
        where = np.flatnonzero(seen.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high = (int(where[0]) - RIM, int(where[-1]) + 1 + RIM) if where.size else (0, size)
        box.append(slice(max(0, low), min(size, high)))
    return box[0], box[1], box[2]


def _mask(read: list[np.ndarray]) -> np.ndarray | None:
    """Return the voxels that belong to the target by at least half; if there are none, all that overlap it."""
    if not read:
        return None
    most = read[0] >= 0.5
    return (most if most.any() else read[0] > 0).astype(np.uint8)


def _start(inside: np.ndarray | None, maps: list[dict[str, Any]], view: View) -> list[int]:
    """Return the initial position of the planes: the slices with most target voxels, else the first map's peak."""
    if inside is None or not inside.any():
        return maps[0]["peak"] if maps and maps[0]["limit"] else [n // 2 for n in view.shown]
    counts = [inside.sum(axis=axes, dtype=np.int64) for axes in ((1, 2), (0, 2), (0, 1))]
    return [int(np.median(np.flatnonzero(count == count.max()))) for count in counts]


def _colours(name: Any) -> str:
    """Return the 256 colours of a colour map as base64 of RGB bytes."""
    table = (colormaps[name] if isinstance(name, str) else name)(np.arange(256) / 255)[:, :3]
    return base64.b64encode(np.rint(table * 255).astype(np.uint8).tobytes()).decode("ascii")


# ---- small pictures --------------------------------------------------------------------------------------------------


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
    return _png(np.hstack(sheet))


def thumbnail(embedded: Embedded) -> str | None:
    """Draw the first plane of the scan at the initial position, as a data URI for the index; None without a scan."""
    if embedded.scan is None or embedded.view is None or not embedded.data.get("planes"):
        return None
    plane = embedded.data["planes"][0]
    cut = np.moveaxis(embedded.scan, plane["through"], 0)[embedded.data["start"][plane["through"]]]
    cut = cut if plane["across"] < plane["up"] else cut.T
    return _png((cut[::-1] if plane["mirrored"] else cut).T[::-1] / 255)


def _planes_or_flat(view: View) -> Iterator[tuple[int, int, int]]:
    for across, up, through in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        if min(view.shown[across], view.shown[up]) > 1:
            yield across, up, through


def _upright(values: np.ndarray, plane: tuple[int, int, int]) -> np.ndarray:
    across, up, through = plane
    cut = values.transpose(through, up, across)[values.shape[through] // 2]
    return cut[::-1, ::-1]  # up is up; the patient's right is on the viewer's left


def _png(grey: np.ndarray) -> str:
    file = io.BytesIO()
    imsave(file, grey, cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
