"""Read the table of groups: a row per case with group, and where known patient, site and other variables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from esegeta_monai.errors import UsageError
from esegeta_monai.utils.csv_text import plain_rows

__all__ = ["CaseTable"]

OWN = ("case", "group", "patient", "site")


@dataclass(frozen=True)
class CaseTable:
    """The table of cases.

    Attributes:
        rows: entries by case.
        variables: names of further columns.
    """

    rows: Mapping[str, Mapping[str, str]]
    variables: Sequence[str]

    @classmethod
    def read(cls, path: Path) -> CaseTable:
        """Read a CSV with the column ``case``, and ``group``, ``patient``, ``site`` and others where known.

        Raises:
            UsageError: it cannot be read, has no column ``case`` or the same case twice, or more than two groups.
        """
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                columns, rows = plain_rows(file)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UsageError(f"--groups {path}: cannot be read ({type(error).__name__}): give a CSV file") from error
        names = [c for c in columns or [] if c]
        if "case" not in names or not rows:
            raise UsageError(f"--groups {path}: the first line must name the columns case and group (patient, site, …)")
        by_case: dict[str, dict[str, str]] = {}
        for row in rows:
            entries = {k: str(v).strip() for k, v in row.items() if k and v is not None}
            case = entries.get("case", "")
            if not case:
                raise UsageError(f"--groups {path}: a row has no case")
            if case in by_case:
                raise UsageError(f"--groups {path}: the case {case!r} has two rows")
            by_case[case] = entries
        groups = {row.get("group", "") for row in by_case.values()} - {""}
        if len(groups) > 2:
            raise UsageError(f"--groups {path}: {len(groups)} groups; a test compares two: leave the others empty")
        return cls(by_case, [c for c in names if c not in OWN])

    @property
    def groups(self) -> list[str]:
        """The names of the groups, sorted."""
        return sorted({row.get("group", "") for row in self.rows.values()} - {""})

    def value(self, case: str, column: str) -> str | None:
        """Return an entry; None if it is empty or missing."""
        return self.rows.get(case, {}).get(column) or None

    def variable(self, cases: Sequence[str], column: str) -> list[float | str | None]:
        """Return a column for cases: numbers if all of its entries are numbers."""
        values = [self.value(case, column) for case in cases]
        try:
            return [None if v is None else float(v) for v in values]
        except ValueError:
            return list(values)
