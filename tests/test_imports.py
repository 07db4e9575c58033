"""The packages import downwards only: a package imports packages below it, and nothing goes round in a circle."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

import esegeta_monai

ROOT = Path(esegeta_monai.__file__).parent
ORDER = ["cli", "app", "interop", "handlers", "bundle", "transforms", "output", "explain", "metrics", "files"]
ORDER += ["methods", "targets", "engine", "utils", "errors"]
SAME_LEVEL = {("methods", "targets"), ("targets", "methods")}
ALLOWED: set[tuple[str, str]] = set()
"""(file, module) of imports that run upwards for now."""


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in ROOT.rglob("*.py")}


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, for types only too."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (whole & set(MODULES)) | ({node.module} if whole - set(MODULES) else set())
    return {name for name in names if name in MODULES and name != module}


def package(module: str) -> str:
    """The entry at the top of the package that a module belongs to; "" for the package itself and its ``__main__``."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in ORDER else ""


def test_the_top_of_the_package_is_small():
    entries = {p.name for p in ROOT.iterdir()} - {"__init__.py", "__main__.py", "py.typed", "__pycache__"}
    assert {entry.removesuffix(".py") for entry in entries} == set(ORDER)


def test_imports_run_downwards():
    upwards = set()
    for module in MODULES:
        for other in imports(module):
            here, there = package(module), package(other)
            if "" in (here, there) or here == there or (here, there) in SAME_LEVEL:
                continue
            if ORDER.index(here) > ORDER.index(there):
                upwards.add((module, other))
    assert upwards == ALLOWED


def test_no_import_goes_round_in_a_circle():
    """Between modules; a package's own `__init__` counts as what it imports."""

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(imports(module)):
                visit(other, (*path, module))
            done.add(module)

    done: set[str] = set()
    for module in sorted(MODULES):
        visit(module, ())


def test_packages_stand_on_at_most_ten_levels():
    above = {name: set[str]() for name in ORDER}
    for module in MODULES:
        above.setdefault(package(module), set()).update(package(other) for other in imports(module))

    @lru_cache
    def level(name: str) -> int:
        below = above[name] - {name, ""}
        lower = [other for other in below if (name, other) not in SAME_LEVEL and ORDER.index(name) < ORDER.index(other)]
        return 1 + max((level(other) for other in lower), default=0)

    assert max(level(name) for name in ORDER) <= 10
