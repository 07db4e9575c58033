"""The measured cells, one per line: library, row, network, dimensions, version of the check, verdict, figure, note.

A cell is valid as long as its version: when a method's file or its check changes, only its row is measured again.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

__all__ = ["STORE", "Cell", "Store"]

STORE = Path(__file__).parent / "cells.csv"


@dataclass(frozen=True)
class Cell:
    """One measured cell.

    Attributes:
        whose: library: "ours", "captum", "monai", …
        verdict: "green"; "capped": right, but the maximum number of steps was reached before the tolerance; "red":
            measured and wrong; "error": raised; "none": the method does not apply to this network.
    """

    whose: str
    row: str
    network: str
    dims: int
    version: str
    verdict: str
    figure: str
    note: str

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.whose, self.row, self.network, self.dims


class Store:
    """Cells by key; every new one is appended to the file at once, so that a run can be stopped."""

    def __init__(self, path: Path = STORE) -> None:
        self.path, self.cells = path, {}
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                for line in csv.reader(file):
                    cell = Cell(*line[:3], int(line[3]), *line[4:])  # type: ignore[arg-type, misc]
                    self.cells[cell.key] = cell

    def has(self, whose: str, row: str, network: str, dims: int, version: str) -> bool:
        """Return True if the cell is stored and still valid."""
        cell = self.cells.get((whose, row, network, dims))
        return cell is not None and cell.version == version

    def add(self, cell: Cell) -> None:
        """Add a cell."""
        self.cells[cell.key] = cell
        with self.path.open("a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(astuple(cell))

    def tidy(self, rows: Iterable[str]) -> None:
        """Write the file anew: sorted, each cell once, only rows that exist."""
        known = set(rows)
        self.cells = {key: cell for key, cell in sorted(self.cells.items()) if cell.row in known}
        with self.path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(astuple(cell) for cell in self.cells.values())
