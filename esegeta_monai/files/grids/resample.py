"""Resample maps between the network's grid and the scan's."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import SpatialResample
from torch import Tensor

from esegeta_monai.errors import InputError, MethodError
from esegeta_monai.files.grids.adjoint import invert_attribution
from esegeta_monai.files.grids.geometry import REMEDY, Geometry, check_geometry
from esegeta_monai.files.grids.probe import Pipeline
from esegeta_monai.files.grids.trace import SizeChangedError, Step, steps

__all__ = ["geometry_of", "has_metadata", "scan_of", "to_network_grid", "to_scan_grid", "unrecorded"]


def scan_of(image: MetaTensor) -> Any:
    """Return the path of the file that an image was loaded from if it still exists, else the image."""
    name = image.meta.get("filename_or_obj")
    name = name[0] if isinstance(name, (list, tuple)) and name else name
    return Path(name) if isinstance(name, (str, os.PathLike)) and Path(name).exists() else image


def has_metadata(image: Tensor, scan: MetaTensor | None = None) -> bool:
    """Return True if an image (C, *spatial) still has the metadata that place it on its scan (C', *scan).

    ``EnsureTyped(track_meta=False)``, and NumPy arrays between transforms, take the file and the affine away; later
    transforms only record what they do to an image that begins at the origin, with voxels of 1 mm.

    Args:
        scan: as loaded from its file; None: unknown.
    """
    if not isinstance(image, MetaTensor):
        return False
    if any(key in image.meta for key in ("filename_or_obj", "original_affine", "spatial_shape")):
        return True
    chain = _trace(image)
    size, affine = (image.shape[1:], _affine(image, image.ndim - 1)) if chain is None else (chain[0], chain[1].numpy())
    if not np.allclose(affine, np.eye(len(affine)), atol=1e-6):
        return True
    return scan is not None and _same_grid(size, affine, scan)


def geometry_of(image: MetaTensor, scan: MetaTensor, *, additive: bool, pipeline: Pipeline | None = None) -> Geometry:
    """Check by contents that a preprocessed image, brought back as `to_scan_grid` brings maps back, lies on its scan.

    Args:
        image: (C, *spatial) with affine and the trace of the preprocessing.
        scan: (C', *scan) as loaded from its file.
        additive: see `to_scan_grid`.
        pipeline: the preprocessing, which runs again with a pattern if the contents cannot decide; None: unknown.
    """
    if (text := unrecorded(image, scan)) is not None:
        return Geometry("refused", text)

    def to_scan(preprocessed: MetaTensor) -> np.ndarray:
        return _to_scan(preprocessed, scan, additive=additive)

    result = check_geometry(scan, image, to_scan(image))
    if result.verdict != "warned" or pipeline is None:
        return result
    return pipeline.probe(to_scan) or result


def _to_scan(image: MetaTensor, scan: MetaTensor, *, additive: bool) -> np.ndarray:
    """Return the matrix (d + 1, d + 1) of voxel indices of the image to those of the scan, see `geometry_of`."""
    here, there = (_affine(x, image.ndim - 1) for x in (image, scan))
    trace = _trace(image) if additive and image.applied_operations else None
    if trace is not None and _inverted(trace[0], trace[1], image, scan):
        return trace[2]
    return np.linalg.solve(there, here)


def unrecorded(image: MetaTensor, scan: MetaTensor) -> str | None:
    """Return why the recorded geometry of an image (C, *spatial) contradicts the size of its scan (C', *scan).

    Transforms that change the size are in the trace, or change the affine. An image of another size than the scan's,
    with the scan's affine before all that is in the trace, was cropped, padded or resampled without a record. None: it
    has the scan's size, or another affine, or the trace has a transform with unknown geometry.
    """
    try:
        chain, affine = _steps(image)
    except SizeChangedError as error:
        return f"{error}: {REMEDY}"
    except InputError:  # `to_scan_grid` raises it where the trace is needed
        return None
    size, known = chain[-1].size_in if chain else tuple(image.shape[1:]), tuple(scan.shape[1:])
    if not _same_affine(affine, scan) or len(_without_ones(known)) > len(size):
        return None
    if _without_ones(size) == _without_ones(known):
        return None
    sizes = " and ".join("x".join(map(str, s)) for s in (size, known))
    return f"image and scan have {sizes} voxels with the same affine, and no recorded transform explains it: {REMEDY}"


def _without_ones(size: Sequence[int]) -> tuple[int, ...]:
    """Return a size without the axes of length 1 at its end."""
    return tuple(size[: max((k + 1 for k, n in enumerate(size) if n > 1), default=0)])


def _trace(image: MetaTensor) -> tuple[tuple[int, ...], Tensor, np.ndarray] | None:
    """Return size, affine and matrix (voxel indices of the image to its own) of the grid before the trace.

    None if a transform in it has no known geometry; `to_scan_grid` raises for it where the trace is needed.
    """
    try:
        chain, affine = _steps(image)
    except InputError:
        return None
    matrix = np.eye(image.ndim)
    for step in chain:  # last first
        matrix = step.xform @ matrix
    return (chain[-1].size_in if chain else tuple(image.shape[1:])), affine, matrix


def _steps(image: MetaTensor) -> tuple[list[Step], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `to_scan_grid` gives them
        return steps(image.applied_operations, image.shape[1:], torch.as_tensor(_affine(image, image.ndim - 1)))


def _affine(image: MetaTensor, d: int) -> np.ndarray:
    return np.asarray(to_affine_nd(d, np.asarray(image.affine, dtype=np.float64)))


def _same_grid(size: Sequence[int], affine: Tensor | np.ndarray, scan: MetaTensor) -> bool:
    return tuple(size) == tuple(scan.shape[1:]) and _same_affine(affine, scan, len(size))


def _same_affine(affine: Tensor | np.ndarray, scan: MetaTensor, d: int | None = None) -> bool:
    d = len(affine) - 1 if d is None else d
    here = to_affine_nd(d, np.asarray(affine, dtype=np.float64))
    return np.allclose(here, _affine(scan, d), rtol=1e-5, atol=1e-4)


def _inverted(size: Sequence[int], affine: Tensor, values: MetaTensor, scan: MetaTensor) -> bool:
    """Return True if the inverted trace leads to the scan's grid (of this size and affine), and not ``values`` itself.

    If only the affine differs, a transform may have changed it without a record; `geometry_of` compares the contents.
    """
    if tuple(size) != tuple(scan.shape[1:]):
        return False
    return _same_grid(size, affine, scan) or not _same_grid(values.shape[1:], values.affine, scan)


def _background(values: Tensor, scan: MetaTensor, image: MetaTensor) -> MetaTensor:
    """Return the background image of a map: the scan, with the number of channels of the map if it has several.

    If channels are in separate files, they are taken from the network's input. The channels of a layer have no
    counterpart; the first channel of the scan is repeated for them.
    """
    if len(values) in (1, len(scan)):
        return scan
    if len(values) == len(image):
        plain = MetaTensor(image.as_tensor().detach().cpu().float(), affine=image.affine)
        return MetaTensor(to_scan_grid(plain, scan, additive=False)[0], affine=scan.affine)
    return MetaTensor(scan.as_tensor()[:1].expand(len(values), *scan.shape[1:]), affine=scan.affine)


def _image_on_scan(values: MetaTensor, scan: MetaTensor, intensity: Sequence[Sequence[float]]) -> Tensor:
    """Resample a synthesised image to the scan's grid, black outside the network's input."""
    black = torch.tensor([low for low, _ in intensity], dtype=values.dtype).reshape(-1, *(1,) * (values.ndim - 1))
    lifted = MetaTensor(values.as_tensor() - black, affine=values.affine)
    return to_scan_grid(lifted, scan, additive=False)[0] + black


def _cut_to_place(values: Tensor, record: Mapping[str, Any], scan: MetaTensor) -> MetaTensor:
    """Crop a synthesised image on the scan's grid to its synthesised part, with the affine of the crop."""
    d = values.ndim - 1
    network, affine = (
        to_affine_nd(d, np.asarray(a, dtype=np.float64)) for a in (record["network_affine"], scan.affine)
    )
    corners = np.array([[*corner, 1.0] for corner in product(*[(a - 0.5, b - 0.5) for a, b in record["place"]])])
    scan_corners = (np.linalg.inv(affine) @ network @ corners.T)[:d]
    low = np.clip(np.ceil(scan_corners.min(1) - 1e-3), 0, None).astype(int)
    high = np.minimum(np.floor(scan_corners.max(1) + 1e-3).astype(int) + 1, values.shape[1:])
    cut: tuple[slice, ...] = (slice(None), *(slice(int(a), int(b)) for a, b in zip(low, high)))
    moved = affine.copy()
    moved[:d, d] += affine[:d, :d] @ low
    part = MetaTensor(values[cut], affine=torch.as_tensor(moved))
    part.meta.update({k: scan.meta[k] for k in ("space", "filename_or_obj") if k in scan.meta})
    return part


def to_scan_grid(
    values: MetaTensor, scan: MetaTensor, *, additive: bool, mode: str = "bilinear"
) -> tuple[Tensor, dict[str, float]]:
    """Bring a map from the network's grid to the scan's; return it (C, *scan), and its sums if it is additive.

    Args:
        values: (C, *spatial) with affine and the trace of the preprocessing.
        scan: (C, *scan) on its own grid.
        additive: True: by the adjoint of the preprocessing, which conserves the sum; False: interpolated in world
            coordinates (zero outside the network's input).

    Raises:
        MethodError: the map belongs to a slice of the scan, or an additive map has no trace back to the scan.
        InputError: see `esegeta_monai.transforms.InvertAttribution`.
    """
    shape = tuple(scan.shape[1:])
    if values.ndim - 1 < sum(n > 1 for n in shape):
        raise MethodError(
            f"the network saw a slice of {tuple(values.shape[1:])}, the scan is a volume of {shape}, and maps are "
            "written on the scan's own grid: predict volumes with SliceInferer, or get maps of slices from Explainer"
        )
    if additive and values.applied_operations:
        back = invert_attribution(values)
        sums = {k: float(back.meta[k]) for k in ("sum_network_grid", "sum_scan_grid", "sum_in_padding")}
        if _inverted(back.shape[1:], torch.as_tensor(back.affine), values, scan):
            return back.as_tensor(), sums
    if _same_grid(values.shape[1:], values.affine, scan):
        total = float(values.as_tensor().sum(dtype=torch.float64))
        return values.as_tensor(), {"sum_network_grid": total, "sum_scan_grid": total} if additive else {}
    if additive:
        raise MethodError(
            f"the preprocessing left no trace from {tuple(values.shape[1:])} back to the scan's "
            f"{shape}: use MONAI's transforms on MetaTensors (no track_meta=False, no plain arrays in between)"
        )
    plain = MetaTensor(values.as_tensor().double(), affine=values.affine)
    resample = SpatialResample(mode=mode, padding_mode="zeros", dtype=np.float64)
    moved = resample(plain, dst_affine=torch.as_tensor(scan.affine), spatial_size=shape)
    return torch.as_tensor(moved).as_subclass(Tensor).to(values.dtype), {}


def to_network_grid(values: MetaTensor, image: MetaTensor, *, additive: bool) -> Tensor:
    """Interpolate a map (C, *scan) from the scan's grid to the network's (C, *spatial), in world coordinates.

    The values of an additive map are shares of a sum, so they are scaled by the ratio of voxel volumes.
    """
    there, here = (np.asarray(a, dtype=np.float64) for a in (image.affine, values.affine))
    if tuple(values.shape[1:]) == tuple(image.shape[1:]) and np.allclose(there, here, atol=1e-4):
        return values.as_tensor()
    plain = MetaTensor(values.as_tensor().double(), affine=values.affine)
    resample = SpatialResample(mode="bilinear", padding_mode="zeros", dtype=np.float64)
    moved = resample(plain, dst_affine=torch.as_tensor(there), spatial_size=tuple(image.shape[1:]))
    ratio = abs(np.linalg.det(there[:3, :3]) / np.linalg.det(here[:3, :3])) if additive else 1.0
    return cast(Tensor, torch.as_tensor(moved).as_subclass(Tensor) * ratio).to(values.dtype)
