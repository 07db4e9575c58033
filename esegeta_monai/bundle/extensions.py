"""Methods and targets that a bundle brings along in its ``scripts/``."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from esegeta_monai.bundle.imports import BundleImports
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import METHODS, Method
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.utils.registry import Configurable

__all__ = ["register_extensions"]


def register_extensions(bundle_dir: str | Path) -> list[type[Configurable]]:
    """Makes the methods and targets of a bundle's ``scripts/`` known by their names, like our own.

    Only files that mention this package are imported; a bundle without any is left alone.

    Returns:
        the classes found.

    Raises:
        UsageError: a file that cannot be imported, or a name that is taken.
    """
    root = Path(bundle_dir).resolve()
    files = [f for f in sorted((root / "scripts").glob("*.py")) if "esegeta_monai" in f.read_text(encoding="utf-8")]
    found: list[type[Configurable]] = []
    if not files:
        return found
    with BundleImports(root)():
        for file in files:
            name = "scripts" if file.stem == "__init__" else f"scripts.{file.stem}"
            try:
                module = importlib.import_module(name)
            except Exception as error:  # a bundle's own code: anything can come, and is named
                raise UsageError(
                    f"scripts/{file.name} of the bundle cannot be imported: {type(error).__name__}: {error}"
                ) from error
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == name and not inspect.isabstract(cls):
                    if issubclass(cls, Method):
                        found.append(METHODS.register(cls, *cls.__dict__.get("aliases", ())))
                    elif issubclass(cls, Target):
                        found.append(TARGETS.register(cls))
    return found
