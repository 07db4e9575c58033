"""Interpolation by one small matrix per axis: many times faster than `torch.nn.functional.interpolate` in 3D."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["area_matrix", "interpolate", "line_matrix"]


@functools.lru_cache(maxsize=1024)
def line_matrix(start: int, stop: int, cells: int, extent: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (voxels, cells) of linear interpolation from cells to the voxels ``start`` … ``stop`` − 1.

    The ``cells`` values are stretched over ``extent`` voxels by the convention of `torch.nn.functional.interpolate`
    with ``align_corners=False``.
    """
    voxels = torch.arange(start, stop, dtype=torch.float64)
    at = ((voxels + 0.5) * cells / extent - 0.5).clamp(0, cells - 1)
    return (1 - (at[:, None] - torch.arange(cells, dtype=torch.float64)).abs()).clamp(min=0).to(dtype)


@functools.lru_cache(maxsize=1024)
def area_matrix(voxels: int, cells: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of shape (voxels, cells) that averages the cells in each voxel.

    It equals ``mode="area"`` of `torch.nn.functional.interpolate`.
    """
    matrix = torch.zeros(voxels, cells, dtype=torch.float64)
    for voxel in range(voxels):
        first, last = voxel * cells // voxels, -(-(voxel + 1) * cells // voxels)
        matrix[voxel, first:last] = 1 / (last - first)
    return matrix.to(dtype)


def interpolate(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply values (..., *cells) by one matrix (voxels, cells) per last axis: (..., *voxels)."""
    for axis, matrix in zip(range(-1, -len(matrices) - 1, -1), reversed(matrices)):
        matrix = matrix.to(values)
        if axis == -1:
            values = values @ matrix.T
        else:  # the axes after it are columns
            behind = values.shape[axis + 1 :]
            values = (matrix @ values.flatten(axis + 1)).unflatten(-1, behind)
    return values
