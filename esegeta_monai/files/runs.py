"""``run.json``: the status of every case, target and method, up to date at any time of a run."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from esegeta_monai.errors import UsageError
from esegeta_monai.utils.distributed import Processes
from esegeta_monai.utils.files import INTENDED_USE, read_json, versions, write_json

__all__ = ["STATUSES", "RunRecord"]

logger = logging.getLogger(__name__)

STATUSES = ("ok", "zero", "incomplete", "empty_target", "failed", "timeout", "skipped")
"""Computed; a map of exact zeros; a map that misses its sum; no predicted voxel; an error; the time limit; finished in
an earlier run."""
UNFINISHED = ("failed", "timeout")

Key = tuple[str, str | None, str | None]


class RunRecord:
    """The record of a run, rewritten atomically after every result.

    Results of earlier runs in the same folder are kept until this run has a result for the same case, target and
    method, so that a run can be interrupted, resumed, or extended by another method. They do not affect `exit_code`.
    The same holds for another run that writes into the folder at the same time.

    Each process of a distributed run has its own record, ``run.json`` and ``run.rank1.json``, …, which `join` merges.
    If such a run is killed, the next run reads them all.

    Args:
        output_dir: the folder of ``run.json``.
        info: further entries (bundle, options, hashes), JSON-ready.
        rank: rank of this process; the first process must create its record before the others begin.
        writes: False keeps everything in memory, for a process whose results another one writes.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, RunRecord(folder, {"seed": 0}) as run:
    ...     run.set("sub-01", "MultiClassMask", "Saliency", "ok", seconds=1.5)
    ...     run.set("sub-02", None, None, "failed", "sub-02.nii.gz: the file is empty")
    ...     run.summary, run.exit_code
    ({'failed': 1, 'ok': 1}, 1)
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        info: Mapping[str, Any] | None = None,
        *,
        rank: int = 0,
        writes: bool = True,
    ) -> None:
        self.path = Path(output_dir) / (f"run.rank{rank}.json" if rank else "run.json")
        self._info, self._rank, self._writes = dict(info or {}), rank, writes
        self._started = _now()
        self._finished: str | None = None
        self._versions = versions()
        others = sorted(self.path.parent.glob("run.rank*.json")) if rank == 0 and writes else []
        self._earlier = {k: e for path in [self.path, *others] for k, e in self._read_earlier(path).items()}
        self._results: dict[Key, dict[str, Any]] = {}
        self._refuted: set[Key] = set()
        self.write()
        for path in others:  # from a run that was killed; now part of run.json
            path.unlink()

    def set(
        self, case: str, target: str | None, method: str | None, status: str, reason: str | None = None, **more: Any
    ) -> None:
        """Record a result and write ``run.json``. A case that failed as a whole has no target and no method.

        Raises:
            UsageError: the status is unknown, or is failed, timeout or empty_target without a reason.
        """
        if status not in STATUSES:
            raise UsageError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
        if status in (*UNFINISHED, "empty_target") and not reason:
            raise UsageError(f"status {status!r} needs a reason")
        entry = {"case": case, "target": target, "method": method, "status": status, **more}
        self._results[case, target, method] = entry if reason is None else {**entry, "reason": reason}
        if method is not None:
            self._refuted.add((case, None, None))  # the case itself did not fail this time
        self.write()

    @property
    def summary(self) -> dict[str, int]:
        """Number of results of this run by status."""
        return dict(sorted(Counter(entry["status"] for entry in self._results.values()).items()))

    @property
    def exit_code(self) -> int:
        """0 if everything succeeded, 1 if some case or method failed; empty targets and maps that are zero or
        incomplete are no failures."""
        return int(any(entry["status"] in UNFINISHED for entry in self._results.values()))

    def join(self, ranks: Processes) -> None:
        """Merge the records of all processes, in memory for each and on disk for the first."""
        for results in ranks.gather(self._results):
            self._results = {**self._results, **results}
        if self._rank == 0:
            self.write()
        ranks.gather(None)  # the first must have written before the others delete theirs
        if self._rank and self._writes:
            self.path.unlink(missing_ok=True)
            self._writes = False

    def write(self) -> None:
        """Write ``run.json`` atomically, and keep results that another run has written in the meantime."""
        if not self._writes:
            return
        self._earlier = {**self._earlier, **self._read_earlier(self.path)}
        earlier = {key: entry for key, entry in self._earlier.items() if key not in self._refuted}
        record = {
            **self._info,
            "intended_use": INTENDED_USE,
            "versions": self._versions,
            "started": self._started,
            "finished": self._finished,
            "summary": self.summary,
            "results": list({**earlier, **self._results}.values()),
        }
        write_json(self.path, record)

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Set ``finished`` unless an exception ended the run."""
        if error is None:
            self._finished = _now()
            self.write()

    @staticmethod
    def _read_earlier(path: Path) -> dict[Key, dict[str, Any]]:
        if not path.exists():
            return {}
        record = read_json(path)
        entries = record.get("results") if record is not None else None
        if not isinstance(entries, list) or not all(isinstance(e, dict) and "case" in e for e in entries):
            aside = path.with_suffix(".json.unreadable")
            os.replace(path, aside)
            logger.warning("%s cannot be read; it was moved to %s and a new one is started", path, aside.name)
            return {}
        return {(e["case"], e.get("target"), e.get("method")): e for e in entries}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
