from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.errors import OutputLost, UsageError
from esegeta_monai.files.journal import Journal, read_run
from esegeta_monai.files.runs import STATUSES, RunRecord
from esegeta_monai.utils.files import INTENDED_USE


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def statuses(folder: Path) -> dict[tuple[str, Any, Any], str]:
    return {(e["case"], e["target"], e["method"]): e["status"] for e in read(folder)["results"]}


def test_the_journal_is_true_after_every_step(tmp_path: Path) -> None:
    with RunRecord(tmp_path / "out", {"bundle": "demo", "seed": 0}) as run:
        contents = read_run(tmp_path / "out")
        assert contents.results == []
        assert contents.info["finished"] is None
        assert contents.info["intended_use"] == INTENDED_USE
        assert (contents.info["bundle"], contents.info["seed"]) == ("demo", 0)
        assert "python" in contents.info["versions"]
        run.set("a", "t", "Saliency", "ok", seconds=1.5, completeness_gap=float("nan"))
        entry = {"case": "a", "target": "t", "method": "Saliency", "status": "ok", "seconds": 1.5}
        entry |= {"completeness_gap": None, "non_finite": {"completeness_gap": "NaN"}}
        assert read_run(tmp_path / "out").results == [entry]
        run.set("a", "t", "GradCam", "failed", "no convolution")
        assert read_run(tmp_path / "out").results[1]["reason"] == "no convolution"
        assert not (tmp_path / "out" / "run.json").exists()
    record = read(tmp_path / "out")
    assert record["summary"] == {"failed": 1, "ok": 1}
    assert record["finished"] is not None
    assert record["results"] == read_run(tmp_path / "out").results
    (tmp_path / "out" / "run.json").unlink()
    alone = read_run(tmp_path / "out")
    assert alone.results == record["results"]
    assert {**alone.info, "summary": record["summary"]} == {k: v for k, v in record.items() if k != "results"}


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
    assert read_run(tmp_path).results == []


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
    for content in ('{"results": [', '{"results": 3}', "[]"):
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
        for journal in tmp_path.glob("run*.jsonl"):
            journal.unlink()
        with caplog.at_level(logging.WARNING), RunRecord(tmp_path) as run:
            run.set("a", "t", "M", "ok")
        assert "cannot be read" in caplog.text
        assert (tmp_path / "run.json.unreadable").read_text(encoding="utf-8") == content
        assert statuses(tmp_path) == {("a", "t", "M"): "ok"}
        caplog.clear()


def test_unwritable_folder_fails_at_once(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match="cannot write"):
        RunRecord(tmp_path / "out")


def test_two_runs_at_once_keep_each_others_results(tmp_path: Path) -> None:
    """The one that wrote last took the other's results out of the record, though its maps lay there."""
    first, second = RunRecord(tmp_path), RunRecord(tmp_path)
    first.set("a", "t", "Rise", "ok")
    second.set("a", "t", "Occlusion", "ok")
    second.set("b", "t", "Occlusion", "failed", "because")
    first.set("b", "t", "Rise", "ok")
    first.write()
    assert statuses(tmp_path) == {
        ("a", "t", "Rise"): "ok",
        ("a", "t", "Occlusion"): "ok",
        ("b", "t", "Occlusion"): "failed",
        ("b", "t", "Rise"): "ok",
    }
    assert first.exit_code == 0
    assert first.summary == {"ok": 2}
    assert second.exit_code == 1


def fill(folder: Path, writer: int) -> None:
    with RunRecord(folder) as run:
        for i in range(500):
            run.set(f"{writer}-{i}", "t", "M", "ok", warnings=["x" * 6000])


def test_four_writers_lose_no_result(tmp_path: Path) -> None:
    """155 of 160 results were lost when each writer wrote the whole file. Lines longer than a page are not torn."""
    processes = multiprocessing.get_context("fork")
    writers = [processes.Process(target=fill, args=(tmp_path, w)) for w in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 4
    contents = read_run(tmp_path)
    assert contents.notes == []
    assert {e["case"] for e in contents.results} == {f"{w}-{i}" for w in range(4) for i in range(500)}
    assert len(read(tmp_path)["results"]) == 2000


def test_the_time_per_result_does_not_grow(tmp_path: Path) -> None:
    """At 1,500 results a result took 206 ms, 40 times that of the first ones."""
    run, times = RunRecord(tmp_path), []
    for i in range(5000):
        began = time.perf_counter()
        run.set(f"case{i}", "t", "M", "ok", seconds=1.0)
        times.append(time.perf_counter() - began)
    early, late = (sorted(times[start : start + 50])[25] for start in (50, 4950))
    assert late <= 3 * early


def test_torn_and_foreign_lines_are_left_out_and_noted(tmp_path: Path) -> None:
    run = RunRecord(tmp_path)
    run.set("a", "t", "M", "ok")
    with open(tmp_path / "run.jsonl", "ab") as file:
        file.write(b'{"case": "b", "target": "t", "meth')  # killed while it wrote
    with RunRecord(tmp_path) as run:
        run.set("c", "t", "M", "ok")
    contents = read_run(tmp_path)
    assert [e["case"] for e in contents.results] == ["a", "c"]
    assert contents.notes == ["run.jsonl: 1 lines are damaged and are left out."]


def test_the_later_of_two_runs_counts_although_the_clock_was_set_back(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as run:
        run.set("a", "t", "M", "failed", "no memory")
        run.set("b", "t", "M", "ok")
    journal = tmp_path / "run.jsonl"
    year = read_run(tmp_path).info["started"][:4]
    later = journal.read_text(encoding="utf-8").replace(f'"{year}-', f'"{int(year) + 10}-')
    journal.write_text(later, encoding="utf-8")
    with RunRecord(tmp_path) as run:
        run.set("a", "t", "M", "ok")
        run.set("c", "t", "M", "failed", "no memory")
    lines = journal.read_text(encoding="utf-8").splitlines()
    again = lines[-2].replace('"failed"', '"ok"').replace(f'"{year}-', f'"{int(year) - 1}-')  # set back in the run, too
    journal.write_text("\n".join([*lines[:-1], again, lines[-1], ""]), encoding="utf-8")
    contents = read_run(tmp_path)
    assert {e["case"]: e["status"] for e in contents.results} == {"a": "ok", "b": "ok", "c": "ok"}
    assert contents.info["finished"].startswith(year)


def test_lines_of_a_run_without_a_header_keep_their_time(tmp_path: Path) -> None:
    """`merge-runs` appends the lines of another folder, which may be older than those before them."""
    with RunRecord(tmp_path) as run:
        run.set("a", "t", "M", "ok")
    old = {"case": "a", "target": "t", "method": "M", "status": "failed", "run": "other", "recorded": "2020-01-01"}
    Journal(tmp_path / "run.jsonl").append(old)
    assert [e["status"] for e in read_run(tmp_path).results] == ["ok"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["run.json", "run.jsonl", "run.part1.jsonl"])
def test_pipes_are_neither_read_nor_written(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    contents = read_run(tmp_path)
    assert contents.results == []
    assert any(name in note for note in contents.notes)
    if name == "run.jsonl":
        with pytest.raises(UsageError, match=r"run.jsonl: it is a folder, a pipe or a device"):
            RunRecord(tmp_path)


def test_a_link_in_place_of_the_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("x", encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.jsonl").symlink_to(tmp_path / "other.txt")
    with pytest.raises(UsageError, match="a link to another file"):
        RunRecord(tmp_path / "out")
    assert (tmp_path / "other.txt").read_text(encoding="utf-8") == "x"


def test_json_that_is_nested_too_deeply_is_noted(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as run:
        run.set("a", "t", "M", "ok")
    deep = "[" * 100_000 + "]" * 100_000
    with open(tmp_path / "run.jsonl", "a", encoding="utf-8") as file:
        file.write(f'{{"case": {deep}}}\n')
    (tmp_path / "run.json").write_text(f'{{"results": {deep}}}', encoding="utf-8")
    contents = read_run(tmp_path)
    assert [e["case"] for e in contents.results] == ["a"]
    assert contents.notes == ["run.json cannot be read.", "run.jsonl: 1 lines are damaged and are left out."]


def test_each_part_has_a_journal_and_all_are_merged(tmp_path: Path) -> None:
    parts = [RunRecord(tmp_path, part=i) for i in range(3)]
    for i, run in enumerate(parts):
        run.set(f"case{i}", "t", "M", "ok")
    parts[1].__exit__(None, None, None)
    assert sorted(p.name for p in tmp_path.glob("*.jsonl")) == [f"run.part{i}.jsonl" for i in range(3)]
    assert {e["case"] for e in read(tmp_path)["results"]} == {"case0", "case1", "case2"}


def test_a_restarted_command_keeps_its_results(tmp_path: Path) -> None:
    first = RunRecord(tmp_path, run="abc")
    first.set("a", "t", "M", "ok")
    first.set("b", None, None, "failed", "the file is empty")
    RunRecord(tmp_path).set("c", "t", "M", "ok")
    again = RunRecord(tmp_path, run="abc")
    assert again.is_known("a", "t", "M")
    assert again.is_known("b", None, None)
    assert not again.is_known("c", "t", "M")
    assert (again.summary, again.exit_code) == ({"failed": 1, "ok": 1}, 1)


def test_a_removed_folder_is_an_error(tmp_path: Path) -> None:
    run = RunRecord(tmp_path / "out")
    run.set("a", "t", "M", "ok")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutputLost, match="was removed or replaced during the run"):
        run.set("b", "t", "M", "ok")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.jsonl").write_text("", encoding="utf-8")  # another run begins in its place
    with pytest.raises(OutputLost):
        run.__exit__(None, None, None)
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_map_removed_during_the_run_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"map")
    with RunRecord(tmp_path) as run:
        run.set("a", "t", "M", "ok", map="a.nii.gz")
        run.set("b", "t", "M", "ok", map="b.nii.gz")
    assert run.exit_code == 1
    assert statuses(tmp_path) == {("a", "t", "M"): "ok", ("b", "t", "M"): "failed"}


def test_a_summary_that_cannot_be_written_does_not_lose_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, record: Any) -> None:
        raise UsageError(f"cannot write {path}: No space left on device")

    monkeypatch.setattr("esegeta_monai.files.runs.write_json", full)
    with caplog.at_level(logging.ERROR), RunRecord(tmp_path) as run:
        run.set("a", "t", "M", "ok")
    assert "run.jsonl has all results" in caplog.text
    assert run.exit_code == 1
    assert [e["case"] for e in read_run(tmp_path).results] == ["a"]


def test_a_journal_that_can_no_longer_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    run = RunRecord(tmp_path)
    run.set("a", "t", "M", "ok")
    with monkeypatch.context() as patch:
        patch.setattr("esegeta_monai.files.journal.os.write", full)
        with pytest.raises(OutputLost, match=r"No space left on device.*the same command resumes the run"):
            run.set("b", "t", "M", "ok")
        with pytest.raises(UsageError, match="No space left on device"):
            RunRecord(tmp_path)
    assert [e["case"] for e in read_run(tmp_path).results] == ["a"]


def asked(folder: Path) -> list[tuple[str, str | None]]:
    return [(e["case"], e["method"]) for e in read_run(folder).results]


def test_results_stand_as_asked_for_not_as_they_end(tmp_path: Path) -> None:
    with RunRecord(tmp_path) as run:
        for case, method, order in (("b", "N", [1, 1]), ("b", "M", [1, 0]), ("c", None, [2]), ("a", "N", [0, 1])):
            run.set(case, method and "t", method, "failed", "because", order=order)
        run.set("a", "t", "M", "ok", order=[0, 0])
    wanted = [("a", "M"), ("a", "N"), ("b", "M"), ("b", "N"), ("c", None)]
    assert asked(tmp_path) == wanted
    assert [(e["case"], e["method"]) for e in read(tmp_path)["results"]] == wanted, "also in the file"
    with RunRecord(tmp_path) as run:  # a resume of one case, and one more method
        for number, method in ((2, "L"), (1, "N"), (0, "M")):
            run.set("b", "t", method, "ok", order=[0, number])
    wanted = [("a", "M"), ("a", "N"), ("b", "M"), ("b", "N"), ("b", "L"), ("c", None)]
    assert asked(tmp_path) == wanted
    (tmp_path / "run.json").unlink()
    assert asked(tmp_path) == wanted, "the journal alone is enough"


def test_parts_of_a_run_stand_one_after_the_other(tmp_path: Path) -> None:
    for part in (1, 0):  # the second part begins first
        with RunRecord(tmp_path, part=part) as run:
            for number in (1, 0):
                run.set(f"{part}{number}", "t", "M", "ok", order=[number, 0])
    assert [case for case, _ in asked(tmp_path)] == ["00", "01", "10", "11"]


def test_a_result_of_the_watching_process_gets_its_order(tmp_path: Path) -> None:
    """The process that ends a result by the hard time limit does not know which one was asked for first."""
    RunRecord(tmp_path, run="r").set("a", "t", "N", "ok", order=[0, 1])
    RunRecord(tmp_path, run="r").set("a", "t", "M", "timeout", "too long")
    with RunRecord(tmp_path, run="r") as again:
        again.add_order("a", "t", "M", [0, 0])
        again.add_order("a", "t", "N", [0, 5])  # known already
        again.set("a", "t", "L", "ok", order=[0, 2])
    assert asked(tmp_path) == [("a", "M"), ("a", "N"), ("a", "L")]
    assert statuses(tmp_path)["a", "t", "M"] == "timeout"


@pytest.mark.parametrize("order", [None, 3, {}, {"case": 1}, {"case": ["t", "x"], "result": [[]]}, {"result": [1]}])
def test_damaged_and_older_orders_are_read(order: Any, tmp_path: Path) -> None:
    entry = {"case": "a", "target": "t", "method": "M", "status": "ok", "order": order}
    (tmp_path / "run.json").write_text(json.dumps({"results": [entry, {**entry, "method": "L"}, 5]}), encoding="utf-8")
    RunRecord(tmp_path).set("a", "t", "K", "ok", order=[0, 0])
    assert [e["method"] for e in read_run(tmp_path).results if isinstance(e, dict)] == ["M", "L", "K"]
