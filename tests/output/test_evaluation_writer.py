"""The table of metrics on disk: tidy, extended case by case."""

from __future__ import annotations

import csv
import json

import pytest

from esegeta_monai.errors import UsageError
from esegeta_monai.explain.evaluation import EvaluationResult
from esegeta_monai.output.evaluation_writer import COLUMNS, REGION_COLUMNS, EvaluationWriter
from tests.explain.judged import judged


def test_the_table_is_tidy_and_grows_by_cases(tmp_path):
    result = judged()
    writer = EvaluationWriter(tmp_path, [], [], {"bundle": "none"})
    for case in ("a", "b", "a"):
        writer.write(case, result)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [r["case"] for r in table] == ["b"] * len(result.rows) + ["a"] * len(result.rows)
    assert float(table[0]["value"]) == result.rows[0]["value"]
    record = json.loads((tmp_path / "a" / "a_metrics.json").read_text(encoding="utf-8"))
    assert record["bundle"] == "none"
    (curve,) = [c for c in record["curves"] if c["method"] == "InputXGradient" and c["metric"].startswith("Deletion")]
    assert len({len(v) for v in curve.values() if isinstance(v, list)}) == 1
    with open(tmp_path / "a" / "a_regions.csv", newline="") as file:
        regions = list(csv.DictReader(file))
    assert tuple(regions[0]) == REGION_COLUMNS
    assert {"all", "label 1", "body"} <= {r["region"] for r in regions}


def test_rows_of_an_earlier_run_do_not_stay_where_a_case_has_none_now(tmp_path):
    result = judged()
    writer = EvaluationWriter(tmp_path, [], [])
    writer.write("a", result)
    writer.write("b", result)
    writer.write("a", EvaluationResult(failed={"ClassScore-class1, InputXGradient": "out of memory"}))
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert {r["case"] for r in csv.DictReader(file)} == {"b"}


def test_a_table_that_a_spreadsheet_wrote_again_is_kept_and_another_one_refused(tmp_path):
    EvaluationWriter(tmp_path, [], []).write("a", judged())
    table = tmp_path / "metrics.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    EvaluationWriter(tmp_path, [], []).write("b", judged())
    with open(table, newline="", encoding="utf-8") as file:
        assert {r["case"] for r in csv.DictReader(file)} == {"a", "b"}
    for content in (b"case;target\na;b\n", "case,target\nKöln,b\n".encode("latin-1")):
        table.write_bytes(content)
        with pytest.raises(UsageError, match=r"metrics\.csv .*move it away"):
            EvaluationWriter(tmp_path, [], [])
        assert table.read_bytes() == content
