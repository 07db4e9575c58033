"""A map as a NIfTI file on its scan's grid, the sidecar beside it, and whether both are finished."""

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

__all__ = ["is_complete", "on_disk", "picture_path", "save_map", "save_sidecar", "sidecar_path"]

WITH_MAP = ("ok", "zero")
"""Statuses under which a map lies on disk; an empty target has a sidecar only, and all others are tried again."""
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
    """Writes a map (C, *spatial) as float32 on ``grid``: raw values, the scan's shape, affine, codes and units.

    The suffix of ``path`` says how: NIfTI, or NRRD or MetaImage through ITK, which hold shape and affine, and neither
    codes nor units nor a display window. Several channels are a vector image there; in 2D the third axis has size 1.

    Args:
        path: from `map_path`.
        values: tensor or array (C, *spatial), channels in the network's order. One channel takes the scan's shape on
            disk; several make a 4D file unless the scan has as many (then its shape). In 2D the third axis has size 1.
        grid: of the scan that the map explains.
        method: goes into ``intent_name`` (the first 16 bytes, all that the format holds) with the intent "estimate".
        cal_min, cal_max: the display window. Default: for a map with negative values minus and plus the 99.5th
            percentile of |a|, else zero to it; the maximum where that percentile is zero.

    Returns:
        ``path``, once the file is whole.

    Raises:
        InputError: the map is not on the grid.
        MethodError: it has a value that is NaN, infinite, or beyond float32.
        UsageError: the file cannot be written.
    """
    path = Path(path)
    if hasattr(values, "detach"):
        values = values.detach().cpu().float().numpy()  # NumPy knows no bfloat16
    with np.errstate(over="ignore"):  # what overflows is refused below
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
    header["pixdim"] = grid.header["pixdim"]  # nibabel resets it for axes that come or go
    header.set_intent("estimate", (), name=method.encode("ascii", "replace")[:16].decode())
    low, high = _window(array)
    header["cal_min"] = low if cal_min is None else cal_min
    header["cal_max"] = high if cal_max is None else cal_max
    # the header's own affine: nibabel then leaves sform, qform and their codes as they are
    image = nib.Nifti1Image(data, header.get_best_affine(), header)
    with atomic(path) as temporary:
        nib.save(image, temporary)
    return path


def _save_with_itk(path: Path, data: np.ndarray, grid: Grid) -> Path:
    """NRRD or MetaImage: (*spatial) or (*spatial, C) as a vector image, world coordinates as ITK has them (LPS mm)."""
    itk, has_itk = optional_import("itk")
    if not has_itk:
        what = f"{path.name}: writing {path.suffix} needs ITK"
        raise UsageError(f'{what}: pip install "esegeta-monai[itk]", or let maps be NIfTI')
    channels = -1 if data.ndim > 3 and data.shape[-1] > 1 else None
    values = data if channels else data.reshape(data.shape[:3])
    image = ITKWriter.create_backend_obj(
        np.ascontiguousarray(values), channel_dim=channels, affine=grid.affine, dtype=np.float32, affine_lps_to_ras=True
    )
    with atomic(path) as temporary:
        itk.imwrite(image, str(temporary), compression=True)
    return path


def on_disk(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(C, *spatial) with channels last, in the scan's own shape where it holds as many values."""
    last = np.moveaxis(array, 0, -1)

    def extent(sizes: tuple[int, ...]) -> list[int]:
        return [n for n in sizes if n != 1]

    if extent(last.shape) == extent(shape):
        return last.reshape(shape)
    spatial = (*shape[:3], *(1,) * (3 - len(shape)))
    if extent(last.shape[:-1]) == extent(spatial):
        return last.reshape(spatial if array.shape[0] == 1 else (*spatial, array.shape[0]))
    raise InputError(f"a map of shape {array.shape} (channels first) does not lie on the scan's grid {shape}")


def _window(array: np.ndarray) -> tuple[float, float]:
    magnitude = np.abs(array)
    high = float(np.percentile(magnitude, 99.5)) or float(magnitude.max())
    return (-high if array.min() < 0 else 0.0), high


def sidecar_path(map_path: str | os.PathLike[str]) -> Path:
    """``…_attr.json`` beside ``…_attr.nii.gz``.

    >>> sidecar_path("out/a/a_b_Saliency_attr.nii.gz").as_posix()
    'out/a/a_b_Saliency_attr.json'
    """
    return _beside(map_path, ".json")


def picture_path(map_path: str | os.PathLike[str]) -> Path:
    """``…_attr.png`` beside ``…_attr.nii.gz``."""
    return _beside(map_path, ".png")


def table_path(map_path: str | os.PathLike[str]) -> Path:
    """The feature table beside a map, of methods that explain features: ``.csv`` in place of the extension."""
    return _beside(map_path, ".csv")


def curve_path(map_path: str | os.PathLike[str]) -> Path:
    """``…_attr_curve.png`` beside ``…_attr.nii.gz``, of methods that optimise an image."""
    return _beside(map_path, "_curve.png")


def _beside(map_path: str | os.PathLike[str], suffix: str) -> Path:
    path = Path(map_path)
    stem = next((path.name.removesuffix(s) for s in MAP_SUFFIXES if path.name.endswith(s)), path.name)
    return path.with_name(stem + suffix)


def save_sidecar(map_path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Writes the record of a map beside it, atomically and last: the sidecar says that map and picture are finished.

    Strict JSON with sorted keys (`strict_json`: a number that is not finite becomes null and is named in
    ``non_finite``). Added to ``record``: ``intended_use``, and of a map that lies there its file name, size and
    SHA-256, so that a map cut or exchanged later is noticed.

    Raises:
        UsageError: the file cannot be written.
        TypeError: a value that JSON has no form for, with its key.
    """
    path = Path(map_path)
    entries = {**record, "intended_use": INTENDED_USE}
    if path.is_file():
        entries |= {"map": path.name, "map_bytes": path.stat().st_size, "map_sha256": sha256_file(path)}
    return write_json(sidecar_path(path), entries)


def is_complete(map_path: str | os.PathLike[str], key: Mapping[str, Any]) -> bool:
    """Whether the map of an earlier run is there, whole, and what this run would compute.

    Args:
        key: the entries of the record that decide: method, parameters, target, hashes of weights, configs and scan,
            seed, versions. Each must stand in the sidecar with an equal value.

    A sidecar that is missing or unreadable, a status other than ok, zero or empty_target, another parameter or hash,
    a map that is missing or no longer has the recorded SHA-256: not complete, and computed again.
    """
    record = read_json(sidecar_path(map_path))
    if record is None or record.get("status") not in (*WITH_MAP, "empty_target"):
        return False
    wanted = json.loads(strict_json(key))  # as it would come back from a sidecar
    wanted.pop("non_finite", None)
    if any(record.get(name, _MISSING) != value for name, value in wanted.items()):
        return False
    if record["status"] not in WITH_MAP:
        return True
    path = Path(map_path)
    return path.is_file() and "map_sha256" in record and sha256_file(path) == record["map_sha256"]
