"""Read and check scans; the voxel grid that a map takes from its scan."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from monai.data import ITKReader, MetaTensor, NibabelReader, NumpyReader, PILReader
from monai.data.image_reader import ImageReader
from monai.transforms import EnsureChannelFirst
from monai.utils import optional_import

from esegeta_monai.errors import InputError
from esegeta_monai.files.dicom import DICOM_SUFFIXES, check_file, check_series
from esegeta_monai.files.doubts import geometry_doubts
from esegeta_monai.utils.images import _check_affine, check_image
from esegeta_monai.utils.stated_size import NIBABEL_SUFFIXES, open_with_nibabel
from esegeta_monai.utils.whole_files import check_whole

__all__ = ["Grid", "read_scan"]

RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
GEOMETRY_FIELDS = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code"),
    *("quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
"""The geometry fields of a NIfTI header. Nothing else of a scan's header is copied to a map: free text (``descrip``,
``db_name``, ``aux_file``) and extensions can name a patient."""


@dataclass(frozen=True)
class Grid:
    """The voxel grid of a scan as stored in its file: shape, affine, sform and qform with codes, units.

    Attributes:
        shape: the array's shape on disk, trailing singletons included, channels last.
        header: a NIfTI header with the scan's shape and geometry only.
    """

    shape: tuple[int, ...]
    header: nib.Nifti1Header

    @property
    def affine(self) -> np.ndarray:
        """4x4 voxel to world (RAS mm): sform, else qform, else voxel size, in the order of the NIfTI standard."""
        return self.header.get_best_affine()

    @classmethod
    def of(cls, scan: str | os.PathLike[str] | nib.spatialimages.SpatialImage | MetaTensor | Mapping[str, Any]) -> Grid:
        """Return the grid of a file, a nibabel image, a MetaTensor (C, *spatial), or a MONAI meta dictionary.

        Prefer the file: MONAI silently corrects an affine that contradicts the voxel size, and MetaTensors have the
        corrected one. Header values in a meta dictionary are used only if they agree with its affine, because
        transforms such as ``Spacingd`` leave outdated ones. Without header values, the affine becomes sform and qform
        with code 1 ("scanner"); the qform is omitted if it cannot represent the affine (shears).

        Raises:
            InputError: the file is missing or unreadable, or the meta dictionary has no affine.
        """
        if isinstance(scan, (str, os.PathLike)):
            path = Path(scan)
            if path.name.lower().endswith(NIBABEL_SUFFIXES):
                return cls.of(open_with_nibabel(path))
            return cls.of(read_scan(path))
        if isinstance(scan, nib.spatialimages.SpatialImage):
            if isinstance(scan.header, nib.Nifti1Header):
                return cls(tuple(scan.shape), _geometry_of(scan.header, scan.shape))
            return cls(tuple(scan.shape), _geometry_from(scan.affine, scan.shape))
        meta = scan.meta if isinstance(scan, MetaTensor) else scan
        if isinstance(scan, MetaTensor):
            shape = _disk_shape(tuple(scan.shape))
        elif "spatial_shape" in meta:
            shape = tuple(int(n) for n in meta["spatial_shape"])
        else:
            raise InputError("the scan's meta data has no 'spatial_shape': load it with MONAI's LoadImage")
        affine = scan.affine if isinstance(scan, MetaTensor) else meta.get("affine")
        if affine is None:
            raise InputError("the scan's meta data has no 'affine': load it with MONAI's LoadImage")
        matrix = _four_by_four(np.asarray(affine, dtype=np.float64))
        if all(field in meta for field in GEOMETRY_FIELDS):
            header = _geometry_of(meta, shape)
            if np.allclose(header.get_best_affine(), matrix, rtol=1e-5, atol=1e-5 * np.abs(matrix).max()):
                return cls(shape, header)
        return cls(shape, _geometry_from(matrix, shape))


def _geometry_of(header: Any, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """Return a new header with the geometry fields of ``header``, bit for bit (float32 as in NIfTI-1).

    It needs the shape, because with sform and qform codes of 0 the origin is the centre of the volume.
    """
    fresh = nib.Nifti1Header()
    fresh.set_data_shape(shape)
    for field in GEOMETRY_FIELDS:
        fresh[field] = np.asarray(header[field])
    return fresh


def _geometry_from(affine: np.ndarray, shape: tuple[int, ...]) -> nib.Nifti1Header:
    """Return a new header for an affine without one: millimetres, code 1 ("scanner")."""
    fresh = nib.Nifti1Header()
    fresh.set_data_shape(shape)
    fresh.set_sform(affine, code=1)
    fresh.set_qform(affine, code=1, strip_shears=True)
    if not np.allclose(fresh.get_qform(), affine, rtol=1e-4, atol=1e-4 * np.abs(affine[:3, :3]).max()):
        fresh["qform_code"] = 0
    fresh.set_xyzt_units("mm")
    return fresh


def _disk_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape on disk of (C, *spatial): at least three spatial axes, then channels if there are several.

    >>> _disk_shape((1, 4, 5)), _disk_shape((3, 4, 5)), _disk_shape((1, 4, 5, 6)), _disk_shape((2, 4, 5, 6))
    ((4, 5, 1), (4, 5, 1, 3), (4, 5, 6), (4, 5, 6, 2))
    """
    channels, spatial = shape[0], shape[1:]
    spatial = spatial + (1,) * (3 - len(spatial))
    return spatial if channels == 1 else (*spatial, channels)


def _four_by_four(affine: np.ndarray) -> np.ndarray:
    """Return a 4x4 affine; a 3x3 one (2D) gets a third axis."""
    full = np.eye(4)
    n = affine.shape[-1] - 1
    full[:n, :n], full[:n, 3] = affine[:n, :n], affine[:n, n]
    return full


def read_scan(
    path: str | os.PathLike[str], *, spatial_dims: int | None = None, channels: int | None = None
) -> MetaTensor:
    """Read a scan as MetaTensor (C, *spatial), float32, and check it.

    NIfTI is read with nibabel, PNG and similar pictures with Pillow, NumPy files directly, everything else (NRRD, MHA,
    a folder with one DICOM series) with ITK if ``itk`` is installed. Compressed files are first read to their end, once
    for each process, to verify their checksums (`esegeta_monai.utils.whole_files.check_whole`).

    Args:
        spatial_dims: required number of spatial dimensions, 2 or 3. For 2, a third axis of size 1 is removed.
        channels: required number of channels.

    Raises:
        InputError: the file is missing, empty, truncated, altered, of another format, or larger than the limit of
            `check_whole` (a DICOM series: it has a gap, see `check_series`); it contains NaN, infinity, colour triples
            or complex numbers; its affine is singular or out of all proportion; dimensions or channels differ from the
            required ones; ITK is needed and not installed.
    """
    check_whole(path)
    path = Path(path)
    reader: ImageReader
    if path.name.lower().endswith(NIBABEL_SUFFIXES):
        image = open_with_nibabel(path)
        # as in the file, before MONAI corrects it
        _check_affine(np.asarray(image.affine, dtype=np.float64), min(3, image.ndim), path)
        geometry_doubts(path)
        reader = NibabelReader()
    elif path.name.lower().endswith(RASTER_SUFFIXES):
        reader = PILReader()
    elif path.name.lower().endswith((".npy", ".npz")):
        reader = NumpyReader()
    else:
        reader = _itk_reader(path)
    array, meta = _load(reader, path)
    if array.dtype.fields is not None or np.iscomplexobj(array):
        raise InputError(f"{path}: voxels of type {array.dtype} are not grey values; convert the image to numbers")
    meta["filename_or_obj"] = str(path)
    scan = MetaTensor.ensure_torch_and_prune_meta(np.ascontiguousarray(array, dtype=np.float32), meta)
    scan = cast(MetaTensor, EnsureChannelFirst()(scan))
    while scan.ndim > 4 and scan.shape[-1] == 1:  # NIfTI stores vectors in the fifth axis; the fourth has size 1
        scan = scan[..., 0]
    if spatial_dims == 2 and scan.ndim == 4 and scan.shape[-1] == 1:
        scan = scan[..., 0]
    check_image(scan, path, spatial_dims=spatial_dims, channels=channels)
    return scan


def _itk_reader(path: Path) -> ImageReader:
    itk, has_itk = optional_import("itk")
    if not has_itk:
        what = "a DICOM folder" if path.is_dir() else f"a {path.suffix or 'suffixless'} file"
        raise InputError(f'{path}: reading {what} needs ITK: pip install "esegeta-monai[itk]"')
    if path.is_dir():
        check_series(path, itk)
    elif path.name.lower().endswith(DICOM_SUFFIXES):
        check_file(path, itk)
    return ITKReader()


def _load(reader: ImageReader, path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # this module checks the causes of these warnings itself
            array, meta = reader.get_data(reader.read(str(path)))
            return np.asarray(array), meta
    except EOFError as error:
        raise InputError(f"{path}: the file is truncated ({_one_line(error)}); copy it again") from error
    except Exception as error:  # each reader has its own errors; all mean an unreadable file
        if "Expected" in str(error) and "bytes, got" in str(error):
            raise InputError(f"{path}: the file is truncated ({_one_line(error)}); copy it again") from error
        raise InputError(f"{path}: cannot be read as an image ({_one_line(error)})") from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
