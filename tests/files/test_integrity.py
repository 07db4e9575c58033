from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from esegeta_monai.errors import InputError
from esegeta_monai.files.integrity import checked_map


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder with two cases, and another patient's folder beside it."""
    for place in ("out/a/a", "out/b/b", "other/c"):
        path = tmp_path / f"{place}_attr.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(place.encode())
    return tmp_path / "out"


def record(path: Path, name: str) -> dict[str, str]:
    """The entries of a sidecar, with the right checksum."""
    return {"map": name, "map_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_the_own_map_is_accepted(out: Path) -> None:
    path = out / "a" / "a_attr.nii.gz"
    assert checked_map(out / "a" / "a_attr.json", record(path, path.name), out) == path


@pytest.mark.parametrize("name", ["../b/b_attr.nii.gz", "../../other/c_attr.nii.gz", "", "..", "x\0", "a\\b", None, 5])
def test_only_plain_names_are_read(out: Path, name: str) -> None:
    with pytest.raises(InputError, match="only files beside it are read"):
        checked_map(out / "a" / "a_attr.json", {**record(out / "b" / "b_attr.nii.gz", ""), "map": name}, out)


def test_absolute_paths_are_not_read(out: Path) -> None:
    path = out.parent / "other" / "c_attr.nii.gz"
    with pytest.raises(InputError, match="only files beside it are read"):
        checked_map(out / "a" / "a_attr.json", record(path, str(path)), out)


def test_links_to_other_folders_are_not_read(out: Path) -> None:
    path = out / "a" / "a_attr.nii.gz"
    for target in (out.parent / "other" / "c_attr.nii.gz", out / "b" / "b_attr.nii.gz"):
        path.unlink()
        path.symlink_to(target)
        with pytest.raises(InputError, match="is a link to another folder"):
            checked_map(out / "a" / "a_attr.json", record(target, path.name), out)
    (out / "c").symlink_to(out.parent / "other")
    path = out / "c" / "c_attr.nii.gz"
    with pytest.raises(InputError, match="is a link to another folder"):
        checked_map(out / "c" / "c_attr.json", record(path, path.name), out)


def test_the_map_of_another_sidecar_is_not_read(out: Path) -> None:
    path = out / "a" / "other_attr.nii.gz"
    path.write_bytes(b"other")
    with pytest.raises(InputError, match="is not its own map"):
        checked_map(out / "a" / "a_attr.json", record(path, path.name), out)


def test_altered_missing_and_unchecked_maps_are_named(out: Path) -> None:
    path, sidecar = out / "a" / "a_attr.nii.gz", out / "a" / "a_attr.json"
    wanted = record(path, path.name)
    with pytest.raises(InputError, match="has no SHA-256"):
        checked_map(sidecar, {"map": path.name}, out)
    path.write_bytes(b"out/a/b")
    with pytest.raises(InputError, match=r"a_attr\.nii\.gz was altered"):
        checked_map(sidecar, wanted, out)
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        checked_map(sidecar, wanted, out)
