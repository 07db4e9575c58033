"""Kills, signals, and several runs in one folder."""

from __future__ import annotations

import csv
import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.files.journal import read_run
from tests.faults.runner import Done, Row, Running, command, start, statuses, unfinished
from tests.support.cli import make_bundle, make_scan

GROUP = "4 kills and signals"
METHODS = "Saliency,IntegratedGradients(n_steps=2),Occlusion(window=16)"
TARGETS = ("--target", "MultiClassMask(1)", "--target", "MultiClassMask(2)")
DATASET = {"_target_": "DataLoader", "dataset": {"_target_": "Dataset", "data": []}, "batch_size": 1}
EVALUATOR = {
    "_target_": "SupervisedEvaluator",
    "device": "@device",
    "val_data_loader": "@dataset",
    "network": "@network",
    "inferer": "@inferer",
    "val_handlers": [],
}
LONG = "Saliency,Rise(n_masks=90000)"


def full(many: int, few: int) -> int:
    """How often: many times in `make faults`, few in the tests."""
    return many if os.environ.get("FAULTS_FULL") else few


def study(folder: Path) -> tuple[Path, Path]:
    """A bundle and the folder of its two scans."""
    for i in range(2):
        make_scan(folder / "scans" / f"c{i}.nii.gz", (16, 16, 16), seed=i)
    return make_bundle(folder / "bundle"), folder / "scans"


def explain(
    folder: Path, output: Path, *more: object, methods: str = METHODS, scans: Path | None = None
) -> list[object]:
    words = ["explain", "--bundle", folder / "bundle", "--input", scans or folder / "scans", "--output", output]
    return [*words, "--methods", methods, *TARGETS, "--seed", 3, *more]


def digests(output: Path, suffixes: tuple[str, ...] = (".nii.gz", ".png")) -> dict[str, str]:
    return {
        path.relative_to(output).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name.endswith(suffixes) and not path.name.startswith(".tmp-")
    }


def partial(output: Path) -> list[str]:
    """Files under a final name that are not whole."""
    return [name for name in unfinished(output) if not name.startswith(".tmp-")]


def temporary(output: Path) -> list[Path]:
    return list(output.rglob(".tmp-*"))


def end(running: Running) -> None:
    """Kill a command that may have ended."""
    with suppress(ProcessLookupError):
        running.kill()
    running.wait()


def killed(words: list[object], output: Path, longest: int, delay: float = 0.2) -> None:
    """Start a command and kill its group once it has written a random number of files, or at its end."""
    count = len(list(output.rglob("*"))) if output.exists() else 0
    wanted, running = count + random.randint(0, longest), start(*words)
    while running.seconds() < 120:
        if (len(list(output.rglob("*"))) if output.exists() else 0) >= wanted:
            break
        if os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    time.sleep(random.uniform(0, delay))
    end(running)


def _explain(folder: Path) -> str:
    study(folder)
    random.seed(0)
    assert command(*explain(folder, folder / "whole")).code == 0
    want, kills, left = digests(folder / "whole"), full(100, 4), 0
    for number in range(0, kills, 2):
        output = folder / f"killed{number}"
        for _ in range(2):
            killed(explain(folder, output), output, 14)
            if not output.exists():
                continue
            assert not partial(output), partial(output)
            left += len(temporary(output))
            known = {(e["case"], e["target"], e["method"]) for e in read_run(output).results if e["status"] == "ok"}
            assert len(known) <= len(list(output.rglob("*_attr.json")))
        done = {
            p: p.stat().st_mtime_ns
            for p in output.rglob("*_attr.nii.gz")
            if p.with_name(f"{p.name[:-7]}.json").exists()
        }
        resumed = command(*explain(folder, output))
        assert resumed.code == 0, (resumed.code, resumed.err)
        assert digests(output) == want
        assert {p: p.stat().st_mtime_ns for p in done} == done  # not computed again
        assert not temporary(output)
        shutil.rmtree(output)
    return f"{kills} kills left 0 partial and {left} temporary files; {kills // 2} of {kills // 2} resumes identical"


def _table(output: Path) -> list[list[str]]:
    """The rows of the table without its times, sorted."""
    with open(output / "metrics.csv", encoding="utf-8", newline="") as file:
        return sorted([v for k, v in row.items() if k not in ("seconds", "passes")] for row in csv.DictReader(file))


def _evaluate(folder: Path) -> str:
    bundle, scans = study(folder)
    assert command(*explain(folder, folder / "maps")).code == 0
    words = ["evaluate", "--bundle", bundle, "--input", scans, "--maps", folder / "maps"]
    words += ["--metrics", "Sparseness,Deletion(steps=4)"]
    whole = command(*words, "--output", folder / "whole")
    assert whole.code == 0, whole.err
    random.seed(1)
    kills = full(30, 3)
    for number in range(kills):
        output = folder / f"killed{number}"
        killed([*words, "--output", output], output, 8)
        assert not output.exists() or not partial(output)
        again = command(*words, "--output", output)
        assert again.code == 0, again.err
        assert _table(output) == _table(folder / "whole")
        assert not temporary(output)
    return f"{kills} kills: 0 partial files, {kills} of {kills} tables equal"


def _report(folder: Path) -> str:
    study(folder)
    output = folder / "out"
    assert command(*explain(folder, output)).code == 0
    took = command("report", output).seconds
    random.seed(2)
    kills = full(30, 3)
    for _ in range(kills):
        for page in output.rglob("*.html"):
            page.unlink()
        running = start("report", output)
        time.sleep(random.uniform(0.02, took))
        end(running)
        assert not partial(output)
    assert command("report", output).code == 0
    assert len(list(output.rglob("*.html"))) == 3
    assert not temporary(output)
    return f"{kills} kills: 0 partial pages"


def _overlay(folder: Path) -> str:
    bundle = make_bundle(folder / "bundle", evaluator=EVALUATOR, dataset=DATASET, run=["$@evaluator.run()"])
    words, target = ["overlay", "--bundle", bundle], bundle / "configs" / "explain.json"
    whole = command(*words)
    assert whole.code == 0, whole.err
    want = target.read_bytes()
    random.seed(3)
    kills, took = full(30, 3), whole.seconds
    for _ in range(kills):
        target.unlink(missing_ok=True)
        running = start(*words)
        time.sleep(random.uniform(0, took))
        end(running)
        assert not target.exists() or target.read_bytes() == want
    assert command(*words).code == 0
    assert target.read_bytes() == want
    assert not temporary(bundle)
    return f"{kills} kills: 0 partial files"


def stopped(folder: Path, number: int, *more: object) -> tuple[Done, Path, float]:
    """Send a signal during a long method; the finished command, its output, and the seconds that it took to stop."""
    study(folder)
    output = folder / "out"
    heeded = signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler  # the tests may run under nohup
    running = start(
        *explain(folder, output, "--no-pictures", *more, methods=LONG), before=lambda: signal.signal(number, heeded)
    )
    while not list(output.glob("*/*_Saliency_attr.json")):
        assert running.seconds() < 120
        time.sleep(0.05)
    time.sleep(1)
    began = running.seconds()
    running.kill(number)
    done = running.wait()
    return done, output, done.seconds - began


def signalled(name: str) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        number = getattr(signal, name)
        done, output, seconds = stopped(folder, number)
        assert done.code == 128 + number, (done.code, done.err)
        assert seconds < 10
        assert "stopped" in done.err.splitlines()[-1]
        assert not done.traceback
        assert not unfinished(output)
        assert read_run(output).info["finished"] is None
        assert "ok" in statuses(output).values()  # run.json is written when a run is stopped
        return f"{seconds:.1f} s, exit code {done.code}"

    return check


def _nohup(folder: Path) -> None:
    study(folder)
    output = folder / "out"
    running = start(*explain(folder, output), before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    while not list(output.glob("*/*_attr.json")):
        assert running.seconds() < 120
        time.sleep(0.02)
    running.kill(signal.SIGHUP)
    assert running.wait().code == 0


def _two(same: bool) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        _, scans = study(folder)
        assert command(*explain(folder, folder / "whole")).code == 0
        inputs = [scans, scans] if same else [scans / "c0.nii.gz", scans / "c1.nii.gz"]
        both = [start(*explain(folder, folder / "out", scans=given)) for given in inputs]
        for running in both:
            done = running.wait()
            assert done.code == 0, done.err
        assert digests(folder / "out") == digests(folder / "whole")
        assert set(statuses(folder / "out")) == set(statuses(folder / "whole"))
        assert not unfinished(folder / "out")

    return check


def _two_evaluations(folder: Path) -> None:
    bundle, scans = study(folder)
    assert command(*explain(folder, folder / "maps")).code == 0
    words = ["evaluate", "--bundle", bundle, "--maps", folder / "maps", "--output", folder / "out"]
    words += ["--metrics", "Sparseness,Complexity", "--input"]
    both = [start(*words, scans / f"c{i}.nii.gz") for i in range(2)]
    assert [running.wait().code for running in both] == [0, 0]
    assert {row[0] for row in _table(folder / "out")} == {"c0", "c1"}


def _removed(folder: Path) -> str:
    study(folder)
    output = folder / "out"
    running = start(*explain(folder, output))
    while not list(output.glob("*/*_attr.json")):
        assert running.seconds() < 120
        time.sleep(0.01)
    shutil.rmtree(output, ignore_errors=True)
    done = running.wait()
    assert done.code == 1, (done.code, done.err)
    assert not done.traceback
    assert "removed" in done.err or "cannot write" in done.err
    return done.err.splitlines()[-1][-120:]


def _scores(folder: Path) -> str:
    """The tables of scores that a kill leaves; damaged ones are named and computed again."""
    study(folder)
    words = explain(folder, folder / "whole", methods="Rise(n_masks=3000)", scans=folder / "scans" / "c0.nii.gz")
    assert command(*words).code == 0
    output = words[words.index("--output") + 1] = folder / "out"

    def write_often() -> None:
        ScoreCheckpoint.__init__.__defaults__ = (0.0,)  # seconds between two writes

    running = start(*words, before=write_often)
    while not [p for p in (output / ".scores").rglob("*.npz") if not p.name.startswith(".tmp-")]:
        assert running.seconds() < 200
        time.sleep(0.01)
    end(running)
    tables = [path for path in (output / ".scores").rglob("*.npz") if not path.name.startswith(".tmp-")]
    assert tables
    for path in tables:
        path.write_bytes(path.read_bytes()[:100])
    resumed = command(*words)
    assert resumed.code == 0, (resumed.code, resumed.err)
    assert "cannot be read" in resumed.err, resumed.err
    assert digests(output) == digests(folder / "whole")
    assert not list((output / ".scores").rglob("*.npz"))
    return f"{len(tables)} table(s) kept by the kill"


def _unwritable_log(folder: Path) -> None:
    study(folder)
    (folder / "out" / "esegeta.log").mkdir(parents=True)
    done = command(*explain(folder, folder / "out"))
    assert done.code == 0, done.err
    assert "esegeta.log cannot be written" in done.err
    assert len(statuses(folder / "out")) == 12
    assert not {"failed", "timeout"} & set(statuses(folder / "out").values())


def _damaged_record(folder: Path) -> None:
    study(folder)
    (folder / "out").mkdir()
    (folder / "out" / "run.json").write_text('{"results": [', encoding="utf-8")
    done = command(*explain(folder, folder / "out"))
    assert done.code == 0, done.err
    assert len(statuses(folder / "out")) == 12
    assert not {"failed", "timeout"} & set(statuses(folder / "out").values())
    (folder / "out" / "run.json").write_text("damaged", encoding="utf-8")
    assert command("report", folder / "out").code == 0  # the journal is enough


ROWS = [
    Row(GROUP, "explain killed at random moments, and resumed", _explain),
    Row(GROUP, "evaluate killed at random moments", _evaluate),
    Row(GROUP, "report killed at random moments", _report),
    Row(GROUP, "overlay killed at random moments", _overlay),
    *(Row(GROUP, f"{name} during a long method", signalled(name)) for name in ("SIGINT", "SIGTERM", "SIGHUP")),
    Row(GROUP, "SIGHUP under nohup: the run goes on", _nohup),
    Row(GROUP, "two runs of the same work in one folder", _two(True), slow=True),
    Row(GROUP, "two runs of other cases in one folder", _two(False)),
    Row(GROUP, "two evaluations into one table", _two_evaluations),
    Row(GROUP, "output folder removed during the run", _removed),
    Row(GROUP, "perturbation scores are kept by a kill, and damaged ones computed again", _scores, slow=True),
    Row(GROUP, "esegeta.log cannot be written", _unwritable_log),
    Row(GROUP, "run.json is damaged", _damaged_record),
]
