"""Read the volumes of a case on the grid of its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from esegeta_monai.engine.feature_masks import foreground
from esegeta_monai.errors import InputError
from esegeta_monai.output.report.collect import CaseResults, Result
from esegeta_monai.output.report.memo import Memo, file_key
from esegeta_monai.output.report.volumes import View, open_volume, read_volume

__all__ = ["CaseVolumes", "body_of", "read_case", "view_of"]

MOST_CHANNELS = 8


def view_of(path: Path, result: Result | None) -> tuple[np.ndarray, View]:
    """Return the affine with which the case is drawn, and the view that follows from it."""
    image = open_volume(path)
    display = (result.record.display if result is not None else None) or {}
    flat = len(image.shape) < 3 or image.shape[2] == 1
    affine = np.asarray(display.get("affine", image.affine), dtype=np.float64)
    oriented = bool(display.get("oriented", not (flat and np.array_equal(affine[:3, :3], np.eye(3)))))
    if not oriented and "affine" not in display:  # rows count downwards
        affine = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float64)
    return affine, View.of(image.shape, affine, oriented)


@dataclass
class CaseVolumes:
    """The volumes of a case on the page's grid, (x, y, z) each.

    Attributes:
        scan: channels of the scan.
        masks: the target's voxels, by file; None if the file cannot be read.
        maps: place, result, channels and their names.
        body: voxels of the patient; None: unknown.
        notes: what could not be read.
    """

    scan: list[np.ndarray] = field(default_factory=list)
    masks: dict[Path, np.ndarray | None] = field(default_factory=dict)
    maps: list[tuple[int, Result, list[np.ndarray], list[str]]] = field(default_factory=list)
    body: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def mask_of(self, result: Result) -> np.ndarray | None:
        """Return the voxels of a result's target, bool; None if it has none or they are unknown."""
        mask = None if result.mask is None else self.masks[result.mask]
        return mask.astype(bool) if mask is not None and mask.any() else None


def read_case(
    case: CaseResults, shown: list[tuple[int, Result]], affine: np.ndarray, view: View, memo: Memo
) -> CaseVolumes:
    """Read scan, maps and masks on the grid of the page; what the memo has is not read again."""
    volumes = CaseVolumes()

    def read(path: Path, most: int | None = None) -> list[np.ndarray]:
        try:
            key = ("read", file_key(path), affine.tobytes(), view.key, most)
            return memo.get(key, lambda: read_volume(path, affine, view, slice(most)))
        except InputError as error:
            volumes.notes.append(str(error))
            return []

    kept = _strongest([result.map for _, result in shown if result.map is not None], affine, view)
    grey = read(case.scan) if case.scan else []
    volumes.scan = [grey[c] for c in kept.get(len(grey), range(min(len(grey), MOST_CHANNELS)))]
    chosen_grey = tuple(kept.get(len(grey), ()))
    key = ("body", file_key(case.scan), affine.tobytes(), view.key, chosen_grey)
    volumes.body = memo.get(key, lambda: body_of(volumes.scan))
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
            volumes.notes += [note] if note not in volumes.notes else []
            values, names = [values[c] for c in chosen], [names[c] for c in chosen]
        if result.mask is not None and result.mask not in volumes.masks:
            volumes.masks[result.mask] = _mask(read(result.mask, 1))
        volumes.maps.append((place, result, values, names))
    return volumes


def body_of(scan: Sequence[np.ndarray]) -> np.ndarray | None:
    """Return the voxels of the patient: what differs from a dark background at the border of the scan.

    Args:
        scan: channels (x, y, z).

    Returns:
        None without a scan, and if the border is not dark (a scan cut to the inside of the body, histology), so that
        patient and background cannot be separated.
    """
    if not scan:
        return None
    image = np.stack(scan)
    image = image[..., 0] if image.shape[-1] == 1 else image
    for channel in image:
        low, high = np.percentile(channel, (1, 99))
        faces = [np.take(channel, end, axis).ravel() for axis in range(channel.ndim) for end in (0, -1)]
        if np.median(np.concatenate(faces)) > low + 0.05 * (high - low):
            return None
    inside: np.ndarray = foreground(torch.from_numpy(image)).numpy().reshape(scan[0].shape)
    return inside if 0.02 < inside.mean() < 0.98 else None


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


def _mask(read: list[np.ndarray]) -> np.ndarray | None:
    """Return the voxels that belong to the target by at least half; if there are none, all that overlap it."""
    if not read:
        return None
    most = read[0] >= 0.5
    return (most if most.any() else read[0] > 0).astype(np.uint8)
