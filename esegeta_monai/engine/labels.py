"""Label maps on the grid of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data.utils import to_affine_nd
from torch import Tensor

from esegeta_monai.engine.score import Case
from esegeta_monai.errors import InputError, TargetError
from esegeta_monai.utils.whole_files import check_whole


def _affine(case: Case, dimensions: int, what: str) -> np.ndarray:
    if case.affine is None:
        raise TargetError(f"{what} needs the positions of the voxels: give the image as a MetaTensor with an affine")
    return _affine_of_axes(case.affine, dimensions)


def label_on_grid(what: str | Path | Tensor, prediction: Tensor, case: Case) -> Tensor:
    """Load a label map on the grid of the prediction from a data key, a file or a tensor.

    A map with an affine on another grid is resampled by nearest neighbour.

    Args:
        what: key of ``case.data``, file, or tensor (*spatial) or (1, *spatial).
        prediction: (K, *spatial).
        case: data and affine of the case.

    Returns:
        (*spatial), int64, on the device of the prediction.

    Raises:
        TargetError: no such key or file, an unreadable file, several channels, another number of axes, values that are
            not whole numbers, another grid without an affine to resample by, or a map that lies outside the image.
    """
    shape = tuple(prediction.shape[1:])
    value: Any = case.data.get(str(what), what) if isinstance(what, (str, Path)) else what
    if isinstance(value, (str, Path)):
        if not Path(value).is_file():
            keys = ", ".join(sorted(map(str, case.data))) or "none"
            raise TargetError(f"'{Path(value).name}' is neither a file nor a key of the case's data (keys: {keys})")
        from monai.transforms import LoadImage

        try:
            check_whole(value)
        except InputError as error:
            raise TargetError(str(error).replace(str(value), Path(value).name)) from error
        try:
            value = LoadImage(image_only=True, ensure_channel_first=True)(value)
        except Exception as error:  # each reader has its own errors for unreadable files
            why = " ".join(str(error).replace(str(value), Path(value).name).split())[:200]
            raise TargetError(f"{Path(value).name} cannot be read as a label map: {why}") from error
    _refuse_other_axes(value, shape)
    spatial = _to_integers(_without_channel(torch.as_tensor(value), shape))
    affines = [getattr(value, "affine", None), case.affine]
    known = [_affine_of_axes(a, len(shape)) for a in affines if a is not None]
    moved = len(known) == 2 and not np.allclose(known[0], known[1], atol=1e-3)
    if tuple(spatial.shape) == shape and not moved:
        return spatial.to(prediction.device)
    if len(known) < 2:
        raise TargetError(
            f"the label map has shape {tuple(spatial.shape)}, the prediction {shape}, and one of them has no affine "
            "to bring them together: give both as files or MetaTensors"
        )
    _refuse_outside(tuple(spatial.shape), known[0], shape, known[1])
    from monai.data import MetaTensor
    from monai.transforms import SpatialResample

    # MONAI resamples in float32, which cannot represent all labels of an atlas: resample consecutive numbers instead
    present, numbers = torch.unique(spatial, return_inverse=True)
    source = MetaTensor((numbers + 1)[None].float(), affine=torch.as_tensor(known[0]))
    resample = SpatialResample(mode="nearest", padding_mode="zeros")
    resampled = resample(source, dst_affine=torch.as_tensor(known[1]), spatial_size=shape)
    moved_numbers = torch.as_tensor(resampled).as_subclass(torch.Tensor)[0].round().long()
    return torch.cat([present.new_zeros(1), present])[moved_numbers].to(prediction.device)


def label_problem(what: str, labels: Tensor) -> str | None:
    """Return why a label map (*spatial), whole numbers on the image's grid, marks nothing; None if it marks something.

    >>> label_problem("label", torch.tensor([0, 1])) is None
    True
    """
    if bool((labels > 0).any()):
        return None
    values = ", ".join(str(v) for v in torch.unique(labels)[:5].tolist())
    return (
        f"the {what} map has no voxel above 0 on the image (values: {values}): it is empty, has negative values only, "
        "or marks a place outside the image; give another one, or leave it out"
    )


def _refuse_other_axes(value: Any, shape: tuple[int, ...]) -> None:
    """Refuse a 2D file for a 3D image: (1, *spatial) would pass for a slice across the first axis."""
    axes = getattr(value, "meta", {}).get("spatial_shape")
    if axes is None or value.ndim != len(shape) or value.shape[0] != 1:
        return
    size = [int(n) for n in np.asarray(axes).reshape(-1)]
    if len(size) < len(shape):
        raise TargetError(
            f"the label map is a {len(size)}D image ({'x'.join(map(str, size))}), but the prediction has {len(shape)} "
            "axes: give the whole volume"
        )


def _refuse_outside(size: tuple[int, ...], affine: np.ndarray, shape: tuple[int, ...], reference: np.ndarray) -> None:
    """Refuse a label map without a voxel on the image; sizes in voxels, affines (d + 1, d + 1) to world (mm)."""
    ends = np.stack(np.meshgrid(*[(-0.5, n - 0.5) for n in size], indexing="ij"), -1).reshape(-1, len(size))
    onto = np.linalg.inv(reference) @ affine
    corners = ends @ onto[:-1, :-1].T + onto[:-1, -1]
    low, high = corners.min(0), corners.max(0)
    if (high > -0.5).all() and (low < np.array(shape) - 0.5).all():
        return
    centres = [a[:-1, :-1] @ ((np.array(n) - 1) / 2) + a[:-1, -1] for a, n in ((affine, size), (reference, shape))]
    distance = float(np.linalg.norm(centres[0] - centres[1]))
    raise TargetError(
        f"the label map lies outside the image (their centres are {distance:.4g} mm apart): give one in the "
        "coordinates of the scan"
    )


def _without_channel(label: Tensor, shape: Sequence[int]) -> Tensor:
    """Remove the channel of a label map (1, *spatial), and a last axis of length 1 that files of 2D images may have."""
    if label.ndim > len(shape) and label.shape[-1] == 1 and tuple(label.shape[-len(shape) :]) != tuple(shape):
        label = label[..., 0]
    if label.ndim == len(shape) + 1 and len(label) > 1:
        raise TargetError(
            f"the label map has {len(label)} channels: give one map with a whole number for each region (of one-hot "
            "channels, their argmax)"
        )
    spatial = label[0] if label.ndim == len(shape) + 1 else label
    if spatial.ndim != len(shape):
        raise TargetError(
            f"the label map has shape {tuple(label.shape)}, the prediction {tuple(shape)}: give one with {len(shape)} "
            "axes"
        )
    return spatial


def _affine_of_axes(affine: Any, axes: int) -> np.ndarray:
    """Reduce an affine to the axes of the grid: that of a 2D image may be 4x4, from its file, or 3x3."""
    matrix = np.asarray(affine, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise TargetError(
            f"an affine of shape {matrix.shape} belongs to the label map or the image, which needs 4x4 or 3x3: collate "
            "batches of MetaTensors by MONAI's list_data_collate, as its DataLoader does"
        )
    return np.asarray(to_affine_nd(axes, matrix))


def _to_integers(labels: Tensor) -> Tensor:
    """Convert label values to int64; files may store them as floats."""
    plain = labels.as_subclass(torch.Tensor)
    if not plain.is_floating_point():
        return plain.long()
    whole = plain.round()
    odd = ~((plain - whole).abs() < 1e-3)  # NaN too
    if bool(odd.any()):
        raise TargetError(
            f"the label map has values that are no whole numbers, such as {float(plain[odd][0]):g}: threshold it, or "
            "resample it by nearest neighbour"
        )
    return whole.long()
