"""Checks of an image before it is used."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor

from esegeta_monai.errors import InputError

__all__ = ["check_contents", "check_dense", "check_image"]

LARGEST_VOXEL, FARTHEST = 1e4, 1e7
"""Edges of voxels and distances from the origin, in mm, above which an affine is an error."""


def check_image(
    image: MetaTensor | Any, where: object = "image", *, spatial_dims: int | None = None, channels: int | None = None
) -> None:
    """Check an image (C, *spatial) before a network processes it.

    Args:
        image: the image.
        where: first words of the error message.
        spatial_dims: required number of spatial axes, or None.
        channels: required number of channels, or None.

    Raises:
        InputError: complex values, values that are NaN or infinite (with their count), an affine that is singular or
            has voxels above 10 m, or other dimensions or channels than required.
    """
    shape = "x".join(str(n) for n in image.shape[1:])
    dims = image.ndim - 1
    if spatial_dims == 3 and (dims < 3 or image.shape[-1] == 1):
        raise InputError(f"{where}: a 2D image ({shape}), but the network takes 3D volumes; give the whole volume")
    if spatial_dims is not None and dims != spatial_dims:
        raise InputError(f"{where}: a {dims}D image ({shape}), but the network takes {spatial_dims}D images")
    if channels is not None and image.shape[0] != channels:
        raise InputError(
            f"{where}: {image.shape[0]} channel(s), but the network takes {channels}; "
            "combine the channels in the order of the bundle's metadata.json"
        )
    values = torch.as_tensor(image)  # unlike NumPy, torch supports bfloat16
    bad = values.numel() - int(torch.isfinite(values).sum())
    if values.is_complex():
        raise InputError(
            f"{where}: the values are complex numbers, and networks would see their real parts only: give the "
            "magnitude (image.abs()), or real and imaginary part as channels"
        )
    if bad:
        raise InputError(f"{where}: {bad} of {values.numel()} voxels are NaN or infinite; correct the image first")
    if isinstance(image, MetaTensor):
        _check_affine(np.asarray(image.affine, dtype=np.float64), dims, where)


def check_dense(image: torch.Tensor, where: object = "image") -> None:
    """Check that an image of any shape is an ordinary tensor.

    Raises:
        InputError: it is sparse.
    """
    if image.layout != torch.strided:
        raise InputError(f"{where}: a sparse tensor ({image.layout}); give a dense one, image.to_dense()")


def check_contents(image: torch.Tensor, where: object = "image") -> None:
    """Check that an image (C, *spatial) shows something.

    Raises:
        InputError: all its voxels are equal, so that no map of it means anything.
    """
    values = torch.as_tensor(image)
    if values.numel() > 1 and bool((values == values.flatten()[0]).all()):
        value = float(values.flatten()[0])
        raise InputError(f"{where}: every voxel is {value:g}: the image is empty, or its preprocessing cut it all away")


def _check_affine(affine: np.ndarray, spatial_dims: int, where: object) -> None:
    n = affine.shape[-1] - 1
    axes = affine[:n, : min(n, spatial_dims)]
    edges = np.sqrt((axes**2).sum(axis=0))
    # normalise the axes, so that micrometres given in metres do not count as singular
    if not np.isfinite(affine).all() or not edges.all() or np.linalg.svd(axes / edges)[1][-1] < 1e-6:
        raise InputError(
            f"{where}: the affine is singular, {affine[:n].tolist()}; set it with nibabel, or convert the image again"
        )
    if edges.max() > LARGEST_VOXEL or np.abs(affine[:n, n]).max() > FARTHEST:
        raise InputError(
            f"{where}: the affine has voxels of {edges.max():.3g} mm at {np.abs(affine[:n, n]).max():.3g} mm from the "
            "origin, which no scan has; set it with nibabel, or convert the image again"
        )
