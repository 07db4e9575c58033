"""Bring maps to a common space by given transforms; mean and variance over cases."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import map_coordinates

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.scans import Grid, read_scan
from esegeta_monai.output.cohort.maps import Volume
from esegeta_monai.output.cohort.transforms import Affine, Chain, PointTransform, read_transform
from esegeta_monai.utils.names import safe_name

__all__ = ["CommonSpace", "Moments", "given_transforms", "warped"]

IDENTITY = "identity"
FINEST = 4
"""Largest number of sampling points per voxel and axis."""
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ANTS = {"0GenericAffine.mat": 1, "1Warp.nii.gz": 0}
"""Ends of the two files of an ANTs registration, with their places in the chain."""
ENDS = (".txt", ".tfm", ".mat", ".h5", ".nii.gz", ".nii")


@dataclass(frozen=True)
class CommonSpace:
    """The grid of a reference and the transforms of the cases.

    Attributes:
        reference: path of the reference image.
        grid: its grid.
        transforms: by case; a case without one has no map in this space.
        sources: names of the files, by case, for the record.
    """

    reference: Path
    grid: Grid
    transforms: dict[str, PointTransform]
    sources: dict[str, list[str]]

    @classmethod
    def read(cls, reference: str, given: Sequence[str], cases: Sequence[str]) -> CommonSpace:
        """Read the reference and the transforms.

        Raises:
            UsageError, InputError: a file is missing, ambiguous or unreadable.
        """
        read_scan(reference)
        files = given_transforms(given, cases)
        transforms: dict[str, PointTransform] = {}
        for case, paths in files.items():
            parts = [read_transform(path) for path in paths]
            transforms[case] = Chain(tuple(parts)) if parts else Affine(np.eye(3), np.zeros(3))
        sources = {case: [p.name for p in paths] or [IDENTITY] for case, paths in files.items()}
        return cls(Path(reference), Grid.of(reference), transforms, sources)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the reference (x, y, z)."""
        x, y, z = (*self.grid.shape[:3], *[1] * (3 - len(self.grid.shape[:3])))
        return x, y, z


def given_transforms(given: Sequence[str], cases: Sequence[str]) -> dict[str, list[Path]]:
    """Return the files of each case in the order of ``antsApplyTransforms -t``; no files: identity.

    Args:
        given: ``identity``, folders, and ``CASE=FILE[,FILE]``.
        cases: names of all cases. In a folder, each file belongs to the case with the longest name that it begins with.

    Raises:
        UsageError: a word is none of these, or the files of a case are ambiguous.
    """
    files: dict[str, list[Path]] = {}
    longest = sorted(cases, key=len, reverse=True)
    for word in given:
        case = next((c for c in longest if word.startswith(f"{c}=")), None)
        if case is not None:
            files[case] = [Path(p) for p in word[len(case) + 1 :].split(",")]
        elif Path(word).is_dir():
            files |= {case: paths for case, paths in _in_folder(Path(word), longest).items() if case not in files}
        elif word == IDENTITY:
            files |= {case: [] for case in cases if case not in files}
        else:
            raise UsageError(
                f"--transforms {word}: give a folder, CASE=FILE[,FILE] with the name of a case, or 'identity' if the "
                "scans are in the space of the reference already"
            )
    return files


def _in_folder(folder: Path, longest: Sequence[str]) -> dict[str, list[Path]]:
    candidates: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or not path.name.endswith(ENDS):
            continue
        for case in longest:
            names = {case, safe_name(case)}
            start = next((n for n in names if path.name.startswith(n) and not path.name[len(n)].isalnum()), None)
            if start is not None:
                candidates.setdefault(case, []).append(path)
                break
    files = {}
    for case, paths in candidates.items():
        ants = {ANTS[end]: p for p in paths for end in ANTS if p.name.endswith(end)}
        if len(ants) == 2 and all(re.search(r"(0GenericAffine\.mat|1(Inverse)?Warp\.nii\.gz)$", p.name) for p in paths):
            paths = [ants[0], ants[1]]
        if len(paths) > 1 and len(ants) < 2:
            listed = ", ".join(p.name for p in paths[:4])
            raise UsageError(f"--transforms {folder.name}: several files for {case} ({listed}): give {case}=FILE,FILE")
        files[case] = paths
    return files


def warped(volume: Volume, space: CommonSpace, transform: PointTransform) -> tuple[np.ndarray, np.ndarray]:
    """Bring a map to the reference, so that its sum over a region stays the region's share.

    ``b(v) = a(T(v)) · |det DT(v)| · volume of a voxel of the reference / volume of a voxel of the scan`` with a the map
    divided by ``Σ |a|``, interpolated linearly, and averaged over several points per voxel where the reference is
    coarser than the scan.

    Args:
        volume: the map.
        space: the reference.
        transform: from the reference to the scan, LPS mm.

    Returns:
        The map (x, y, z), shares of ``Σ |a|`` per voxel of the reference; and whether the voxel is in the scan's field
        of view, bool (x, y, z).

    Raises:
        InputError: the transform gives points that are not finite.
    """
    shape, affine = space.shape, np.asarray(space.grid.affine, dtype=np.float64)
    to_scan = np.linalg.inv(LPS @ volume.affine)
    ratio = abs(np.linalg.det(affine[:3, :3]) / np.linalg.det(volume.affine[:3, :3]))
    index = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float64) for n in shape], indexing="ij"), -1).reshape(-1, 3)

    def in_scan(voxels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = transform(voxels @ (LPS @ affine)[:3, :3].T + (LPS @ affine)[:3, 3])
        return points, points @ to_scan[:3, :3].T + to_scan[:3, 3]

    middle = (np.asarray(shape) - 1) / 2
    steps = [
        np.linalg.norm(np.subtract(*(in_scan(middle[None] + s * np.eye(3)[k] / 2)[1][0] for s in (1, -1))))
        for k in range(3)
    ]
    finer = [min(FINEST, max(1, int(np.ceil(step - 1e-6)))) if n > 1 else 1 for step, n in zip(steps, shape)]
    edges = [np.subtract(*(in_scan(index + s * np.eye(3)[k] / 2)[0] for s in (1, -1))) for k in range(3)]
    volumes = np.abs(np.linalg.det(np.stack(edges, -1))) / abs(np.linalg.det(affine[:3, :3]))
    size = np.asarray(volume.values.shape)
    values, covered = np.zeros(len(index)), np.zeros(len(index), dtype=bool)
    shares = volume.shares
    for offsets in itertools.product(*[(np.arange(n) + 0.5) / n - 0.5 for n in finer]):
        _, voxel = in_scan(index + np.asarray(offsets))
        if not np.isfinite(voxel).all():
            raise InputError("the transform gives points that are not finite: register the scan again")
        voxel = np.where((size == 1) & (np.abs(voxel) <= 0.5), 0.0, voxel)  # the only slice fills its own thickness
        values += map_coordinates(shares, voxel.T, order=1, mode="grid-constant", cval=0.0)
        covered |= ((voxel >= -0.5 - 1e-6) & (voxel <= size - 0.5 + 1e-6)).all(1)
    result = values / np.prod(finer) * volumes * ratio
    return result.reshape(shape), covered.reshape(shape)


class Moments:
    """Running mean and variance of maps, per voxel over the cases that cover it (Welford 1962)."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.count = np.zeros(shape, dtype=np.int64)
        self.mean = np.zeros(shape)
        self._squares = np.zeros(shape)

    def add(self, values: np.ndarray, covered: np.ndarray) -> None:
        """Add a map (x, y, z) and its coverage, bool (x, y, z)."""
        self.count += covered
        change = np.where(covered, values - self.mean, 0.0)
        self.mean += change / np.maximum(self.count, 1)
        self._squares += change * np.where(covered, values - self.mean, 0.0)

    @property
    def variance(self) -> np.ndarray:
        """Variance over cases (x, y, z), divided by n − 1; 0 where fewer than two cases cover the voxel."""
        result: np.ndarray = np.where(self.count > 1, self._squares / np.maximum(self.count - 1, 1), 0.0)
        return result

    @classmethod
    def of(cls, maps: Iterable[tuple[np.ndarray, np.ndarray]], shape: Sequence[int]) -> Moments:
        """Return mean and variance of maps (x, y, z) with their coverage."""
        moments = cls(shape)
        for values, covered in maps:
            moments.add(values, covered)
        return moments
