"""The tables of the known-cause benchmark say what the rows say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.metrics import METRICS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table() -> Iterator[Any]:
    folder = str(ROOT / "benchmarks" / "known_cause")
    sys.path.insert(0, folder)
    import table

    yield table
    sys.path.remove(folder)
    for name in ("metrics", "table"):
        del sys.modules[name]


@pytest.fixture
def metrics(table: Any) -> Any:
    return sys.modules["metrics"]


def rows(method: str, values: list[float], metric: str = "AUC") -> list[dict[str, Any]]:
    return [
        {"network": "lesion", "seed": seed, "method": method, "metric": metric, "value": v}
        for seed, v in enumerate(values)
    ]


def with_controls(metric: str, control: float) -> list[dict[str, Any]]:
    names = ("control:random", "control:sobel", "control:constant")
    return [row for name in names for row in rows(name, [control + 0.01 * i for i in range(6)], metric)]


def test_a_cell_is_the_mean_of_its_cases_with_its_interval(table: Any) -> None:
    values = [0.2, 0.4, 0.9, 0.5]
    (summary,) = table.by_cell(rows("LRP", values)).values()
    assert summary.n == 4
    assert summary.mean == pytest.approx(0.5)
    assert min(values) <= summary.low < 0.5 < summary.high <= max(values)


def test_a_rate_has_wilsons_interval(table: Any) -> None:
    (summary,) = table.by_cell(rows("LRP", [1.0] * 8, "pointing game")).values()
    assert summary.low == pytest.approx(8 / (8 + 1.959964**2)), "Wilson at 8 of 8: n / (n + z²)"
    assert summary.high == pytest.approx(1)


def test_a_cell_that_is_undefined_in_one_case_is_empty(table: Any) -> None:
    undefined = {"network": "lesion", "seed": 9, "method": "LRP", "metric": "AUC", "value": ""}
    cells = table.by_cell([*rows("LRP", [0.9] * 4), undefined, *rows("LRP", [0.5] * 4, "relevance mass")])
    assert [cell.metric for cell in cells] == ["relevance mass"]
    assert table.method_table(cells, "lesion", ["AUC"], ["AUC"]).splitlines()[2] == "| LRP | 0 | – |"


def test_every_metric_of_both_groups_is_measured(metrics: Any) -> None:
    for group, named in (("localisation", metrics.LOCALISATION), ("faithfulness", metrics.FAITHFULNESS)):
        measured = {type(metrics.metric_of(name)) for name in named}
        assert measured == {cls for cls in METRICS if cls.group == group}


def test_directions_are_those_of_the_metrics(table: Any, metrics: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lower = [name for name in metrics.LOCALISATION | metrics.FAITHFULNESS if table.direction(name) < 0]
    assert lower == ["distance", "deletion", "infidelity", "average drop"]
    monkeypatch.setattr(type(metrics.metric_of("AUC")), "higher_is_better", None)
    cells = table.by_cell(rows("LRP", [0.9] * 6) + with_controls("AUC", 0.1))
    assert table.beats_controls(cells, "lesion", "LRP", "AUC") is None, "a description has no better and worse"


def test_a_control_without_a_value_is_left_out(table: Any) -> None:
    result = with_controls("sensitivity-n", 0.1)
    undefined = [{**row, "value": ""} if row["method"] == "control:constant" else row for row in result]
    cells = table.by_cell(rows("LRP", [0.5] * 6, "sensitivity-n") + undefined)
    assert table.beats_controls(cells, "lesion", "LRP", "sensitivity-n") is True


@pytest.mark.parametrize(
    ("metric", "control", "values", "beats"),
    [
        ("AUC", 0.5, [0.9, 0.8, 0.95, 0.9, 0.85, 0.9], True),
        ("AUC", 0.5, [0.3, 0.8, 0.4, 0.6, 0.5, 0.55], False),
        ("deletion", 0.5, [0.9, 0.8, 0.95, 0.9, 0.85, 0.9], False),
        ("deletion", 0.5, [0.1, 0.2, 0.15, 0.1, 0.2, 0.1], True),
    ],
)
def test_a_method_beats_the_controls_where_the_paired_difference_is_clear(
    table: Any, metric: str, control: float, values: list[float], beats: bool
) -> None:
    cells = table.by_cell(rows("LRP", values, metric) + with_controls(metric, control))
    assert table.beats_controls(cells, "lesion", "LRP", metric) is beats


def test_two_cases_are_too_few_to_beat_anything(table: Any) -> None:
    cells = table.by_cell(rows("LRP", [1.0, 1.0]) + with_controls("AUC", 0.1))
    assert table.beats_controls(cells, "lesion", "LRP", "AUC") is None


def test_the_table_has_the_best_first_and_controls_in_italics(table: Any) -> None:
    measured = rows("Worse", [0.1] * 6) + rows("Better", [0.9] * 6) + with_controls("AUC", 0.5)
    cells = table.by_cell([row for m in ("AUC", table.ORDER) for row in ({**row, "metric": m} for row in measured)])
    lines = table.method_table(cells, "lesion", ["AUC"], ["AUC"]).splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names[0] == "Better"
    assert names[-1] == "Worse"
    assert "*control:sobel*" in names
    assert lines[2] == "| Better | 6 | 0.90 (0.90–0.90)\\* |"
    assert lines[-1].count("\\*") == 0
    means = table.method_table(cells, "lesion", ["AUC"], ["AUC"], intervals=False).splitlines()
    assert means[2] == "| Better | 6 | 0.90\\* |"


def test_agreement_with_mass_and_how_many_are_above_the_controls(table: Any, metrics: Any) -> None:
    """Deletion ranks three methods as mass does, insertion the other way round; Sobel has the best insertion."""
    result = []
    for i, method in enumerate(("A", "B", "C", "C again")):
        at = min(i, 2)
        result += [row for name in metrics.LOCALISATION for row in rows(method, [0.5 + 0.1 * at] * 3, name)]
        result += rows(method, [0.9 - 0.3 * at] * 3, "deletion") + rows(method, [0.9 - 0.3 * at] * 3, "insertion")
    for metric in metrics.LOCALISATION:
        result += with_controls(metric, 0.0)
    result += with_controls("deletion", 0.5) + with_controls("insertion", 2.0)
    lines = table.agreement_table(table.by_cell(result), ["lesion"]).splitlines()
    assert "| relevance mass | +1.00 | 4 of 4 |" in lines
    assert "| distance | -1.00 | 0 of 4 |" in lines
    assert "| deletion | +1.00 | 2 of 4 |" in lines
    assert "| insertion | -1.00 | 0 of 4 |" in lines


def test_agreement_where_a_metric_is_undefined_for_a_method(table: Any, metrics: Any) -> None:
    """It is left out of that metric's row, and stays in the others."""
    result = []
    for i, method in enumerate("ABC"):
        result += [row for name in metrics.LOCALISATION for row in rows(method, [0.5 + 0.1 * i] * 3, name)]
    undefined = [row for row in result if row["method"] == "B" and row["metric"] == "AUC"]
    undefined[0]["value"] = ""
    lines = table.agreement_table(table.by_cell(result), ["lesion"]).splitlines()
    assert [line for line in lines if line.startswith("| AUC")] == ["| AUC | +1.00 | 2 of 2 |"]
    assert [line for line in lines if line.startswith("| top 20")] == ["| top 20 | +1.00 | 3 of 3 |"]


def test_the_page_has_a_column_of_every_metric(metrics: Any) -> None:
    page = (ROOT / "docs" / "known_cause.md").read_text(encoding="utf-8")
    for network in ("lesion", "shortcut", "distractor"):
        for kind, named in (("localisation", metrics.LOCALISATION), ("faithfulness", metrics.FAITHFULNESS)):
            block = page.split(f"<!-- {kind} {network} -->")[1].split("<!-- /")[0].strip().splitlines()
            columns = [line.strip("| ").split(" | ") for line in block if not line.startswith("|---")]
            assert columns[0][2 : 2 + len(named)] == [*named]
            assert {len(line) for line in columns} == {len(columns[0])}


def test_a_block_is_replaced_and_the_rest_of_the_page_kept(table: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n", encoding="utf-8")
    table.write_block(page, "a", "new")
    table.write_block(page, "a", "newer")
    assert page.read_text(encoding="utf-8") == "before\n<!-- a -->\n\nnewer\n\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="no block"):
        table.write_block(page, "b", "text")
