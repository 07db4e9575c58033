"""List the methods, targets and metrics of a bundle's ``scripts/`` from their source, without importing it."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esegeta_monai.bundle.configs import bundle_folder
from esegeta_monai.bundle.contents import printable
from esegeta_monai.errors import UsageError
from esegeta_monai.utils.registry import Configurable, Registry

__all__ = ["ExtensionSource", "list_extensions"]

MAX_SOURCE = 1 << 20
"""Bytes of one script."""


@dataclass(frozen=True)
class ExtensionSource:
    """A class in a script, as its source states it.

    Attributes:
        name: the class.
        base: the class of this package from which it derives.
        file: the script and the line, relative to the bundle.
        doc: its documentation; may be empty.
        parameters: defaults by name; an expression that is no literal is its text.
        required: parameters without default.
        stated: literal class attributes that are no parameters, such as ``reference`` and ``aliases``.
    """

    name: str
    base: type[Any]
    file: str
    doc: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    required: list[str] = field(default_factory=list)
    stated: dict[str, Any] = field(default_factory=dict)

    def attribute(self, name: str) -> Any:
        """Return a class attribute: the class's own if it is a literal, else that of its base."""
        own = self.stated.get(name, getattr(self.base, name, None))
        return own if isinstance(own, (bool, int, float, str, list, tuple, set, frozenset)) else None


def list_extensions(bundle_dir: str | Path, registry: Registry[Any]) -> list[ExtensionSource]:
    """Return the classes of a kind that `register_extensions` would register, from the text of the scripts.

    A class counts if its bases lead, within its file, to a class that the file imports from this package. Classes that
    are made in another way are found only when the bundle runs.

    Args:
        bundle_dir: the bundle directory.
        registry: the kind: `METHODS`, `TARGETS` or `METRICS`.

    Raises:
        UsageError: there is no such folder, or a script cannot be read as Python.
    """
    root = bundle_folder(bundle_dir)
    listed: list[ExtensionSource] = []
    for file in sorted((root / "scripts").glob("*.py")):
        if not file.is_file():
            continue
        with file.open("rb") as stream:
            raw = stream.read(MAX_SOURCE + 1)
        if b"esegeta_monai" not in raw:
            continue
        shown = f"scripts/{printable(file.name)}"
        if len(raw) > MAX_SOURCE:
            raise UsageError(f"{shown} of the bundle has more than {MAX_SOURCE >> 20} MiB and is not read")
        try:
            tree = ast.parse(raw)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise UsageError(f"{shown} of the bundle is not valid Python: {printable(error)}") from error
        listed += _of_file(tree, shown, registry)
    return listed


def _of_file(tree: ast.Module, file: str, registry: Registry[Any]) -> list[ExtensionSource]:
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "esegeta_monai":
            module = sys.modules.get(str(node.module))  # only modules of this package that are loaded anyway
            known |= {alias.asname or alias.name: getattr(module, alias.name, None) for alias in node.names}
        elif isinstance(node, ast.Import):
            known |= {a.asname or a.name: sys.modules.get(a.name) for a in node.names if a.name.startswith("esegeta_")}
    classes: dict[str, ExtensionSource] = {}
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        parents = [_base(base, known, classes) for base in node.bases]
        base = next((p for p in parents if isinstance(p, type) and issubclass(p, registry.base)), None)
        if base is not None:
            inherited = [classes[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in classes]
            classes[node.name] = _of_class(node, base, file, inherited)
    return [source for name, source in classes.items() if not name.startswith("_")]


def _base(node: ast.expr, known: Mapping[str, Any], classes: Mapping[str, ExtensionSource]) -> Any:
    if isinstance(node, ast.Name):
        return classes[node.id].base if node.id in classes else known.get(node.id)
    if isinstance(node, ast.Attribute):
        text = ast.unparse(node)
        module, _, name = text.rpartition(".")
        owner = known.get(module) or (sys.modules.get(module) if module.startswith("esegeta_monai") else None)
        return vars(owner).get(name) if owner is not None and hasattr(owner, "__dict__") else None
    return None


def _of_class(node: ast.ClassDef, base: type[Any], file: str, inherited: list[ExtensionSource]) -> ExtensionSource:
    parameters: dict[str, Any] = {}
    required: list[str] = []
    stated: dict[str, Any] = {}
    for parent in inherited:
        parameters, stated = {**parameters, **parent.parameters}, {**stated, **parent.stated}
        required += parent.required
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        parameters, required = _of_signature(init)
    elif not inherited:
        signature = inspect.signature(base.__init__).parameters if issubclass(base, Configurable) else {}
        for name in base.parameter_names() if signature else ():
            if signature[name].default is inspect.Parameter.empty:
                required.append(name)
            else:
                parameters[name] = signature[name].default
    shared = {name for cls in base.__mro__ for name in vars(cls).get("__annotations__", {})}
    shared -= {*parameters, *required}
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name, annotation = statement.target.id, ast.unparse(statement.annotation)
            if annotation.startswith(("ClassVar", "typing.ClassVar")) or name in shared:
                if statement.value is not None:
                    stated[name] = _value(statement.value)
            elif init is None and statement.value is None:
                required.append(name)
            elif init is None and statement.value is not None:
                parameters[name] = _value(statement.value)
        elif isinstance(statement, ast.Assign):
            stated |= {t.id: _value(statement.value) for t in statement.targets if isinstance(t, ast.Name)}
    return ExtensionSource(
        node.name,
        base,
        f"{file}:{node.lineno}",
        inspect.cleandoc(ast.get_docstring(node) or ""),
        parameters,
        required,
        stated,
    )


def _of_signature(init: ast.FunctionDef) -> tuple[dict[str, Any], list[str]]:
    plain = [*init.args.posonlyargs, *init.args.args][1:]
    defaults = [None] * (len(plain) - len(init.args.defaults)) + list(init.args.defaults)[-len(plain) or None :]
    pairs = [*zip(plain, defaults), *zip(init.args.kwonlyargs, init.args.kw_defaults)]
    named = [(argument.arg, default) for argument, default in pairs if argument.arg != "name"]
    return {n: _value(d) for n, d in named if d is not None}, [n for n, d in named if d is None]


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return printable(ast.unparse(node))
