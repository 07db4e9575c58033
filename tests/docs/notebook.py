"""Run a notebook in this process: its code cells one after the other, each with what it shows.

A kernel and a client of Jupyter would be eight more packages for a file of ten cells.
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Shown:
    """A code cell after its run: its source, and the value of its last expression, None without one."""

    source: str
    value: Any

    @property
    def html(self) -> str:
        """Return what a notebook shows: HTML where the value has some, else its text."""
        as_html = getattr(self.value, "_repr_html_", None)
        return as_html() if as_html is not None else repr(self.value)


def run(path: Path) -> list[Shown]:
    """Run the code cells of a notebook in one namespace.

    Raises:
        Exception: that of the first cell that fails.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            cells.append(Shown(source, _value(source, f"{path.name}, cell {number}", namespace)))
    return cells


def _value(source: str, name: str, namespace: dict[str, Any]) -> Any:
    tree = ast.parse(source, name)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), namespace)
    return None if last is None else eval(compile(ast.Expression(last.value), name, "eval"), namespace)
