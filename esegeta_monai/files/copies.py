"""Copy of the scan and target masks on the scan's grid, for the report.

They are stored in the output folder, so that a report needs no path outside it:

    <output>/<case>/<case>_scan.nii.gz            intensities, without the header's texts
    <output>/<case>/<case>_<target>_mask.nii.gz   1 in the voxels of the target
"""

from __future__ import annotations

import os
from pathlib import Path

import nibabel as nib
import numpy as np

from esegeta_monai.files.maps import on_disk
from esegeta_monai.files.scans import Grid
from esegeta_monai.utils.files import atomic
from esegeta_monai.utils.names import safe_name

__all__ = ["mask_path", "save_mask", "save_scan_copy", "scan_copy_path"]


def scan_copy_path(output_dir: str | os.PathLike[str], case: str, *, separate_folder: bool = True) -> Path:
    """Return the path of the copy of a case's scan.

    >>> scan_copy_path("out", "sub-01").as_posix()
    'out/sub-01/sub-01_scan.nii.gz'
    """
    return _folder(output_dir, case, separate_folder) / f"{safe_name(case)}_scan.nii.gz"


def mask_path(output_dir: str | os.PathLike[str], case: str, target: str, *, separate_folder: bool = True) -> Path:
    """Return the path of a target's mask.

    >>> mask_path("out", "sub-01", "MultiClassMask-grey matter").as_posix()
    'out/sub-01/sub-01_MultiClassMask-grey-matter_mask.nii.gz'
    """
    return _folder(output_dir, case, separate_folder) / f"{safe_name(case)}_{safe_name(target)}_mask.nii.gz"


def _folder(output_dir: str | os.PathLike[str], case: str, separate: bool) -> Path:
    return Path(output_dir) / safe_name(case) if separate else Path(output_dir)


def save_scan_copy(path: str | os.PathLike[str], values: np.ndarray, grid: Grid) -> Path:
    """Write the intensities of a scan (C, *spatial) for display, so that a reader can choose the grey scale.

    Whole numbers that fit are stored as 16-bit integers, which is exact (CT in Hounsfield units). Others are stored as
    float32 with 12 significant bits, which compress well and are finer than a screen's 256 grey levels. Values that are
    not finite become the channel's smallest value.

    Raises:
        InputError: the scan is not on the grid.
        UsageError: the file cannot be written.
    """
    copy = np.array(values, dtype=np.float32)
    for channel in copy:
        finite = channel[np.isfinite(channel)]
        channel[~np.isfinite(channel)] = finite.min() if finite.size else 0
    if np.abs(copy).max(initial=0) < 2**15 and np.array_equal(copy, np.rint(copy)):
        return _save(Path(path), copy.astype(np.int16), grid)
    mantissa, exponent = np.frexp(copy)
    return _save(Path(path), np.ldexp(np.rint(mantissa * 2**12) / 2**12, exponent).astype(np.float32), grid)


def save_mask(path: str | os.PathLike[str], mask: np.ndarray, grid: Grid) -> Path:
    """Write a mask (1, *spatial), thresholded at 0.5, as bytes 1 and 0.

    Raises:
        InputError: the mask is not on the grid.
        UsageError: the file cannot be written.
    """
    return _save(Path(path), (mask > 0.5).astype(np.uint8), grid)


def _save(path: Path, values: np.ndarray, grid: Grid) -> Path:
    data = on_disk(values, grid.shape)
    header = grid.header.copy()
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header["pixdim"] = grid.header["pixdim"]  # nibabel resets it when axes are added or removed
    header["cal_min"], header["cal_max"] = float(data.min()), float(data.max())
    with atomic(path) as temporary:
        nib.save(nib.Nifti1Image(data, header.get_best_affine(), header), temporary)
    return path
