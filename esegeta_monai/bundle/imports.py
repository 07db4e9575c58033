"""Import a bundle's own code: every bundle has a package `scripts`, and one process may use several bundles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

__all__ = ["BundleImports"]


class BundleImports:
    """Context in which the Python packages in a bundle's root can be imported.

    Args:
        root: the bundle directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._loaded: dict[str, ModuleType] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Put `root` first on `sys.path`; modules of the same name from elsewhere are removed and restored afterwards.

        If none had to be removed, the bundle's modules stay in `sys.modules`, so that its classes can be pickled.
        """
        tops = {file.relative_to(self.root).parts[0] for file in self.root.glob("*/*.py")}
        tops |= {file.stem for file in self.root.glob("*.py")}
        displaced = {name: module for name, module in self._named(tops).items() if not self._is_own(module)}
        for name in displaced:
            del sys.modules[name]
        sys.modules.update(self._loaded)
        path = list(sys.path)
        sys.path.insert(0, str(self.root))
        try:
            yield
        finally:
            sys.path[:] = path
            self._loaded = {name: module for name, module in self._named(tops).items() if self._is_own(module)}
            if displaced:
                for name in self._loaded:
                    del sys.modules[name]
                sys.modules.update(displaced)

    @staticmethod
    def _named(tops: set[str]) -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in tops}

    def _is_own(self, module: ModuleType) -> bool:
        places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
        return any(place is not None and Path(place).is_relative_to(self.root) for place in places)
