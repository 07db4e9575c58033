"""Damage in the bytes of DICOM files (implicit little endian, as ITK writes them)."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

Edit = Callable[[Path], object]
IMPLICIT = b"1.2.840.10008.1.2\0"


def transfer_syntax(uid: str, *names: str) -> Edit:
    """State another transfer syntax than that of the data, in these files of a folder or in all."""

    def edit(folder: Path) -> None:
        value = uid.encode() + b"\0" * (len(uid) % 2)
        for path in _files(folder, names):
            content = path.read_bytes()
            old = b"\2\0\x10\0UI" + struct.pack("<H", len(IMPLICIT)) + IMPLICIT
            new = b"\2\0\x10\0UI" + struct.pack("<H", len(value)) + value
            assert content.count(old) == 1
            length = struct.pack("<I", struct.unpack("<I", content[140:144])[0] + len(new) - len(old))
            path.write_bytes(content[:140] + length + content[144:].replace(old, new))

    return edit


def element(group: int, number: int, value: bytes, *names: str) -> Edit:
    """Give an element another value of the same length."""

    def edit(folder: Path) -> None:
        for path in _files(folder, names):
            content = path.read_bytes()
            start = struct.pack("<HHI", group, number, len(value))
            at = content.index(start) + len(start)
            path.write_bytes(content[:at] + value + content[at + len(value) :])

    return edit


def text(old: bytes, new: bytes, *names: str) -> Edit:
    """Replace a text by another of the same length, once."""
    assert len(old) == len(new)

    def edit(folder: Path) -> None:
        for path in _files(folder, names):
            content = path.read_bytes()
            assert old in content, path
            path.write_bytes(content.replace(old, new, 1))

    return edit


def _files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    return [p for p in sorted(folder.glob("*.dcm")) if not names or p.name in names]
