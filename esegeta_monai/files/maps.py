"""Write a map on its scan's grid and its sidecar, and check that both are finished."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import ITKWriter
from monai.utils import optional_import

from esegeta_monai.errors import InputError, MethodError, UsageError
from esegeta_monai.files.scans import Grid
from esegeta_monai.utils.files import INTENDED_USE, atomic, read_json, sha256_file, strict_json, write_json
from esegeta_monai.utils.names import MAP_SUFFIXES

__all__ = ["WITH_MAP", "is_complete", "on_disk", "picture_path", "save_map", "save_sidecar", "sidecar_path"]
__all__ += ["spread_path"]

WITH_MAP = ("ok", "zero", "incomplete")
"""Statuses with a map on disk. An empty target has a sidecar only; all other statuses are computed again."""
NIFTI_SUFFIXES = (".nii.gz", ".nii")
_MISSING = object()


def save_map(
    path: str | os.PathLike[str],
    values: Any,
    grid: Grid,
    *,
    method: str,
    cal_min: float | None = None,
    cal_max: float | None = None,
) -> Path:
    """Write a map (C, *spatial) as float32 on ``grid``: raw values with the scan's shape, affine, codes and units.

    The suffix of ``path`` sets the format: NIfTI, or NRRD or MetaImage through ITK. The latter two store shape and
    affine, but no codes, units or display window. They store several channels as a vector image; in 2D the third axis
    has size 1.

    Args:
        path: from `map_path`.
        values: tensor or array (C, *spatial), channels in the network's order. A map of one channel gets the scan's
            shape on disk; several channels make a 4D file, or get the scan's shape if it has as many. In 2D the third
            axis has size 1.
        grid: grid of the scan that the map explains.
        method: its first 16 bytes (the limit of the format) become ``intent_name``, with the intent "estimate".
        cal_min, cal_max: display window. Default with p the 99.5th percentile of |a| (the maximum if p is zero): −p to
            p for a map with negative values, otherwise 0 to p.

    Returns:
        ``path``, after the file is complete.

    Raises:
        InputError: the map is not on the grid.
        MethodError: a value is NaN, infinite, or outside the range of float32.
        UsageError: the file cannot be written.
    """
    path = Path(path)
    if hasattr(values, "detach"):
        values = values.detach().cpu().float().numpy()  # NumPy has no bfloat16
    with np.errstate(over="ignore"):  # overflow is refused below
        array = np.asarray(values).astype(np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise MethodError(f"{path.name}: {bad} of {array.size} values are not finite in float32; nothing is written")
    data = on_disk(array, grid.shape)
    if not path.name.endswith(NIFTI_SUFFIXES):
        return _save_with_itk(path, data, grid)

    header = grid.header.copy()
    header.set_data_dtype(np.float32)
    header.set_data_shape(data.shape)
    header["pixdim"] = grid.header["pixdim"]  # nibabel resets it when axes are added or removed
    header.set_intent("estimate", (), name=method.encode("ascii", "replace")[:16].decode())
    low, high = _window(array)
    header["cal_min"] = low if cal_min is None else cal_min
    header["cal_max"] = high if cal_max is None else cal_max
    # the header's own affine, so that nibabel keeps sform, qform and their codes
    image = nib.Nifti1Image(data, header.get_best_affine(), header)
    with atomic(path) as temporary:
        nib.save(image, temporary)
    return path


def _save_with_itk(path: Path, data: np.ndarray, grid: Grid) -> Path:
    """Write NRRD or MetaImage from (*spatial) or (*spatial, C) (a vector image), in ITK's coordinates (LPS mm)."""
    itk, has_itk = optional_import("itk")
    if not has_itk:
        what = f"{path.name}: writing {path.suffix} needs ITK"
        raise UsageError(f'{what}: pip install "esegeta-monai[itk]", or write maps as NIfTI')
    channels = -1 if data.ndim > 3 and data.shape[-1] > 1 else None
    values = data if channels else data.reshape(data.shape[:3])
    image = ITKWriter.create_backend_obj(
        np.ascontiguousarray(values), channel_dim=channels, affine=grid.affine, dtype=np.float32, affine_lps_to_ras=True
    )
    with atomic(path) as temporary:
        itk.imwrite(image, str(temporary), compression=True)
    return path


def on_disk(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Reshape (C, *spatial) to channels last, or to the scan's own ``shape`` if it has as many values."""
    last = np.moveaxis(array, 0, -1)

    def extent(sizes: tuple[int, ...]) -> list[int]:
        return [n for n in sizes if n != 1]

    if extent(last.shape) == extent(shape):
        return last.reshape(shape)
    spatial = (*shape[:3], *(1,) * (3 - len(shape)))
    if extent(last.shape[:-1]) == extent(spatial):
        return last.reshape(spatial if array.shape[0] == 1 else (*spatial, array.shape[0]))
    raise InputError(f"a map of shape {array.shape} (channels first) does not fit the scan's grid {shape}")


def _window(array: np.ndarray) -> tuple[float, float]:
    magnitude = np.abs(array)
    high = float(np.percentile(magnitude, 99.5)) or float(magnitude.max())
    return (-high if array.min() < 0 else 0.0), high


def sidecar_path(map_path: str | os.PathLike[str]) -> Path:
    """Return the path of the sidecar ``…_attr.json`` beside ``…_attr.nii.gz``.

    >>> sidecar_path("out/a/a_b_Saliency_attr.nii.gz").as_posix()
    'out/a/a_b_Saliency_attr.json'
    """
    return _beside(map_path, ".json")


def picture_path(map_path: str | os.PathLike[str]) -> Path:
    """Return the path of the picture ``…_attr.png`` beside ``…_attr.nii.gz``."""
    return _beside(map_path, ".png")


def table_path(map_path: str | os.PathLike[str]) -> Path:
    """Return the path of the feature table beside a map (extension ``.csv``), for methods that explain features."""
    return _beside(map_path, ".csv")


def spread_path(map_path: str | os.PathLike[str], kind: str) -> Path:
    """Return the path of the standard deviation over ``"members"`` or ``"views"`` beside a map, in its format.

    >>> spread_path("out/a/a_b_Saliency_attr.nii.gz", "members").as_posix()
    'out/a/a_b_Saliency_attr_members_sd.nii.gz'
    """
    name = Path(map_path).name
    suffix = next((s for s in MAP_SUFFIXES if name.endswith(s)), Path(name).suffix)
    return _beside(map_path, f"_{kind}_sd{suffix}")


def curve_path(map_path: str | os.PathLike[str]) -> Path:
    """Return the path of ``…_attr_curve.png`` beside ``…_attr.nii.gz``, for methods that optimise an image."""
    return _beside(map_path, "_curve.png")


def _beside(map_path: str | os.PathLike[str], suffix: str) -> Path:
    path = Path(map_path)
    stem = next((path.name.removesuffix(s) for s in MAP_SUFFIXES if path.name.endswith(s)), path.name)
    return path.with_name(stem + suffix)


def save_sidecar(map_path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write the record of a map beside it, atomically and last: its sidecar marks map and picture as finished.

    The file is strict JSON with sorted keys (`strict_json`: a non-finite number becomes null and is listed in
    ``non_finite``). ``intended_use`` is added to ``record``, and, if the map exists, its file name, size and SHA-256,
    so that a truncated or replaced map is detected.

    Raises:
        UsageError: the file cannot be written.
        TypeError: a value cannot be written as JSON; the message names its key.
    """
    path = Path(map_path)
    entries = {**record, "intended_use": INTENDED_USE}
    if path.is_file():
        entries |= {"map": path.name, "map_bytes": path.stat().st_size, "map_sha256": sha256_file(path)}
    return write_json(sidecar_path(path), entries)


def is_complete(map_path: str | os.PathLike[str], key: Mapping[str, Any]) -> bool:
    """Return True if the map of an earlier run exists, is intact, and is what this run would compute.

    Args:
        key: the entries of the record that determine a map: method, parameters, target, hashes of weights, configs and
            scan, seed, versions. Each must be in the sidecar with an equal value.

    A map is not complete, and is computed again, if its sidecar is missing or unreadable, its status is not ok, zero,
    incomplete or empty_target, a parameter or hash differs, or the map is missing or no longer has the recorded
    SHA-256.
    """
    record = read_json(sidecar_path(map_path))
    if record is None or record.get("status") not in (*WITH_MAP, "empty_target"):
        return False
    wanted = json.loads(strict_json(key))  # as read back from a sidecar
    wanted.pop("non_finite", None)
    if any(record.get(name, _MISSING) != value for name, value in wanted.items()):
        return False
    if record["status"] not in WITH_MAP:
        return True
    path = Path(map_path)
    return path.is_file() and "map_sha256" in record and sha256_file(path) == record["map_sha256"]
