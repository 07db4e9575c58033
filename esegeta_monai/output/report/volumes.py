"""Volumes as a page carries them: turned to RAS order, coarsened to a budget, in bytes, compressed, as text.

Every volume of a case is brought to one grid, whose axes run to the right, to anterior and upwards (the nearest voxel
axes, no resampling). Maps become signed bytes, the greatest for the stated limit; scans and masks unsigned ones.
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

__all__ = ["Packed", "View", "limit_of", "open_volume", "pack", "read_volume"]

PERCENTILE = 99.5


@dataclass(frozen=True)
class View:
    """The grid that a page shows.

    Attributes:
        size: voxels along right, anterior, up of the stored grid, before blocks are taken.
        affine: (4, 4) stored voxel to RAS mm, after the turn.
        oriented: whether letters and millimetres are to be believed.
        blocks: how many stored voxels along each axis become one shown voxel.
    """

    size: tuple[int, int, int]
    affine: np.ndarray
    oriented: bool
    blocks: tuple[int, int, int] = (1, 1, 1)

    @classmethod
    def of(cls, shape: Sequence[int], affine: np.ndarray, oriented: bool) -> View:
        """The view of a file of this shape, with the affine by which it is drawn.

        >>> view = View.of((4, 5, 6), np.diag([-2.0, 1.0, 3.0, 1.0]), True)
        >>> view.size, view.spacing, view.shown_affine[:3, 3].tolist()
        ((4, 5, 6), (2.0, 1.0, 3.0), [-6.0, 0.0, 0.0])

        Raises:
            InputError: an affine without a way from voxel to world and back.
        """
        Anatomy(shape, affine)  # which looks at the affine
        spatial = [*shape[:3], *[1] * (3 - len(shape[:3]))]
        turn = io_orientation(affine)
        size = [0, 0, 0]
        for axis, (new, _) in enumerate(turn):
            size[int(new)] = int(spatial[axis])
        return cls((size[0], size[1], size[2]), affine @ inv_ornt_aff(turn, spatial), oriented)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Of shown voxels, mm."""
        x, y, z = (float(s) * b for s, b in zip(np.linalg.norm(self.affine[:3, :3], axis=0), self.blocks))
        return x, y, z

    @property
    def shown(self) -> tuple[int, int, int]:
        """Shown voxels along the three axes."""
        x, y, z = (math.ceil(n / b) for n, b in zip(self.size, self.blocks))
        return x, y, z

    @property
    def shown_affine(self) -> np.ndarray:
        """(4, 4) shown voxel to RAS mm: a shown voxel lies in the middle of its block."""
        scale, middle = np.diag([*map(float, self.blocks), 1.0]), np.eye(4)
        middle[:3, 3] = [(b - 1) / 2 for b in self.blocks]
        return self.affine @ middle @ scale

    def coarser(self, factor: float) -> View:
        """The same view with at least ``factor`` times fewer shown voxels: the finest axis is coarsened first.

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
        """Axial, coronal, sagittal; without letters nothing is mirrored."""
        return Anatomy(self.shown, self.shown_affine).planes(radiological and self.oriented)

    @property
    def tilt(self) -> float:
        """Degrees between a voxel axis and the RAS axis that names it, at most."""
        return Anatomy(self.shown, self.shown_affine).tilt


def open_volume(path: Path) -> Any:
    """A map as a NIfTI image, its voxels still on disk; NRRD and MetaImage are read whole, with channels last.

    Raises:
        InputError: it is none, or needs ITK, which is not installed.
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
    except Exception as error:  # nibabel has many errors; all mean that the file is not whole
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path.name} cannot be read ({type(error).__name__}): run explain again with --overwrite")


def read_volume(path: Path, affine: np.ndarray, view: View, channels: slice = slice(None)) -> list[np.ndarray]:
    """The channels of a NIfTI file, float32 (x, y, z) in RAS order, as means of the view's blocks.

    Args:
        affine: by which the file is drawn, see `View.of`.
        channels: which of a 4D file.

    Raises:
        InputError: the file is unreadable, lies on another grid, or has voxels that are no numbers.
    """
    image = open_volume(path)
    try:
        values = np.asanyarray(image.dataobj)
    except Exception as error:  # cut in the middle
        raise _unreadable(path, error) from error
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise InputError(
            f"{path.name}: {bad} of {values.size} values are not finite: run explain again with --overwrite"
        )
    values = values.reshape([*values.shape[:3], *[1] * (3 - values.ndim), -1])
    turned = apply_orientation(values, io_orientation(affine))
    if turned.shape[:3] != view.size:
        raise InputError(f"{path.name}: a grid of {turned.shape[:3]} where the case has {view.size}")
    return [_means(turned[..., c].astype(np.float32), view.blocks) for c in range(turned.shape[3])[channels]]


def _means(values: np.ndarray, blocks: Sequence[int]) -> np.ndarray:
    """Means over blocks; a block that reaches over the border has the mean of what is inside."""
    for axis, block in enumerate(blocks):
        if block > 1:
            starts = np.arange(0, values.shape[axis], block)
            counts = np.minimum(block, values.shape[axis] - starts)
            shape = [1] * values.ndim
            shape[axis] = len(counts)
            values = np.add.reduceat(values, starts, axis=axis) / counts.reshape(shape).astype(np.float32)
    return values


def limit_of(values: np.ndarray, signed: bool) -> float:
    """The end of the colour scale: the 99.5th percentile of |a|, or of max(a, 0) where the map has no sign.

    Where it is zero, that of the voxels that are not zero; 0 for a map without any.

    >>> round(limit_of(np.array([0.0, 0.0, -4.0]), True), 3), limit_of(np.zeros(3), True)
    (3.96, 0.0)
    """
    strength = np.abs(values) if signed else np.maximum(values, 0)
    limit = float(np.percentile(strength, PERCENTILE))
    if limit == 0 and strength.any():
        limit = float(np.percentile(strength[strength > 0], PERCENTILE))
    return limit


@dataclass(frozen=True)
class Packed:
    """A volume as text: base64 of zlib of bytes, x fastest; with ``delta`` each byte is the step from the last."""

    text: str
    delta: bool


def pack(values: np.ndarray) -> Packed:
    """Bytes (int8 or uint8, any shape) as text, by whichever of two ways is shorter.

    >>> packed = pack(np.arange(8, dtype=np.uint8).reshape(2, 2, 2))
    >>> raw = np.frombuffer(zlib.decompress(base64.b64decode(packed.text)), np.uint8)
    >>> bool(((np.cumsum(raw, dtype=np.uint8) if packed.delta else raw) == [0, 4, 2, 6, 1, 5, 3, 7]).all())
    True
    """
    flat = values.astype(values.dtype).view(np.uint8).ravel(order="F")
    steps = np.diff(flat, prepend=np.uint8(0))
    # which way is shorter shows on a fast try
    delta = len(zlib.compress(steps.tobytes(), 1)) < len(zlib.compress(flat.tobytes(), 1))
    packed = zlib.compress((steps if delta else flat).tobytes(), 6)
    return Packed(base64.b64encode(packed).decode("ascii"), delta)
