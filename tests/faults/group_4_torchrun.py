"""Kills of `torchrun` jobs whose processes share cases or methods."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.faults.group_4_kills import GROUP, digests, explain, full, partial, study, temporary
from tests.faults.runner import Row, command, statuses

ROOT = Path(__file__).parents[2]


def processes_of(output: Path) -> dict[int, int]:
    """The rank of each process that computes into a folder, by its number."""
    known: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is another user's
            continue
        rank = [v for v in variables if v.startswith(b"RANK=")]
        if rank and str(output).encode() in words.split(b"\0"):
            known[int(folder.name)] = int(rank[0][5:])
    return known


def launch(words: list[object], log: Path) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.Popen(
            [*torchrun, "-m", "esegeta_monai", *map(str, words)],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            text=True,
            start_new_session=True,
        )


def lives(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def shared(share: str) -> Callable[[Path], str]:
    """One process is killed, the launcher is killed with all its processes, or it is asked to stop."""

    def check(folder: Path) -> str:
        study(folder)
        random.seed(4)
        assert command(*explain(folder, folder / "whole")).code == 0
        want, kills, left = digests(folder / "whole"), full(6, 2), 0
        for number in range(kills):
            output, log = folder / f"killed{number}", folder / f"killed{number}.log"
            words = explain(folder, output, "--share", share)
            job = launch(words, log)
            enough = random.randint(1, 12)
            until = time.monotonic() + 200
            while len(list(output.rglob("*_attr.*"))) < enough and job.poll() is None:
                assert time.monotonic() < until, log.read_text(encoding="utf-8")
                time.sleep(0.02)
            ranks = processes_of(output)
            if number % 3 == 0 and ranks:
                with suppress(ProcessLookupError):
                    os.kill(random.choice(list(ranks)), signal.SIGKILL)
            elif number % 3 == 1:
                for process in (job.pid, *ranks):
                    with suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            else:
                job.send_signal(signal.SIGTERM)
            job.wait(90)
            until = time.monotonic() + 30
            while [process for process in ranks if lives(process)]:
                assert time.monotonic() < until, f"left behind: {log.read_text(encoding='utf-8')[-500:]}"
                time.sleep(0.1)
            assert not partial(output), partial(output)
            left += len(temporary(output))
            alone = number % 2
            if alone:
                done = command(*explain(folder, output))
                assert done.code == 0, (done.code, done.err)
            else:
                again = launch(words, log)
                assert again.wait(200) == 0, log.read_text(encoding="utf-8")
            assert digests(output) == want
            assert set(statuses(output)) == set(statuses(folder / "whole"))
            assert not set(statuses(output).values()) & {"failed", "timeout"}
            assert not temporary(output)
            shutil.rmtree(output)
        return f"{kills} kills: 0 partial and {left} temporary files, {kills} of {kills} resumes identical"

    return check


ROWS = [Row(GROUP, f"torchrun --share {share}, killed", shared(share), long=True) for share in ("cases", "methods")]
