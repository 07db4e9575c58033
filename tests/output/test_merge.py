from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.evaluation import EvaluationResult
from esegeta_monai.files.journal import read_run
from esegeta_monai.files.maps import save_sidecar
from esegeta_monai.files.runs import RunRecord
from esegeta_monai.output.evaluation_writer import COLUMNS, EvaluationWriter
from esegeta_monai.output.merge import merge_runs


def part(folder: Path, case: str, status: str = "ok", number: int | None = None, finished: bool = True) -> Path:
    """A part of a run with one case: map, sidecar, journal, run.json and table."""
    run = RunRecord(folder, {"bundle": "demo"}, part=number)
    path = folder / case / f"{case}_attr.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(case.encode())
    save_sidecar(path, {"case": case})
    run.set(case, "t", "M", status, "because", map=path.relative_to(folder).as_posix())
    if finished:
        run.__exit__(None, None, None)
    writer = EvaluationWriter(folder, [], [])
    row = {**dict.fromkeys(COLUMNS), "case": case, "target": "t", "method": "M", "metric": "Sparseness", "value": 0.5}
    writer.write(case, EvaluationResult(rows=[{**row, "status": "ok"}]))
    return folder


def cases(folder: Path) -> dict[str, str]:
    return {e["case"]: e["status"] for e in json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]}


def test_folders_become_one(tmp_path: Path) -> None:
    parts = [part(tmp_path / name, name) for name in ("a", "b", "c")]
    before = {p: p.read_bytes() for folder in parts for p in folder.rglob("*") if p.is_file()}
    joined = merge_runs(tmp_path / "whole", parts)
    assert (joined.cases, joined.counts, joined.exit_code) == (3, {"ok": 3}, 0)
    assert cases(tmp_path / "whole") == dict.fromkeys("abc", "ok")
    for name in "abc":
        assert (tmp_path / "whole" / name / f"{name}_attr.nii.gz").read_bytes() == name.encode()
        assert (tmp_path / "whole" / name / f"{name}_attr.json").is_file()
    with open(tmp_path / "whole" / "metrics.csv", encoding="utf-8") as file:
        assert {row["case"]: row["value"] for row in csv.DictReader(file)} == dict.fromkeys("abc", "0.5")
    assert {p: p.read_bytes() for p in before} == before
    again = merge_runs(tmp_path / "whole", parts)
    assert (again.copied, again.counts) == (0, {"ok": 3})


def test_parts_of_one_folder_become_one_record(tmp_path: Path) -> None:
    for number, case in enumerate("abc"):
        part(tmp_path, case, number=number)
    (tmp_path / "run.json").unlink()
    assert main(["merge-runs", str(tmp_path)]) == 0
    assert cases(tmp_path) == dict.fromkeys("abc", "ok")


def test_a_later_result_wins_whatever_the_order(tmp_path: Path) -> None:
    first, second = part(tmp_path / "first", "a", "failed"), part(tmp_path / "second", "a", "ok")
    for order in ([first, second], [second, first]):
        whole = tmp_path / order[0].name[:1]
        merge_runs(whole, order)
        assert cases(whole) == {"a": "ok"}


def test_unfinished_parts_and_failures_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part(tmp_path, "a", number=0)
    part(tmp_path, "b", number=1, finished=False)
    assert main(["merge-runs", str(tmp_path)]) == 1
    assert "run.part1.jsonl: this part is not finished" in capsys.readouterr().err
    assert merge_runs(tmp_path / "whole", [part(tmp_path / "other", "c", "failed")]).exit_code == 1


def test_files_that_differ_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    first, second = part(tmp_path / "first", "a"), part(tmp_path / "second", "a")
    (second / "a" / "a_attr.nii.gz").write_bytes(b"other")
    with pytest.raises(UsageError, match=r"a_attr\.nii\.gz differs in"):
        merge_runs(tmp_path / "whole", [first, second])
    assert not (tmp_path / "whole").exists()


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=r"has no results and no metrics\.csv"):
            merge_runs(folder)
    assert read_run(tmp_path).results == []


def test_merged_results_stand_as_asked_for(tmp_path: Path) -> None:
    """Two folders with other methods of one case, and with other cases."""
    for folder, case, methods in (("one", "b", "NM"), ("two", "b", "LK"), ("three", "a", "NM")):
        with RunRecord(tmp_path / folder) as run:
            for number, method in reversed(list(enumerate(methods))):
                run.set(case, "t", method, "ok", order=[0, number, 0, 0])
    merge_runs(tmp_path / "whole", [tmp_path / name for name in ("three", "two", "one")])
    contents = json.loads((tmp_path / "whole" / "run.json").read_text(encoding="utf-8"))
    assert [e["case"] + e["method"] for e in contents["results"]] == ["bN", "bM", "bL", "bK", "aN", "aM"]
