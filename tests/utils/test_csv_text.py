from __future__ import annotations

import csv
import io

import pytest

from esegeta_monai.utils.csv_text import csv_text, plain_rows

NAMES = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@x",
    "\t=x",
    "\r=x",
    "'=x",
    "''=x",
    "'x",
    "x",
    "",
    "-",
    "a,b\n=c",
    "-0.5",
    "-inf",
    "+1e5",
]


def test_texts_come_back_and_no_cell_is_a_formula() -> None:
    text = csv_text(["case"], [{"case": name} for name in NAMES])
    cells = [row[0] if row else "" for row in csv.reader(io.StringIO(text, newline=""))][1:]
    for name, cell in zip(NAMES, cells):
        if cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
            float(cell)  # a number
        else:
            assert cell.lstrip("'") == name.lstrip("'").replace("\r", "\n")
    assert [row["case"] for row in plain_rows(io.StringIO(text, newline=""))[1]] == [
        name.replace("\r", "\n") for name in NAMES
    ]


@pytest.mark.parametrize(
    ("value", "cell"), [(-0.5, "-0.5"), (-3, "-3"), (None, ""), (True, "true"), (1e-300, "1e-300"), ("-0.5", "-0.5")]
)
def test_numbers_stay_numbers(value: object, cell: str) -> None:
    assert csv_text(["v", "w"], [{"v": value, "w": "x"}]).splitlines()[1] == f"{cell},x"
