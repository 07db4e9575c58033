"""Check DICOM series for completeness: readers skip a gap with only a warning and shift all slices after it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from esegeta_monai.errors import InputError
from esegeta_monai.files.dicom_syntax import UNCOMPRESSED, check_syntax
from esegeta_monai.utils.whole_files import check_size

__all__ = ["DICOM_SUFFIXES", "check_file", "check_series"]

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_POSITION, _ORIENTATION = "0020|0032", "0020|0037"
_NUMBER, _IN_ACQUISITION, _IN_STACK = "0020|0013", "0020|1002", "0054|0081"
_UNEVEN = 0.02  # relative to the slice distance; scanners round positions to about 1e-3 mm


def check_file(path: Path, itk: Any) -> None:
    """Check a single DICOM file: its encoding, and its size against the one that it states.

    Raises:
        InputError: it is truncated, too large, or not encoded as it states.
    """
    check_syntax(path)
    try:
        header = _header(itk, str(path))
    except Exception as error:  # ITK raises RuntimeError with several lines
        raise InputError(f"{path}: cannot be read as a DICOM file; export it again") from error
    on_disk = path.stat().st_size
    check_size(path, header["pixels"], header["bytes"], on_disk)
    if header["bytes"] > on_disk and not header["compressed"]:
        raise InputError(f"{path}: the file is truncated ({on_disk} bytes for {header['bytes']} bytes of voxels)")


def check_series(folder: Path, itk: Any) -> list[str]:
    """Return the files of the only series in a folder, in slice order, after checking that it is complete.

    A series is complete if every ``.dcm`` (``.dicom``, ``.ima``) file in the folder is one of its readable slices, the
    slices are equally spaced and of one size and orientation, their instance numbers have no gap, and their number is
    the one that the files declare (Images in Acquisition, Number of Slices), if they do.

    Raises:
        InputError: the folder has no or several series, a truncated or mixed one, or files that are not encoded as they
            state; the message names the missing part.
    """
    for member in sorted(folder.iterdir()):
        if member.is_file():
            check_syntax(member)
    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.SetDirectory(str(folder))
    series = list(names.GetSeriesUIDs())
    if len(series) != 1:
        raise InputError(f"{folder}: the folder holds {len(series)} DICOM series; give a folder that holds one")
    files = [str(file) for file in names.GetFileNames(series[0])]
    expected = {p.resolve() for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(DICOM_SUFFIXES)}
    unreadable = sorted(p.name for p in expected - {Path(file).resolve() for file in files})
    if unreadable:
        raise _truncated(folder, f"{len(unreadable)} of {len(expected)} files cannot be read, first {unreadable[0]}")
    headers = [_header(itk, file) for file in files]
    for file, header in zip(files, headers):
        if header["bytes"] > Path(file).stat().st_size and not header["compressed"]:
            raise _truncated(folder, f"{Path(file).name} is cut short")
    _check_alike(folder, files, headers)
    if len(files) > 1:
        _check_distances(folder, headers)
    numbers = sorted(h["number"] for h in headers if h["number"] is not None)
    steps = np.diff(numbers)
    if len(set(steps)) > 1 and max(steps) > 1:  # a constant step is a numbering scheme, not a gap
        raise _truncated(folder, f"instance number {numbers[int(np.argmax(steps))] + 1} is missing")
    declared = {h["count"] for h in headers} - {None}
    if len(declared) == 1 and (count := declared.pop()) is not None and count > len(files):
        raise _truncated(folder, f"{len(files)} slices of the {count} that the files declare")
    return files


def _check_alike(folder: Path, files: list[str], headers: list[dict[str, Any]]) -> None:
    """Check that the slices have one size and orientation, and are not too large together."""
    first = headers[0]
    for file, header in zip(files, headers):
        if header["size"] != first["size"]:
            sizes = [" x ".join(map(str, h["size"])) for h in (header, first)]
            raise _mixed(folder, f"{Path(file).name} has {sizes[0]} voxels, {Path(files[0]).name} {sizes[1]}")
        if header["kind"] != first["kind"]:
            raise _mixed(folder, f"{Path(file).name} has other types of numbers than {Path(files[0]).name}")
        here, there = header["orientation"], first["orientation"]
        if here is not None and there is not None and not np.allclose(here, there, atol=1e-3):
            raise _mixed(folder, f"{Path(file).name} has another orientation than {Path(files[0]).name}")
    on_disk = sum(Path(file).stat().st_size for file in files)
    check_size(folder, sum(h["pixels"] for h in headers), sum(h["bytes"] for h in headers), on_disk)


def _mixed(folder: Path, what: str) -> InputError:
    return InputError(f"{folder}: the slices are not of one series ({what}); give a folder that holds one")


def _check_distances(folder: Path, headers: list[dict[str, Any]]) -> None:
    if any(h["position"] is None or h["orientation"] is None for h in headers):
        return
    row, column = np.split(headers[0]["orientation"], 2)
    along = np.array([h["position"] @ np.cross(row, column) for h in headers])
    distances = np.diff(np.sort(along))
    usual = float(np.median(distances))
    uneven = np.abs(distances - usual) > _UNEVEN * max(usual, 1e-6)
    if uneven.any():
        wrong = float(distances[uneven][0])
        if wrong < _UNEVEN * usual:
            raise _mixed(folder, "two slices are at the same place")
        raise _truncated(folder, f"slices are missing, one gap of {wrong:g} mm among gaps of {usual:g} mm")


def _truncated(folder: Path, what: str) -> InputError:
    return InputError(f"{folder}: the DICOM series is truncated ({what}); export or copy the complete series again")


def _header(itk: Any, file: str) -> dict[str, Any]:
    image_io = itk.GDCMImageIO.New()
    image_io.SetFileName(file)
    image_io.ReadImageInformation()
    tags = image_io.GetMetaDataDictionary()

    def text(tag: str) -> str | None:
        return str(tags[tag]).strip() if tags.HasKey(tag) else None

    def numbers(tag: str, n: int) -> np.ndarray | None:
        values = [float(v) for v in (text(tag) or "").split("\\") if v.strip()]
        return np.array(values) if len(values) == n else None

    def whole(tag: str) -> int | None:
        value = text(tag)
        return int(value) if value and re.fullmatch(r"[+-]?\d+", value) else None

    size = tuple(int(image_io.GetDimensions(axis)) for axis in range(image_io.GetNumberOfDimensions()))
    syntax = text("0002|0010") or "1.2.840.10008.1.2.1"
    return {
        "position": numbers(_POSITION, 3),
        "orientation": numbers(_ORIENTATION, 6),
        "number": whole(_NUMBER),
        "count": whole(_IN_ACQUISITION) or whole(_IN_STACK),
        "size": size,
        "kind": image_io.GetComponentTypeAsString(image_io.GetComponentType()),
        "pixels": math.prod(size) * int(image_io.GetNumberOfComponents()),
        "bytes": int(image_io.GetImageSizeInBytes()),
        "compressed": syntax not in UNCOMPRESSED,
    }
