"""Small DICOM series, NRRD and MetaImage files that tests write themselves, with ITK alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def to_lps(affine: np.ndarray) -> np.ndarray:
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _image(itk: Any, values: np.ndarray, affine: np.ndarray) -> Any:
    lps = to_lps(affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = itk.image_from_array(np.ascontiguousarray(values.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / spacing)))
    return image


def write_volume(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    """An NRRD or MetaImage file; ``affine`` is voxel to RAS."""
    import itk

    path.parent.mkdir(parents=True, exist_ok=True)
    itk.imwrite(_image(itk, values, affine), str(path))
    return path


def write_series(folder: Path, values: np.ndarray, affine: np.ndarray, *, declared: int | None = None) -> Path:
    """Write one DICOM file per slice along the last axis of ``values`` (int16).

    Args:
        folder: new folder.
        values: (x, y, z).
        affine: (4, 4).
        declared: number of slices in the tag Images in Acquisition; None: no tag.
    """
    import itk

    folder.mkdir(parents=True, exist_ok=True)
    lps, uid = to_lps(affine), "1.2.826.0.1.3680043.2.1125.1"
    axes = lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0)
    for k in range(values.shape[2]):
        shifted = affine.copy()
        shifted[:3, 3] = (affine @ [0, 0, k, 1])[:3]
        image = _image(itk, values[:, :, k : k + 1].astype(np.int16), shifted)
        tags = image.GetMetaDataDictionary()
        entries = {
            "0008|0060": "CT",
            "0008|0018": f"{uid}.3.{k + 1}",
            "0010|0010": "Doe^Jane",
            "0020|000d": f"{uid}.1",
            "0020|000e": f"{uid}.2",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(f"{x:.9g}" for x in to_lps(shifted)[:3, 3]),
            "0020|0037": "\\".join(f"{x:.9g}" for x in [*axes[:, 0], *axes[:, 1]]),
        }
        if declared is not None:
            entries["0020|1002"] = str(declared)
        for key, value in entries.items():
            tags[key] = value
        image_io = itk.GDCMImageIO.New()
        image_io.KeepOriginalUIDOn()
        writer = itk.ImageFileWriter[type(image)].New()
        writer.SetInput(image)
        writer.SetImageIO(image_io)
        writer.SetFileName(str(folder / f"{k:03d}.dcm"))
        writer.Update()
    return folder
