"""Show the Python files whose code differs between two commits when all text is left out.

A commit that only changes prose (docstrings, comments, messages) must list no file:

    python .ci/same_code.py HEAD~1 HEAD

Exit status 1 where a file's syntax tree without strings differs.
"""

from __future__ import annotations

import ast
import subprocess
import sys


class WithoutText(ast.NodeTransformer):
    """Replaces every string by "" and removes docstrings."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        """An f-string is its values, in a fixed order: a sentence may name them in another one."""
        values = [self.visit(v) for v in node.values if isinstance(v, ast.FormattedValue)]
        return ast.JoinedStr(sorted(values, key=ast.dump)) if values else ast.Constant("")


def code(commit: str, path: str) -> str:
    """The syntax tree of a file at a commit, without text; empty where the file does not exist."""
    shown = subprocess.run(
        ["git", "show", f"{commit}:{path}"], capture_output=True, text=True, encoding="utf-8", check=False
    )
    return ast.dump(WithoutText().visit(ast.parse(shown.stdout))) if shown.returncode == 0 else ""


def main(old: str, new: str) -> int:
    """Print the files that differ between two commits; 1 where there are some."""
    listed = subprocess.run(
        ["git", "diff", "--name-only", old, new, "--", "*.py"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    different = [path for path in listed.stdout.splitlines() if code(old, path) != code(new, path)]
    print("\n".join(different) or "the code is the same")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
