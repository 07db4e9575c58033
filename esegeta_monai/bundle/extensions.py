"""Register the methods, targets and metrics in a bundle's ``scripts/``."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from esegeta_monai.bundle.imports import BundleImports
from esegeta_monai.errors import UsageError, named_reason
from esegeta_monai.methods.base import METHODS
from esegeta_monai.metrics.base import METRICS
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.registry import Configurable, Registry

__all__ = ["register_extensions"]


def register_extensions(bundle_dir: str | Path) -> list[type[Configurable]]:
    """Register the methods, targets and metrics of a bundle's ``scripts/`` by their names, like built-in ones.

    Only files that mention this package are imported.

    Returns:
        the registered classes.

    Raises:
        UsageError: a file cannot be imported, or a name is taken.
    """
    root = Path(bundle_dir).resolve()
    files = [f for f in sorted((root / "scripts").glob("*.py")) if "esegeta_monai" in f.read_text(encoding="utf-8")]
    registries: tuple[Registry[Any], ...] = (METHODS, TARGETS, METRICS)
    registered: list[type[Configurable]] = []
    if not files:
        return registered
    with BundleImports(root)():
        for file in files:
            name = "scripts" if file.stem == "__init__" else f"scripts.{file.stem}"
            try:
                module = importlib.import_module(name)
            except Exception as error:  # a bundle's own code can raise anything
                raise UsageError(
                    f"scripts/{file.name} of the bundle cannot be imported: {named_reason(error)}"
                ) from error
            for cls in vars(module).values():
                if isinstance(cls, type) and cls.__module__ == name and not inspect.isabstract(cls):
                    for registry in registries:
                        if issubclass(cls, registry.base):
                            registered.append(registry.register(cls, *cls.__dict__.get("aliases", ())))
    return registered
