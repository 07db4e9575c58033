"""Limits of the system: the size of files (``ulimit -f``) and their number (``ulimit -n``); memory is in group 6."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Callable
from pathlib import Path

from tests.faults.group_4_kills import digests, explain, study
from tests.faults.runner import Done, Row, command, statuses, unfinished

GROUP = "10 limits of the system"


def _answered(done: Done, output: Path) -> None:
    """Done, or every failure is named in one line; nothing partial is left."""
    assert done.code in (0, 1, 2), (done.code, done.err[-800:])
    assert not done.traceback, done.err[-800:]
    assert bool(done.code) == bool(done.errors), done.err[-800:]
    assert not output.exists() or not unfinished(output), unfinished(output)


def _again(folder: Path) -> None:
    """Without the limit the same command ends the work."""
    assert command(*explain(folder, folder / "whole")).code == 0
    done = command(*explain(folder, folder / "out"))
    assert done.code == 0, done.err
    assert digests(folder / "out") == digests(folder / "whole")


def sizes(kilobytes: int) -> Callable[[Path], str]:
    """``ulimit -f``: the largest size of a file, in kilobytes."""

    def check(folder: Path) -> str:
        study(folder)
        size = kilobytes << 10
        done = command(
            *explain(folder, folder / "out"), before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        )
        _answered(done, folder / "out")
        assert done.code in ((1, 2) if kilobytes == 1 else (1,)), done.err  # the first line of the record may not fit
        why = re.compile("cannot write .*(File too large|bytes were written; the disk may be full)")
        assert all(why.search(line) for line in done.errors), done.errors
        failed = [status for status in statuses(folder / "out").values() if status == "failed"]
        _again(folder)
        return f"exit code {done.code}, {len(failed)} failed; {done.errors[0].replace(str(folder), '')[:120]}"

    return check


def handles(more: int) -> Callable[[Path], str]:
    """``ulimit -n``: how many files may be open beyond those at the start."""

    def limit() -> None:
        most = max(int(name) for name in os.listdir("/proc/self/fd")) + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    def check(folder: Path) -> str:
        study(folder)
        done = command(*explain(folder, folder / "out"), before=limit)
        _answered(done, folder / "out")
        assert not done.code or any("Too many open files" in line for line in done.errors), done.errors
        _again(folder)
        return "done" if not done.code else f"exit code {done.code}; {done.errors[0].replace(str(folder), '')[:120]}"

    return check


ROWS = [
    *(Row(GROUP, f"ulimit -f: {size} KiB", sizes(size), slow=size != 10) for size in (1, 10, 100)),
    *(Row(GROUP, f"ulimit -n: {more} more than at the start", handles(more), slow=more != 4) for more in (1, 4, 8)),
]
