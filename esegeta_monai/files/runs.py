"""``run.json`` and its journal: the status of every case, target and method of a run."""

from __future__ import annotations

import logging
import os
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from esegeta_monai.errors import OutputLost, UsageError
from esegeta_monai.files.journal import Journal, merged, read_run
from esegeta_monai.utils.distributed import Processes
from esegeta_monai.utils.files import INTENDED_USE, versions, write_json

__all__ = ["STATUSES", "RunRecord", "now"]

logger = logging.getLogger(__name__)

STATUSES = ("ok", "zero", "incomplete", "empty_target", "failed", "timeout", "skipped")
"""Computed; a map of exact zeros; a map that misses its sum; no predicted voxel; an error; the time limit; finished in
an earlier run."""
UNFINISHED = ("failed", "timeout")
ATTEMPTS = 20
"""How often ``run.json`` is written again because other runs in the folder have added results meanwhile."""

Key = tuple[str, str | None, str | None]


class RunRecord:
    """The record of a run: a journal with one line per result, and ``run.json``, its summary at the end.

    The journal ``run.jsonl`` (`esegeta_monai.files.journal`) is complete at any time. ``run.json`` is written when the
    run ends or is stopped, from all journals in the folder. Results of earlier runs, and of runs that write into the
    folder at the same time, are kept until this run has a result for the same case, target and method. They do not
    affect `exit_code`.

    Each part of a run that several machines share has its own journal ``run.part0.jsonl``, …. So does each further
    process of a distributed run (``run.rank1-….jsonl``), until `join` adds its results to the first process's journal;
    if such a run is killed, these files stay and are read.

    Args:
        output_dir: the folder of ``run.json``.
        info: further entries (bundle, options, hashes), JSON-ready.
        rank: rank of this process.
        part: number of this part of the run; None: the run is not divided.
        run: identifier of a command that was restarted: its results so far are results of this run, see `is_known`;
            None: a new one.
        writes: False keeps everything in memory, for a process whose results another one writes.
        started: time at which the command began, if several processes share it; None: now.

    Raises:
        UsageError: the journal cannot be written.

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
        part: int | None = None,
        run: str | None = None,
        writes: bool = True,
        started: str | None = None,
    ) -> None:
        self.path = Path(output_dir) / "run.json"
        self._info, self._rank = dict(info or {}), rank
        self._started = self._asked = started or now()
        self._part = part
        self._finished: str | None = None
        self._versions = versions()
        self._results: dict[Key, dict[str, Any]] = {}
        self._known: set[Key] = set()
        self._unwritten = False
        self._run = run or uuid.uuid4().hex[:12]
        self.journal: Journal | None = None
        if not writes:
            return
        name = "run" if part is None else f"run.part{part}"
        name += f".rank{rank}-{uuid.uuid4().hex[:8]}" if rank else ""
        self.journal = Journal(self.path.with_name(f"{name}.jsonl"))
        if run is not None:
            lines = [line for line in read_run(output_dir).lines if line.get("run") == run]
            self._results = {_key(entry): entry for entry in merged(lines)}
            self._known = set(self._results)
            orders = [entry["order"]["result"][0] for entry in self._results.values() if entry.get("order")]
            self._asked = min([self._asked, *orders])  # the command, not this process, asked
        self.journal.append({**self._about, "run": self._run}, flush=True)

    def set(
        self,
        case: str,
        target: str | None,
        method: str | None,
        status: str,
        reason: str | None = None,
        *,
        order: Sequence[int] | None = None,
        **more: Any,
    ) -> None:
        """Record a result and append it to the journal. A case that failed as a whole has no target and no method.

        Args:
            case, target, method: names.
            status: one of `STATUSES`.
            reason: cause of a failure.
            order: the number of the case, then those that order its results, as the command asked for them; None: the
                result is read before those that have an order.
            more: further entries, JSON-ready.

        Raises:
            UsageError: the status is unknown, or is failed, timeout or empty_target without a reason.
            OutputLost: the output folder was removed during the run, or the journal cannot be written.
        """
        if status not in STATUSES:
            raise UsageError(f"status must be one of {', '.join(STATUSES)}, got {status!r}")
        if status in (*UNFINISHED, "empty_target") and not reason:
            raise UsageError(f"status {status!r} needs a reason")
        entry = {"case": case, "target": target, "method": method, "status": status, **more}
        if reason is not None:
            entry["reason"] = reason
        if order is not None:
            entry["order"] = self._order(order)
        if self.journal is not None:
            entry = self.journal.append({**entry, "run": self._run})
        self._results[case, target, method] = entry

    def _order(self, numbers: Sequence[int]) -> dict[str, list[Any]]:
        """Return the places of a case and of its result, see `esegeta_monai.files.journal.read_run`.

        Parts of a run begin at different times, so that their number stands for the time.
        """
        begun: list[Any] = [self._asked, 0] if self._part is None else ["", self._part]
        return {"case": [*begun, numbers[0]], "result": [self._asked, *numbers[1:]]}

    def add_order(self, case: str, target: str | None, method: str | None, order: Sequence[int]) -> None:
        """Record the order of a result that was recorded without: one that the watching process has ended."""
        entry = self._results[case, target, method]
        if entry.get("order") is None:
            entry = {**entry, "order": self._order(order)}
            self._results[case, target, method] = (
                entry
                if self.journal is None
                else self.journal.append({k: v for k, v in entry.items() if k != "recorded"} | {"run": self._run})
            )

    def is_known(self, case: str, target: str | None, method: str | None) -> bool:
        """Return True if this command, before it was restarted, already had this result, whatever its status."""
        return (case, target, method) in self._known

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results of this run in their order, JSON-ready."""
        return [dict(entry) for entry in self._results.values()]

    @property
    def summary(self) -> dict[str, int]:
        """Number of results of this run by status."""
        return dict(sorted(Counter(entry["status"] for entry in self._results.values()).items()))

    @property
    def exit_code(self) -> int:
        """0 if everything succeeded, 1 if some case or method failed or the summary cannot be written; empty targets
        and maps that are zero or incomplete are no failures."""
        return int(self._unwritten or any(entry["status"] in UNFINISHED for entry in self._results.values()))

    def join(self, ranks: Processes) -> None:
        """Merge the records of all processes, in memory for each and on disk for the first."""
        if ranks.size == 1:
            return
        for rank, results in enumerate(ranks.gather(self._results)):
            if self.journal is not None and not self._rank and rank:
                for entry in results.values():
                    self.journal.append(entry)
            self._results = {**self._results, **results}
        ranks.gather(None)  # the first must have written before the others delete theirs
        if self._rank and self.journal is not None:
            self.journal.path.unlink(missing_ok=True)
            self.journal = None

    def write(self) -> None:
        """Write ``run.json`` atomically, from all journals in the folder.

        If only this file cannot be written, the run is not lost: an error is logged, and `exit_code` is 1.

        Raises:
            OutputLost: the output folder was removed during the run.
        """
        if self.journal is None or self._rank:
            return
        self.journal.check()
        try:
            for _ in range(ATTEMPTS):
                before = read_run(self.path.parent)
                if before.damaged:
                    aside = self.path.with_suffix(".json.unreadable")
                    logger.warning("%s cannot be read; it is moved to %s and written anew", self.path, aside.name)
                    os.replace(self.path, aside)
                write_json(self.path, {**self._about, "summary": self.summary, "results": before.results})
                if len(read_run(self.path.parent).lines) == len(before.lines):
                    break  # otherwise another run has ended meanwhile, and this file may have replaced its own
            self._unwritten = False
        except (OSError, UsageError) as error:
            self._unwritten = True
            logger.error("run.json is not up to date, but %s has all results: %s", self.journal.path.name, error)

    @property
    def _about(self) -> dict[str, Any]:
        return {
            **self._info,
            "intended_use": INTENDED_USE,
            "versions": self._versions,
            "started": self._started,
            "finished": self._finished,
        }

    def _check_maps(self) -> None:
        """Turn results whose map was removed during the run into failures."""
        for (case, target, method), entry in list(self._results.items()):
            if entry.get("map") and not (self.path.parent / entry["map"]).is_file():
                reason = f"its map {Path(entry['map']).name} was removed during the run: run the same command again"
                self.set(case, target, method, "failed", reason)
                logger.error("%s: %s", case, reason)

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write ``run.json``; set ``finished`` unless an exception ended the run."""
        if error is not None:
            try:
                self.write()
            except OutputLost as lost:  # the exception that ended the run matters more
                logger.error("%s", lost)
            return
        if self.journal is not None and not self._rank:
            self._check_maps()
        self._finished = now()
        if self.journal is not None and not self._rank:
            self.journal.append({**self._about, "run": self._run}, flush=True)
        self.write()


def _key(entry: Mapping[str, Any]) -> Key:
    return entry["case"], entry.get("target"), entry.get("method")


def now() -> str:
    """Return the time in UTC, ISO 8601, to the microsecond."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")
