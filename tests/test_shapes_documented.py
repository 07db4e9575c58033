"""Public functions on tensors state a shape in their docstrings, such as ``(k, C, *spatial)``.

A function counts if it, its class and its module are public, it has a docstring, and an annotation in its signature
names `Tensor`. ``shapes_missing.txt`` lists those that state no shape yet. The list may only shrink;
``python -m tests.test_shapes_documented --write`` removes what has been documented.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "esegeta_monai"
LIST = Path(__file__).with_name("shapes_missing.txt")
IN_BRACKETS = re.compile(r"\(([^()]*)\)")
ITEM = re.compile(r"[\w.*+\-·/…\[\] ]*")
SIZE = re.compile(r"\*[a-z][\w.]*|\d+|[A-Za-z]|dims|voxels|cells|…")  # *spatial, 3, C, n, dims, voxels, …
IN_WORDS = re.compile(r"\bscalars?\b|\b(same|any|equal) shapes?\b|\bshapes? of\b|\(\)")


def states_shape(docstring: str) -> bool:
    """True if the text has a tuple of sizes, or the words for a scalar, any shape or another tensor's shape."""
    for text in IN_BRACKETS.findall(docstring):
        items = [item.strip() for item in text.split(",")]
        if all(map(ITEM.fullmatch, items)) and any(map(SIZE.fullmatch, items)) and ("," in text or "*" in text):
            return True
    return bool(IN_WORDS.search(docstring))


def on_tensors(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Qualified name and docstring of the public documented functions with `Tensor` in an annotation."""

    def visit(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [n for n in ast.walk(node.args) if isinstance(n, ast.arg)]
                annotations = [a.annotation for a in arguments if a.annotation] + [n for n in [node.returns] if n]
                docstring = ast.get_docstring(node)
                if docstring and any(re.search(r"\bTensor\b", ast.unparse(a)) for a in annotations):
                    yield prefix + node.name, docstring

    yield from visit(tree.body, "")


def missing() -> list[str]:
    """Return ``path:name`` of the functions without a shape, sorted."""
    return sorted(
        f"{path.relative_to(ROOT).as_posix()}:{name}"
        for path in ROOT.rglob("*.py")
        if not path.name.startswith("_")
        for name, docstring in on_tensors(ast.parse(path.read_text(encoding="utf-8")))
        if not states_shape(docstring)
    )


def test_functions_on_tensors_state_a_shape() -> None:
    listed, now = LIST.read_text(encoding="utf-8").split(), missing()
    assert sorted(set(now) - set(listed)) == [], "state a shape in these docstrings"
    assert sorted(set(listed) - set(now)) == [], "documented: python -m tests.test_shapes_documented --write"


@pytest.mark.parametrize(
    "docstring",
    [
        "Map (C, *spatial).",
        "Values (k, n) in float64.",
        "The mask (*out_roi).",
        "Of shape (len, *box).",
        "(2, 2)",
        "Return a scalar.",
        "Return a tensor of the same shape.",
    ],
)
def test_what_states_a_shape(docstring: str) -> None:
    assert states_shape(docstring)


@pytest.mark.parametrize("docstring", ["One score.", "By Otsu (Otsu 1979).", "As (one, another).", "See f(x)."])
def test_what_states_none(docstring: str) -> None:
    assert not states_shape(docstring)


def test_which_functions_count() -> None:
    source = """
def f(x: Tensor): "a"
def g(x: int) -> list[Tensor]: "b"
def h(x: int): "c"
def i(x: Tensor): pass
def _j(x: Tensor): "d"
class K:
    def l(self, *x: Tensor | None): "e"
class _M:
    def n(self, x: Tensor): "f"
"""
    assert list(on_tensors(ast.parse(source))) == [("f", "a"), ("g", "b"), ("K.l", "e")]


def write() -> None:
    """Rewrite the list, unless it would grow."""
    now, before = missing(), LIST.read_text(encoding="utf-8").split() if LIST.exists() else None
    if before is not None and len(now) > len(before):
        sys.exit(f"{len(now)} functions without a shape, {len(before)} before: {sorted(set(now) - set(before))}")
    LIST.write_text("".join(f"{name}\n" for name in now), encoding="utf-8")


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    write()
