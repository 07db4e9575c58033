"""Import a bundle's own code: every bundle has a package `scripts`, and one process may use several bundles."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    PathFinder,
    SourceFileLoader,
)
from pathlib import Path
from types import ModuleType

from esegeta_monai.errors import UsageError
from esegeta_monai.utils.files import same_folder

__all__ = ["MODULE_SUFFIXES", "BundleImports", "hiding_modules"]

logger = logging.getLogger("esegeta_monai")

MODULE_SUFFIXES = (*SOURCE_SUFFIXES, *EXTENSION_SUFFIXES)
"""Suffixes of the files that can be imported from a bundle; compiled Python (``.pyc``) is not among them."""

_FOLDERS = ("scripts", "configs", "models", "docs", "tests", "data")
"""Folders of MONAI's bundle format and usual additions: no dependency has one of these names."""
_AT_START = ("sitecustomize", "usercustomize")
"""Modules that every new Python process imports."""


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

        If none had to be removed, the bundle's modules stay in `sys.modules`, so that its classes can be pickled. The
        bundle's modules are compiled from their source; files in ``__pycache__`` are neither read nor written. If the
        bundle's code changes the working folder, it is set back.

        Raises:
            UsageError: a file of the bundle hides a module of the standard library or of an installed package.
        """
        if hiding := hiding_modules(self.root):
            name, file = next(iter(hiding.items()))
            raise UsageError(
                f"{file} of the bundle {self.root.name} hides the module {name}, which other code imports: rename it"
            )
        _compile_from_source(self.root)
        tops = set(_top_modules(self.root))
        displaced = {name: module for name, module in self._named(tops).items() if not self._is_own(module)}
        for name in displaced:
            del sys.modules[name]
        sys.modules.update(self._loaded)
        path = list(sys.path)
        sys.path.insert(0, str(self.root))
        try:
            with same_folder() as moved:
                yield
        finally:
            if moved:
                logger.warning("code of the bundle changed the working folder; it is set back")
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
        places = [getattr(module, "__file__", None), *(getattr(module, "__path__", None) or ())]
        return any(place is not None and Path(place).is_relative_to(self.root) for place in places)


def hiding_modules(root: Path) -> dict[str, str]:
    """Return the modules that a bundle hides while its root is first on `sys.path`, with the file or folder that does.

    Hidden are modules of the standard library and of installed packages (also of ones on ``PYTHONPATH``). The folders
    of MONAI's bundle format, such as ``scripts``, are excepted. Nothing is imported.

    Args:
        root: the bundle directory.
    """
    here = {str(root), str(Path.cwd())}
    elsewhere = [entry for entry in sys.path if entry and str(Path(entry).resolve()) not in here]
    return {
        name: file
        for name, file in sorted(_top_modules(root).items())
        if name in _AT_START
        or name in sys.stdlib_module_names
        or (name not in _FOLDERS and _is_installed(name, elsewhere, root))
    }


def _is_installed(name: str, path: Sequence[str], root: Path) -> bool:
    try:
        spec = PathFinder.find_spec(name, path)
    except (ImportError, ValueError):  # a file of that name that is no module
        return False
    if spec is None or spec.origin is None:  # a folder without __init__, which hides nothing
        return False
    return not Path(spec.origin).resolve().is_relative_to(root)  # else the bundle itself is installed


def _top_modules(root: Path) -> dict[str, str]:
    """Return the modules that can be imported from a folder, by name, with the file or folder of each."""
    tops: dict[str, str] = {}
    for entry in sorted(root.iterdir()):
        if entry.is_dir():
            try:
                inside = any(file.name.endswith(MODULE_SUFFIXES) for file in entry.iterdir())
            except OSError:  # without permission to read, Python cannot import from it either
                inside = False
            if inside:
                tops[entry.name] = f"{entry.name}/"
        elif entry.name.endswith(MODULE_SUFFIXES):
            tops[entry.name.split(".")[0]] = entry.name
    return tops


class _SourceLoader(SourceFileLoader):
    """A loader that never uses compiled files, whose content need not be that of the source."""

    def path_stats(self, path: str) -> dict[str, float]:
        """Refuse, so that compiled files are neither read nor written."""
        raise OSError("compiled files of bundles are not used")


_ROOTS: set[str] = set()
"""Bundles from which this process has imported."""


def _compile_from_source(root: Path) -> None:
    """Let all imports from `root`, also later ones of its own code, compile the source."""
    if _hook not in sys.path_hooks:
        sys.path_hooks.insert(0, _hook)
    if str(root) not in _ROOTS:
        _ROOTS.add(str(root))
        for known in [p for p in sys.path_importer_cache if Path(p).is_relative_to(root)]:
            del sys.path_importer_cache[known]


def _hook(path: str) -> FileFinder:
    if not any(Path(path).is_relative_to(root) for root in _ROOTS):
        raise ImportError("not in a bundle", path=path)
    return FileFinder(path, (ExtensionFileLoader, EXTENSION_SUFFIXES), (_SourceLoader, SOURCE_SUFFIXES))
