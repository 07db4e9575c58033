"""Rows of the fault suite, and commands in forked children of an interpreter that has imported and warmed everything.

A row costs what its command costs, without the seconds of imports. The child has its own process group, its own output
files and `/dev/null` as input, so that it behaves like a command of its own.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import gzip
import importlib
import io
import itertools
import json
import os
import pkgutil
import resource
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from esegeta_monai.bundle.trust import TRUST_VARIABLE
from tests.support.cli import make_bundle, make_scan

TARGET = "MultiClassMask(1)"
os.environ[TRUST_VARIABLE] = "1"  # as in tests/conftest.py; a row on trust removes it by `before`


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        group: number and title of its group, such as "1 malformed NIfTI".
        name: what happens, unique in the group.
        check: makes the fault in an empty folder and asserts what must follow; the text it returns (or None) is what
            was measured, for the table.
        slow: pytest runs it only with the slow tests.
        long: only ``make faults`` runs it, for the tests have few minutes.
        why: the reason, where the fault has a lawful reading or another answer would also be right.
    """

    group: str
    name: str
    check: Callable[[Path], str | None]
    slow: bool = False
    why: str = ""
    long: bool = False


def all_rows() -> list[Row]:
    """The rows of all groups, in order."""
    import tests.faults as package

    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name.startswith("group_"))
    rows = [row for name in names for row in importlib.import_module(f"tests.faults.{name}").ROWS]
    return sorted(rows, key=lambda row: int(row.group.split()[0]))


@dataclass
class Done:
    """A finished command: exit code (a negative signal number, or "timeout"), output, cost.

    Attributes:
        seconds: time until its end, less `waited`.
        waited: seconds in which it could have run, but other processes had the processors.
    """

    code: int | str
    out: str
    err: str
    seconds: float
    waited: float
    cpu_seconds: float
    memory: int
    """Bytes of peak resident memory beyond that at the start."""

    @property
    def errors(self) -> list[str]:
        """Lines that report errors, without the time."""
        lines = self.err.splitlines()
        return [line[20:] for line in lines if " ERROR" in line] + [
            line for line in lines if line.startswith("esegeta-monai: error:")
        ]

    @property
    def warnings(self) -> list[str]:
        """Lines of warnings, without the time."""
        return [line[20:] for line in self.err.splitlines() if " WARNING" in line]

    @property
    def traceback(self) -> bool:
        return "Traceback" in self.err or "Traceback" in self.out


@dataclass
class Running:
    """A command in a forked child, which leads a process group of its own."""

    pid: int
    base: Path
    began: float = field(default_factory=time.monotonic)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the command's process group."""
        os.killpg(self.pid, number)

    def waited(self) -> float:
        """Seconds in which the command could have run, but other processes had the processors; 0 once it has ended.

        A busy machine is no fault of the command, so limits of time do not count them.
        """
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text(encoding="utf-8").split()[1]) / 1e9
        except (OSError, IndexError):  # it has ended, or the kernel does not count
            return 0.0

    def seconds(self) -> float:
        """Seconds since the begin, less those in which other processes had the processors."""
        return time.monotonic() - self.began - self.waited()

    def wait(self, timeout: float = 120) -> Done:
        """Wait for the end; kill the group after ``timeout`` seconds of `seconds`."""
        code: int | str
        waited = 0.0
        while True:
            waited = max(waited, self.waited())
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() - self.began - waited > timeout:
                self.kill()
                _, _, usage = os.wait4(self.pid, 0)
                code = "timeout"
                break
            time.sleep(0.005)
        out, err, at_start = (_text(Path(f"{self.base}.{kind}")) for kind in ("out", "err", "rss"))
        return Done(
            code,
            out,
            err,
            time.monotonic() - self.began - waited,
            waited,
            usage.ru_utime + usage.ru_stime,
            max(0, usage.ru_maxrss * 1024 - int(at_start or 0)),
        )


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


@functools.cache
def warm() -> None:
    """Import and run everything once in this process, so that a child's time and memory are the command's own."""
    import monai.bundle.__main__  # noqa: F401
    import torch

    import esegeta_monai.handlers  # noqa: F401
    from esegeta_monai.cli.main import main

    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # tqdm's own lock is shared by forks: a child killed with it would stop all others
    with tempfile.TemporaryDirectory() as name, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        folder = Path(name)
        words = [*("--bundle", make_bundle(folder / "bundle")), *("--input", make_scan(folder / "scan.nii.gz"))]
        words += ["--methods", "Saliency", "--target", TARGET, "--output", folder / "out"]
        assert main([str(w) for w in ("explain", *words, "--report")]) == 0
        assert main([str(w) for w in ("evaluate", *words, "--metrics", "Sparseness")]) == 0
    gc.collect()
    gc.freeze()


_numbers = itertools.count()


@functools.cache
def _logs() -> Path:
    """Folder of the children's output, removed with this process."""
    folder = tempfile.TemporaryDirectory(prefix="faults-")
    _KEPT.append(folder)
    return Path(folder.name)


_KEPT: list[Any] = []


def start(
    *argv: object,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    before: Callable[[], object] | None = None,
    code: Callable[[], int | None] | None = None,
    bundle_run: bool = False,
) -> Running:
    """Start ``esegeta-monai ARGV`` in a forked child.

    Args:
        cwd: its working directory.
        env: further environment variables.
        before: called in the child before the command (limits, patches, `obey_permissions`).
        code: run this function in place of the command.
        bundle_run: run ``python -m monai.bundle ARGV`` instead.
    """
    from esegeta_monai.cli.main import main

    warm()
    base = _logs() / f"{os.getpid()}-{next(_numbers)}"
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        with suppress(OSError):  # the child does the same; whoever comes first, it can be killed from now on
            os.setpgid(pid, pid)
        return Running(pid, base)
    status = 98
    try:
        os.setpgid(0, 0)
        _own_streams(base)
        if cwd is not None:
            os.chdir(cwd)
        os.environ.update({"OMP_NUM_THREADS": "1", **(env or {})})
        signal.signal(signal.SIGINT, signal.default_int_handler)
        Path(f"{base}.rss").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024), encoding="utf-8")
        if before is not None:
            before()
        try:
            if code is not None:
                status = code() or 0
            elif bundle_run:
                sys.argv = ["monai.bundle", *map(str, argv)]
                runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
                status = 0
            else:
                status = main([str(word) for word in argv])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _own_streams(base: Path) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        opened = os.open(f"{base}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the standard streams stay open
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False, errors="backslashreplace")  # noqa: SIM115


def command(*argv: object, timeout: float = 120, **more: Any) -> Done:
    """Run ``esegeta-monai ARGV`` in a forked child to its end, see `start`."""
    return start(*argv, **more).wait(timeout)


def limit_memory(gigabytes: float) -> Callable[[], None]:
    """For ``before``: limit the child's address space."""
    size = int(gigabytes * 2**30)
    return lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size))


def obey_permissions() -> None:
    """For ``before``: root reads every file; without these capabilities it obeys permission bits like anyone else.

    Raises:
        OSError: the kernel refuses it.
    """
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    head = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    data = (ctypes.c_uint32 * 6)()
    if libc.capget(head, data):
        raise OSError(ctypes.get_errno(), "capget")
    for at in range(2):  # effective and permitted: CAP_DAC_OVERRIDE (1) and CAP_DAC_READ_SEARCH (2)
        data[at] &= ~0b110
    if libc.capset(head, data):
        raise OSError(ctypes.get_errno(), "capset")


def statuses(output: Path) -> dict[tuple[str, str | None, str | None], str]:
    """Status by case, target and method in ``run.json``; empty where there is none."""
    path = output / "run.json"
    if not path.is_file():
        return {}
    return {
        (e["case"], e["target"], e["method"]): e["status"]
        for e in json.loads(path.read_text(encoding="utf-8"))["results"]
    }


SUFFIXES = (".nii.gz", ".json", ".html", ".csv", ".png")


def unfinished(output: Path, suffixes: Sequence[str] = SUFFIXES) -> list[str]:
    """Files under a final name that are not whole, and temporary files."""
    bad: list[str] = []
    for path in output.rglob("*"):
        if not path.is_file() or path.is_symlink():
            continue
        if path.name.startswith(".tmp-"):
            bad.append(path.name)
        elif path.name.endswith(tuple(suffixes)):
            try:
                _read_whole(path)
            except Exception as error:  # whatever makes the file unreadable
                bad.append(f"{path.name}: {type(error).__name__}")
    return bad


def _read_whole(path: Path) -> None:
    if path.name.endswith(".nii.gz"):
        gzip.decompress(path.read_bytes())
        np.asanyarray(nib.load(path).dataobj)
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".png":
        with Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".csv":
        if not path.read_bytes().endswith(b"\n"):
            raise ValueError("the last line has no end")
    elif not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("no end")
