"""CSV tables whose cells a spreadsheet shows and never runs."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["csv_text", "plain_rows"]

FORMULA = re.compile(r"'*[=+\-@\t\n]")
GUARDED = re.compile(r"'+[=+\-@\t\n]")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    r"""Format rows as CSV with a header.

    Spreadsheets run cells that begin with ``=``, ``+``, ``-``, ``@``, a tab or a line break. Such texts (names of
    cases, regions and layers come from outside) get an apostrophe in front, which `plain_rows` removes. Numbers stay
    numbers. Carriage returns become line breaks.

    >>> csv_text(["case", "value"], [{"case": "=1+1", "value": -0.5}])
    "case,value\n'=1+1,-0.5\n"
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(column) for column in columns])
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return text.getvalue()


def plain_rows(file: Iterable[str]) -> tuple[list[str] | None, list[dict[str, Any]]]:
    r"""Read the columns and rows that `csv_text` wrote, without its apostrophes.

    Raises:
        csv.Error: the text is no CSV.

    >>> plain_rows(["case,value\n", "'=1+1,-0.5\n"])
    (['case', 'value'], [{'case': '=1+1', 'value': '-0.5'}])
    """
    table = csv.DictReader(file)
    rows = [{key: _plain(value) for key, value in row.items()} for row in table]
    columns = None if table.fieldnames is None else [_plain(name) for name in table.fieldnames]
    return columns, rows


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, (bool, float)):
        return json.dumps(value)
    if not isinstance(value, str):
        return value
    text = value.replace("\r\n", "\n").replace("\r", "\n")  # `csv` does not quote a carriage return alone
    return f"'{text}" if FORMULA.match(text) and not _is_number(text) else text


def _plain(value: Any) -> Any:
    return value[1:] if isinstance(value, str) and GUARDED.match(value) else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text and text == text.strip()
