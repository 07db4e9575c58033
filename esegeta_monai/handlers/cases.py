"""Names of an engine's cases, which are unique and do not depend on the order of the scans."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from monai.data import MetaTensor
from monai.transforms import Compose

from esegeta_monai.files.grids.probe import Pipeline
from esegeta_monai.utils.names import case_name, safe_name

__all__ = ["CaseNames", "files_of", "pipeline_of"]


class CaseNames:
    """The name of each scan: that of its file, with the folders that distinguish it if several files share a name.

    Args:
        files: all scans, if they are known in advance; names then depend neither on the order nor on the process that
            reads a scan.
        root: folders below it are always part of the name (a bundle's ``data_root_dir``).

    >>> names = CaseNames(["/study/a/T1.nii", "/study/b/T1.nii", "/study/b/T2.nii"])
    >>> names["/study/b/T1.nii"], names["/study/b/T2.nii"], names["/elsewhere/c/T2.nii"]
    ('b-T1', 'T2', 'c-T2')
    """

    def __init__(self, files: Iterable[str] = (), root: str | os.PathLike[str] | None = None) -> None:
        self.root = root or None
        self._names: dict[str, str] = {}
        known = list(dict.fromkeys(os.path.abspath(file) for file in files))
        count = Counter(_plain(case_name(file, self.root)) for file in known)
        twins = [file for file in known if count[_plain(case_name(file, self.root))] > 1]
        common = os.path.commonpath([os.path.dirname(file) for file in twins]) if twins else None
        for file in [f for f in known if f not in set(twins)]:
            self._names[file] = case_name(file, self.root)
        for file in twins:
            self._names[file] = self._free(file, [case_name(file, common)])

    def __getitem__(self, file: str | os.PathLike[str]) -> str:
        path = os.path.abspath(file)
        if path not in self._names:
            self._names[path] = self._free(path, [case_name(path, root) for root in (self.root, Path(path).parents[1])])
        return self._names[path]

    def _free(self, path: str, candidates: list[str]) -> str:
        """Return the first candidate that no other scan has; if all are taken, the last one with a hash of the path."""
        taken = {_plain(name) for name in self._names.values()}
        digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:8]
        return next(name for name in [*candidates, f"{candidates[-1]}-{digest}"] if _plain(name) not in taken)


def _plain(name: str) -> str:
    return safe_name(name).casefold()


def files_of(loader: Any, key: str) -> list[str]:
    """Return the scan files of a data loader whose dataset is a list of dictionaries, as MONAI's are; else []."""
    items = getattr(getattr(loader, "dataset", None), "data", None)
    if not isinstance(items, (list, tuple)):
        return []
    values = [item.get(key) for item in items if isinstance(item, Mapping)]
    firsts = [v[0] if isinstance(v, (list, tuple)) and v else v for v in values]
    return [os.fspath(v) for v in firsts if isinstance(v, (str, os.PathLike))]


def pipeline_of(engine: Any, image: MetaTensor, key: str) -> Pipeline | None:
    """Return the preprocessing of an image (C, *spatial) by the transform of the engine's data set; None: unknown."""
    data_set, file = getattr(engine.data_loader, "dataset", None), file_of(image)
    transform, items = getattr(data_set, "transform", None), getattr(data_set, "data", None)
    if file is None or not isinstance(transform, Compose) or not isinstance(items, (list, tuple)):
        return None
    for item in items:
        files = item.get(key) if isinstance(item, Mapping) else None
        first = files[0] if isinstance(files, (list, tuple)) and files else files
        if isinstance(first, (str, os.PathLike)) and os.path.abspath(first) == os.path.abspath(file):
            return Pipeline(transform, item, key)
    return None


def file_of(image: MetaTensor) -> str | None:
    """Return the file that an image was loaded from, or None."""
    file = image.meta.get("filename_or_obj")
    file = file[0] if isinstance(file, (list, tuple)) and file else file
    return os.fspath(file) if isinstance(file, (str, os.PathLike)) and str(file) else None
