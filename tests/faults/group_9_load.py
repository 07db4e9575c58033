"""Many results, cases and files."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from esegeta_monai.files.journal import read_run
from esegeta_monai.files.runs import RunRecord
from tests.faults.runner import Row, Running, command, start, statuses
from tests.support.cli import make_bundle, make_scan

GROUP = "9 load"
METHODS = ("--methods", "Saliency,GradCam", "--target", "MultiClassMask(1)", "--target", "MultiClassMask(2)")


def _fill(folder: Path, writer: int) -> None:
    with RunRecord(folder) as run:
        for i in range(500):
            run.set(f"{writer}-{i}", "t", "M", "ok", seconds=1.0, warnings=["a sentence of a usual length"] * 10)


def _writers(folder: Path) -> str:
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_fill, args=(folder, number)) for number in range(4)]
    began = time.perf_counter()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    took = time.perf_counter() - began
    assert [writer.exitcode for writer in writers] == [0] * 4
    contents = read_run(folder)
    assert len(contents.results) == 2000
    assert contents.notes == []
    assert len(statuses(folder)) == 2000
    return f"2000 of 2000 results, {1e3 * took / 500:.2f} ms per result and writer"


def _flat(folder: Path) -> str:
    run, times = RunRecord(folder), []
    for i in range(5000):
        began = time.perf_counter()
        run.set(f"c{i}", "t", "M", "ok", seconds=1.0)
        times.append(time.perf_counter() - began)
    at = {n: 1e3 * statistics.median(times[n - 50 : n]) for n in (50, 500, 1500, 5000)}
    assert at[5000] <= 3 * at[50]
    began = time.perf_counter()
    run.__exit__(None, None, None)
    figures = ", ".join(f"{ms:.3f} ms at {n}" for n, ms in at.items())
    return f"{figures}; run.json at the end {time.perf_counter() - began:.2f} s"


@dataclass(frozen=True)
class Mark:
    """The use of processor, memory and files by a running command, at one time.

    Attributes:
        at: seconds as `time.time`.
        cpu: seconds of processor time so far; other work on the machine does not change them much.
        memory: resident MB.
        handles: open files.
    """

    at: float
    cpu: float
    memory: int
    handles: int


def watched(running: Running, marks: list[Mark]) -> threading.Thread:
    """Note marks of a command while it runs."""
    place, ticks = Path(f"/proc/{running.pid}"), os.sysconf("SC_CLK_TCK")

    def watch() -> None:
        while True:
            try:
                used = [int(n) for n in (place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]]
                resident = re.search(r"VmRSS:\s+(\d+)", (place / "status").read_text(encoding="utf-8"))
                handles = len(os.listdir(place / "fd"))
            except OSError:  # it has ended
                return
            if resident is None:
                return
            marks.append(Mark(time.time(), sum(used) / ticks, int(resident[1]) >> 10, handles))
            time.sleep(0.2)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def steady(marks: list[Mark], ends: list[float]) -> str:
    """Assert that processor time per case, memory and open files do not grow.

    Args:
        marks: marks of the whole command.
        ends: when each case ended, as `time.time`, sorted.
    """
    cpu = np.interp(ends, [m.at for m in marks], [m.cpu for m in marks])
    quarter = len(ends) // 4
    first, last = (cpu[quarter] - cpu[0]) / quarter, (cpu[-1] - cpu[-1 - quarter]) / quarter
    during = [m for m in marks if ends[0] <= m.at <= ends[-1]]
    parts = [during[i * len(during) // 4 : (i + 1) * len(during) // 4] for i in range(4)]
    memory, handles = [max(m.memory for m in part) for part in parts], [max(m.handles for m in part) for part in parts]
    text = f"{1e3 * first:.0f} ms of processor time per case at first and {1e3 * last:.0f} ms at last; memory by "
    text += f"quarter {memory} MB, open files {handles}"
    assert last <= 1.3 * first, text
    assert memory[3] - memory[1] <= 30, text
    assert handles[3] <= handles[1] + 2, text
    return text


def _cases(folder: Path) -> str:
    bundle, count = make_bundle(folder / "bundle"), 100
    for i in range(count):
        make_scan(folder / "in" / f"case{i:03d}.nii.gz", seed=i)
    output, marks = folder / "out", list[Mark]()
    words = ["explain", "--bundle", bundle, "--input", folder / "in", "--output", output, *METHODS]
    running = start(*words)
    watched(running, marks)
    done = running.wait(1800)
    assert done.code == 0, done.err[-500:]
    assert len(statuses(output)) == 4 * count
    ends = sorted(max(p.stat().st_mtime for p in case.iterdir()) for case in output.iterdir() if case.is_dir())
    text = steady(marks, ends)
    again = command(*words, timeout=1800)
    assert again.code == 0
    assert set(statuses(output).values()) == {"skipped"}
    assert again.cpu_seconds < done.cpu_seconds / 2
    report = command("report", output, timeout=900)
    pages = [page.stat().st_size for page in output.rglob("*_report.html")]
    assert (report.code, len(pages)) == (0, count)
    assert max(*pages, (output / "index.html").stat().st_size) < 5e6
    words = ["evaluate", "--bundle", bundle, "--input", folder / "in", "--maps", output, "--output", output]
    evaluation = command(*words, "--metrics", "Sparseness,Complexity", timeout=1800)
    assert evaluation.code == 0, evaluation.err[-500:]
    return (
        f"{text}; {done.cpu_seconds:.0f} s of processor time, again {again.cpu_seconds:.0f} s, report "
        f"{report.cpu_seconds:.0f} s, evaluate {evaluation.cpu_seconds:.0f} s"
    )


def _parts(folder: Path) -> str:
    bundle = make_bundle(folder / "bundle")
    for i in range(3):
        make_scan(folder / "in" / f"c{i}.nii.gz", (16, 16, 16), seed=i)
    words = ["explain", "--bundle", bundle, "--input", folder / "in", *METHODS]
    assert command(*words, "--output", folder / "whole").code == 0
    parts = [start(*words, "--output", folder / "out", "--num-parts", 2, "--part-id", i) for i in range(2)]
    assert [part.wait().code for part in parts] == [0, 0]
    assert command("merge-runs", folder / "out").code == 0
    assert statuses(folder / "out") == statuses(folder / "whole")
    return f"{len(statuses(folder / 'out'))} results of 2 parts"


ROWS = [
    Row(GROUP, "4 writers with 500 results each", _writers),
    Row(GROUP, "time per result from 50 to 5,000 results", _flat),
    Row(GROUP, "two parts in one folder", _parts),
    Row(GROUP, "100 cases in one run, again, report, evaluate", _cases, long=True),
]
