"""Each row of the fault suite as a test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.runner import Row, all_rows

ROWS = all_rows()


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row.group.split()[0]}-{row.name}", marks=[pytest.mark.slow] if row.slow else [])
        for row in ROWS
        if not row.long
    ],
)
def test_fault(row: Row, tmp_path: Path) -> None:
    row.check(tmp_path)


def test_rows_have_names_of_their_own() -> None:
    names = [(row.group, row.name) for row in ROWS]
    assert len(set(names)) == len(names)
