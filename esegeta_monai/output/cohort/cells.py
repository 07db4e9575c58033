"""Sum maps over cells that all cases share: at most 20 along each axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esegeta_monai.output.cohort.maps import Volume, field_of_view

__all__ = ["Cells", "cells_for", "pooled"]

SIDE = 20
"""Largest number of cells along an axis."""


@dataclass(frozen=True)
class Cells:
    """A grid of cubes with axes right, anterior, superior, around a centre.

    Attributes:
        shape: number of cells along the axes.
        edge: of a cube, in mm.
    """

    shape: tuple[int, int, int]
    edge: float

    @property
    def extent(self) -> tuple[float, ...]:
        """Size in mm along the axes."""
        return tuple(n * self.edge for n in self.shape)


def cells_for(volumes: Sequence[Volume], extent: float | None = None) -> Cells:
    """Return cells for maps: as large as the largest field of view, or a cube of ``extent`` mm.

    A cell is at least as large as the largest voxel edge, so that no cell is empty between two voxels.

    >>> cells_for([Volume(np.zeros((40, 48, 1)), np.diag([4.0, 4.0, 4.0, 1.0]))])
    Cells(shape=(17, 20, 1), edge=9.6)
    """
    views = np.stack([field_of_view(v) for v in volumes]).max(0)
    if extent is not None:
        views = np.minimum(extent, views)
    voxel = max(float(np.linalg.norm(v.affine[:3, :3], axis=0)[np.asarray(v.values.shape) > 1].max()) for v in volumes)
    edge = max(float(views.max()) / SIDE, voxel)
    shape = [max(1, int(np.ceil(size / edge - 1e-6))) for size in views]
    return Cells((shape[0], shape[1], shape[2]), edge)


def pooled(shares: np.ndarray, affine: np.ndarray, centre: np.ndarray, cells: Cells) -> np.ndarray:
    """Add up the values of a map in the cells around a centre.

    Args:
        shares: (x, y, z).
        affine: (4, 4), voxel to RAS mm.
        centre: (3,), RAS mm.
        cells: their grid.

    Returns:
        Sums (cells along right, anterior, superior); values beyond the cells are left out.

    >>> pooled(np.ones((4, 1, 1)), np.eye(4), np.array([1.5, 0, 0]), Cells((2, 1, 1), 2.0)).ravel().tolist()
    [2.0, 2.0]
    """
    index = np.zeros(shares.shape, dtype=np.int64)
    inside = np.ones(shares.shape, dtype=bool)
    axes = [
        np.arange(n, dtype=np.float64).reshape([-1 if k == a else 1 for k in range(3)])
        for a, n in enumerate(shares.shape)
    ]
    for axis, n in enumerate(cells.shape):
        position = sum(affine[axis, k] * axes[k] for k in range(3)) + affine[axis, 3] - centre[axis]
        # rounded, so that a voxel exactly between two cells is always in the same one
        cell = np.floor(np.round(position / cells.edge + n / 2, 6)).astype(np.int64)
        inside &= (cell >= 0) & (cell < n)
        index = index * n + cell
    flat = np.bincount(index[inside], weights=shares[inside], minlength=int(np.prod(cells.shape)))
    result: np.ndarray = flat.reshape(cells.shape)
    return result
