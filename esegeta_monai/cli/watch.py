"""Watch a command that ``--hard-time-limit`` limits, and end it where one result takes too long.

This file is also run as a script, by an interpreter that has imported nothing else (`watched` in `main`), so it uses
the standard library alone and stays small while the command, its child, holds the network.

The child writes a heartbeat: case, and targets and methods that it is computing
(`esegeta_monai.utils.heartbeat.Heartbeat`). If one heartbeat stays for too long, or the child dies by a signal, this
process ends the child's process group, records the result, and starts the same command again, which continues with
the next one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

VARIABLE = "ESEGETA_WATCHED"
"""Environment variable through which the child learns of its heartbeat."""

POLL, GRACE = 0.1, 30.0
"""Seconds between looks at the heartbeat; seconds that the child has to stop after a signal."""

CRASHES = ("SIGKILL", "SIGSEGV", "SIGBUS", "SIGABRT", "SIGFPE", "SIGILL")


def watch(limit: float, command: list[str]) -> int:
    """Run a command until it ends by itself, restarting it after each result that takes too long or kills it.

    Args:
        limit: seconds for one result; methods that share passes have as many seconds each.
        command: program and arguments of the child.

    Returns:
        The exit code of the last child; 1 under ``torchrun`` if a result took too long, which ends the whole job.
    """
    stopped_by: list[int] = []
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda n, _: stopped_by.append(n))
    try:
        with tempfile.TemporaryDirectory(prefix="esegeta-watch-") as folder:
            return _watch(limit, command, Path(folder), stopped_by)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(limit: float, command: list[str], folder: Path, stopped_by: list[int]) -> int:
    run, separate = uuid.uuid4().hex[:12], list[str]()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    while True:
        beat = folder / "heartbeat.json"
        beat.unlink(missing_ok=True)
        state = {"folder": str(folder), "run": run, "separate": separate}
        child = subprocess.Popen(command, env={**os.environ, VARIABLE: json.dumps(state)}, start_new_session=True)
        late = _wait(child, beat, limit, stopped_by)
        code = child.returncode
        heartbeat = _read(beat)
        crashed = code < 0 and signal.Signals(-code).name in CRASHES
        if stopped_by or heartbeat.get("case") is None or not (late or crashed):
            return 128 - code if code < 0 else code
        seconds = limit * heartbeat.get("times", 1)
        if late:
            reason = f"ended after {seconds:g} s by --hard-time-limit {limit:g}"
        else:
            reason = f"the process was ended by {signal.Signals(-code).name} (out of memory, or a crash of a library)"
        several = len(heartbeat["results"]) > 1
        if several and heartbeat["case"] not in separate:
            separate.append(heartbeat["case"])
            then = "its methods and targets run one by one"
        else:
            _record(heartbeat, "timeout" if late else "failed", reason, run, folder)
            then = "the command goes on without it"
        if not alone:
            then = "the whole job ends; the same command resumes it"
        _say(f"{_name(heartbeat)}: {reason}; {then}")
        if not alone:
            return 1


def _wait(child: subprocess.Popen[bytes], beat: Path, limit: float, stopped_by: list[int]) -> bool:
    """Wait until the child ends; return True if it was ended because a heartbeat stayed for too long."""
    seen: Any = None
    since = time.monotonic()
    asked: float | None = None
    while child.poll() is None:
        now = time.monotonic()
        if stopped_by and asked is None:
            asked = now
            _signal(child, stopped_by[0])
        if asked is not None:
            if now - asked > GRACE:
                _signal(child, signal.SIGKILL)
        else:
            heartbeat = _read(beat)
            if heartbeat.get("number") != seen:
                seen, since = heartbeat.get("number"), now
            if heartbeat.get("case") is not None and now - since > limit * heartbeat.get("times", 1):
                _signal(child, signal.SIGKILL)
                child.wait()
                return True
        time.sleep(POLL)
    _signal(child, signal.SIGKILL)  # processes that it has left behind
    return False


def _signal(child: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(child.pid, number)


def _read(beat: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(beat.read_text(encoding="utf-8")))
    except FileNotFoundError:  # before the first case
        return {}


def _record(heartbeat: dict[str, Any], status: str, reason: str, run: str, folder: Path) -> None:
    """Append the result to the run's journal, or to the cases that the next child leaves out."""
    target, method = heartbeat["results"][0] if heartbeat["results"] else (None, None)
    entry = {"case": heartbeat["case"], "target": target, "method": method, "status": status, "reason": reason}
    entry |= {"recorded": datetime.now(timezone.utc).isoformat(timespec="microseconds"), "run": run}
    path = heartbeat.get("journal")
    if path is None:
        path, entry = folder / "cases.jsonl", {"case": entry["case"], "problems": [f"{entry['case']}: {reason}"]}
    line = "\n" + json.dumps(entry, sort_keys=True) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _name(heartbeat: dict[str, Any]) -> str:
    results = [f"{target}, {method}" for target, method in heartbeat["results"]]
    return f"{heartbeat['case']}: {'; '.join(results) or 'before its first result'}"


def _say(text: str) -> None:
    print(f"esegeta-monai: error: {' '.join(text.split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(watch(float(sys.argv[1]), sys.argv[2:]))
