"""Run a notebook in this process: its code cells one after the other, each with what it shows.

A kernel and a client of Jupyter would be eight more packages for a file of ten cells.

    python -m tests.docs.notebook docs/notebooks/own_method.ipynb     run it and write what its cells show
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


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


def write_outputs(path: Path) -> None:
    """Run a notebook and write what its cells show into the file, as a notebook program does."""
    content = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    for number, (cell, shown) in enumerate(zip(code, run(path)), 1):
        cell["execution_count"], cell["outputs"] = number, []
        if shown.value is not None:
            data = {"text/plain": repr(shown.value).splitlines(keepends=True)}
            if isinstance(shown.value, Figure):
                picture = io.BytesIO()
                shown.value.savefig(picture, format="png")
                data = {"image/png": base64.b64encode(picture.getvalue()).decode(), **data}
            elif hasattr(shown.value, "_repr_html_"):
                data = {"text/html": shown.html.splitlines(keepends=True), **data}
            result = {"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data}
            cell["outputs"].append(result)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        write_outputs(Path(name))
