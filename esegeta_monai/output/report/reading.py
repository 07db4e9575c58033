"""Lenient readers for files that may have been edited or truncated: valid entries are used, others noted."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from esegeta_monai.explain.record import KINDS, NUMBER
from esegeta_monai.utils.csv_text import plain_rows

__all__ = ["fitted", "table"]

CHECKED = {**KINDS, "traceback": str}
"""The types of entries in sidecars and in ``run.json``."""


def fitted(record: Mapping[str, Any], name: str, notes: list[str]) -> dict[str, Any]:
    """Return a record without entries of a wrong type; their names are added to ``notes``.

    >>> notes = []
    >>> fitted({"sum": "many", "value": 2.5, "seconds": None}, "a.json", notes), notes
    ({'value': 2.5, 'seconds': None}, ["a.json is not as 'explain' wrote it, left out: sum."])
    """
    wrong = [key for key, kind in CHECKED.items() if record.get(key) is not None and not _fits(key, record[key], kind)]
    if wrong:
        notes.append(f"{name} is not as 'explain' wrote it, left out: {', '.join(sorted(wrong))}.")
    return {key: value for key, value in record.items() if key not in wrong}


def _fits(key: str, value: Any, kind: Any) -> bool:
    if not isinstance(value, kind) or (kind is NUMBER and (isinstance(value, bool) or not math.isfinite(value))):
        return False
    if key == "network_affine":
        return len(value) >= 3 and all(isinstance(row, list) and len(row) >= 3 and _numbers(row) for row in value)
    if key in ("network_grid", "curve"):
        return _numbers(value)
    if key == "display":
        rows = value.get("affine")
        return rows is None or (
            len(rows) == 4 and all(isinstance(r, list) and len(r) == 4 and _numbers(r) for r in rows)
        )
    return True


def _numbers(values: list[Any]) -> bool:
    return all(v is None or (isinstance(v, NUMBER) and math.isfinite(v)) for v in values)


def table(path: Path, columns: Collection[str], notes: list[str]) -> list[dict[str, Any]]:
    """Read the rows of a table, also one saved by a spreadsheet; no rows and a note if it cannot be read.

    Args:
        path: a CSV file.
        columns: columns that every row must have; other rows are left out, with a note.
        notes: list to which notes are added.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            _, rows = plain_rows(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}): run 'evaluate' again.")
        return []
    whole = [row for row in rows if all(row.get(column) for column in columns)]
    if len(whole) < len(rows):
        notes.append(
            f"{path.name}: {len(rows) - len(whole)} of {len(rows)} rows are not as 'evaluate' writes them and are left "
            "out: run it again."
        )
    return whole
