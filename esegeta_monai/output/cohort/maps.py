"""Read the finished maps of an output folder, one family for each target and method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.journal import read_run
from esegeta_monai.output.report.collect import ALTERED, CaseResults, Result, read_output
from esegeta_monai.output.report.volumes import open_volume
from esegeta_monai.utils.files import sha256_file

__all__ = ["CohortMap", "Family", "LeftOut", "Volume", "centroid", "field_of_view", "open_map", "read_families"]


@dataclass(frozen=True)
class LeftOut:
    """A case without a map of a target and method, with the reason; target and method are None for all of them."""

    case: str
    target: str | None
    method: str | None
    status: str
    reason: str


@dataclass(frozen=True)
class CohortMap:
    """A finished map of a case.

    Attributes:
        case: its name.
        result: record, path of the map, mask of the target.
        regions: rows of the evaluated region table of this target and method.
    """

    case: str
    result: Result
    regions: list[dict[str, object]]


@dataclass
class Family:
    """All maps of one target and method.

    Attributes:
        target, method: names as in ``run.json``.
        maps: one per case, in the order of the run.
        left_out: cases without a map.
        notes: sentences on differences between the maps.
    """

    target: str
    method: str
    maps: list[CohortMap]
    left_out: list[LeftOut]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Volume:
    """A map on the scan's grid.

    Attributes:
        values: signed values, summed over the channels (x, y, z), float64; in 2D the third axis has size 1.
        affine: (4, 4), voxel to RAS mm.
    """

    values: np.ndarray
    affine: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """The map divided by ``Σ |a|`` (x, y, z); zeros if the map is zero."""
        total = float(np.abs(self.values).sum())
        return self.values / total if total > 0 else self.values


def open_map(path: Path) -> Volume:
    """Read a map, and sum it over its channels.

    Raises:
        InputError: the file cannot be read, or has values that are not finite.
    """
    image = open_volume(path)
    try:
        values = np.asarray(image.dataobj, dtype=np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path.name} cannot be read ({type(error).__name__}): run explain again") from error
    values = values.reshape(*values.shape[:3], *[1] * (3 - values.ndim), -1).sum(-1)
    if not np.isfinite(values).all():
        raise InputError(f"{path.name} has values that are not finite: run explain again")
    return Volume(values, np.asarray(image.affine, dtype=np.float64))


def centroid(one: CohortMap, volume: Volume) -> np.ndarray:
    """Return the centroid of the target in RAS mm (3,); that of a class score is the centre of the image.

    Raises:
        InputError: the mask is missing, or on another grid than the map.
    """
    record = one.result.record
    whole = record.predicted_class is not None if record.display is None else record.display.get("mask") is None
    if one.result.mask is None and not whole:
        raise InputError(
            "the mask of its target is missing, so maps cannot be compared around it: explain with pictures, or give "
            "--space and --transforms"
        )
    if one.result.mask is None:
        voxel = (np.asarray(volume.values.shape) - 1) / 2
    else:
        file = nib.load(one.result.mask)
        assert isinstance(file, nib.Nifti1Image)
        stored = np.asarray(file.dataobj)
        mask = np.asarray(stored.reshape(*stored.shape[:3], *[1] * (3 - stored.ndim), -1).any(-1))
        if mask.shape != volume.values.shape:
            raise InputError(
                f"{one.result.mask.name} is not on the grid of its map: run explain again with --overwrite"
            )
        voxel = np.argwhere(mask).mean(0) if mask.any() else (np.asarray(mask.shape) - 1) / 2
    position: np.ndarray = volume.affine[:3, :3] @ voxel + volume.affine[:3, 3]
    return position


def field_of_view(volume: Volume) -> np.ndarray:
    """Return the extent of a volume along right, anterior, superior in mm (3,)."""
    extent: np.ndarray = np.abs(volume.affine[:3, :3]) @ np.asarray(volume.values.shape)
    return extent


def read_families(
    folder: Path, targets: Sequence[str] = (), methods: Sequence[str] = ()
) -> tuple[list[Family], list[str]]:
    """Read the maps of an output folder of ``explain``; each is checked against the SHA-256 in its sidecar.

    Args:
        folder: the output folder.
        targets, methods: names to keep; empty: all.

    Returns:
        One family for each target and method that has a map or a failure, and notes on the folder.

    Raises:
        UsageError: there is no such folder, it has no results, or none of these names.
    """
    run = read_output(folder)
    notes = list(dict.fromkeys(note for case in run.cases for note in case.notes))
    for path in read_run(folder).unfinished:
        notes.append(f"{Path(path).name}: the run has not finished, so maps may be missing.")
    names = dict.fromkeys((str(r.target), str(r.method)) for case in run.cases for r in case.explained)
    for what, wanted, known in (
        ("target", targets, {t for t, _ in names}),
        ("method", methods, {m for _, m in names}),
    ):
        for name in wanted:
            if name not in known:
                raise UsageError(f"--{what} {name!r}: the folder has {', '.join(sorted(known)) or 'none'}")
    families = []
    for target, method in names:
        if (targets and target not in targets) or (methods and method not in methods):
            continue
        family = _family(run.cases, target, method)
        if family is not None:
            families.append(family)
    if not families:
        raise UsageError(f"{folder} has no map of a scan: run 'esegeta-monai explain --output {folder}' first")
    return families, notes


def _family(cases: Sequence[CaseResults], target: str, method: str) -> Family | None:
    maps, left_out, synthesised = [], [], False
    for case in cases:
        results = [r for r in case.results if (r.target, r.method) == (target, method)]
        whole = [r for r in case.results if r.method is None]
        if not results:
            reason = whole[0].reason if whole else "the run has no result of this target and method"
            left_out.append(LeftOut(case.name, target, method, "failed" if whole else "missing", str(reason)))
            continue
        result = results[-1]
        synthesised |= result.synthesised
        if result.map is None or result.status not in ("ok", "zero", "incomplete"):
            absent = result.status in ("ok", "zero", "incomplete")
            reason = "the file of the map is missing" if absent else result.reason or result.status.replace("_", " ")
            left_out.append(LeftOut(case.name, target, method, "missing" if absent else result.status, reason))
            continue
        rows = [row for row in case.regions if (row["target"], row["method"]) == (target, method)]
        maps.append(CohortMap(case.name, result, rows))
    if synthesised:
        return None
    return Family(target, method, maps, left_out, _differences(maps))


def _differences(maps: Sequence[CohortMap]) -> list[str]:
    """Return sentences on maps that do not belong together: other networks, other parameters, the same scan twice."""
    notes = []
    for what, values in (
        ("networks (weights)", [m.result.record.weights_sha256 for m in maps]),
        ("parameters of the method", [repr(m.result.record.parameters) for m in maps]),
        ("inferers", [repr(m.result.record.inferer) for m in maps]),
    ):
        if len(set(values)) > 1:
            notes.append(
                f"The maps have {len(set(values))} different {what}: their differences are not those of cases."
            )
    scans: dict[str, list[str]] = {}
    for m in maps:
        if m.result.record.scan_sha256:
            scans.setdefault(m.result.record.scan_sha256, []).append(m.case)
    for names in scans.values():
        if len(names) > 1:
            notes.append(f"{', '.join(names)} are the same scan: statistics need one map per patient.")
    if any(m.result.record.grid == "network" for m in maps):
        notes.append("Some maps are on the network's grid, not on the scan's: their positions in mm are not certain.")
    return notes


def is_problem(entry: LeftOut) -> bool:
    """Return True if a case was left out for another reason than an empty target."""
    return entry.status in ("failed", "timeout", "missing", ALTERED)


def map_hash(one: CohortMap) -> str | None:
    """Return the SHA-256 of a map."""
    return None if one.result.map is None else sha256_file(one.result.map)
