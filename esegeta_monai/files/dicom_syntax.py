"""Check that a DICOM file is encoded as it states: readers may hang on data of another encoding."""

from __future__ import annotations

import struct
from pathlib import Path

from esegeta_monai.errors import InputError

__all__ = ["UNCOMPRESSED", "check_syntax"]

IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
UNCOMPRESSED = (IMPLICIT, EXPLICIT, BIG_ENDIAN)
LONGEST_META = 1 << 16
LONG_FORMS = (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UC", b"UN", b"UR", b"UT", b"SV", b"UV")


def check_syntax(path: Path) -> None:
    """Check that the data of a DICOM file are in the transfer syntax that its meta information states.

    Files without the DICOM preamble have no meta information and are not checked.

    Raises:
        InputError: the file cannot be read or is cut short in its header, the syntax is private (not one of the
            standard), or the first element has another encoding.
    """
    try:
        with path.open("rb") as file:
            head = file.read(LONGEST_META)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    if head[128:132] != b"DICM":
        return
    syntax, at = _meta(path, head)
    if not syntax.startswith("1.2.840.10008.1.2"):
        raise InputError(
            f"{path}: the transfer syntax {syntax or '(none)'} is not one of the DICOM standard; convert the file to "
            "explicit little endian, for example with gdcmconv --raw"
        )
    if syntax == "1.2.840.10008.1.2.1.99":
        return  # deflated: the data are compressed as a whole
    order = ">" if syntax == BIG_ENDIAN else "<"
    group = struct.unpack(f"{order}H", head[at : at + 2])[0] if len(head) >= at + 8 else None
    explicit = head[at + 4 : at + 6].isalpha() and head[at + 4 : at + 6].isupper()
    if group is None:
        raise InputError(f"{path}: the file is truncated (it ends in its header); copy it again")
    if not 4 <= group <= 0x1000 or explicit != (syntax != IMPLICIT):
        raise InputError(
            f"{path}: its data are not in the transfer syntax that it states, {syntax}; export the series again"
        )


def _meta(path: Path, head: bytes) -> tuple[str, int]:
    """Return the transfer syntax, and where the meta information (group 2, always explicit little endian) ends."""
    at, syntax = 132, ""
    while head[at : at + 2] == b"\2\0":
        kind = head[at + 4 : at + 6]
        long = kind in LONG_FORMS
        field = head[at + 8 : at + 12] if long else head[at + 6 : at + 8]
        if len(field) < (4 if long else 2):
            break
        length = struct.unpack("<I" if long else "<H", field)[0]
        start = at + (12 if long else 8)
        if head[at + 2 : at + 4] == b"\x10\0":
            syntax = head[start : start + length].decode("ascii", "replace").strip("\0 ")
        at = start + length
    if at > len(head):
        raise InputError(f"{path}: the file is truncated (it ends in its header); copy it again")
    return syntax, at
