"""Anatomical planes of a volume with orientation letters and proportions, derived from the affine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from nibabel.orientations import io_orientation

from esegeta_monai.errors import InputError

__all__ = ["Anatomy", "Plane", "largest_section"]

LETTERS = (("L", "R"), ("P", "A"), ("I", "S"))  # low and high end of the axes of RAS space


@dataclass(frozen=True)
class Plane:
    """A plane through a volume: the RAS axes (0 R, 1 A, 2 S) across, up and through, and the mirroring."""

    name: str
    across: int
    up: int
    through: int
    mirrored: bool
    """True if the axis across points to the viewer's left."""

    @property
    def sides(self) -> dict[str, str]:
        """Orientation letters of the four sides."""
        left, right = LETTERS[self.across][:: -1 if self.mirrored else 1]
        bottom, top = LETTERS[self.up]
        return {"left": left, "right": right, "bottom": bottom, "top": top}


class Anatomy:
    """The voxel grid of a scan in RAS space. Planes follow the voxel axes, named after the nearest RAS axes.

    Args:
        size: spatial shape (i, j, k).
        affine: (4, 4), voxel index to RAS mm.

    Raises:
        InputError: the affine is singular or not finite.

    Example:
        >>> anatomy = Anatomy((20, 30, 10), np.diag([-1.0, 1.0, 5.0, 1.0]))
        >>> axial = anatomy.planes()[0]
        >>> axial.name, axial.sides["right"], anatomy.extent(axial), anatomy.world((0, 2, 3))
        ('axial', 'L', (20.0, 30.0), (0.0, 2.0, 15.0))
    """

    def __init__(self, size: Sequence[int], affine: np.ndarray) -> None:
        self.size, self.affine = tuple(size), np.asarray(affine, dtype=np.float64)
        if not np.isfinite(self.affine).all() or abs(np.linalg.det(self.affine[:3, :3])) < 1e-12:
            raise InputError(f"the affine of the scan is singular or not finite: {self.affine.tolist()}")
        nearest = io_orientation(self.affine)
        self._voxel_axis = [int(axis) for axis in np.argsort(nearest[:, 0])]
        self._reversed = [bool(nearest[axis, 1] < 0) for axis in self._voxel_axis]
        self._spacing = np.linalg.norm(self.affine[:3, :3], axis=0)[self._voxel_axis]

    @property
    def tilt(self) -> float:
        """Largest angle in degrees between a voxel axis and the RAS axis that names it; 0 for a straight scan."""
        directions = self.affine[:3, self._voxel_axis] / self._spacing
        return float(np.degrees(np.arccos(np.abs(np.diag(directions)).clip(max=1.0).min())))

    def planes(self, radiological: bool = True) -> list[Plane]:
        """Return the non-degenerate axial, coronal and sagittal planes; anterior is left in the sagittal one.

        Radiological: the patient is seen from the feet and from the front, with right on the viewer's left.
        """
        every = [
            Plane("axial", 0, 1, 2, radiological),
            Plane("coronal", 0, 2, 1, radiological),
            Plane("sagittal", 1, 2, 0, True),
        ]
        return [plane for plane in every if min(self._length(plane.across), self._length(plane.up)) > 1]

    def cut(self, volume: np.ndarray, voxel: Sequence[int], plane: Plane) -> np.ndarray:
        """Return the slice of ``volume`` (i, j, k) through ``voxel`` as (across, up), both in increasing RAS order."""
        order = [self._voxel_axis[axis] for axis in (plane.across, plane.up, plane.through)]
        slab = volume.transpose(order)[..., voxel[order[2]]]
        steps = [-1 if self._reversed[axis] else 1 for axis in (plane.across, plane.up)]
        return slab[:: steps[0], :: steps[1]]

    def extent(self, plane: Plane) -> tuple[float, float]:
        """Return the size of the plane in mm, (across, up)."""
        across, up = (float(self._length(axis) * self._spacing[axis]) for axis in (plane.across, plane.up))
        return across, up

    def position(self, voxel: Sequence[int], plane: Plane) -> tuple[float, float]:
        """Return the centre of ``voxel`` in the plane, (across, up) in mm from the corner of lowest RAS coordinates."""
        across, up = (
            float((self._index(voxel, axis) + 0.5) * self._spacing[axis]) for axis in (plane.across, plane.up)
        )
        return across, up

    def world(self, voxel: Sequence[int]) -> tuple[float, float, float]:
        """Return the RAS coordinates of a voxel's centre, in mm."""
        x, y, z = (float(v) for v in self.affine[:3, :3] @ np.asarray(voxel, dtype=np.float64) + self.affine[:3, 3])
        return x, y, z

    def _length(self, axis: int) -> int:
        return self.size[self._voxel_axis[axis]]

    def _index(self, voxel: Sequence[int], axis: int) -> int:
        index = voxel[self._voxel_axis[axis]]
        return self._length(axis) - 1 - index if self._reversed[axis] else index


def largest_section(mask: np.ndarray) -> tuple[int, ...]:
    """Return for each axis of a mask (*spatial), bool, the slice with most of its voxels; the middle one of several.

    >>> mask = np.zeros((5, 5, 5), bool); mask[1, 1:3, 2] = mask[3, 1, 1] = True
    >>> largest_section(mask)
    (1, 1, 2)

    Raises:
        InputError: the mask is empty.
    """
    if not mask.any():
        raise InputError("the mask has no voxel, so it has no largest cross-section")
    axes = range(mask.ndim)
    counts = [mask.sum(axis=tuple(a for a in axes if a != axis), dtype=np.int64) for axis in axes]
    return tuple(int(np.median(np.flatnonzero(count == count.max()))) for count in counts)
