"""Malformed NIfTI files, labels and regions, through the command line, each beside a good scan.

A file must be refused in one line that names it (exit code 1, no traceback, nothing left of it, the good scan done), or
be explained where it has one lawful reading (`Case.lawful`).
"""

from __future__ import annotations

import gzip
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.faults import nifti as n
from tests.faults.runner import TARGET, Done, Row, command, limit_memory, statuses, unfinished
from tests.support.cli import make_bundle, make_scan

GROUP = "1 malformed NIfTI files, labels and regions"
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """A malformed file.

    Attributes:
        lawful: the reading by which it may also be explained.
        doubt: what the map's sidecar must warn of, if it is explained.
    """

    name: str
    make: n.Make
    suffix: str = ".nii.gz"
    lawful: str = ""
    doubt: str = ""


def explain(folder: Path, *inputs: object, **more: object) -> Done:
    words = ["explain", "--bundle", make_bundle(folder / "bundle"), "--input", *inputs, "--output", folder / "out"]
    return command(*words, "--methods", "Saliency", "--target", TARGET, "--no-pictures", **more)


def refused(done: Done, output: Path, name: str) -> None:
    """Assert that one case failed in one line that names it, and that the good scan is done."""
    results = {case: status for (case, _, _), status in statuses(output).items()}
    assert done.code == 1, f"exit code {done.code}: {done.err[-500:]}"
    assert not done.traceback, done.err[-500:]
    assert len(done.errors) == 1, done.err[-800:]
    assert name in done.errors[0], done.errors[0]
    assert results.pop("good") == "ok", results
    assert list(results.values()) == ["failed"], results
    assert not unfinished(output)
    assert not [p for p in output.rglob("*_attr*") if not p.name.startswith("good_")]


FAST = (
    *("gzip without checksum and length", "gzip with a wrong checksum", "plain file cut to -4 bytes", "pipe"),
    *("30000³ stated in .nii.gz", "voxels of 1e30 mm", "sform and qform contradict", "neither sform nor qform"),
    *("voxel size zero beside an sform", "voxel size zero, no sform and qform", "voxel size NaN", "link to itself"),
    *("sform of 1 mm, voxel size 2 mm", "fewer voxels stated than stored", "gzip and garbage", "gzip of two members"),
)
"""Malformed files of the fast tests: one of each kind of answer."""


def malformed(case: Case) -> Row:
    def check(folder: Path) -> str:
        bad = folder / "bad" / f"bad{case.suffix}"
        bad.parent.mkdir()
        case.make(bad)
        done = explain(folder, bad, make_scan(folder / "good.nii.gz"), before=limit_memory(8), timeout=40)
        if case.lawful and done.code == 0:
            results = statuses(folder / "out")
            assert set(results.values()) <= {"ok", "zero", "empty_target"}, results
            assert not unfinished(folder / "out")
            if case.doubt:
                (sidecar,) = (folder / "out" / "bad").glob("*.json")
                warnings = json.loads(sidecar.read_text(encoding="utf-8"))["warnings"]
                assert any(re.search(case.doubt, text) for text in warnings), warnings
            return f"explained; {'; '.join(done.warnings)[:150]}"
        refused(done, folder / "out", "bad")
        assert not case.doubt, f"refused: {done.errors}"
        return done.errors[0][:150]

    return Row(GROUP, case.name, check, slow=case.name not in FAST, why=case.lawful)


def damaged_trailer(content: bytes) -> bytes:
    return content[:-8] + bytes(b ^ 0x55 for b in content[-8:-4]) + content[-4:]


def two_members(path: Path) -> None:
    content = n.plain()
    path.write_bytes(gzip.compress(content[:5000]) + gzip.compress(content[5000:]))


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def quadruple(path: Path) -> None:
    """Voxels of IEEE 754 binary128, from 1 to 2."""
    header = bytearray(n.plain()[:352])
    header[70:74] = np.array([1536, 128], "<i2").tobytes()
    one = np.random.default_rng(0).integers(0, 256, (int(np.prod(n.SHAPE)), 16), dtype=np.uint8)
    one[:, 14:] = (0xFF, 0x3F)  # sign and exponent, little endian
    n.put(path, bytes(header) + one.tobytes())


def extension(path: Path) -> None:
    """The header claims an extension of 2 GiB."""
    content = n.plain()
    n.put(path, content[:348] + b"\1\0\0\0" + np.array([2**31 - 16, 6], "<i4").tobytes() + content[352:])


def colours(values: np.ndarray) -> np.ndarray:
    return np.zeros(n.SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))


def saved(values: np.ndarray) -> n.Make:
    return lambda path: nib.save(nib.Nifti1Image(values, n.AFFINE), path)


def noise(size: int) -> bytes:
    return np.random.default_rng(0).bytes(size)


def writes(content: bytes, compress: bool = False) -> n.Make:
    return lambda path: n.put(path, content) if compress else path.write_bytes(content)


SHEAR, TURNED = n.changed({(0, 1): 0.6}), n.changed({(1, 1): 0.0, (0, 1): 2.0})
SCALE = ("<4f", 76)
NII = ".nii"
CASES = [
    *(
        Case(f"gzip cut to {share:.1%}", n.raw(lambda b, s=share: b[: int(len(b) * s)]))
        for share in (0.02, 0.3, 0.5, 0.9, 0.999)
    ),
    Case("gzip without checksum and length", n.raw(lambda b: b[:-8])),
    Case("gzip without length", n.raw(lambda b: b[:-4])),
    Case("gzip with a wrong checksum", n.raw(damaged_trailer)),
    Case("gzip with a wrong length", n.raw(lambda b: b[:-4] + b"\1\0\0\0")),
    *(Case(f"plain file cut to {k} bytes", n.raw(lambda b, k=k: b[:k]), NII) for k in (0, 100, 347, 352, 400, -4)),
    Case("wrong magic", n.field(("4s", 344, (b"XXXX",)))),
    Case("magic of a pair of files", n.field(("4s", 344, (b"ni1\0",))), lawful="read as one file by its name"),
    Case("size of the header 999", n.field(("<i", 0, (999,))), lawful="the magic decides, not this field"),
    Case("negative size", n.field(n.dims(-16, 20, 16))),
    Case("size zero", n.field(n.dims(0, 20, 16))),
    Case("no axes", n.field(("<h", 40, (0,)))),
    Case("nine axes", n.field(("<h", 40, (9,)))),
    Case("more voxels stated than stored", n.field(n.dims(16, 20, 160))),
    Case(
        "fewer voxels stated than stored",
        n.field(n.dims(16, 20, 8)),
        lawful="the standard lets anything follow the voxels; a warning in the log has their number",
    ),
    Case("30000³ stated in .nii.gz", n.field(n.dims(30000, 30000, 30000))),
    Case("30000³ stated in .nii", n.field(n.dims(30000, 30000, 30000)), NII),
    Case("data type 0", n.field(("<h", 70, (0,)))),
    Case("data type 9999", n.field(("<h", 70, (9999,)))),
    Case("bits that contradict the type", n.field(("<h", 72, (8,))), lawful="the type decides, as in nibabel and ITK"),
    Case("voxels begin behind the file", n.field(("<f", 108, (1e8,)))),
    Case("voxels begin at NaN", n.field(("<f", 108, (NAN,)))),
    Case("voxels begin before the file", n.field(("<f", 108, (-352.0,)))),
    Case("slope 0", n.field(("<2f", 112, (0.0, 5.0))), lawful="the standard: a slope of 0 means no scaling"),
    Case("slope NaN", n.field(("<2f", 112, (NAN, NAN))), lawful="nibabel writes NaN for no scaling"),
    Case("slope infinite", n.field(("<2f", 112, (INF, 0.0))), lawful="nibabel takes it for no scaling"),
    Case("intercept NaN", n.field(("<2f", 112, (1.0, NAN)))),
    Case("slope 3e38", n.field(("<2f", 112, (3e38, 0.0)))),
    Case("one voxel NaN", n.voxels(n.one_voxel(NAN))),
    Case("one voxel infinite", n.voxels(n.one_voxel(INF))),
    Case("all voxels NaN", n.voxels(lambda v: v.fill(NAN))),
    Case("one voxel 1e300", n.voxels(n.one_voxel(1e300), np.float64)),
    Case("all voxels 7", n.voxels(lambda v: v.fill(7))),
    Case("all voxels 0", n.voxels(lambda v: v.fill(0))),
    Case("singular sform", n.sform(TURNED)),
    Case("sform without its third axis", n.sform(n.changed({(2, 2): 0.0}))),
    Case("sform NaN", n.sform(n.changed({(0, 0): NAN}))),
    Case("sform offset infinite", n.sform(n.changed({(0, 3): INF}))),
    Case("sform offset NaN", n.sform(n.changed({(0, 3): NAN}))),
    Case("sform zero", n.sform(np.zeros((4, 4)))),
    Case("voxels of 1e30 mm", n.sform(np.diag([1e30, 1e30, 1e30, 1]))),
    Case("1e30 mm from the origin", n.sform(n.changed({(1, 3): 1e30}))),
    Case(
        "sheared sform", n.sform(SHEAR), lawful="a shear is lawful; the voxel size contradicts it", doubt="voxel size"
    ),
    Case(
        "sform of 1 mm, voxel size 2 mm",
        n.sform(np.eye(4)),
        lawful="the sform is read, and the doubt is in the record",
        doubt="contradicts the voxel size",
    ),
    Case(
        "sform and qform contradict",
        n.two_forms,
        lawful="the sform has precedence, and the doubt is in the record",
        doubt="sform and qform place voxels up to",
    ),
    Case(
        "neither sform nor qform",
        n.field(n.codes(0, 0)),
        lawful="the standard's old way; position and orientation are called assumed in the record",
        doubt="neither sform nor qform",
    ),
    Case(
        "voxel size zero beside an sform",
        n.field((*SCALE, (1.0, 0.0, 2.0, 2.0))),
        lawful="the sform has the geometry; the doubt is in the record",
        doubt="voxel size in the header is 0 x 2 x 2",
    ),
    Case("voxel size zero, no sform and qform", n.field((*SCALE, (1.0, 0.0, 2.0, 2.0)), n.codes(0, 0))),
    Case(
        "voxel size negative",
        n.field((*SCALE, (1.0, -2.0, 2.0, 2.0))),
        lawful="the sform has the geometry; the doubt is in the record",
        doubt="voxel size in the header is -2",
    ),
    Case("voxel size NaN", n.field((*SCALE, (1.0, NAN, 2.0, 2.0)))),
    Case("qfac zero", n.field(("<f", 76, (0.0,)), n.codes(1, 0)), lawful="the standard: 0 means 1"),
    Case("quaternion too long", n.field(n.codes(1, 0), ("<3f", 256, (5.0, 5.0, 5.0)))),
    Case("quaternion NaN", n.field(n.codes(1, 0), ("<3f", 256, (NAN, 0.0, 0.0)))),
    Case("two channels for a network of one", n.shaped(16, 20, 16, 2)),
    Case("a fourth axis of 1", n.shaped(16, 20, 16, 1), lawful="one channel"),
    Case("a fourth axis of 0", n.field(n.dims(16, 20, 16, 0))),
    Case("5D vectors", n.shaped(16, 20, 16, 1, 3)),
    Case("5D time and vectors", n.shaped(16, 20, 16, 2, 3)),
    Case("7D", n.shaped(4, 4, 4, 1, 2, 1, 2)),
    Case("2D", n.shaped(16, 20)),
    Case("1D", n.shaped(16)),
    Case("one voxel", n.shaped(1, 1, 1)),
    Case("two slices", n.shaped(16, 20, 2), lawful="a volume, which the windows pad"),
    Case("complex", n.voxels(lambda v: (v + 1j * v).astype(np.complex64), np.complex64)),
    Case("colours", lambda path: saved(colours(n.ball()))(path)),
    Case(
        "int64 up to 1e18",
        n.voxels(lambda v: (v * 1e18).astype(np.int64), np.int64),
        lawful="float32 keeps seven digits of it, as of every scan",
    ),
    Case("float128", quadruple, lawful="may be read where the machine has this type; x86 has not"),
    Case("bits", n.field(("<2h", 70, (1, 1)))),
    Case("big endian", n.big_endian, lawful="the standard allows both"),
    Case("empty file", writes(b"")),
    Case("gzip of nothing", writes(b"", compress=True)),
    Case("a table called .nii.gz", writes(b"date,patient\n" * 99)),
    Case("a table called .nii", writes(b"date,patient\n" * 99), NII),
    Case("a web page", writes(b"<html><body>404 Not Found</body></html>")),
    Case("gzip of noise", writes(noise(20000), compress=True)),
    Case("noise", writes(noise(20000)), NII),
    Case("gzip called .nii", lambda path: path.write_bytes(gzip.compress(n.plain())), NII),
    Case("plain called .nii.gz", writes(n.plain()), lawful="no reading is needed: refused by its name"),
    Case("gzip of a gzip", writes(gzip.compress(n.plain()), compress=True)),
    Case("gzip of two members", two_members, lawful="the gzip format: members are joined; both checksums are verified"),
    Case("gzip and zeros", n.raw(lambda b: b + b"\0" * 1000), lawful="zeros that fill a block, as gzip reads them"),
    Case("gzip and garbage", n.raw(lambda b: b + b"\0" * 100 + b"xx")),
    Case("extension of 2 GiB", extension),
    Case("a picture called .nii.gz", writes(b"\x89PNG\r\n\x1a\n" + noise(500))),
    Case("pointer of git-lfs", pointer),
    Case("link to nowhere", lambda path: path.symlink_to(path.parent / "nowhere.nii.gz")),
    Case("link to itself", lambda path: path.symlink_to(path)),
    Case("pipe", lambda path: os.mkfifo(path)),
    Case("header without voxels", writes(n.plain()[:348]), ".hdr"),
    Case("voxels without header", writes(n.plain()[352:]), ".img"),
]


def all_in_one_run(folder: Path) -> str:
    (folder / "bad").mkdir()
    files = []
    for i, case in enumerate(CASES):
        if case.name not in ("link to nowhere", "link to itself", "pipe"):
            files.append(folder / "bad" / f"{i:03d}{case.suffix}")
            case.make(files[-1])
    done = explain(folder, *files, make_scan(folder / "good.nii.gz"), timeout=400)
    results = {case: status for (case, _, _), status in statuses(folder / "out").items()}
    assert done.code == 1, done.err[-500:]
    assert results["good"] == "ok"
    assert len(results) == len(files) + 1
    assert not done.traceback, done.err[-500:]
    report = command("report", folder / "out")
    assert report.code == 0, report.err
    assert not unfinished(folder / "out")
    return f"{len(results)} results, {done.seconds:.0f} s"


ROWS = [
    *map(malformed, CASES),
    Row(GROUP, "all of them in one run, and its report", all_in_one_run, slow=True),
]
