from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.errors import UsageError
from esegeta_monai.files.runs import STATUSES, RunRecord
from esegeta_monai.utils.files import INTENDED_USE


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def statuses(folder: Path) -> dict[tuple[str, Any, Any], str]:
    return {(e["case"], e["target"], e["method"]): e["status"] for e in read(folder)["results"]}


def test_the_file_is_true_after_every_step(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "out", {"bundle": "demo", "seed": 0}) as run:
        record = read(tmp_path / "out")
        assert record["results"] == []
        assert record["finished"] is None
        assert record["intended_use"] == INTENDED_USE
        assert (record["bundle"], record["seed"]) == ("demo", 0)
        assert "python" in record["versions"]
        run.set("a", "t", "Saliency", "ok", seconds=1.5, completeness_gap=float("nan"))
        entry = {"case": "a", "target": "t", "method": "Saliency", "status": "ok", "seconds": 1.5}
        assert read(tmp_path / "out")["results"] == [{**entry, "completeness_gap": None}]
        run.set("a", "t", "GradCam", "failed", "no convolution")
        assert read(tmp_path / "out")["results"][1]["reason"] == "no convolution"
        assert read(tmp_path / "out")["summary"] == {"failed": 1, "ok": 1}
    assert read(tmp_path / "out")["finished"] is not None


@pytest.mark.parametrize(
    ("status", "code"),
    [("ok", 0), ("zero", 0), ("empty_target", 0), ("skipped", 0), ("failed", 1), ("timeout", 1)],
)
def test_exit_code(status: str, code: int, tmp_path: Path) -> None:
    run = RunRecord(tmp_path)
    assert run.exit_code == 0
    run.set("a", "t", "M", "ok")
    run.set("b", "t", "M", status, "because")
    assert run.exit_code == code
    assert status in STATUSES


def test_statuses_are_checked(tmp_path: Path) -> None:
    run = RunRecord(tmp_path)
    with pytest.raises(UsageError, match="must be one of ok, zero"):
        run.set("a", "t", "M", "done")
    for status in ("failed", "timeout", "empty_target"):
        with pytest.raises(UsageError, match="needs a reason"):
            run.set("a", "t", "M", status)
    assert read(tmp_path)["results"] == []


def test_an_interrupted_run_is_not_finished_and_can_go_on(tmp_path: Path) -> None:
    def interrupted() -> None:
        with RunRecord(tmp_path) as run:
            run.set("a", "t", "M", "ok")
            run.set("b", "t", "M", "failed", "out of memory")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert read(tmp_path)["finished"] is None
    with RunRecord(tmp_path) as run:
        assert statuses(tmp_path) == {("a", "t", "M"): "ok", ("b", "t", "M"): "failed"}
        run.set("a", "t", "M", "skipped", "done in an earlier run")
        run.set("b", "t", "M", "ok")
        run.set("b", "t", "N", "ok")
    assert run.exit_code == 0
    assert statuses(tmp_path) == {("a", "t", "M"): "skipped", ("b", "t", "M"): "ok", ("b", "t", "N"): "ok"}


def test_earlier_failures_do_not_count_and_unreadable_cases_recover(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as run:
        run.set("a", None, None, "failed", "a.nii.gz: the file is truncated")
        run.set("b", None, None, "failed", "b.nii.gz: the file is empty")
    assert run.exit_code == 1
    with RunRecord(tmp_path) as run:
        run.set("a", "t", "M", "ok")
    assert run.exit_code == 0
    assert statuses(tmp_path) == {("b", None, None): "failed", ("a", "t", "M"): "ok"}
    assert read(tmp_path)["summary"] == {"ok": 1}


def test_a_damaged_record_is_moved_away_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for content in ('{"results": [', '{"results": 3}', '{"results": [{"status": "ok"}]}'):
        (tmp_path / "run.json").write_text(content)
        with caplog.at_level(logging.WARNING), RunRecord(tmp_path) as run:
            run.set("a", "t", "M", "ok")
        assert "cannot be read" in caplog.text
        assert (tmp_path / "run.json.unreadable").read_text(encoding="utf-8") == content
        assert statuses(tmp_path) == {("a", "t", "M"): "ok"}
        caplog.clear()


def test_unwritable_folder_fails_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        RunRecord(tmp_path / "out")


def test_two_runs_at_once_keep_each_others_results(tmp_path: Path) -> None:
    """The one that wrote last took the other's results out of the record, though its maps lay there."""
    first, second = RunRecord(tmp_path), RunRecord(tmp_path)
    first.set("a", "t", "Rise", "ok")
    second.set("a", "t", "Occlusion", "ok")
    second.set("b", "t", "Occlusion", "failed", "because")
    first.set("b", "t", "Rise", "ok")
    assert statuses(tmp_path) == {
        ("a", "t", "Rise"): "ok",
        ("a", "t", "Occlusion"): "ok",
        ("b", "t", "Occlusion"): "failed",
        ("b", "t", "Rise"): "ok",
    }
    assert first.exit_code == 0
    assert first.summary == {"ok": 2}
    assert second.exit_code == 1
