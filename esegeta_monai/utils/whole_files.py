"""Check that an image file is whole before its voxels are used: size, checksums, and a size that memory can take.

Readers stop at the last voxel, so they never see the checksum that follows: a flipped bit in a ``.nii.gz`` gives other
voxels without an error. Here the compressed stream is read to its end, in blocks, once for each file and process.
"""

from __future__ import annotations

import logging
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from monai.utils import optional_import

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.utils.files import refuse_remote
from esegeta_monai.utils.stated_size import StatedData, stated_data

__all__ = ["LIMIT", "check_size", "check_sources", "check_whole"]

logger = logging.getLogger(__name__)

LIMIT = "ESEGETA_MAX_SCAN_GB"
"""Environment variable with the largest size of a scan in memory (float32), in GiB."""
USUAL_LIMIT, PACKED_LIMIT = 8.0, 2.0
PACKED = 200
"""Scans compress 2- to 20-fold, label maps 200-fold. Files that state more than that have the lower limit."""
FIRST_ANSWER = 1 << 20
BLOCK = 1 << 20


def check_sources(image: Any, data: Mapping[Any, Any] | None = None) -> None:
    """Check the files from which an image and the entries of its data dictionary were loaded, by `check_whole`.

    Args:
        image: tensor; a MetaTensor (C, *spatial) has the file in its metadata.
        data: data dictionary of the case.

    Raises:
        InputError: a file is damaged. Files that no longer exist are not checked.
    """
    for value in (image, *(data or {}).values()):
        names = getattr(value, "meta", {}).get("filename_or_obj") if hasattr(value, "meta") else None
        for name in names if isinstance(names, (list, tuple)) else [names]:
            if isinstance(name, (str, os.PathLike)) and os.path.isfile(name):
                check_whole(name)


def check_whole(path: str | os.PathLike[str]) -> None:
    """Check that an image file has all the data that its header states, and that these are intact.

    The checksum and length at the end of gzip and zlib streams are verified (with ``isal``, where it is installed). The
    header's sizes are compared with the file's before anything is allocated. Nothing can find a changed bit in an
    uncompressed file: it has no checksum.

    The result is kept for the file's path, size and time of change. A folder is not checked (for DICOM series see
    `esegeta_monai.files.dicom.check_series`).

    Raises:
        InputError: the file is missing, unreadable, truncated, altered, or larger than the limit.
        UsageError: the path is remote, or the limit is no number.

    Example:
        check_whole("scan.nii.gz")
    """
    refuse_remote(path)
    path = Path(path)
    try:
        about = path.stat()
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file or folder") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if stat.S_ISDIR(about.st_mode):
        return
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"{path}: is no regular file (a pipe or a device)")
    if about.st_size == 0:
        raise InputError(f"{path}: the file is empty")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: cannot be read (Permission denied)")
    _check(str(path.absolute()), str(path), about.st_size, about.st_mtime_ns, about.st_ino, os.environ.get(LIMIT))


@lru_cache(maxsize=4096)
def _check(_where: str, name: str, *_version: Any) -> None:
    path = Path(name)
    stated = stated_data(path)
    if stated is None:
        return
    try:
        on_disk = stated.file.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: the file with its voxels, {stated.file.name}, cannot be read") from error
    check_size(path, stated.voxels, stated.size, on_disk)
    if stated.stored == "raw":
        there = on_disk if stated.start < 0 else on_disk - stated.start - stated.skipped
        if there < stated.size:
            raise _truncated(path, there, stated.size)
        behind = 0 if stated.start < 0 or not stated.ends else there - stated.size
    else:
        behind = _check_stream(path, stated, on_disk)
    if behind > 0 and stated.ends:
        logger.warning("%s: %d bytes after the voxels that its header states are not read", path, behind)


def check_size(path: Path, voxels: int, size: int, on_disk: int) -> None:
    """Check that an image of this size may be read, before anything is allocated.

    The limit is 8 GiB of float32, and 2 GiB for files that state more than 200 times their own size.
    ``ESEGETA_MAX_SCAN_GB`` replaces both.

    Args:
        path: file, for the message.
        voxels: number of voxels that its header states, of all channels.
        size: bytes of these voxels, decompressed.
        on_disk: bytes of the file.

    Raises:
        InputError: it is larger than the limit.
        UsageError: ``ESEGETA_MAX_SCAN_GB`` is no number above 0.
    """
    given = os.environ.get(LIMIT)
    needed = 4 * voxels / 2**30
    packed = size > PACKED * on_disk
    try:
        limit = float(given) if given else PACKED_LIMIT if packed else USUAL_LIMIT
    except ValueError:
        limit = -1.0
    if not limit > 0:
        raise UsageError(f"{LIMIT}={given!r}: give a number of GiB above 0")
    if needed > limit:
        raise InputError(
            f"{path}: the header states {voxels} voxels, {needed:.1f} GiB in memory, in a file of {_bytes(on_disk)}: "
            f"more than the limit of {limit:g} GiB; if the file is right, set {LIMIT}={int(needed) + 1}"
        )


def _check_stream(path: Path, stated: StatedData, on_disk: int) -> int:
    """Read a compressed stream to its end; return the number of bytes after the voxels.

    Raises:
        InputError: it is truncated or altered, or goes on far beyond the voxels.
    """
    wanted, total = stated.skipped + stated.size, 0
    most = wanted + max(stated.size, FIRST_ANSWER)
    try:
        for length in _blocks(stated):
            total += length
            if total > most:
                raise InputError(
                    f"{path}: the compressed data go on far beyond the {_bytes(stated.size)} of voxels that the header "
                    "states; convert or copy the file again"
                )
    except EOFError as error:
        raise InputError(f"{path}: the file is truncated ({error}); copy it again") from error
    except Exception as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
        if isinstance(error, (zlib.error, *_isal_errors())):
            raise InputError(f"{path}: the file is damaged ({_said(error)}); copy it again") from error
        raise
    if total < wanted:
        raise _truncated(path, max(0, total - stated.skipped), stated.size)
    return total - wanted


def _blocks(stated: StatedData) -> Iterator[int]:
    """Decompress a stream block by block, which verifies its checksums; give the length of each block.

    Raises:
        EOFError: it has no end.
        zlib.error, isal_zlib.error: it is damaged, or something else follows it.
    """
    library = _zlib()
    bits = 31 if stated.stored == "gzip" else 15
    with stated.file.open("rb") as file:
        file.seek(stated.start)
        stream = library.decompressobj(wbits=bits)
        members, feed = 0, file.read(BLOCK)
        while feed:
            if stream.eof:  # after a member: another one, or zeros that fill a block of the storage
                if stated.stored == "zlib":
                    return
                feed = feed.lstrip(b"\0")
                if not feed:
                    feed = file.read(BLOCK)
                    continue
                if not b"\x1f\x8b".startswith(feed[:2]):
                    raise zlib.error("something else follows the compressed data")
                stream = library.decompressobj(wbits=bits)
            block = stream.decompress(feed, BLOCK)
            yield len(block)
            if stream.eof:
                members += 1
                feed = stream.unused_data or file.read(BLOCK)
            else:
                feed = stream.unconsumed_tail or file.read(BLOCK)
        while not stream.eof:
            block = stream.decompress(b"", BLOCK)
            if not block:
                raise EOFError("the end of the compressed data is missing")
            yield len(block)


def _zlib() -> Any:
    """Return ``isal.isal_zlib`` if it is installed, which is several times as fast, else `zlib`."""
    fast, there = optional_import("isal.isal_zlib")
    return fast if there else zlib


def _isal_errors() -> tuple[type[Exception], ...]:
    library = _zlib()
    return () if library is zlib else (library.error,)


def _said(error: Exception) -> str:
    text = str(error).lower()
    if "data check" in text or "checksum" in text:
        return "its checksum is wrong"
    if "length check" in text:
        return "its length is wrong"
    return " ".join(str(error).split())[:120]


def _truncated(path: Path, there: int, wanted: int) -> InputError:
    return InputError(f"{path}: the file is truncated ({max(there, 0)} of {wanted} bytes of voxels); copy it again")


def _bytes(count: int) -> str:
    """
    >>> _bytes(512), _bytes(3 << 20)
    ('512 bytes', '3.0 MiB')
    """
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
