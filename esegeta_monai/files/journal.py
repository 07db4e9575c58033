"""``run.jsonl``: the journal of a run, one line per result, to which several processes append.

A line is written by one call of the operating system at the end of the file (``O_APPEND``), so that lines of several
processes on one machine do not mix, and the time per result does not grow with their number. Machines that share a
folder need a journal each (`esegeta_monai.files.runs.RunRecord`): network file systems do not append atomically.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from esegeta_monai.errors import OutputLost, UsageError
from esegeta_monai.utils.files import cannot_write, inside, json_line, parse_json, read_json, refuse_special

__all__ = ["JOURNALS", "Journal", "RunContents", "merged", "read_run"]

SYNC_EVERY = 1.0
"""Seconds between flushes to the disk. A killed process loses no line; a power failure loses those of one second, whose
maps are on disk and are found by their sidecars."""

JOURNALS = "run*.jsonl"
"""Pattern of the names of the journals in an output folder."""

OF_LINE = ("recorded", "run")
"""Entries of a line that say when and by which run it was written."""


class Journal:
    """A file to which one line per entry is appended.

    Args:
        path: the file; it and its folder are created if missing.

    Raises:
        UsageError: the file cannot be written, or is a link, a pipe or a device.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced, self._size, self._lost, self._begun = 0.0, 0, False, False
        self._torn = True  # the last line of a run that was killed may lack its end
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            refuse_special(path)
            with open(path, "ab") as file:
                self._identity = _identity(os.fstat(file.fileno()))
        except OSError as error:
            raise UsageError(cannot_write(path, error)) from error

    def append(self, entry: Mapping[str, Any], *, flush: bool = False) -> dict[str, Any]:
        """Append an entry with the time, and return it as it will be read.

        Args:
            entry: JSON-ready; with ``recorded`` if it was recorded before.
            flush: flush the line to the disk now, not within a second.

        Raises:
            OutputLost: after the run had begun, the file or its folder was removed or replaced, or no further line can
                be written (a full disk).
            UsageError: the first line cannot be written.
            TypeError: a value has no representation in JSON.
        """
        line = json_line({"recorded": datetime.now(timezone.utc).isoformat(timespec="microseconds"), **entry})
        data = (b"\n" if self._torn else b"") + line.encode("utf-8", "backslashreplace") + b"\n"
        self.check()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                self._torn = True
                written = os.write(descriptor, data)
                if written < len(data):
                    raise OSError(f"only {written} of {len(data)} bytes were written; the disk may be full")
                self._torn, self._begun, self._size = False, True, os.lseek(descriptor, 0, os.SEEK_CUR)
                now = time.monotonic()
                if flush or now - self._synced >= SYNC_EVERY:
                    os.fsync(descriptor)
                    self._synced = now
            finally:
                os.close(descriptor)
        except OSError as error:
            text = cannot_write(self.path, error)
            if self._begun:
                raise OutputLost(f"{text}; finished maps are kept, and the same command resumes the run") from error
            raise UsageError(text) from error
        return json.loads(line)

    def check(self) -> None:
        """Check that the file is still the one of the run's beginning; a new file may get the number of the old one,
        so it must also have at least the old size.

        Raises:
            OutputLost: it, or its folder, was removed or replaced.
        """
        try:
            status = os.stat(self.path)
            present = _identity(status) == self._identity and status.st_size >= self._size
        except OSError:
            present = False
        self._lost = self._lost or not present
        if self._lost:
            raise OutputLost(
                f"{self.path} was removed or replaced during the run, and with it perhaps finished maps: leave the "
                "output folder alone during a run, and run the same command again"
            )


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


@dataclass
class RunContents:
    """Contents of the record and the journals of an output folder.

    Attributes:
        info: entries of the run as a whole (bundle, hashes, versions, ``started``, ``finished``).
        results: one entry per case, target and method, the latest, in the order in which they were asked for.
        lines: results in the journals, with ``recorded`` and ``run``, in the order of their time.
        notes: what cannot be read, one sentence each.
        damaged: True if ``run.json`` is there and cannot be read.
        unfinished: paths of journals whose last run has not ended by itself.
    """

    info: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    damaged: bool = False
    unfinished: list[str] = field(default_factory=list)


def read_run(folder: str | os.PathLike[str]) -> RunContents:
    """Read ``run.json`` and the journals ``run*.jsonl`` of a folder; each alone is enough.

    Lines that are torn or no JSON are left out and noted, and so are files that are links to other folders.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Journal(Path(folder) / "run.jsonl").append({"case": "a", "target": "t", "method": "M", "status": "ok"})
    ...     read_run(folder).results
    [{'case': 'a', 'method': 'M', 'status': 'ok', 'target': 't'}]
    """
    folder, contents = Path(folder), RunContents()
    summary = folder / "run.json"
    if summary.exists() and not inside(summary, folder):
        contents.notes.append("run.json is a link to another folder and is not read.")
    elif summary.exists():
        record = read_json(summary)
        results = None if record is None else record.get("results", [])
        if record is None or not isinstance(results, list):
            contents.damaged = True
            contents.notes.append("run.json cannot be read.")
        if record is not None:
            contents.info = {k: v for k, v in record.items() if k != "results"}
        contents.results = results if isinstance(results, list) else []
    headers: list[dict[str, Any]] = []
    for path in sorted(folder.glob(JOURNALS)):
        if not inside(path, folder):
            contents.notes.append(f"{path.name} is a link to another folder and is not read.")
            continue
        if not path.is_file():
            contents.notes.append(f"{path.name} is no regular file (a pipe or a device) and is not read.")
            continue
        bad, finished = 0, True
        try:
            lines = path.read_bytes().split(b"\n")
        except OSError as error:
            contents.notes.append(f"{path.name} cannot be read ({error.strerror or error}).")
            continue
        order = _Order()
        for line in filter(None, lines):
            try:
                entry = parse_json(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                bad += 1
            elif "case" in entry:
                contents.lines.append(order.line(entry))
            else:
                headers.append(order.header(entry))
                finished = entry.get("finished") is not None
        if not finished:
            contents.unfinished.append(str(path))
        if bad:
            contents.notes.append(f"{path.name}: {bad} lines are damaged and are left out.")
    headers.sort(key=_recorded)
    contents.lines.sort(key=_recorded)  # stable: lines of one time stay in the order of their file
    contents.results = _as_asked([*contents.results, *contents.lines])
    if headers:
        last = {k: v for k, v in headers[-1].items() if k not in OF_LINE}
        if last.get("started") != contents.info.get("started"):
            contents.info.pop("summary", None)  # of another run
        contents.info.update(last)
    return contents


class _Order:
    """Sets ``recorded`` of the lines of one journal so that a run comes after everything that stood before its header.

    The clock may be set back between two runs, or during one: then the file's order is right, and the time is not.
    Lines of runs without a header in this file (``merge-runs`` brought them) keep their time.
    """

    def __init__(self) -> None:
        self._latest = ""
        self._earliest: dict[str, str] = {}
        """By run: the time before which no further line of it can be."""

    def header(self, entry: dict[str, Any]) -> dict[str, Any]:
        run = str(entry.get("run", ""))
        self._earliest[run] = max(self._earliest.get(run, ""), self._latest)
        return self.line(entry)

    def line(self, entry: dict[str, Any]) -> dict[str, Any]:
        run, time = str(entry.get("run", "")), _recorded(entry)
        if run in self._earliest:
            time = self._earliest[run] = max(time, self._earliest[run])
        self._latest = max(self._latest, time)
        return {**entry, "recorded": time}


def _recorded(entry: Mapping[str, Any]) -> str:
    return str(entry.get("recorded", ""))


def _as_asked(entries: list[Any]) -> list[Any]:
    """Return the last entry for each case, target and method in the order of the commands.

    A case has the place of the first command that names it. Its results follow the last command that asked for them.
    Entries without an order, which older versions wrote, come first.
    """
    first: dict[str, list[Any]] = {}
    for entry in entries:
        if (place := _place(entry, "case")) is not None:
            case = str(entry["case"])
            first[case] = min(first.get(case, place), place)

    def key(entry: Any) -> tuple[list[Any], list[Any]]:
        case = str(entry.get("case")) if isinstance(entry, dict) else ""
        return first.get(case, []), _place(entry, "result") or []

    return sorted(merged(entries), key=key)


def _place(entry: Any, of: str) -> list[Any] | None:
    """Return the place of an entry's case or result: the time of its command, then numbers; None: it has none."""
    order = entry.get("order") if isinstance(entry, dict) else None
    place = order.get(of) if isinstance(order, dict) and "case" in entry else None
    if not isinstance(place, list) or not place or not isinstance(place[0], str):
        return None
    return place if all(isinstance(number, int) for number in place[1:]) else None


def merged(*several: Iterable[Any]) -> list[Any]:
    """Return the last entry for each case, target and method, in the order of their first one.

    The failure of a whole case counts only until one of its methods has a result. Entries that name no case in text
    stay as they are.

    >>> a = {"case": "a", "target": None, "method": None, "status": "failed"}
    >>> merged([a, {"case": "b"}], [{"case": "a", "target": "t", "method": "M", "status": "ok"}, {"case": "b", "n": 1}])
    [{'case': 'b', 'n': 1}, {'case': 'a', 'target': 't', 'method': 'M', 'status': 'ok'}]
    """
    last: dict[Any, Any] = {}
    for entries in several:
        for entry in entries:
            names = [entry.get(k) for k in ("case", "target", "method")] if isinstance(entry, dict) else [0]
            if not all(name is None or isinstance(name, str) for name in names):
                last[object()] = entry
                continue
            if names[2] is not None:
                last.pop((names[0], None, None), None)
            last[tuple(names)] = {k: v for k, v in entry.items() if k not in OF_LINE}
    return list(last.values())
