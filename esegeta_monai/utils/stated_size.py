"""Place, encoding and size of an image's voxels, as the header of its file states them."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from esegeta_monai.errors import InputError

__all__ = ["NIBABEL_SUFFIXES", "StatedData", "open_with_nibabel", "stated_data"]

NIBABEL_SUFFIXES = (".nii", ".nii.gz", ".img", ".img.gz", ".hdr", ".hdr.gz", ".mgz", ".mgh")
LONGEST_HEADER = 1 << 20
LONGEST_EXTENSIONS, MOST_EXTENSIONS = 64 << 20, 1000

_NRRD_BYTES = {
    **dict.fromkeys(("int8", "uint8", "signed char", "unsigned char", "uchar", "int8_t", "uint8_t"), 1),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), 2),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), 2),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t", "uint", "unsigned int", "uint32", "uint32_t"), 4),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), 8),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), 8),
    "float": 4,
    "double": 8,
}
_META_BYTES = {
    **dict.fromkeys(("MET_CHAR", "MET_UCHAR"), 1),
    **dict.fromkeys(("MET_SHORT", "MET_USHORT"), 2),
    **dict.fromkeys(("MET_INT", "MET_UINT", "MET_LONG", "MET_ULONG", "MET_FLOAT"), 4),
    **dict.fromkeys(("MET_LONG_LONG", "MET_ULONG_LONG", "MET_DOUBLE"), 8),
}


@dataclass(frozen=True)
class StatedData:
    """The voxels of an image file, as its header states them.

    Attributes:
        file: the file with the voxels; another one than the header's for Analyze pairs and detached headers.
        start: where the stream of voxels begins in ``file``, in bytes; ``raw`` data with −1 are its last bytes.
        skipped: bytes of the (decompressed) stream before the first voxel.
        size: bytes of the voxels, decompressed.
        voxels: number of voxels, all channels together.
        stored: ``"raw"``, ``"gzip"`` or ``"zlib"``.
        ends: the format has nothing after its voxels.
    """

    file: Path
    start: int
    skipped: int
    size: int
    voxels: int
    stored: Literal["raw", "gzip", "zlib"]
    ends: bool = True


def stated_data(path: Path) -> StatedData | None:
    """Read what the header of a file states about its voxels, without reading any; None for other formats.

    NIfTI, Analyze, MGH, NRRD, MetaImage and NumPy are known.

    Raises:
        InputError: the header cannot be read, or states an impossible size.
    """
    name = path.name.lower()
    if name.endswith(NIBABEL_SUFFIXES):
        return _of_nibabel(path)
    if name.endswith((".nrrd", ".nhdr")):
        return _of_nrrd(path)
    if name.endswith((".mha", ".mhd")):
        return _of_metaimage(path)
    return _of_numpy(path) if name.endswith(".npy") else _of_archive(path) if name.endswith(".npz") else None


def open_with_nibabel(path: Path) -> Any:
    """Open an image: read its header, leave its voxels on disk.

    Raises:
        InputError: the file is missing, its header cannot be read, or it has more extensions than a scan can have.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    _check_extensions(path)
    try:
        return nib.load(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file or folder") from error
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: no readable NIfTI file ({why[:200]}); convert or copy it again") from error


def _check_extensions(path: Path) -> None:
    """Check the extensions of a NIfTI file or pair, all of which nibabel reads and parses before the first voxel.

    Raises:
        InputError: they are longer, or more, than a scan can have.
    """
    header = path.with_name(re.sub(r"\.img(\.gz)?$", r".hdr\1", path.name, flags=re.IGNORECASE))
    try:
        with (gzip.open if path.name.lower().endswith(".gz") else open)(header, "rb") as file:
            head = file.read(544)
            order, begin, end = _nifti_layout(head)
            at = begin + 4
            for _ in range(MOST_EXTENSIONS + 1):
                if at > LONGEST_EXTENSIONS or (end is not None and end > LONGEST_EXTENSIONS):
                    raise InputError(
                        f"{path}: the header states more than {LONGEST_EXTENSIONS >> 20} MiB before the voxels, as no "
                        "scan has; convert the file"
                    )
                if not any(head[begin : begin + 1]) or (end is not None and at >= end):
                    return
                file.seek(at)
                step = struct.unpack(f"{order}i", file.read(4))[0]
                if step < 8:
                    return  # nibabel names it
                at += step
    except (OSError, EOFError, struct.error, zlib.error):
        return  # nibabel and the check of the stream name it
    raise InputError(f"{path}: the header has more than {MOST_EXTENSIONS} extensions, as no scan has; convert the file")


def _nifti_layout(head: bytes) -> tuple[str, int, float | None]:
    """Return the byte order, the size of the header, and the place of the first voxel (None: in another file).

    Raises:
        struct.error: it is no NIfTI header.
    """
    for order in "<>":
        (size,) = struct.unpack_from(f"{order}i", head)
        if size == 348 and head[344:347] in (b"n+1", b"ni1"):
            return order, size, struct.unpack_from(f"{order}f", head, 108)[0] if head[344:347] == b"n+1" else None
        if size == 540 and head[4:7] in (b"n+2", b"ni2"):
            return order, size, struct.unpack_from(f"{order}q", head, 168)[0] if head[4:7] == b"n+2" else None
    raise struct.error("no NIfTI header")


def _of_nibabel(path: Path) -> StatedData:
    import nibabel as nib

    image = open_with_nibabel(path)
    shape = tuple(int(n) for n in image.shape)
    if not shape or min(shape) < 1:
        raise InputError(f"{path}: the header states the shape {shape}; convert or copy the file again")
    stored = image.file_map["image"].filename
    file = path if stored is None else Path(stored)
    voxels = math.prod(shape)
    start = int(image.dataobj.offset)
    compressed = file.name.lower().endswith((".gz", ".mgz"))
    size = voxels * image.header.get_data_dtype().itemsize
    ends = isinstance(image.header, nib.Nifti1Header)  # MGH has tags after its voxels
    return StatedData(file, 0, start, size, voxels, "gzip" if compressed else "raw", ends)


def _of_nrrd(path: Path) -> StatedData | None:
    text, end = _text_header(path, re.compile(rb"\r?\n\r?\n"))
    if not text.startswith("NRRD"):
        raise InputError(f"{path}: cannot be read as an image (no NRRD file)")
    fields = {key.strip().lower(): value.strip() for key, value in re.findall(r"^([^:#\n]+):\s(.*)$", text, re.M)}
    sizes, kind = _whole(path, fields.get("sizes", "")), _NRRD_BYTES.get(fields.get("type", ""))
    encoding = fields.get("encoding", "raw").lower()
    if not sizes or kind is None:
        return None  # ITK names what is wrong
    if kind > 1 and "endian" not in fields and encoding not in ("ascii", "text", "txt"):
        raise InputError(f"{path}: the header does not state the byte order (endian: little or big); add this line")
    detached = fields.get("data file", fields.get("datafile"))
    if detached is not None and (detached.startswith("LIST") or " " in detached):
        return None  # several files: ITK reads one after the other
    file = path if detached is None else path.parent / detached
    if encoding not in ("raw", "gzip", "gz") or "line skip" in fields:
        return None
    stored: Literal["raw", "gzip"] = "raw" if encoding == "raw" else "gzip"
    voxels = math.prod(sizes)
    skip = int(fields.get("byte skip", fields.get("byteskip", "0")))
    begin = end if detached is None else 0
    if stored == "raw" and skip == -1:
        begin, skip = -1, 0
    return StatedData(file, begin, max(skip, 0), voxels * kind, voxels, stored)


def _of_metaimage(path: Path) -> StatedData | None:
    text, end = _text_header(path, re.compile(rb"ElementDataFile\s*=[^\n]*\n?"))
    fields = {key: value.strip() for key, value in re.findall(r"^(\w+)\s*=\s*(.*)$", text, re.M)}
    sizes, kind = _whole(path, fields.get("DimSize", "")), _META_BYTES.get(fields.get("ElementType", ""))
    where = fields.get("ElementDataFile", "")
    binary = fields.get("BinaryData", "True").lower().startswith("t")
    if not sizes or kind is None or not where or not binary or where.startswith("LIST") or "%" in where:
        return None  # ITK names what is wrong
    local = where.upper() == "LOCAL"
    file = path if local else path.parent / where
    compressed = fields.get("CompressedData", "False").lower().startswith("t")
    voxels = math.prod(sizes) * int(fields.get("ElementNumberOfChannels", "1"))
    begin = int(fields.get("HeaderSize", "0")) if not local else end
    return StatedData(file, begin, 0, voxels * kind, voxels, "zlib" if compressed else "raw")


def _of_numpy(path: Path) -> StatedData:
    with path.open("rb") as file:
        try:
            shape, kind = _numpy_header(file)
        except Exception as error:  # NumPy evaluates the header, and passes on what Python's parser raises
            raise InputError(f"{path}: cannot be read as an image ({' '.join(str(error).split())[:200]})") from error
        voxels = math.prod(shape)
        return StatedData(path, file.tell(), 0, voxels * kind.itemsize, voxels, "raw")


def _numpy_header(file: Any) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    return shape, kind


def _of_archive(path: Path) -> StatedData | None:
    """The members of an archive together; `zipfile` verifies their checksums while they are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = 0
            for member in archive.infolist():
                size += member.file_size
                with archive.open(member) as file:
                    shape, kind = _numpy_header(file)
                if math.prod(shape) * kind.itemsize > member.file_size:
                    raise InputError(f"{path}: the file is truncated ({member.filename} is cut short); copy it again")
    except InputError:
        raise
    except Exception as error:  # as above, and those of `zipfile` and `zlib`
        raise InputError(f"{path}: cannot be read as an image ({' '.join(str(error).split())[:200]})") from error
    return StatedData(path, 0, 0, 0, size, "raw", ends=False)


def _text_header(path: Path, end: re.Pattern[bytes]) -> tuple[str, int]:
    """Return the text at the beginning of a file up to the first match of ``end``, and where the match stops.

    Raises:
        InputError: it goes on for a MiB without an end; ITK would read it for minutes, or crash.
    """
    with path.open("rb") as file:
        head = file.read(LONGEST_HEADER)
    match = end.search(head)
    if match is None and len(head) == LONGEST_HEADER:
        raise InputError(f"{path}: cannot be read as an image (its header has no end within a MiB)")
    stop = len(head) if match is None else match.end()
    return head[:stop].decode("utf-8", "replace").replace("\r\n", "\n"), stop


def _whole(path: Path, text: str) -> list[int]:
    """Return the sizes of the axes; [] if there are none.

    Raises:
        InputError: one is no whole number above 0.
    """
    words = text.split()
    if not all(w.isdigit() and int(w) > 0 for w in words):
        raise InputError(f"{path}: the header states the shape {text}; convert or copy the file again")
    return [int(w) for w in words]
