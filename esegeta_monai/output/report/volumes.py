"""Prepare volumes for a page: reorient to RAS, downsample to a budget, quantise, compress, encode as text.

Every volume of a case is brought to one grid, whose axes point right, anterior and superior (the nearest voxel axes,
without resampling). Maps become whole numbers on a scale that is linear near zero and logarithmic above (`Steps`), so
that nothing is clipped and a lesion is as finely graded as its surroundings. Scans become whole numbers on a linear
scale, masks bytes.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data.utils import to_affine_nd
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

from esegeta_monai.errors import InputError
from esegeta_monai.files.pictures.planes import Anatomy, Plane
from esegeta_monai.files.scans import read_scan

__all__ = ["Packed", "Steps", "View", "open_volume", "pack", "read_volume"]

SAMPLE = 200_000
"""Numbers of a volume from which its encoding is chosen."""
KNEE = 0.02
"""Share of the end of the colour scale below which the steps of a map are even."""


@dataclass(frozen=True)
class View:
    """The grid that a page shows.

    Attributes:
        size: number of voxels of the stored grid along right, anterior, superior, before downsampling.
        affine: (4, 4) stored voxel to RAS mm, after reorientation.
        oriented: True if the affine is known, so that orientation letters and millimetres are valid.
        blocks: number of stored voxels per shown voxel, along each axis.
    """

    size: tuple[int, int, int]
    affine: np.ndarray
    oriented: bool
    blocks: tuple[int, int, int] = (1, 1, 1)

    @classmethod
    def of(cls, shape: Sequence[int], affine: np.ndarray, oriented: bool) -> View:
        """Return the view of a file with this shape, drawn with this affine.

        >>> view = View.of((4, 5, 6), np.diag([-2.0, 1.0, 3.0, 1.0]), True)
        >>> view.size, view.spacing, view.shown_affine[:3, 3].tolist()
        ((4, 5, 6), (2.0, 1.0, 3.0), [-6.0, 0.0, 0.0])

        Raises:
            InputError: the affine is singular.
        """
        Anatomy(shape, affine)  # checks the affine
        spatial = [*shape[:3], *[1] * (3 - len(shape[:3]))]
        turn = io_orientation(affine)
        size = [0, 0, 0]
        for axis, (new, _) in enumerate(turn):
            size[int(new)] = int(spatial[axis])
        return cls((size[0], size[1], size[2]), affine @ inv_ornt_aff(turn, spatial), oriented)

    @property
    def key(self) -> tuple[Any, ...]:
        """Key of this grid, different for each other grid."""
        return self.size, self.affine.tobytes(), self.oriented, self.blocks

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Size of a shown voxel in mm."""
        x, y, z = (float(s) * b for s, b in zip(np.linalg.norm(self.affine[:3, :3], axis=0), self.blocks))
        return x, y, z

    @property
    def shown(self) -> tuple[int, int, int]:
        """Number of shown voxels along the three axes."""
        x, y, z = (math.ceil(n / b) for n, b in zip(self.size, self.blocks))
        return x, y, z

    @property
    def shown_affine(self) -> np.ndarray:
        """(4, 4) shown voxel to RAS mm; the centre of a shown voxel is the centre of its block."""
        scale, middle = np.diag([*map(float, self.blocks), 1.0]), np.eye(4)
        middle[:3, 3] = [(b - 1) / 2 for b in self.blocks]
        return self.affine @ middle @ scale

    def coarser(self, factor: float) -> View:
        """Return this view with at least ``factor`` times fewer shown voxels; the finest axis is downsampled first.

        >>> view = View.of((64, 64, 8), np.diag([1.0, 1.0, 4.0, 1.0]), True)
        >>> view.coarser(1.5).blocks, view.coarser(4).blocks
        ((1, 2, 1), (2, 2, 1))
        """
        blocks, view = list(self.blocks), self
        while np.prod(view.shown) * factor > np.prod(self.shown) and max(view.shown) > 1:
            axes = [axis for axis in range(3) if view.shown[axis] > 1]
            blocks[min(axes, key=lambda axis: (view.spacing[axis], -axis))] += 1
            view = replace(self, blocks=(blocks[0], blocks[1], blocks[2]))
        return view

    def planes(self, radiological: bool) -> list[Plane]:
        """Return the axial, coronal and sagittal planes; without a known orientation, none is mirrored."""
        return Anatomy(self.shown, self.shown_affine).planes(radiological and self.oriented)

    @property
    def tilt(self) -> float:
        """Largest angle in degrees between a voxel axis and the RAS axis that names it."""
        return Anatomy(self.shown, self.shown_affine).tilt


def open_volume(path: Path) -> Any:
    """Open a map as a NIfTI image without reading its voxels; NRRD and MetaImage are read as a whole, channels last.

    Raises:
        InputError: the file is not readable, or needs ITK, which is not installed.
    """
    try:
        if path.name.endswith((".nii", ".nii.gz")):
            return nib.load(path)
        scan = read_scan(path)
        values = np.moveaxis(np.asarray(scan), 0, -1)
        values = values.reshape(*values.shape[:-1], *[1] * (4 - values.ndim), values.shape[-1])
        return nib.Nifti1Image(values, np.asarray(to_affine_nd(3, np.asarray(scan.affine, dtype=np.float64))))
    except InputError:
        raise
    except Exception as error:  # nibabel has many errors; all mean that the file is damaged
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path.name} cannot be read ({type(error).__name__}): run explain again with --overwrite")


def read_volume(path: Path, affine: np.ndarray, view: View, channels: slice = slice(None)) -> list[np.ndarray]:
    """Read the channels of a NIfTI file, each float32 (x, y, z) in RAS order, as means over the view's blocks.

    Args:
        path: the file.
        affine: affine with which the file is drawn, see `View.of`.
        view: the grid of the page.
        channels: the channels to read from a 4D file.

    Raises:
        InputError: the file is unreadable, has another grid, or has values that are not finite.
    """
    image = open_volume(path)
    try:
        values = np.asanyarray(image.dataobj)
    except Exception as error:  # the file is truncated
        raise _unreadable(path, error) from error
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InputError(
            f"{path.name}: {bad} of {values.size} values are not finite: run explain again with --overwrite"
        )
    values = values.reshape([*values.shape[:3], *[1] * (3 - values.ndim), -1])
    turned = apply_orientation(values, io_orientation(affine))
    if turned.shape[:3] != view.size:
        raise InputError(f"{path.name}: its grid is {turned.shape[:3]}, that of the case is {view.size}")
    return [_means(turned[..., c].astype(np.float32), view.blocks) for c in range(turned.shape[3])[channels]]


def _means(values: np.ndarray, blocks: Sequence[int]) -> np.ndarray:
    """Return means over blocks (x, y, z); a block that extends over the border is the mean of its inner voxels."""
    for axis, block in enumerate(blocks):
        if block > 1:
            starts = np.arange(0, values.shape[axis], block)
            counts = np.minimum(block, values.shape[axis] - starts)
            shape = [1] * values.ndim
            shape[axis] = len(counts)
            values = np.add.reduceat(values, starts, axis=axis) / counts.reshape(shape).astype(np.float32)
    return values


@dataclass(frozen=True)
class Steps:
    """The steps in which a map is stored: ``v = knee · sinh(n / levels · asinh(peak / knee))`` for step n.

    Below ``knee`` steps are even, above they grow with the value, so that the relative error stays the same from weak
    voxels to the largest one, however far it lies beyond
    the end of the colour scale.

    Attributes:
        levels: number of steps on either side of zero.
        knee: value at which the steps begin to grow, in units of the map.
        peak: largest absolute value of the map; 0 for a map of zeros.
    """

    levels: int
    knee: float
    peak: float

    @classmethod
    def of(cls, values: np.ndarray, limit: float, levels: int) -> Steps:
        """Return the steps of a map of any shape whose colours end at ``limit``."""
        peak = float(np.abs(values).max(initial=0))
        return cls(levels, KNEE * (limit or peak or 1.0), peak)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Return the nearest steps, int8 or int16, of values of any shape.

        >>> steps = Steps.of(np.array([-1000.0, 0.0, 1.0]), 1.0, 127)
        >>> steps.encode(np.array([-1000.0, 0.0, 1.0, 10.0])).tolist()
        [-127, 0, 51, 76]
        """
        if not self.peak:
            return np.zeros(values.shape, np.int8)
        part = np.arcsinh(values / self.knee) / np.arcsinh(self.peak / self.knee)
        return np.rint(part * self.levels).astype(np.int8 if self.levels < 128 else np.int16)

    def decode(self, steps: np.ndarray) -> np.ndarray:
        """Return the values of steps of any shape.

        >>> values = np.array([-1000.0, 0.0, 1.0, 10.0])
        >>> steps = Steps.of(values, 1.0, 511)
        >>> bool((np.abs(steps.decode(steps.encode(values)) - values) <= steps.error * np.abs(values)).all())
        True
        """
        return self.knee * np.sinh(steps.astype(np.float64) / self.levels * np.arcsinh(self.peak / self.knee))

    @property
    def error(self) -> float:
        """Largest relative error of values above the end of the colour scale, from rounding to steps."""
        return float(0.51 * np.arcsinh(self.peak / self.knee) / self.levels)


@dataclass(frozen=True)
class Packed:
    """A volume as text: base64 of zlib of whole numbers, x fastest.

    Attributes:
        text: the text.
        delta: True if each number is the difference to the one before, modulo 256 or 65536.
        width: bytes per number: 1, or 2 with all low bytes before all high bytes.
    """

    text: str
    delta: bool
    width: int = 1


def pack(values: np.ndarray, effort: int = 6) -> Packed:
    """Encode whole numbers of one or two bytes (any shape) as text, as values or as differences, whichever is shorter.

    Args:
        values: the numbers.
        effort: of zlib, 1 (fast) to 9 (small).

    >>> packed = pack(np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    >>> raw = np.frombuffer(zlib.decompress(base64.b64decode(packed.text)), np.uint8)
    >>> bool(((np.cumsum(raw, dtype=np.uint8) if packed.delta else raw) == [0, 4, 2, 6, 1, 5, 3, 7]).all())
    True
    """
    kind = np.dtype(f"u{values.dtype.itemsize}")
    flat = values.astype(values.dtype).view(kind).ravel(order="F")
    steps = np.diff(flat, prepend=kind.type(0))
    # a part in the middle and fast compression are sufficient to choose the shorter encoding
    part = slice(max(0, len(flat) // 2 - SAMPLE // 2), len(flat) // 2 + SAMPLE // 2)
    delta = len(zlib.compress(_planes(steps[part]), 1)) < len(zlib.compress(_planes(flat[part]), 1))
    packed = zlib.compress(_planes(steps if delta else flat), effort)
    return Packed(base64.b64encode(packed).decode("ascii"), delta, kind.itemsize)


def _planes(flat: np.ndarray) -> bytes:
    """Return the low bytes of all numbers, then the high bytes, which compress better apart."""
    little = flat.astype(flat.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(-1, flat.dtype.itemsize).T.tobytes()
