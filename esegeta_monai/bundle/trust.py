"""Remember which bundles the user has allowed to run, by the SHA-256 of their contents.

The store is ``trusted.json`` in the folder ``esegeta-monai`` of the user's settings (``$XDG_CONFIG_HOME``, else
``~/.config``). A bundle that was moved stays trusted; one with a changed file does not.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import esegeta_monai
from esegeta_monai.bundle.contents import BundleContents, NnunetContents
from esegeta_monai.errors import UsageError
from esegeta_monai.utils.choices import TRUST_VARIABLE
from esegeta_monai.utils.files import atomic, parse_json, sha256_file

__all__ = ["TRUST_VARIABLE", "TrustStore", "is_shipped", "store_path"]

_CACHED_BYTES = 1 << 20
"""Files of this size and more are hashed once; smaller ones each time."""

logger = logging.getLogger("esegeta_monai")


def store_path() -> Path:
    """Return the path of the store; the file may be missing."""
    base = os.environ.get("XDG_CONFIG_HOME") or ""
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".config"
    return folder / "esegeta-monai" / "trusted.json"


def is_shipped(contents: BundleContents) -> bool:
    """Return True for a bundle in ``bundles`` in this package (wheel) or beside it (checkout), with no file elsewhere.

    Whoever can change files there can change the package itself.
    """
    package = Path(esegeta_monai.__file__).resolve().parent
    ours = (package / "bundles", package.parent / "bundles")
    return contents.root.parent in ours and not isinstance(contents, NnunetContents) and not contents.outside


class TrustStore:
    """The trusted contents, and the hashes of large files by size and times.

    Args:
        path: the file; None: `store_path`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = TrustStore(Path(folder) / "trusted.json")
    ...     before = store.trusts("0" * 64)
    ...     store.add("0" * 64, "spleen")
    ...     before, TrustStore(Path(folder) / "trusted.json").trusts("0" * 64)
    (False, True)
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or store_path()
        content = self._read()
        self._trusted: dict[str, Any] = content.get("trusted") or {}
        self._hashes: dict[str, Any] = content.get("hashes") or {}
        self._changed = False

    def trusts(self, digest: str) -> bool:
        """Return True if the user has trusted contents with this digest."""
        return digest in self._trusted

    def add(self, digest: str, name: str) -> None:
        """Trust contents from now on.

        Args:
            digest: of `BundleContents.digest`.
            name: a note for the reader of the store.

        Raises:
            UsageError: the store cannot be written.
        """
        self._trusted[digest] = {"name": name, "date": time.strftime("%Y-%m-%d")}
        self._changed = True
        self.save()

    def sha256(self, file: Path) -> str:
        """Return the SHA-256 of a file; that of a large one is computed once, as long as its size and times stay.

        Programs can set the time of the last change of the content, but not that of the inode, so both count.
        """
        status = file.stat()
        if status.st_size < _CACHED_BYTES:
            return sha256_file(file)
        state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        known = self._hashes.get(key := os.path.realpath(file))
        if isinstance(known, list) and known[:-1] == state:
            return str(known[-1])
        digest = sha256_file(file)
        self._hashes[key] = [*state, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Write the store if it has changed, with what other processes have added meanwhile.

        Raises:
            UsageError: it cannot be written.
        """
        if not self._changed:
            return
        now = self._read()
        trusted = {**(now.get("trusted") or {}), **self._trusted}
        hashes = {**(now.get("hashes") or {}), **self._hashes}
        hashes = {file: value for file, value in hashes.items() if os.path.exists(file)}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(f"cannot write {self.path}: {error.strerror or error}") from error
        with atomic(self.path) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps({"trusted": trusted, "hashes": hashes}, indent=1), encoding="utf-8")
        self._changed = False

    def _read(self) -> dict[str, Any]:
        try:
            content = parse_json(self.path.read_bytes())
            if not isinstance(content, dict) or not all(isinstance(value, dict) for value in content.values()):
                raise ValueError("it is no store of trusted bundles")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s): no bundle counts as trusted", self.path, error)
            return {}
        return content
