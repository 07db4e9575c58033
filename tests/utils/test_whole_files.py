from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.utils.files import refuse_remote, writable_folder
from esegeta_monai.utils.stated_size import stated_data
from esegeta_monai.utils.whole_files import LIMIT, check_whole


def scan(path: Path, shape: tuple[int, ...] = (6, 7, 8)) -> Path:
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=shape).astype(np.float32), np.eye(4)), path)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mgz", "a.img", "a.hdr"])
def test_the_stated_size_is_that_of_the_voxels(name: str, tmp_path: Path) -> None:
    if name == "a.mgz":
        nib.save(nib.MGHImage(np.zeros((6, 7, 8), np.float32), np.eye(4)), tmp_path / name)
    elif name in ("a.img", "a.hdr"):
        nib.save(nib.Nifti1Pair(np.zeros((6, 7, 8), np.float32), np.eye(4)), tmp_path / "a.img")
    else:
        scan(tmp_path / name)
    stated = stated_data(tmp_path / name)
    assert stated is not None
    assert (stated.voxels, stated.size) == (6 * 7 * 8, 4 * 6 * 7 * 8)
    content = stated.file.read_bytes()
    whole = gzip.decompress(content) if stated.stored == "gzip" else content
    assert len(whole) >= stated.start + stated.skipped + stated.size
    check_whole(tmp_path / name)


def test_every_flip_of_the_compressed_voxels_is_found(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.nii.gz", (4, 4, 4))
    content = path.read_bytes()
    voxels, harmless = gzip.decompress(content), 0
    for byte in range(40, len(content)):
        changed = bytearray(content)
        changed[byte] ^= 1 << byte % 8
        path.write_bytes(changed)
        if _decompressed(changed) == voxels:  # the same bytes in another code: harmless
            harmless += 1
            continue
        with pytest.raises(InputError, match=r"damaged|truncated|readable|states|beyond"):
            check_whole(path)
    assert harmless < 5
    path.write_bytes(content)
    check_whole(path)


def test_a_refused_file_is_refused_again(tmp_path: Path) -> None:
    path = scan(tmp_path / "a.nii.gz")
    path.write_bytes(path.read_bytes()[:-4])
    for _ in range(2):
        with pytest.raises(InputError, match="truncated"):
            check_whole(path)


def test_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scan(tmp_path / "a.nii")
    monkeypatch.setenv(LIMIT, "1e-9")
    with pytest.raises(InputError, match=rf"336 voxels.*if the file is right, set {LIMIT}=1"):
        check_whole(path)
    for wrong in ("much", "-1", "nan", "0"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(UsageError, match="give a number of GiB above 0"):
            check_whole(path)


def test_remote_paths(tmp_path: Path) -> None:
    for text in ("s3://bucket/a.nii.gz", "s3:/bucket/a.nii.gz", "HTTPS://host/a", "dicomweb://host/a"):
        with pytest.raises(UsageError, match="remote paths are not supported; copy it here first"):
            refuse_remote(text)
        with pytest.raises(UsageError, match="remote"):
            check_whole(Path(text))
        with pytest.raises(UsageError, match="remote"):
            writable_folder(text)
    with pytest.raises(UsageError, match="without file:"):
        refuse_remote("file:///a.nii.gz")
    for text in ("a:b/c", "C:\\scans", "c:/scans", str(tmp_path), "x/s3://y"):
        refuse_remote(text)


def _decompressed(content: bytes) -> bytes | None:
    try:
        return gzip.decompress(content)
    except Exception:  # whatever the damage does
        return None


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_extensions_beyond_those_of_a_scan_are_refused_before_they_are_parsed(
    kind: Any, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a{suffix}"
    image = kind(np.ones((6, 7, 8), np.float32), np.eye(4))
    for text in (b"a", b"b" * 5000):
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", text))
    nib.save(image, path)
    check_whole(path)
    content = path.read_bytes() if suffix == ".nii" else gzip.decompress(path.read_bytes())
    begin, place, form = (348, 108, "<f") if kind is nib.Nifti1Image else (540, 168, "<q")
    voxels = content[-4 * 6 * 7 * 8 :]
    for count, step, says in ((1, 100 << 20, "more than 64 MiB before the voxels"), (5000, 16, "more than 1000 ext")):
        header = bytearray(content[:begin])
        end = begin + 4 + count * step
        struct.pack_into(form, header, place, end + -end % 16 if form == "<f" else end)
        extensions = (struct.pack("<2i", step, 6) + bytes(8)) * count if count > 1 else struct.pack("<2i", step, 6)
        damaged = bytes(header) + b"\1\0\0\0" + extensions + voxels
        path.write_bytes(damaged if suffix == ".nii" else gzip.compress(damaged))
        with pytest.raises(InputError, match=says):
            check_whole(path)


def test_extensions_of_a_pair_are_counted_too(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Pair(np.ones((6, 7, 8), np.float32), np.eye(4)), tmp_path / "a.img")
    header = (tmp_path / "a.hdr").read_bytes()[:348]
    (tmp_path / "a.hdr").write_bytes(header + b"\1\0\0\0" + (struct.pack("<2i", 16, 6) + bytes(8)) * 5000)
    with pytest.raises(InputError, match="more than 1000 extensions"):
        check_whole(tmp_path / "a.img")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_a_text_header_without_end_is_refused(name: str, tmp_path: Path) -> None:
    begin = b"NRRD0004\n" if name == "a.nrrd" else b"ObjectType = Image\n"
    for line in (b"# x\n" * 300_000, b"x" * (2 << 20)):
        (tmp_path / name).write_bytes(begin + line)
        with pytest.raises(InputError, match="its header has no end within a MiB"):
            check_whole(tmp_path / name)
