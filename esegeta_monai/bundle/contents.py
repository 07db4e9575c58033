"""The contents of a bundle that run when its network is built: found by reading, without evaluating or importing.

A bundle is code by design. Its configs name classes and functions (``_target_``), contain Python expressions (``$…``),
and its ``scripts/`` are imported. Pickled weights can run code when they are loaded without ``weights_only=True``, and
TorchScript is a program as well (its operation ``aten::from_file`` writes files), so both count as code; safetensors
contain numbers only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from esegeta_monai.bundle.configs import (
    bundle_folder,
    check_macros,
    config_entries,
    find_config_files,
    merged_config,
    parse_config,
)
from esegeta_monai.bundle.imports import MODULE_SUFFIXES, hiding_modules
from esegeta_monai.errors import UsageError
from esegeta_monai.utils.files import sha256_file

__all__ = ["BundleContents", "NnunetContents", "Runnable", "printable"]

PICKLES = (
    ".pt",
    ".pth",
    ".ts",
    ".ckpt",
    ".pkl",
    ".pickle",
    ".bin",
    ".npy",
    ".npz",
    ".joblib",
    ".pyc",
    ".zip",
    ".pth.tar",
)
"""Suffixes of files that hold, or may hold, objects or programs."""
MAX_FILES = 200_000
"""Files of a bundle that are looked at."""

_LOADS = re.compile(
    r"\b(torch\.(jit\.)?load|pickle|cPickle|dill|joblib|cloudpickle|torch\.hub|torch\.package|allow_pickle)\b"
)
_SAFE = re.compile(r"weights_only\s*=\s*True")
_IMPORT = re.compile(r"\$\s*(import|from)\b")
_OWN = re.compile(r"\w+|(monai|ignite|torch\.nn)\.([a-z_0-9]+\.)*[A-Z]\w*")
_WORDS = re.compile(r"[\w.\-]{3,}")
# Classes that plans.json may name without a question: layers of torch, and nnU-Net's own networks.
_LAYERS = re.compile(
    r"torch\.nn\.(modules\.\w+\.)?[A-Z]\w*"
    r"|dynamic_network_architectures\.(architectures|building_blocks)\.\w+\.[A-Z]\w*"
)


@dataclass(frozen=True)
class Runnable:
    """Something in a bundle that runs when its network is built.

    Attributes:
        file: the file, relative to the bundle.
        id: the id in the config, or the line of a script; empty for a whole file.
        kind: "component" (``_target_``), "expression" (``$…``), "import", "pickle" (an entry that opens one),
            "script" or "class" (of an nnU-Net plan).
        text: the target, the expression or a description, without control characters, at most `MAX_SHOWN` of them.
        own: True for MONAI's, Ignite's and torch.nn's components, which are no code of the bundle.
    """

    file: str
    id: str
    kind: str
    text: str
    own: bool = False

    def __str__(self) -> str:
        return f"{self.file}{f' {self.id}' if self.id else ''}: {self.kind}: {self.text}"


MAX_SHOWN = 2000
"""Characters of a target or expression that are listed: a shorter text could hide its end."""


def printable(text: object, length: int = 100) -> str:
    r"""Return text in one line, shortened, with control and direction characters escaped.

    A terminal obeys control characters, so a config could hide its own entries.

    >>> printable("a\x1b[2Jb"), printable("x" * 200, 5)
    ('a\\x1b[2Jb', 'xxxxx... (200 characters)')
    """
    raw = str(text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw[: length + 1])
    return shown if len(raw) <= length else f"{shown[:length]}... ({len(raw)} characters)"


class BundleContents:
    """The configs, scripts and weights of a bundle, read as data.

    Args:
        bundle_dir: the bundle root.
        config_files: the configs to use, as for `BundleReader`; an empty list: none, only the scripts.

    Raises:
        UsageError: there is no such bundle or config file, or a config cannot be read.

    Example:
        contents = BundleContents("my_bundle")
        print(*contents.runnables, sep="\\n")
        contents.digest()                      # of all files that decide what runs
    """

    def __init__(self, bundle_dir: str | Path, config_files: Any = None) -> None:
        self.root = bundle_folder(bundle_dir)
        used = find_config_files(self.root, config_files)
        self.configs = list(used)
        if used and (metadata := used[0].parent / "metadata.json").is_file():
            self.configs.append(metadata)
        macros = check_macros(merged_config(used), used)
        self.configs += [file for file in macros if file.resolve() not in {f.resolve() for f in self.configs}]

    @property
    def what(self) -> str:
        """Noun for messages."""
        return "bundle"

    @cached_property
    def runnables(self) -> list[Runnable]:
        """Everything that runs, or may run, when the bundle's network is built: scripts and pickles first."""
        entries = [Runnable(self.shown(file), "", "script", _about(file)) for file in self.scripts]
        for file in self.configs:
            entries += _of_config(self.shown(file), parse_config(file))
        return sorted(entries, key=lambda entry: (entry.own, _ORDER.index(entry.kind)))

    @cached_property
    def hiding(self) -> dict[str, str]:
        """Modules that files of the bundle hide, which is refused; see `hiding_modules`."""
        return hiding_modules(self.root)

    @cached_property
    def scripts(self) -> list[Path]:
        """All files that can be imported while the bundle's root is on `sys.path`."""
        return [file for file in self._all if file.name.endswith(MODULE_SUFFIXES)]

    @cached_property
    def files(self) -> dict[str, Path]:
        """The files that decide what runs, by their shown path.

        They are the used configs, the files that macros read, everything that can be imported, everything in
        ``models/`` and everything with the suffix of a pickle except safetensors, and each other file whose name is a
        word of a config or script.
        """
        chosen = {self.shown(file): file for file in [*self.configs, *self.scripts]}
        words: set[str] = set()
        for file in list(chosen.values()):
            if not file.name.endswith(MODULE_SUFFIXES[1:]):
                words |= set(_WORDS.findall(file.read_text(encoding="utf-8", errors="replace")))
        for file in self._all:
            name = file.name
            if name.endswith(".safetensors") or self.shown(file) in chosen:
                continue
            in_models = file.is_relative_to(self.root / "models")
            if in_models or name.lower().endswith(PICKLES) or name in words:
                chosen[self.shown(file)] = file
        return chosen

    @property
    def outside(self) -> bool:
        """True if a used config, or a file to which a link of the bundle leads, is outside the bundle's folder."""
        return any(not file.resolve().is_relative_to(self.root) for file in self.files.values())

    def digest(self, sha256: Callable[[Path], str] = sha256_file) -> str:
        """Return the SHA-256 of the paths and contents of `files`.

        Args:
            sha256: function that hashes a file, for example with a cache.

        Raises:
            UsageError: a file cannot be read.
        """
        try:
            listed = sorted((name, sha256(file)) for name, file in self.files.items())
        except OSError as error:
            name = Path(str(error.filename)).name
            raise UsageError(f"{name} of the bundle {self.root.name} cannot be read: {error.strerror}") from error
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def shown(self, file: Path) -> str:
        """Return the path of a file relative to the bundle, without control characters."""
        path = file if file.is_absolute() else Path.cwd() / file
        inside = path.is_relative_to(self.root)
        return printable(path.relative_to(self.root).as_posix() if inside else f"(outside) {file}", 200)

    @cached_property
    def _all(self) -> list[Path]:
        return list(_walk(self.root))


class NnunetContents(BundleContents):
    """An nnU-Net model folder, read as data.

    Its checkpoints are read with ``weights_only=True``, and names of trainers, preprocessors and readers are looked up
    in nnU-Net's own package. Only ``plans.json`` names Python objects of any module, in the entries ``architecture`` of
    its configurations: nnU-Net imports the class of the network and the objects in its arguments, and calls them. Where
    all of them are layers of torch or networks of nnU-Net, nothing foreign runs.

    Args:
        folder: the model folder.
        previous: the model folder of the first stage of a cascade; None: the one beside the folder, if the plans name
            a first stage and it is there.

    Raises:
        UsageError: ``plans.json`` is missing or cannot be read.
    """

    def __init__(self, folder: str | Path, previous: str | Path | None = None) -> None:
        self.root = Path(folder).resolve()
        if not self.root.is_dir():
            raise UsageError(f"no nnU-Net folder at {folder}: there is no such folder")
        self.configs = [self.root / "plans.json"]
        if previous is not None:
            stages = [Path(previous).resolve()]
        else:
            entries = config_entries(parse_config(self.configs[0]))
            named = {v for k, v in entries if k.endswith("::previous_stage") and isinstance(v, str) and "/" not in v}
            stages = [self.root.with_name(f"{self.root.name.rpartition('__')[0]}__{name}") for name in sorted(named)]
        self.configs += [stage / "plans.json" for stage in stages if (stage / "plans.json").is_file()]

    @property
    def what(self) -> str:
        """Noun for messages."""
        return "nnU-Net folder"

    @cached_property
    def runnables(self) -> list[Runnable]:
        """Names of Python objects in ``plans.json`` that are neither layers of torch nor networks of nnU-Net."""
        named: list[Runnable] = []
        for file in self.configs:
            for key, value in config_entries(parse_config(file)):
                parts = key.split("::")
                if "_kw_requires_import" in parts or not isinstance(value, str) or _LAYERS.fullmatch(value):
                    continue
                if parts[-1] in _CLASS_KEYS or any(part in _ARGUMENT_KEYS for part in parts[:-1]):
                    named.append(Runnable(self.shown(file), printable(key, 200), "class", printable(value, MAX_SHOWN)))
        return named

    @cached_property
    def hiding(self) -> dict[str, str]:
        """Empty: nothing is imported from a model folder."""
        return {}

    @cached_property
    def scripts(self) -> list[Path]:
        """Empty: nothing is imported from a model folder."""
        return []

    @cached_property
    def files(self) -> dict[str, Path]:
        """``plans.json`` of each stage, which alone decide what runs."""
        return {self.shown(file): file for file in self.configs}


_ORDER = ("script", "pickle", "import", "component", "expression")
_CLASS_KEYS = ("network_class_name", "network_arch_class_name")
_ARGUMENT_KEYS = ("architecture", "network_arch_init_kwargs")


def _of_config(file: str, config: Mapping[str, Any]) -> Iterator[Runnable]:
    for key, value in config_entries(config):
        shown = printable(key, 200)
        if isinstance(value, Mapping) and "_target_" in value:
            target = str(value["_target_"])
            mode = f" (_mode_ {printable(value['_mode_'], 40)})" if "_mode_" in value else ""
            safe = str(value.get("weights_only")).lower() == "true"
            kind = "pickle" if _LOADS.search(target) and not safe else "component"
            own = kind == "component" and _OWN.fullmatch(target) is not None
            yield Runnable(file, shown, kind, printable(target, MAX_SHOWN) + mode, own)
        elif isinstance(value, str) and value.startswith("$"):
            kind = "import" if _IMPORT.match(value) else "expression"
            kind = "pickle" if _LOADS.search(value) and not _SAFE.search(value) else kind
            yield Runnable(file, shown, kind, printable(value, MAX_SHOWN))


def _about(file: Path) -> str:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").count("\n") + 1
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    linked = f", a link to {printable(os.path.realpath(file))}" if os.path.islink(file) else ""
    return f"{lines} lines of Python{linked}" if file.suffix == ".py" else f"compiled code{linked}"


def _walk(root: Path) -> Iterator[Path]:
    """Yield all regular files of a folder, also through links, each folder once."""
    visited: set[str] = set()
    count = 0
    for here, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if name not in (".git", "__pycache__"))
        for name in sorted(names):
            count += 1
            if count > MAX_FILES:
                raise UsageError(
                    f"the bundle {root.name} has more than {MAX_FILES} files, or a link that leads out of it: move "
                    "data sets out of the bundle's folder"
                )
            file = Path(here) / name
            if file.is_file():  # no pipe, no device
                yield file
