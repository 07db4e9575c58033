"""Temporary files: names that say who writes them, and removal of those that killed runs left behind."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import time
import uuid
from functools import cache
from pathlib import Path

__all__ = ["PREFIX", "remove_leftovers", "temporary_name"]

logger = logging.getLogger(__name__)

PREFIX = ".tmp-"
OF_A_PROCESS = re.compile(rf"{re.escape(PREFIX)}([0-9a-f]{{8}})-(\d+)-[0-9a-f]{{8}}(-|$)")
"""The machine, the number of the process there, and a random part."""

OLD = 24 * 3600.0
"""Seconds after which a file is removed whose writer cannot be asked for: another machine's. No file takes so long."""


def temporary_name(name: str = "") -> str:
    """Return the name of a temporary file of this process for the file ``name``; it keeps the end of ``name``.

    >>> temporary_name("map.nii.gz").startswith(".tmp-"), temporary_name("map.nii.gz").endswith("-map.nii.gz")
    (True, True)
    """
    return f"{PREFIX}{_machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}" + (f"-{name[-48:]}" if name else "")


def remove_leftovers(folder: str | os.PathLike[str]) -> int:
    """Remove the temporary files of killed runs in a folder and in its subfolders, and return their number.

    A file stays while the process that its name states runs. Files of other machines are removed when they are a day
    old. Links to folders are not followed.
    """
    removed = 0
    for place in [Path(folder), *_subfolders(Path(folder))]:
        for path in place.glob(f"{PREFIX}*"):
            try:
                if path.is_file() and not path.is_symlink() and _is_abandoned(path):
                    path.unlink()
                    removed += 1
            except OSError as error:  # its own run has renamed or removed it, or it belongs to another user
                logger.debug("%s stays: %s", path.name, error.strerror)
    if removed:
        logger.info("removed %d temporary file(s) of runs that were killed", removed)
    return removed


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders of cases, and those of scores, which are one level deeper."""
    try:
        own = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return own + [deep for place in own if place.name == ".scores" for deep in _subfolders(place)]


def _is_abandoned(path: Path) -> bool:
    status = path.stat()
    owner = OF_A_PROCESS.match(path.name)
    if owner is None or owner[1] != _machine() or os.name == "nt":  # os.kill ends a process there
        return time.time() - status.st_mtime > OLD
    return not _runs(int(owner[2]), status.st_mtime)


def _runs(process: int, since: float) -> bool:
    """Return True if a process runs, and has not got its number from one that ended before ``since`` (s)."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    started = _started(process)
    return started is None or started <= since + 2


def _started(process: int) -> float | None:
    """Return when a process began, in seconds as `time.time`; None where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        boot = next(
            line for line in Path("/proc/stat").read_text(encoding="utf-8").splitlines() if line.startswith("btime")
        )
        if fields[0] == "Z":  # ended, but its parent has not asked for its exit code
            return float("inf")
        return float(boot.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, IndexError, ValueError):
        return None


@cache
def _machine() -> str:
    """Return eight digits for the machine, and on Linux for the container, in which process numbers are unique."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]
