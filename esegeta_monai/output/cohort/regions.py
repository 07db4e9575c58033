"""Sums of maps over regions, per case, and their summary over cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import affine_transform

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.scans import read_scan
from esegeta_monai.output.cohort.maps import CohortMap, Volume
from esegeta_monai.utils.names import case_name

__all__ = ["RegionRow", "RegionSummary", "evaluated_rows", "label_map", "label_rows", "labels_of_cases", "summary"]


@dataclass(frozen=True)
class RegionRow:
    """A region of a map of a case.

    Attributes:
        case, region: names.
        share_of_abs: ``Σ_region |a| / Σ |a|``, 0 to 1.
        signed_share: ``Σ_region a / Σ |a|``, −1 to 1; None: unknown.
    """

    case: str
    region: str
    share_of_abs: float
    signed_share: float | None


@dataclass(frozen=True)
class RegionSummary:
    """A region over cases: number of cases, and mean, standard deviation, median, least and greatest share of |a|.

    ``signed`` is the mean signed share; None if it is unknown.
    """

    region: str
    cases: int
    mean: float
    sd: float | None
    median: float
    low: float
    high: float
    signed: float | None


def labels_of_cases(folder: Path, cases: Sequence[str]) -> dict[str, Path]:
    """Return the label map of each case in a folder: ``CASE.nii.gz``, or one that begins with ``CASE_``.

    A file belongs to the case with the longest name that it begins with. Cases without a file are left out.

    Raises:
        UsageError: a case has several files, or no case has one.
    """
    fitting: dict[str, list[Path]] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")):
        name = case_name(path)
        owners = [c for c in cases if name == c or (name.startswith(c) and not name[len(c)].isalnum())]
        if owners:
            fitting.setdefault(max(owners, key=len), []).append(path)
    files = {}
    for case, paths in fitting.items():
        exact = [p for p in paths if case_name(p) == case]
        if len(exact or paths) > 1:
            listed = ", ".join(p.name for p in paths[:4])
            raise UsageError(f"--regions {folder.name}: several files for {case} ({listed}): leave one")
        files[case] = (exact or paths)[0]
    if not files:
        raise UsageError(f"--regions {folder.name}: no file is named after a case, such as {cases[0]}.nii.gz")
    return files


def label_map(path: Path, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Read a label map, and bring it to a grid by the nearest voxel: int64 (x, y, z), 0 beyond its field of view.

    Raises:
        InputError: it cannot be read, has several channels, or values that are not whole numbers.
    """
    scan = read_scan(path)
    if scan.shape[0] != 1:
        raise InputError(f"{path}: a label map has one channel, not {scan.shape[0]}")
    values = np.asarray(scan.as_tensor()[0], dtype=np.float64)
    values = values.reshape(*values.shape, *[1] * (3 - values.ndim))
    if (values != np.round(values)).any():
        raise InputError(f"{path}: a label map has whole numbers")
    own = np.eye(4)
    given = np.asarray(scan.affine, dtype=np.float64)
    d = len(given) - 1
    own[:d, :d], own[:d, 3] = given[:d, :d], given[:d, d]
    matrix = np.linalg.inv(own) @ affine
    moved = affine_transform(
        values, matrix[:3, :3], matrix[:3, 3], output_shape=tuple(shape), order=0, mode="constant", cval=0.0
    )
    return np.round(moved).astype(np.int64)


def label_rows(case: str, shares: np.ndarray, labels: np.ndarray, names: Mapping[int, str]) -> list[RegionRow]:
    """Return the rows of a map for the regions of a label map.

    Args:
        case: its name.
        shares: map divided by ``Σ |a|`` (x, y, z).
        labels: int64 (x, y, z), 0 for no region.
        names: names of the labels.
    """
    values, index = np.unique(labels, return_inverse=True)
    index = index.reshape(-1)
    signed = np.bincount(index, weights=shares.ravel(), minlength=len(values))
    absolute = np.bincount(index, weights=np.abs(shares).ravel(), minlength=len(values))
    rows = []
    for k, value in enumerate(values.tolist()):
        name = names.get(value, f"label {value}") if value else "no region"
        rows.append(RegionRow(case, name, float(absolute[k]), float(signed[k])))
    return rows


def evaluated_rows(one: CohortMap) -> list[RegionRow]:
    """Return the rows that ``evaluate`` wrote for a map; regions of an undefined share (a zero map) are left out."""
    rows = []
    for row in one.regions:
        share, absolute, total = row.get("share_of_abs"), row.get("abs_sum"), row.get("sum")
        if row["region"] == "all" or not isinstance(share, float):
            continue
        signed = None
        if isinstance(absolute, float) and isinstance(total, float):
            signed = share * total / absolute if absolute > 0 else 0.0
        rows.append(RegionRow(one.case, str(row["region"]), share, signed))
    return rows


def summary(rows: Sequence[RegionRow]) -> list[RegionSummary]:
    """Return one row per region, the largest mean share first."""
    by_region: dict[str, list[RegionRow]] = {}
    for row in rows:
        by_region.setdefault(row.region, []).append(row)
    result = []
    for region, several in by_region.items():
        shares = np.sort([r.share_of_abs for r in several])  # sorted: sums do not depend on the order of cases
        signed = np.sort([r.signed_share for r in several if r.signed_share is not None])
        result.append(
            RegionSummary(
                region,
                len(several),
                float(shares.mean()),
                float(shares.std(ddof=1)) if len(shares) > 1 else None,
                float(np.median(shares)),
                float(shares[0]),
                float(shares[-1]),
                float(signed.mean()) if len(signed) == len(several) else None,
            )
        )
    return sorted(result, key=lambda r: (-r.mean, r.region))


def shared_regions(rows: Sequence[RegionRow], cases: Sequence[str]) -> list[str]:
    """Return the regions that all of these cases have, sorted by name."""
    known = {(r.case, r.region) for r in rows}
    regions = sorted({r.region for r in rows})
    return [region for region in regions if all((case, region) in known for case in cases)]


def columns(rows: Sequence[RegionRow], cases: Sequence[str], regions: Sequence[str]) -> np.ndarray:
    """Return shares of |a| (cases, regions), NaN where a case has no such region."""
    values = {(r.case, r.region): r.share_of_abs for r in rows}
    return np.array([[values.get((case, region), np.nan) for region in regions] for case in cases])


def labelled(volume: Volume, path: Path) -> np.ndarray:
    """Return a label map on the grid of a map: int64 (x, y, z)."""
    return label_map(path, volume.values.shape, volume.affine)
