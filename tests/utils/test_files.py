from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.utils.files import (
    INTENDED_USE,
    atomic,
    read_json,
    refuse_link_out,
    refuse_special,
    sha256_file,
    strict_json,
    versions,
    writable_folder,
    write_json,
)


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("old", encoding="utf-8")

    def interrupted() -> None:
        with atomic(path) as temporary:
            temporary.write_text("half", encoding="utf-8")
            assert temporary.parent == path.parent  # another file system could not rename atomically
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["map.txt"]


def test_death_between_write_and_rename_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    """A process killed outright, so that no ``finally`` runs: the parent looks at what it left."""
    path = tmp_path / "case" / "map.txt"
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        with atomic(path) as temporary:
            temporary.write_text("whole but not yet renamed", encoding="utf-8")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert not path.exists()
    (leftover,) = path.parent.iterdir()
    assert leftover.name.startswith(".tmp-")
    with atomic(path) as temporary:
        temporary.write_text("second run", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "second run"


def test_data_reaches_the_disk_before_the_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        events.append("folder" if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir() else "file")
        fsync(descriptor)

    def note_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with atomic(tmp_path / "a.txt") as temporary:
        temporary.write_text("x", encoding="utf-8")
    assert events == ["file", "rename", "folder"]


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "results"
    blocker.write_text("a file where a folder should be", encoding="utf-8")
    for attempt in (lambda: writable_folder(blocker / "out"), lambda: write_json(blocker / "out" / "a.json", {})):
        with pytest.raises(UsageError, match=r"cannot write .*results.out.*choose another output folder"):
            attempt()


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="Permission denied"):
            writable_folder(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match="No space left on device"):
        write_json(tmp_path / "a.json", {})
    assert list(tmp_path.iterdir()) == []


def test_writable_folder_makes_it_and_leaves_it_empty(tmp_path: Path) -> None:
    folder = writable_folder(tmp_path / "a" / "b")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_strict_json_replaces_what_json_has_no_form_for() -> None:
    record = {
        "gap": float("nan"),
        "nested": {"values": [1.0, float("-inf"), np.float32("inf")]},
        "array": np.arange(3, dtype=np.int16),
        "tensor": torch.tensor([0.5, 1.5], requires_grad=True),
        "count": np.int64(7),
        "flag": np.bool_(True),
        "file": Path("/home/somebody/model.pt"),
        "names": {"b", "a"},
        3: None,
    }
    text = strict_json(record)
    parsed = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert parsed == {
        "gap": None,
        "nested": {"values": [1.0, None, None]},
        "array": [0, 1, 2],
        "tensor": [0.5, 1.5],
        "count": 7,
        "flag": True,
        "file": "model.pt",
        "names": ["a", "b"],
        "3": None,
        "non_finite": {"gap": "NaN", "nested.values.1": "-Infinity", "nested.values.2": "Infinity"},
    }
    assert "somebody" not in text
    assert text == strict_json(dict(reversed(record.items())))  # order of insertion does not matter


def test_strict_json_names_the_entry_it_cannot_write() -> None:
    with pytest.raises(TypeError, match=r"'network.layer' is a object"):
        strict_json({"network": {"layer": object()}})


def test_hostile_text_survives_the_round_trip(tmp_path: Path) -> None:
    record = {"reason": "größe <b>\u2028\x00\n", "file": os.fsdecode(b"scan\xff.nii")}
    assert read_json(write_json(tmp_path / "a.json", record)) == record


def test_read_json_gives_none_for_what_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_json(path) is None
    for content in (b"", b'{"a": 1', b"[1]", b"\xff\xfe\x00", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"):
        path.write_bytes(content)
        assert read_json(path) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_pipes_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_json(tmp_path / "pipe") is None
    with pytest.raises(InputError, match=r"pipe.*no regular file"):
        sha256_file(tmp_path / "pipe")
    with pytest.raises(OSError, match="a pipe or a device"):
        refuse_special(tmp_path / "pipe")


def test_links_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path)
    for name in ("b", "b/c"):
        refuse_link_out(tmp_path / "out" / name, tmp_path / "out")
    with pytest.raises(UsageError, match="out/a/x is a link to another folder"):
        refuse_link_out(tmp_path / "out" / "a" / "x", tmp_path / "out")
    with pytest.raises(OSError, match="a link to another file"):
        refuse_special(tmp_path / "out" / "a")
    refuse_special(tmp_path / "absent")


def test_sha256(tmp_path: Path) -> None:
    content = os.urandom(3 * (1 << 20) + 17)  # more than one block
    (tmp_path / "weights.pt").write_bytes(content)
    assert sha256_file(tmp_path / "weights.pt") == hashlib.sha256(content).hexdigest()
    with pytest.raises(InputError, match=r"absent.pt.*No such file"):
        sha256_file(tmp_path / "absent.pt")


def test_versions_name_packages_but_neither_machine_nor_user() -> None:
    result = versions()
    assert result["torch"] == torch.__version__
    assert result["numpy"] == np.__version__
    assert result["python"] == platform.python_version()
    assert {"esegeta_monai", "monai", "captum", "nibabel", "platform"} <= result.keys()
    text = " ".join(result.values())
    assert platform.node() not in text
    assert getpass.getuser() not in text.split()


def test_intended_use_has_the_required_statements() -> None:
    assert INTENDED_USE == "Research only, not a medical device; a map is no proof that a prediction is right."
