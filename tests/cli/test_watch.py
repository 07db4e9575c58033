"""The process that watches a command, with commands that only write heartbeats; the real one is in tests/faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from esegeta_monai.cli import watch
from esegeta_monai.files.journal import read_run
from esegeta_monai.utils import heartbeat

CHILD = """
import json, os, signal, sys, time
told = json.loads(os.environ["ESEGETA_WATCHED"])
journal, cases = sys.argv[1], sys.argv[2:]
try:
    lines = [json.loads(line) for line in open(journal) if line.strip()]
except FileNotFoundError:
    lines = []
number = 0
def beat(case, results):
    global number
    number += 1
    with open(told["folder"] + "/new", "w") as file:
        json.dump({"number": number, "case": case, "results": results, "times": 1, "journal": journal}, file)
    os.replace(told["folder"] + "/new", told["folder"] + "/heartbeat.json")
def done(case, method):
    return any(l["run"] == told["run"] and l["case"] == case and l["method"] in (None, method) for l in lines)
def write(case, method):
    with open(journal, "a") as file:
        line = {"case": case, "target": "t", "method": method, "status": "ok", "run": told["run"]}
        file.write(json.dumps(line) + "\\n")
for case in cases:
    if done(case, None):
        continue
    beat(case, [])
    if case == "first":
        time.sleep(60)
    methods = [m for m in ("A", "B") if not done(case, m)]
    for group in [[m] for m in methods] if case in told["separate"] else [methods]:
        beat(case, [["t", m] for m in group])
        if case == "pass" and "B" in group:
            time.sleep(60)
        if case == "killed" and "B" in group:
            os.kill(os.getpid(), signal.SIGKILL)
        if case == "stops":
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
            open(journal + ".ready", "w").close()
            time.sleep(60)
        for method in group:
            write(case, method)
sys.exit(3)
"""


def run(folder: Path, *cases: str, limit: float = 0.7) -> tuple[int, dict[tuple[str, str | None], str]]:
    code = watch.watch(limit, [sys.executable, "-S", "-c", CHILD, str(folder / "run.jsonl"), *cases])
    return code, {(e["case"], e["method"]): e["status"] for e in read_run(folder).results}


def test_it_knows_the_variable_of_the_heartbeat() -> None:
    assert watch.VARIABLE == heartbeat.VARIABLE


def test_it_imports_neither_torch_nor_the_package() -> None:
    code = (
        f"import runpy, sys; runpy.run_path({watch.__file__!r}); print({{'torch', 'esegeta_monai'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "set()"


def test_only_what_hangs_or_dies_is_lost(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, results = run(tmp_path, "first", "pass", "killed", "good")
    assert code == 3  # that of the last child
    assert results == {
        ("first", None): "timeout",
        ("pass", "A"): "ok",
        ("pass", "B"): "timeout",
        ("killed", "A"): "ok",
        ("killed", "B"): "failed",
        ("good", "A"): "ok",
        ("good", "B"): "ok",
    }
    printed = capfd.readouterr().err
    assert "first: before its first result: ended after 0.7 s by --hard-time-limit 0.7; the command goes on" in printed
    assert (
        "pass: t, A; t, B: ended after 0.7 s by --hard-time-limit 0.7; its methods and targets run one by one"
        in printed
    )
    assert "pass: t, B: ended after 0.7 s" in printed
    assert "killed: t, B: the process was ended by SIGKILL (out of memory" in printed


def test_a_command_in_time_runs_once(tmp_path: Path) -> None:
    assert run(tmp_path, "good", limit=60) == (3, {("good", "A"): "ok", ("good", "B"): "ok"})


def test_under_torchrun_the_job_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(tmp_path, "first", "good") == (1, {("first", None): "timeout"})


def test_a_command_without_a_case_is_not_restarted(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]
    assert watch.watch(0.5, command) == 128 + signal.SIGKILL
    assert watch.watch(0.2, [sys.executable, "-S", "-c", "import time; time.sleep(0.6)"]) == 0  # no limit for a start


def test_signals_reach_the_child_and_end_the_watch(tmp_path: Path) -> None:
    journal = tmp_path / "run.jsonl"
    words = [
        sys.executable,
        "-I",
        watch.__file__,
        "60",
        sys.executable,
        "-S",
        "-c",
        CHILD,
        str(journal),
        "stops",
        "good",
    ]
    process = subprocess.Popen(words)
    while not Path(f"{journal}.ready").exists():
        time.sleep(0.02)
    began = time.monotonic()
    process.terminate()
    assert process.wait() == 143
    assert time.monotonic() - began < 10
    assert read_run(tmp_path).results == []


def test_a_case_of_a_command_without_a_journal_is_left_out(tmp_path: Path) -> None:
    """``evaluate`` has no journal: the restarted command learns from the heartbeat's folder."""
    watch._record({"case": "a", "results": [], "journal": None}, "timeout", "too long", "r", tmp_path)
    beat = heartbeat.Heartbeat(tmp_path)
    beat.finish("b", done=1, problems=[], not_beating=[])
    assert beat.finished() == {
        "a": {"case": "a", "problems": ["a: too long"]},
        "b": {"case": "b", "done": 1, "problems": [], "not_beating": []},
    }


def test_the_heartbeat_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat.sys, "platform", "other")  # without the death signal for the test process
    monkeypatch.setenv(watch.VARIABLE, json.dumps({"folder": str(tmp_path), "run": "r", "separate": ["a"]}))
    beat = heartbeat.Heartbeat.take()
    assert (beat.run, beat.separate) == ("r", {"a"})
    assert watch.VARIABLE not in os.environ
    beat.journal = tmp_path / "run.jsonl"
    beat.beat("a", [("t", "M")], 2)
    read = watch._read(tmp_path / "heartbeat.json")
    assert read == {"number": 1, "case": "a", "results": [["t", "M"]], "times": 2, "journal": str(beat.journal)}
    assert heartbeat.Heartbeat.take().folder is None
