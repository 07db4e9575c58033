"""Doubts about a scan's geometry: contradictory or missing header entries."""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data.utils import correct_nifti_header_if_necessary

from esegeta_monai.errors import InputError
from esegeta_monai.utils.stated_size import NIBABEL_SUFFIXES, open_with_nibabel

__all__ = ["geometry_doubts"]

logger = logging.getLogger(__name__)


def geometry_doubts(scan: Any) -> tuple[str, ...]:
    """Return sentences on uncertain entries of the geometry of a NIfTI file; () for other formats.

    Each is logged once for a file and process, and belongs into the records of the scan's maps.

    * sform and qform are both set, and place a corner of the volume more than half a voxel apart;
    * neither is set, so that position and orientation are assumed;
    * a voxel size is zero (beside an sform) or negative;
    * the affine contradicts the voxel size, so that MONAI's reader replaces one by the other.

    Args:
        scan: path; anything else has no doubts.

    Raises:
        InputError: the header cannot be read, a voxel size is no finite number, or it is zero and there is no sform.
    """
    if not isinstance(scan, (str, os.PathLike)) or not str(scan).lower().endswith(NIBABEL_SUFFIXES):
        return ()
    path = Path(scan)
    about = path.stat()
    return _doubts(str(path), about.st_size, about.st_mtime_ns)


@lru_cache(maxsize=4096)
def _doubts(name: str, *_version: int) -> tuple[str, ...]:
    path = Path(name)
    image = open_with_nibabel(path)
    header = image.header
    if not isinstance(header, nib.Nifti1Header):
        return ()
    with image.file_map.get("header", image.file_map["image"]).get_prepare_fileobj("rb") as file:
        header = type(header).from_fileobj(file, check=False)  # as in the file: nibabel replaces voxel sizes of zero
    axes = min(3, int(header["dim"][0]))
    sizes = np.asarray(header["pixdim"], dtype=np.float64)[1 : 1 + axes]
    if not np.isfinite(sizes).all():
        raise InputError(
            f"{path}: the voxel size in the header is {_numbers(sizes)}; correct the header (pixdim) first"
        )
    texts: list[str] = []
    codes = int(header["sform_code"]), int(header["qform_code"])
    if (sizes == 0).any() and codes[0] <= 0:
        raise InputError(
            f"{path}: the voxel size in the header is {_numbers(sizes)} and there is no sform: the true size is not "
            "known; correct the header (pixdim) first"
        )
    if all(code > 0 for code in codes):
        apart = _largest_distance(image.get_sform(), image.get_qform(), image.shape[:3])
        if apart > 0.5 * np.linalg.norm(image.affine[:3, :axes], axis=0).min():
            texts.append(f"sform and qform place voxels up to {apart:.4g} mm apart; maps follow the sform")
    elif not any(code > 0 for code in codes):
        axcodes = "".join(str(code) for code in nib.aff2axcodes(image.affine))
        texts.append(f"the header has neither sform nor qform: position and orientation ({axcodes}) are assumed")
    if (sizes <= 0).any():
        texts.append(f"the voxel size in the header is {_numbers(sizes)}: that of the affine is used")
    stated = np.array(image.affine, dtype=np.float64)
    if not np.allclose(stated, correct_nifti_header_if_necessary(image).affine, rtol=1e-4, atol=1e-4):
        texts.append(
            "the affine contradicts the voxel size and MONAI corrects it, so the network sees another geometry; maps "
            "keep the file's"
        )
    for text in texts:
        logger.warning("%s: %s", path, text)
    return tuple(texts)


def _largest_distance(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> float:
    """Return how far two affines (4, 4) place a corner voxel of a volume apart, in mm."""
    corners = np.array([[*corner, 1.0] for corner in product(*[(0, n - 1) for n in (*shape, 1, 1, 1)[:3]])])
    return float(np.linalg.norm(corners @ (first - second)[:3].T, axis=1).max())


def _numbers(values: np.ndarray) -> str:
    return " x ".join(f"{v:g}" for v in values) + " mm"
