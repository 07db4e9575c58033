"""``torchrun -m esegeta_monai explain`` and ``evaluate``: the same files by one process and by several, and none left
waiting."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import esegeta_monai.bundle
from tests.bundle.test_ensemble import ensemble
from tests.support import oblique
from tests.support.cli import make_bundle, make_scan, run_json, statuses
from tests.support.synthetic import write_scan

pytestmark = pytest.mark.slow

METHODS = "Saliency,GradCam,Occlusion(window=8),IntegratedGradients(n_steps=4)"
ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(bundle: Path, scans: Path, output: Path, ranks: int, *more: str, what: str = "explain") -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    words = [what, "--bundle", str(bundle), "--input", str(scans), "--output", str(output), "--device", "cpu"]
    return [sys.executable, *launch, "-m", "esegeta_monai", *words, *more]


def explain(*args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args, **kwargs),  # type: ignore[arg-type]
        env=environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )


def process_of(rank: int, run: str) -> int:
    """Find the process id of a rank by its command and environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            reported, variables = (folder / "cmdline").read_bytes().split(b"\0"), (folder / "environ").read_bytes()
        except OSError:  # it has just ended, or is not ours
            continue
        if run.encode() in reported and f"RANK={rank}".encode() in variables.split(b"\0"):
            return int(folder.name)
    raise ProcessLookupError(f"no rank {rank}")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A bundle, three scans, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("study")
    bundle = make_bundle(folder / "bundle")
    for i in range(3):
        make_scan(folder / "scans" / f"s{i}.nii.gz", seed=i)
    done = explain(bundle, folder / "scans", folder / "alone", 1, "--methods", METHODS, "--no-pictures")
    assert done.returncode == 0, done.stderr
    return folder


def maps(folder: Path) -> dict[str, np.ndarray]:
    return {p.relative_to(folder).as_posix(): np.asarray(nib.load(p).dataobj) for p in folder.rglob("*_attr.nii.gz")}


def order(folder: Path) -> list[tuple[str, str, str]]:
    return [(e["case"], e["method"], e["target"]) for e in run_json(folder)["results"]]


@pytest.mark.parametrize("share", ["cases", "windows", "methods"])
def test_two_processes_write_what_one_does(study, share):
    output = study / share
    done = explain(
        study / "bundle", study / "scans", output, 2, "--methods", METHODS, "--share", share, "--no-pictures"
    )
    assert done.returncode == 0, done.stderr
    assert statuses(output) == statuses(study / "alone")
    assert order(output) == order(study / "alone"), "as asked for, not as the processes ended"
    assert set(statuses(output).values()) <= {"ok", "incomplete"}  # four steps of a path leave a gap
    assert not list(output.glob("run.rank*"))
    actual, expected = maps(output), maps(study / "alone")
    assert actual.keys() == expected.keys()
    assert {name.split("/")[0] for name in actual} == {"s0", "s1", "s2"}
    for name in expected:
        assert np.abs(actual[name] - expected[name]).max() <= 1e-5 * np.abs(expected[name]).max(), name
    assert done.stdout.count("run.json lists all results") == 1
    again = explain(
        study / "bundle", study / "scans", output, 2, "--methods", METHODS, "--share", share, "--no-pictures"
    )
    assert again.returncode == 0, again.stderr
    assert set(statuses(output).values()) == {"skipped"}
    assert order(output) == order(study / "alone")


def test_an_ensemble_with_views_by_two_processes(tmp_path):
    """Members and mirrored views are windows like any others, so processes share them; also of their agreement."""
    bundle = ensemble(tmp_path)
    scan = write_scan(tmp_path)
    config = bundle / "configs" / "inference.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    target = "esegeta_monai.explain.ensemble.EnsembleInferer"
    content["inferer"] = {"_target_": target, "inferer": content["inferer"], "mirror_axes": [0, 1]}
    config.write_text(json.dumps(content), encoding="utf-8")
    what = ["--methods", METHODS, "--target", "Box(1, (4, 4), (40, 30))", "--agreement", "--no-pictures"]
    for ranks, output in ((1, "one"), (2, "two")):
        done = explain(bundle, scan, tmp_path / output, ranks, *what, "--share", "windows")
        assert done.returncode == 0, done.stderr
    assert statuses(tmp_path / "two") == statuses(tmp_path / "one")
    assert set(statuses(tmp_path / "one").values()) <= {"ok", "incomplete"}
    records = {}
    for output in ("one", "two"):
        files = [p for p in (tmp_path / output).rglob("*.nii.gz") if p.name.endswith(("_attr.nii.gz", "_sd.nii.gz"))]
        records[output] = {p.name: np.asarray(nib.load(p).dataobj) for p in files}
    assert records["two"].keys() == records["one"].keys()
    assert len(records["one"]) == 4 * 3  # map, members, views
    for name, expected in records["one"].items():
        assert np.abs(records["two"][name] - expected).max() <= 1e-5 * np.abs(expected).max(), name
    sidecar = json.loads(next((tmp_path / "two").rglob("*Saliency_attr.json")).read_text(encoding="utf-8"))
    assert sidecar["ranks"] == 2
    assert (sidecar["agreement"]["members"]["count"], sidecar["agreement"]["views"]["count"]) == (2, 4)


JUDGED = [
    *("--methods", "Saliency,InputXGradient,Occlusion(window=8)", "--target"),
    *("MultiClassMask(class_index=1),MultiClassMask(class_index=2)", "--metrics"),
    "Deletion(steps=4),Infidelity(n_samples=10),MaxSensitivity(n_samples=2),CascadingRandomisation,ROAD(shares=[0.5]),"
    "Sparseness,RandomLogit",
]


def figures(folder: Path) -> dict[tuple[str, ...], dict[str, str]]:
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    result = {(r["case"], r["target"], r["method"], r["metric"]): r for r in rows}
    assert len(result) == len(rows)
    return result


@pytest.fixture(scope="module")
def judged(study):
    done = explain(study / "bundle", study / "scans", study / "judged", 1, *JUDGED, what="evaluate")
    assert done.returncode == 0, done.stderr
    return figures(study / "judged")


@pytest.mark.parametrize("share", ["cases", "windows", "methods"])
def test_two_processes_judge_as_one_does(study, judged, share):
    output = study / f"judged-{share}"
    done = explain(study / "bundle", study / "scans", output, 2, *JUDGED, "--share", share, what="evaluate")
    assert done.returncode == 0, done.stderr
    actual = figures(output)
    assert list(actual) == list(judged)
    assert len(actual) == (3 * 2 - 1) * 6 * 7  # one case has no voxel of one target
    for key, row in judged.items():
        assert actual[key]["beats_controls"] == row["beats_controls"], key
        assert bool(actual[key]["value"]) == bool(row["value"]), key
        if row["value"]:
            assert float(actual[key]["value"]) == pytest.approx(float(row["value"]), rel=1e-4, abs=1e-5), key
    assert done.stdout.count("3 case(s) evaluated, 0 problem(s)") == 1
    for case in ("s0", "s1", "s2"):
        one, other = (
            (study / f / case / f"{case}_regions.csv").read_text(encoding="utf-8").splitlines()
            for f in (output, "judged")
        )
        assert [r.split(",")[:3] for r in one] == [r.split(",")[:3] for r in other]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc to find the process")
def test_a_killed_process_ends_the_others_and_finished_cases_stay(study):
    output = study / "killed"
    dear = ("--methods", "Saliency,Occlusion(window=2,stride=1)", "--share", "windows", "--no-pictures")
    running = subprocess.Popen(
        command(study / "bundle", study / "scans", output, 2, *dear),
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        until = time.monotonic() + 120
        while not list(output.rglob("*Saliency*.json")) and time.monotonic() < until:
            time.sleep(0.1)
        os.kill(process_of(rank=1, run=str(output)), signal.SIGKILL)
        killed = time.monotonic()
        _, reported = running.communicate(timeout=60)
        assert time.monotonic() - killed < 60
    finally:
        running.kill()
    assert running.returncode != 0
    assert "SIGKILL" in reported or "another rank has ended" in reported, reported
    finished = {k for k, s in statuses(output).items() if s == "ok"}
    assert finished
    assert run_json(output)["finished"] is None
    cheap = ("--methods", "Saliency", "--share", "windows", "--no-pictures")
    again = explain(study / "bundle", study / "scans", output, 2, *cheap)
    assert again.returncode == 0, again.stderr
    now = statuses(output)
    assert all(now[key] == "skipped" for key in finished if key[2] == "Saliency")
    assert len([s for k, s in now.items() if k[2] == "Saliency" and s in ("ok", "skipped")]) == len(
        {k for k in statuses(study / "alone") if k[2] == "Saliency"}
    )


@pytest.mark.parametrize("shared", ["cases", "windows"])
def test_the_overlay_by_two_processes(shared, tmp_path):
    scans = [oblique.write_scan(tmp_path / "scans" / f"{name}.nii.gz", i) for i, name in enumerate(("a", "b", "c"))]
    bundle = oblique.write(tmp_path / "bundle", oblique.config(scans, tmp_path / "eval"))
    shipped = Path(esegeta_monai.bundle.__file__).parent
    overlays = ["explain.json", "explain_metrics.json", "multi_gpu_explain.json"]
    sampler = [] if shared == "cases" else ["--dataloader#sampler", "None"]
    what = ["--explain_methods", "Saliency,Occlusion(window=12)", "--explain_targets", "MultiClassMask(2)"]
    what += ["--explain_metrics", "Sparseness,Deletion(steps=3)"]

    def run(output: Path, launch: list[str], files: list[str], *more: str) -> None:
        configs = [str(bundle / "configs" / "inference.json"), *(str(shipped / f) for f in files)]
        reported = [*launch, "-m", "monai.bundle", "run", "--bundle_root", str(bundle), "--config_file", str(configs)]
        extra = [*what, "--output_dir", str(output), "--explain_handler#pictures", "False", *more]
        done = subprocess.run(
            [sys.executable, *reported, *extra],
            env=environment(),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=300,
        )
        assert done.returncode == 0, done.stderr

    run(tmp_path / "one", [], overlays[:2])
    run(tmp_path / "two", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], overlays, *sampler)
    assert statuses(tmp_path / "two") == statuses(tmp_path / "one")
    assert set(statuses(tmp_path / "one").values()) == {"ok"}
    actual, reference = maps(tmp_path / "two"), maps(tmp_path / "one")
    assert actual.keys() == reference.keys()
    assert len(actual) == 6
    for name in reference:
        assert np.abs(actual[name] - reference[name]).max() <= 1e-5 * np.abs(reference[name]).max(), name
    assert len(list((tmp_path / "two").rglob("*_seg.nii.gz"))) == 3
    result, expected = figures(tmp_path / "two"), figures(tmp_path / "one")
    assert result.keys() == expected.keys()
    assert len(result) == 3 * (2 + 3) * 2  # cases, methods and controls, metrics
    for key, row in expected.items():
        assert float(result[key]["value"]) == pytest.approx(float(row["value"]), rel=1e-4, abs=1e-5), key
