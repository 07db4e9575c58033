"""Many results, cases and files."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import statistics
import threading
import time
from pathlib import Path

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


def _watched(running: Running, marks: list[tuple[int, int]]) -> threading.Thread:
    """Note resident memory (MB) and open files of a command while it runs."""

    def watch() -> None:
        while True:
            try:
                status = Path(f"/proc/{running.pid}/status").read_text(encoding="utf-8")
                resident = re.search(r"VmRSS:\s+(\d+)", status)
                marks.append((int(resident[1]) >> 10 if resident else 0, len(os.listdir(f"/proc/{running.pid}/fd"))))
            except (OSError, TypeError):
                return
            time.sleep(0.2)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def _cases(folder: Path) -> str:
    bundle, count = make_bundle(folder / "bundle"), 100
    for i in range(count):
        make_scan(folder / "in" / f"case{i:03d}.nii.gz", seed=i)
    output, marks = folder / "out", list[tuple[int, int]]()
    words = ["explain", "--bundle", bundle, "--input", folder / "in", "--output", output, *METHODS]
    running = start(*words)
    _watched(running, marks)
    done = running.wait(1800)
    assert done.code == 0, done.err[-500:]
    assert len(statuses(output)) == 4 * count
    ends = sorted(max(p.stat().st_mtime for p in case.iterdir()) for case in output.iterdir() if case.is_dir())
    gaps = [b - a for a, b in itertools.pairwise(ends)]
    first, last = statistics.median(gaps[:25]), statistics.median(gaps[-25:])
    assert last <= 1.3 * first, (first, last)
    quarter = len(marks) // 4
    peaks = [max(m for m, _ in marks[i * quarter : (i + 1) * quarter]) for i in range(4)]
    handles = [max(f for _, f in marks[i * quarter : (i + 1) * quarter]) for i in range(4)]
    assert peaks[3] - peaks[1] <= 30, peaks
    assert handles[3] <= handles[1] + 2, handles
    again = command(*words, timeout=1800)
    assert again.code == 0
    assert set(statuses(output).values()) == {"skipped"}
    assert again.seconds < done.seconds / 2
    report = command("report", output, timeout=900)
    pages = [page.stat().st_size for page in output.rglob("*_report.html")]
    assert (report.code, len(pages)) == (0, count)
    assert max(pages) < 5e6
    words = ["evaluate", "--bundle", bundle, "--input", folder / "in", "--maps", output, "--output", output]
    evaluation = command(*words, "--metrics", "Sparseness,Complexity", timeout=1800)
    assert evaluation.code == 0, evaluation.err[-500:]
    return (
        f"{first:.2f} s per case at first, {last:.2f} s at last; memory by quarter {peaks} MB; "
        f"again {again.seconds:.0f} s of {done.seconds:.0f} s; report {report.seconds:.0f} s"
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
    Row(GROUP, "100 cases in one run, again, report, evaluate", _cases, slow=True),
]
