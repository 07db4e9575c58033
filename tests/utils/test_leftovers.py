from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esegeta_monai.utils.files import atomic
from esegeta_monai.utils.leftovers import remove_leftovers, temporary_name


def leftover(folder: Path, name: str, age: float = 0.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def of(process: int) -> str:
    return temporary_name("map.nii.gz").replace(f"-{os.getpid()}-", f"-{process}-")


def test_files_of_processes_that_ended_are_removed_and_others_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-S", "-c", ""])
    ended.wait()
    dead = [leftover(folder, of(ended.pid)) for folder in (tmp_path, tmp_path / "case", tmp_path / ".scores" / "a")]
    alive = leftover(tmp_path / "case", of(os.getpid()))
    reused = leftover(tmp_path, of(os.getpid()), age=10 * 24 * 3600)  # older than the process with that number
    other_machine = ".tmp-00000000-1-12345678-map.nii.gz"
    recent, old = leftover(tmp_path, other_machine), leftover(tmp_path / "case", other_machine, age=2 * 24 * 3600)
    map_file = leftover(tmp_path, "map.nii.gz", age=10 * 24 * 3600)
    assert remove_leftovers(tmp_path) == 5
    assert not any(path.exists() for path in (*dead, reused, old))
    assert all(path.exists() for path in (alive, recent, map_file))


def test_a_file_that_is_being_written_stays(tmp_path: Path) -> None:
    with atomic(tmp_path / "map.nii.gz") as temporary:
        temporary.write_bytes(b"whole")
        assert remove_leftovers(tmp_path) == 0
    assert (tmp_path / "map.nii.gz").read_bytes() == b"whole"


def test_links_are_not_followed(tmp_path: Path) -> None:
    path = leftover(tmp_path / "elsewhere", ".tmp-12345678-a.nii.gz", age=10 * 24 * 3600)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "case").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "out" / path.name).symlink_to(path)
    assert remove_leftovers(tmp_path / "out") == 0
    assert path.exists()


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "\U0001f9e0" * 63])
def test_temporary_names_are_short_enough(tmp_path: Path, name: str) -> None:
    name = os.fsdecode(name.encode())  # these tests may run in an ASCII locale
    with atomic(tmp_path / name) as temporary:
        assert len(os.fsencode(temporary.name)) <= 255
        temporary.write_bytes(b"")
