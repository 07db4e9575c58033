"""Atomic writing of files, strict JSON, checksums, and the versions of the packages in use."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.utils.leftovers import temporary_name

__all__ = [
    "INTENDED_USE",
    "VERSION",
    "atomic",
    "cannot_write",
    "inside",
    "json_line",
    "parse_json",
    "read_json",
    "refuse_link_out",
    "refuse_remote",
    "refuse_special",
    "same_folder",
    "sha256_file",
    "strict_json",
    "versions",
    "writable_folder",
    "write_json",
]

VERSION = "0.2.0"
INTENDED_USE = "Research only, not a medical device; a map is no proof that a prediction is right."
"""Text in every sidecar, every run.json and every picture."""

PACKAGES = ("monai", "torch", "captum", "pytorch-ignite", "nibabel", "numpy", "scipy", "scikit-image", "lime")

REMOTE = re.compile(r"(?!file:)([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
COPY = {"s3": "aws s3 cp", "gs": "gcloud storage cp", "http": "curl -O", "https": "curl -O", "sftp": "sftp"}


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Provide a temporary path beside ``path``; rename it to ``path`` if the block ends without an exception.

    The temporary name starts with ``.tmp-`` and keeps the suffix of ``path``, by which nibabel chooses the format. The
    file is flushed to disk before it is renamed, and its folder afterwards, so that a crash at any time leaves either
    the old or the new file, never a partial one. After an exception it is removed. Missing folders are created.

    Raises:
        UsageError: the file cannot be written there (no permission, no space, a file in place of a folder).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic(Path(folder) / "note.txt") as temporary:
    ...         _ = temporary.write_text("whole")
    ...     [p.name for p in Path(folder).iterdir()]
    ['note.txt']
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise UsageError(cannot_write(path, error)) from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush the buffers of a file or folder to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open folders; NTFS journals the rename
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: OSError) -> str:
    """Return the message of a file that cannot be written: its path, the reason and the remedy."""
    return f"cannot write {path}: {error.strerror or error}; choose another output folder or make room in this one"


@contextmanager
def same_folder() -> Iterator[list[str]]:
    """Set the working folder back after foreign code; relative paths mean the same file before and after.

    Yields:
        A list that has the other folder after the block, if it was changed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as other, same_folder() as moved:
    ...     os.chdir(other)
    >>> len(moved)
    1
    """
    folder, moved = _working_folder(), list[str]()
    try:
        yield moved
    finally:
        now = _working_folder()
        if folder is not None and now != folder:
            os.chdir(folder)
            moved.append(str(now))


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def refuse_remote(path: str | os.PathLike[str], what: str = "") -> None:
    """Check that a path is one of this machine.

    Args:
        path: path as given.
        what: first words of the message.

    Raises:
        UsageError: it is a URL; the message names the way to copy it.

    >>> refuse_remote("scans/a.nii.gz")
    """
    text = os.fspath(path)
    if text.lower().startswith("file:/"):
        raise UsageError(f"{what}{text}: give the plain path, without file:")
    match = REMOTE.match(text)
    if match and not os.path.exists(text):
        tool = COPY.get(match[1].lower())
        how = f"copy it here first ({tool} ...)" if tool else "copy it here first"
        raise UsageError(f"{what}{text}: remote paths are not supported; {how}, or mount it, and give the local path")


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder ``path`` if it is missing, and verify by writing that files can be saved there.

    It is called before any computation, so that hours of computing are not lost to a missing permission.

    Raises:
        UsageError: the folder cannot be written, or is remote; the message names folder and reason.
    """
    refuse_remote(path)
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"cannot write {folder}: it is a file, not a folder; choose another output folder")
    probe = folder / temporary_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"esegeta")
        probe.unlink()
    except OSError as error:
        raise UsageError(cannot_write(folder, error)) from error
    return folder


def strict_json(record: Mapping[str, Any]) -> str:
    """Format ``record`` as standard JSON: sorted keys, indentation of two spaces, a newline at the end.

    JSON has no NaN and no infinity. Such a number becomes ``null``, and the field ``non_finite`` of the outermost
    object records its value by dotted key. NumPy scalars and arrays and torch tensors become numbers and lists, paths
    their last part (folders can contain names of patients), sets sorted lists.

    Raises:
        TypeError: a value has no representation in JSON; the message names its dotted key.

    >>> print(strict_json({"gap": float("nan"), "sums": (1, 2.5)}))
    {
      "gap": null,
      "non_finite": {
        "gap": "NaN"
      },
      "sums": [
        1,
        2.5
      ]
    }
    <BLANKLINE>
    """
    return _json(record, indent=2) + "\n"


def json_line(record: Mapping[str, Any]) -> str:
    """Format ``record`` as `strict_json` does, in one line without its end.

    >>> json_line({"sums": (1, 2.5), "gap": float("inf")})
    '{"gap": null, "non_finite": {"gap": "Infinity"}, "sums": [1, 2.5]}'
    """
    return _json(record, indent=None)


def _json(record: Mapping[str, Any], indent: int | None) -> str:
    non_finite: dict[str, str] = {}
    plain = _plain(record, "", non_finite)
    if non_finite:
        plain["non_finite"] = non_finite
    return json.dumps(plain, indent=indent, sort_keys=True, allow_nan=False, ensure_ascii=False)


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write `strict_json` of ``record`` in UTF-8, atomically, and return the path.

    Raises:
        UsageError: the file cannot be written.
        TypeError: a value has no representation in JSON.
    """
    # A file name that is no valid Unicode reaches Python as a lone surrogate; backslashreplace makes it JSON's \\uXXXX.
    content = strict_json(record).encode("utf-8", "backslashreplace")
    with atomic(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def _plain(value: Any, key: str, non_finite: dict[str, str]) -> Any:
    if hasattr(value, "detach"):  # a torch tensor, without importing torch
        value = value.detach().tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        non_finite[key] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return None
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{key}.{k}" if key else str(k), non_finite) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=str)
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{key}.{i}", non_finite) for i, v in enumerate(value)]
    if isinstance(value, PurePath):
        return value.name
    raise TypeError(f"record entry {key!r} is a {type(value).__name__}, which has no representation in JSON")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Read the object in a JSON file; None if it is missing, no regular file, truncated, or contains no object."""
    path = Path(path)
    try:
        content = parse_json(path.read_bytes()) if path.is_file() else None  # to open a pipe would wait for its writer
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from outside.

    Raises:
        ValueError: it is no JSON in UTF-8, or its lists and objects are nested too deeply to be one of ours.

    >>> parse_json("[1, 2]")
    [1, 2]
    """
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def refuse_special(path: str | os.PathLike[str]) -> None:
    """Check that a file to be written in place is a regular file or does not exist yet.

    To open a pipe would wait for its reader, and a link would lead the text to a file elsewhere.

    Raises:
        OSError: it is a link, a pipe, a device or a folder.
    """
    path = Path(path)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link to another file (remove it)")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device (remove it)")


def inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Return True if ``path``, after all links are resolved, is in ``folder``.

    >>> inside("out/a/map.nii.gz", "out"), inside("out/../b/map.nii.gz", "out")
    (True, False)
    """
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def refuse_link_out(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Check that a path in an output folder leads to no other folder, where files would be written or replaced.

    Raises:
        UsageError: a link leads out of the folder.
    """
    if not inside(path, folder):
        raise UsageError(f"{path} is a link to another folder: remove it, or choose another output folder")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits, reading it in blocks of 1 MiB.

    Raises:
        InputError: the file cannot be read.
    """
    digest = hashlib.sha256()
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"cannot read {path}: it is no regular file (a folder, a pipe or a device)")
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect a map and of Python, and the kind of machine without its name.

    >>> sorted(versions())[:3]
    ['captum', 'esegeta_monai', 'lime']
    """
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Read the versions once: every record contains them, and reading the packages' metadata takes 80 ms."""
    import torch

    installed = {"esegeta_monai": VERSION}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = "not installed"
    installed["torch"] = str(torch.__version__)  # with its build (+cpu, +cu130), which the package metadata may lack
    installed["python"] = platform.python_version()
    installed["platform"] = f"{platform.system()} {platform.machine()}"
    return installed
