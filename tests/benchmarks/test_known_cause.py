"""The tables of the known-cause benchmark say what the rows say."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def table() -> Iterator[Any]:
    folder = str(Path(__file__).parents[2] / "benchmarks" / "known_cause")
    sys.path.insert(0, folder)
    import table

    yield table
    sys.path.remove(folder)
    del sys.modules["table"]


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
    found = table.by_cell([*rows("LRP", values), {**rows("LRP", [0.0])[0], "seed": 9, "value": ""}])
    (summary,) = found.values()
    assert summary.n == 4, "a row without a value is no case"
    assert summary.mean == pytest.approx(0.5)
    assert min(values) <= summary.low < 0.5 < summary.high <= max(values)


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
    cells = table.by_cell(rows("Worse", [0.1] * 6) + rows("Better", [0.9] * 6) + with_controls("AUC", 0.5))
    lines = table.method_table(cells, "lesion", ["AUC"], "AUC", ["AUC"]).splitlines()
    names = [line.split(" | ")[0].strip("| ") for line in lines[2:]]
    assert names[0] == "Better"
    assert names[-1] == "Worse"
    assert "*control:sobel*" in names
    assert lines[2].count("\\*") == 1
    assert lines[-1].count("\\*") == 0


def test_a_block_is_replaced_and_the_rest_of_the_page_kept(table: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- /a -->\nafter\n")
    table.write_block(page, "a", "new")
    table.write_block(page, "a", "newer")
    assert page.read_text() == "before\n<!-- a -->\n\nnewer\n\n<!-- /a -->\nafter\n"
    with pytest.raises(ValueError, match="no block"):
        table.write_block(page, "b", "text")
