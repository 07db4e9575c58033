"""Damaged NRRD, MetaImage, DICOM and NumPy files.

Each must be refused in one sentence that begins with its name, or be read where it has a lawful reading.
"""

from __future__ import annotations

import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from esegeta_monai.errors import InputError
from esegeta_monai.files.scans import read_scan
from tests.faults import dicom
from tests.faults.runner import TARGET, Row, command, statuses
from tests.files.series import write_series, write_volume
from tests.support.cli import make_bundle, make_scan

GROUP = "14 DICOM, NRRD, MetaImage and NumPy"
AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])
ONE = "003.dcm"


def values() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (12, 10, 7)).astype(np.int16)


def row(name: str, write: Callable[[Path], Path], says: str, why: str = "") -> Row:
    """A damaged file that must be refused, in its own words; an empty pattern: it may be read."""

    def check(folder: Path) -> str:
        pytest.importorskip("itk")
        import itk

        itk.ProcessObject.SetGlobalWarningDisplay(False)
        path = write(folder)
        done = command(code=lambda: print(read_in_one_line(path)), timeout=60)  # a reader may hang or crash
        assert done.code == 0, f"exit code {done.code}: {done.err[-300:]}"
        assert done.out.startswith(("read", str(folder))), done.out
        answer = done.out.strip().replace(f"{folder}/", "")
        if says:
            assert re.search(says, answer), answer
            assert not answer.startswith("read")
        return answer[:150]

    return Row(GROUP, name, check, why=why)


def read_in_one_line(path: Path) -> str:
    try:
        scan = read_scan(path)
    except InputError as error:
        return str(error)
    return f"read, {tuple(scan.shape)}, {float(scan.min()):g} to {float(scan.max()):g}"


def volume(suffix: str, edit: Callable[[bytes], bytes], compressed: bool = False) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        import itk

        path = write_volume(folder / f"scan{suffix}", values(), AFFINE)
        if compressed:
            itk.imwrite(itk.imread(str(path)), str(path), compression=True)
        path.write_bytes(edit(path.read_bytes()))
        return path

    return write


def swap(old: bytes, new: bytes) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    return edit


def endless(content: bytes) -> bytes:
    """A line of the header that goes on: ITK crashed on 80 MB of it."""
    begin = content.index(b"\n") + 1
    return content[:begin] + b"# " + b"x" * 8_000_000 + b"\n" + content[begin:]


def flip(content: bytes) -> bytes:
    return content[:-200] + bytes([content[-200] ^ 4]) + content[-199:]


def series(edit: Callable[[Path], object], declared: int | None = 7, file: str | None = None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_series(folder / "series", values(), AFFINE, declared=declared)
        edit(path)
        return path if file is None else path / file

    return write


def cut(length: int) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        content = (folder / ONE).read_bytes()
        (folder / ONE).write_bytes(content[:length])

    return edit


def number(value: int) -> bytes:
    return struct.pack("<H", value)


def array(folder: Path) -> Path:
    np.save(folder / "scan.npy", values())
    return folder / "scan.npy"


def cut_array(folder: Path) -> Path:
    path = array(folder)
    path.write_bytes(path.read_bytes()[:-10])
    return path


def edited_array(old: bytes, new: bytes) -> Callable[[Path], Path]:
    assert len(old) == len(new)

    def write(folder: Path) -> Path:
        path = array(folder)
        path.write_bytes(swap(old, new)(path.read_bytes()))
        return path

    return write


def flipped_archive(folder: Path) -> Path:
    path = folder / "scan.npz"
    np.savez_compressed(path, values())
    content = path.read_bytes()
    path.write_bytes(content[:400] + bytes([content[400] ^ 4]) + content[401:])
    return path


def in_a_run(folder: Path) -> str:
    """A damaged series and file beside a good scan, on the command line."""
    pytest.importorskip("itk")
    scans = folder / "scans"
    make_scan(scans / "good.nii.gz")
    write_series(scans / "series", values(), AFFINE)
    dicom.transfer_syntax("1.2.840.10008.1.2.2")(scans / "series")
    volume(".mha", lambda b: b[:-100])(scans)
    done = command(
        *("explain", "--bundle", make_bundle(folder / "bundle"), "--input", scans, "--output", folder / "out"),
        *("--methods", "Saliency", "--target", TARGET, "--no-pictures"),
        timeout=60,
    )
    assert done.code == 1, done.err
    assert {case: status for (case, _, _), status in statuses(folder / "out").items()} == {
        "good": "ok",
        "scan": "failed",
        "series": "failed",
    }
    assert len(done.errors) == 2
    assert not done.traceback
    return "; ".join(done.errors)[:200]


SIZES = b"12 10 7"
BYTE_ORDER = "nothing in the file contradicts it: the voxels are then noise, which a look at the report's slices shows"
UID = b"1.2.826.0.1.3680043.2.1125.1.2"
ROWS = [
    *(
        made
        for suffix in (".nrrd", ".mha")
        for made in (
            row(f"{suffix} truncated", volume(suffix, lambda b: b[:-100]), "1580 of 1680 bytes"),
            row(f"{suffix} compressed, truncated", volume(suffix, lambda b: b[:-50], True), "the file is truncated"),
            row(f"{suffix} compressed, a flipped bit", volume(suffix, flip, True), "the file is damaged"),
            row(f"{suffix} of its header only", volume(suffix, lambda b: b[:100]), "cannot be read"),
            row(f"{suffix} with a header of 8 MB", volume(suffix, endless), "its header has no end within a MiB"),
            row(f"{suffix} of 31 GiB stated", volume(suffix, swap(SIZES, b"1200 1000 7000")), "more than the limit"),
            row(
                f"{suffix} with a negative size", volume(suffix, swap(SIZES, b"12 10 -7")), "states the shape 12 10 -7"
            ),
            row(
                f"{suffix} with fewer voxels stated",
                volume(suffix, swap(SIZES, b"12 10 5")),
                "",
                why="bytes after the voxels are not read; a warning in the log has their number",
            ),
        )
    ),
    row(".nrrd without byte order", volume(".nrrd", swap(b"endian: little\n", b"")), "does not state the byte order"),
    row(".nrrd with the wrong byte order", volume(".nrrd", swap(b"little", b"big")), "", BYTE_ORDER),
    row(".mha with the wrong byte order", volume(".mha", swap(b"MSB = False", b"MSB = True")), "", BYTE_ORDER),
    row(".nrrd of unknown type", volume(".nrrd", swap(b"short", b"strange")), "cannot be read as an image"),
    row(".mha of unknown type", volume(".mha", swap(b"MET_SHORT", b"MET_ODD")), "cannot be read as an image"),
    row(
        ".nrrd whose voxels are gone",
        volume(".nrrd", swap(b"encoding", b"data file: gone.raw\nencoding")),
        "gone.raw, cannot be read",
    ),
    row(".mha whose voxels are gone", volume(".mha", swap(b"= LOCAL", b"= gone.raw")), "gone.raw, cannot be read"),
    row(
        ".nrrd without directions",
        volume(".nrrd", swap(b"(-1,0,0)", b"(0,0,0)")),
        "cannot be read as an image",
    ),
    row(".npy truncated", cut_array, "the file is truncated"),
    row(".npy of 0.2 GiB stated", edited_array(b"(12, 10, 7)", b"(99999999,)"), "the file is truncated"),
    row(".npy with a damaged header", edited_array(b"7), }", b"7 { }"), "cannot be read as an image"),
    row(".npz with a flipped bit", flipped_archive, "cannot be read as an image|damaged"),
    row("DICOM: a slice is missing", series(lambda d: (d / ONE).unlink(), None), "one gap of 4 mm among gaps of 2 mm"),
    row("DICOM: the last slice is missing", series(lambda d: (d / "006.dcm").unlink()), "6 slices of the 7"),
    row("DICOM: a slice twice", series(lambda d: shutil.copy(d / ONE, d / "9.dcm")), "at the same place"),
    row("DICOM: a slice cut in its voxels", series(cut(-60)), "first 003.dcm|003.dcm is cut short"),
    row("DICOM: a slice cut in its header", series(cut(400)), "first 003.dcm|003.dcm: "),
    row("DICOM: a slice cut in its meta information", series(cut(200)), "003.dcm: the file is truncated"),
    row("DICOM: an empty slice", series(cut(0)), "first 003.dcm"),
    row(
        "DICOM: a text among the slices",
        series(lambda d: (d / "9.dcm").write_text("x", encoding="utf-8")),
        "first 9.dcm",
    ),
    row("DICOM: a slice of another series", series(dicom.text(UID, UID[:-1] + b"7", ONE)), "holds 2 DICOM series"),
    row(
        "DICOM: a slice of another orientation",
        series(dicom.text(b"-1\\0\\0\\0\\-1\\0", b"0\\-1\\0\\-1\\0\\0", ONE), None),
        "003.dcm has another orientation|holds 2 DICOM series|one gap",
    ),
    row("DICOM: a slice of another size", series(dicom.element(0x28, 0x10, number(5), ONE)), "2 DICOM series|voxels"),
    row(
        "DICOM: a slice of other numbers", series(dicom.element(0x28, 0x100, number(8), ONE)), "other types of numbers"
    ),
    row("DICOM: 65535 rows stated", series(dicom.element(0x28, 0x10, number(65535))), "is cut short|limit"),
    row("DICOM: no rows stated", series(dicom.element(0x28, 0x10, number(0))), "holds 0 DICOM series"),
    row(
        "DICOM: one file of 65535 rows", series(dicom.element(0x28, 0x10, number(65535)), None, ONE), "truncated|limit"
    ),
    row("DICOM: one file, cut", series(cut(-60), None, ONE), "cannot be read as a DICOM file|truncated"),
    *(
        row(f"DICOM: states {what}, {where}", series(dicom.transfer_syntax(uid, *names), None, file), says)
        for what, uid, says in (
            ("big endian", "1.2.840.10008.1.2.2", "not in the transfer syntax that it states"),
            ("explicit little endian", "1.2.840.10008.1.2.1", "not in the transfer syntax that it states"),
            ("JPEG", "1.2.840.10008.1.2.4.70", "not in the transfer syntax that it states"),
            ("a private syntax", "1.2.826.0.1.999999.1", "not one of the DICOM standard; convert"),
            ("the private syntax of GE", "1.2.840.113619.5.2", "not one of the DICOM standard; convert"),
        )
        for where, names, file in (("all slices", (), None), ("one slice", (ONE,), None), ("one file", (ONE,), ONE))
    ),
    Row(GROUP, "a damaged series and file beside a good scan", in_a_run),
]
