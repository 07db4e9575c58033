"""Limits of the system: sizes and numbers of files, standard streams, the working folder; memory is in group 6."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from esegeta_monai.bundle.trust import TRUST_VARIABLE
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


def _close(*numbers: int) -> None:
    for number in numbers:
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)  # as Python finds them


def _full(number: int) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def _closed(folder: Path) -> None:
    """``<&- >&- 2>&-``, as some daemons start programs: files must not get the numbers of the streams."""
    study(folder)
    done = command(*explain(folder, folder / "out"), before=lambda: _close(0, 1, 2))
    assert done.code == 0
    assert len(statuses(folder / "out")) == 12
    assert "failed" not in statuses(folder / "out").values()


def _no_input(folder: Path) -> str:
    """Without standard input nobody can be asked whether the bundle is trusted."""

    def before() -> None:
        _close(0)
        os.environ.pop(TRUST_VARIABLE)

    study(folder)
    done = command(*explain(folder, folder / "out"), before=before, env={"XDG_CONFIG_HOME": str(folder)})
    assert done.code == 3, (done.code, done.err)
    assert "is not trusted" in done.errors[0]
    return done.errors[0][-100:]


def _full_output(folder: Path) -> str:
    """``> file`` on a full disk."""
    study(folder)
    done = command("info", "--bundle", folder / "bundle", before=lambda: _full(1))
    assert done.code == 1, (done.code, done.err)
    assert done.errors == ["esegeta-monai: error: the standard output cannot be written: No space left on device"]
    return done.errors[0]


def _full_errors(folder: Path) -> None:
    """``2> file`` on a full disk: the log file has all lines, and nothing is lost."""
    study(folder)
    done = command(*explain(folder, folder / "out"), before=lambda: _full(2))
    assert done.code == 0, done.code
    assert len(statuses(folder / "out")) == 12
    assert "case 2 of 2" in (folder / "out" / "esegeta.log").read_text(encoding="utf-8")


def _no_folder(folder: Path) -> str:
    study(folder)
    (folder / "gone").mkdir()

    def before() -> None:
        os.chdir(folder / "gone")
        (folder / "gone").rmdir()

    done = command(*explain(folder, folder / "out"), before=before)
    assert done.code == 2, (done.code, done.err)
    assert "the working folder was removed" in done.errors[0]
    return done.errors[0]


ROWS = [
    Row(GROUP, "all standard streams are closed", _closed),
    Row(GROUP, "standard input is closed, and the bundle is not trusted", _no_input),
    Row(GROUP, "standard output on a full disk", _full_output),
    Row(GROUP, "standard error on a full disk", _full_errors, slow=True),
    Row(GROUP, "working folder was removed", _no_folder),
    *(Row(GROUP, f"ulimit -f: {size} KiB", sizes(size), slow=size != 10) for size in (1, 10, 100)),
    *(Row(GROUP, f"ulimit -n: {more} more than at the start", handles(more), slow=more != 4) for more in (1, 4, 8)),
]
