"""Read affine transforms and displacement fields of ITK and ANTs.

A transform maps a point of the reference to the point of the scan that belongs there, both in LPS mm: that is what ITK
and ANTs write when a scan is registered to a reference (fixed image).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import optional_import
from scipy.io import loadmat
from scipy.io.matlab import matfile_version
from scipy.ndimage import map_coordinates

from esegeta_monai.errors import InputError
from esegeta_monai.utils.stated_size import NIBABEL_SUFFIXES, open_with_nibabel
from esegeta_monai.utils.whole_files import check_whole

__all__ = ["Affine", "Chain", "DisplacementField", "PointTransform", "read_transform"]

PointTransform = Callable[[np.ndarray], np.ndarray]
"""Maps points (n, 3) of the reference to points (n, 3) of the scan, in LPS mm."""

MATRICES = re.compile(r"(MatrixOffsetTransformBase|AffineTransform)_(?:double|float)_([23])_\2")
LARGEST_TEXT = 1_000_000
DISPLACEMENT, VECTOR = 1006, 1007
"""NIfTI intents: displacements in RAS mm, and vectors, which ITK and ANTs write in LPS mm."""


@dataclass(frozen=True)
class Affine:
    """``y = M x + b``; M (3, 3) and b (3,), LPS mm."""

    matrix: np.ndarray
    offset: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points (n, 3)."""
        result: np.ndarray = points @ self.matrix.T + self.offset
        return result


@dataclass(frozen=True)
class DisplacementField:
    """``y = x + d(x)``, d interpolated linearly, and zero beyond the field.

    Attributes:
        displacements: (x, y, z, 3), LPS mm.
        inverse: (4, 4), LPS mm to voxel of the field.
    """

    displacements: np.ndarray
    inverse: np.ndarray

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points (n, 3)."""
        voxel = (points @ self.inverse[:3, :3].T + self.inverse[:3, 3]).T
        shape = np.asarray(self.displacements.shape[:3])
        voxel[shape == 1] = 0  # a plane extends to both sides
        inside = ((voxel >= -1e-6) & (voxel <= shape[:, None] - 1 + 1e-6)).all(0)
        voxel = np.clip(voxel, 0, shape[:, None] - 1)
        moved = np.stack([map_coordinates(self.displacements[..., k], voxel, order=1) for k in range(3)], 1)
        result: np.ndarray = points + np.where(inside[:, None], moved, 0.0)
        return result


@dataclass(frozen=True)
class Chain:
    """Several transforms; the last one is applied first, as ``antsApplyTransforms`` does."""

    parts: tuple[PointTransform, ...]

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points (n, 3)."""
        for part in reversed(self.parts):
            points = part(points)
        return points


def read_transform(path: str | os.PathLike[str]) -> PointTransform:
    """Read a transform: ``.txt``, ``.tfm``, ``.mat`` (affine), ``.nii[.gz]`` (displacement field), ``.h5`` (needs ITK).

    Raises:
        InputError: the file is missing or unreadable, is no transform of ITK, is singular, has values that are not
            finite, or needs ITK, which is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: there is no such file")
    name = path.name.lower()
    if name.endswith(NIBABEL_SUFFIXES):
        return _field(path)
    if name.endswith((".txt", ".tfm")):
        return _text(path)
    if name.endswith(".mat"):
        return _matlab(path)
    if name.endswith((".h5", ".hdf5")):
        return _with_itk(path)
    raise InputError(f"{path}: a transform is .txt, .tfm, .mat or .h5 of ITK, or a displacement field .nii.gz")


def _affine(path: Path, parameters: Sequence[float], fixed: Sequence[float], dims: int) -> Affine:
    """Return ``y = A (x − c) + t + c`` from ITK's parameters: A by rows, t; fixed parameters: c."""
    values, centre = np.asarray(parameters, dtype=np.float64), np.asarray(fixed, dtype=np.float64)
    if values.size != dims * (dims + 1) or centre.size != dims or not np.isfinite([*values, *centre]).all():
        raise InputError(
            f"{path}: {values.size} and {centre.size} numbers are no affine transform of {dims} dimensions"
        )
    matrix, offset = np.eye(3), np.zeros(3)
    small = values[: dims * dims].reshape(dims, dims)
    matrix[:dims, :dims] = small
    offset[:dims] = values[dims * dims :] + centre - small @ centre
    return _checked(path, matrix, offset)


def _checked(path: Path, matrix: np.ndarray, offset: np.ndarray) -> Affine:
    if not np.isfinite(matrix).all() or not np.isfinite(offset).all() or abs(np.linalg.det(matrix)) < 1e-9:
        raise InputError(f"{path}: the matrix is singular or not finite: register the scan again")
    return Affine(matrix, offset)


def _text(path: Path) -> PointTransform:
    if path.stat().st_size > LARGEST_TEXT:
        raise InputError(f"{path}: {path.stat().st_size} bytes are too many for an affine transform")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text: give the transform that ITK or ANTs wrote") from error
    if not text.startswith("#Insight Transform File"):
        raise InputError(f"{path} is no transform of ITK: its first line is '#Insight Transform File V1.0'")
    kinds = re.findall(r"(?m)^Transform:\s*(\S+)", text)
    kind = MATRICES.fullmatch(kinds[0]) if len(kinds) == 1 else None
    if kind is None:
        return _with_itk(path)
    numbers: dict[str, list[float]] = {}
    for key, line in re.findall(r"(?m)^(Parameters|FixedParameters):(.*)$", text):
        try:
            numbers[key] = [float(word) for word in line.split()]
        except ValueError as error:
            raise InputError(f"{path}: {key} are not numbers") from error
    return _affine(path, numbers.get("Parameters", []), numbers.get("FixedParameters", []), int(kind[2]))


def _matlab(path: Path) -> PointTransform:
    try:
        if matfile_version(path)[0] != 0:
            raise InputError(f"{path}: only files of MATLAB version 4 are transforms of ITK")
        content = loadmat(path)
    except InputError:
        raise
    except Exception as error:  # the reader has many errors; all mean that the file is damaged
        raise InputError(f"{path} cannot be read ({type(error).__name__}): register the scan again") from error
    kinds = [(key, kind) for key in content if (kind := MATRICES.fullmatch(key))]
    if len(kinds) != 1 or "fixed" not in content:
        return _with_itk(path)
    key, kind = kinds[0]
    return _affine(path, np.ravel(content[key]).tolist(), np.ravel(content["fixed"]).tolist(), int(kind[2]))


def _field(path: Path) -> DisplacementField:
    check_whole(path)
    image: Any = open_with_nibabel(path)
    values = np.asarray(image.dataobj, dtype=np.float64)
    intent = int(image.header["intent_code"]) if "intent_code" in image.header else 0
    axes = values.shape[-1] if values.ndim == 5 and values.shape[3] == 1 else 0
    if intent not in (DISPLACEMENT, VECTOR) or axes not in (2, 3):
        raise InputError(
            f"{path}: a displacement field of ITK or ANTs has the shape (x, y, z, 1, 3) and a NIfTI intent of vectors "
            f"(1006 or 1007), not {values.shape} and {intent}"
        )
    if not np.isfinite(values).all():
        raise InputError(f"{path} has displacements that are not finite: register the scan again")
    displacements = np.zeros((*values.shape[:3], 3))
    displacements[..., :axes] = values[:, :, :, 0]
    lps = np.diag([-1.0, -1.0, 1.0, 1.0])
    if intent == DISPLACEMENT:
        displacements = displacements @ lps[:3, :3]
    return DisplacementField(displacements, np.linalg.inv(lps @ np.asarray(image.affine, dtype=np.float64)))


def _with_itk(path: Path) -> PointTransform:
    itk, has_itk = optional_import("itk")
    if not has_itk:
        raise InputError(f'{path}: this transform needs ITK: pip install "esegeta-monai[itk]"')
    try:
        read = itk.transformread(str(path))
    except Exception as error:  # ITK's errors are RuntimeError with many lines
        raise InputError(f"{path} cannot be read by ITK: give the transform that ITK or ANTs wrote") from error
    parts = [part for one in read for part in _flat(path, one)]
    if len(read) > 1 and "Composite" not in read[0].GetNameOfClass():
        raise InputError(f"{path} has {len(read)} transforms: give a file for each, or one composite transform")
    return parts[0] if len(parts) == 1 else Chain(tuple(parts))


def _flat(path: Path, one: Any) -> list[PointTransform]:
    import itk

    name, one = one.GetNameOfClass(), itk.down_cast(one)
    if name == "CompositeTransform":
        return [p for k in range(one.GetNumberOfTransforms()) for p in _flat(path, one.GetNthTransform(k))]
    if name == "IdentityTransform":
        return [Affine(np.eye(3), np.zeros(3))]
    if hasattr(one, "GetDisplacementField"):
        return [_itk_field(one.GetDisplacementField())]
    if name == "TranslationTransform" or hasattr(one, "GetMatrix"):
        dims = len(one.TransformPoint([0.0] * one.GetInputSpaceDimension()))
        matrix, offset = np.eye(3), np.zeros(3)
        offset[:dims] = list(one.TransformPoint([0.0] * dims))
        for k in range(dims):
            unit = [float(k == axis) for axis in range(dims)]
            matrix[:dims, k] = np.asarray(list(one.TransformPoint(unit))) - offset[:dims]
        return [_checked(path, matrix, offset)]
    raise InputError(f"{path}: {name} is not supported: give an affine transform or a displacement field")


def _itk_field(image: Any) -> DisplacementField:
    import itk

    array = np.moveaxis(np.asarray(itk.array_from_image(image), dtype=np.float64), -1, 0)
    values = np.moveaxis(array.transpose(0, *range(array.ndim - 1, 0, -1)), 0, -1)
    dims = values.shape[-1]
    displacements = np.zeros((*values.shape[:dims], *[1] * (3 - dims), 3))
    displacements[..., :dims] = values.reshape(*displacements.shape[:3], dims)
    affine = np.eye(4)
    spacing, direction = np.asarray(list(image.GetSpacing())), itk.array_from_matrix(image.GetDirection())
    affine[:dims, :dims] = direction * spacing
    affine[:dims, 3] = list(image.GetOrigin())
    return DisplacementField(displacements, np.linalg.inv(affine))
