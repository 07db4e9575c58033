"""Maps judged with controls beside them: in Python and by the command, freshly computed and from disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.explain.judged import METRICS, ONE, Linear, judged
from tests.support.cli import make_bundle, make_scan


def test_the_exact_map_beats_the_controls_and_a_zero_map_does_not():
    result = judged()
    rows = {(r["method"], r["metric"].split("-")[0]): r for r in result.rows}
    assert not result.failed
    assert rows["InputXGradient", "RelevanceMass"]["value"] == pytest.approx(1.0)
    assert rows["InputXGradient", "Infidelity"]["value"] == pytest.approx(0.0, abs=1e-12)
    for metric in ("RelevanceMass", "Deletion", "Infidelity"):
        assert rows["InputXGradient", metric]["beats_controls"] is True, metric
        assert {m for m, n in rows if n == metric} == {
            "InputXGradient",
            "control:random",
            "control:sobel",
            "control:constant",
        }
        assert rows["control:random", metric]["beats_controls"] is None
    assert rows["InputXGradient", "Sparseness"]["beats_controls"] is None  # an edge detector is sparse by nature
    zeros = {("ClassScore-class1", "InputXGradient"): torch.zeros(1, 8, 8)}
    result = judged(maps=zeros)
    actual = [r for r in result.rows if r["method"] == "InputXGradient" and r["metric"] != "Sparseness"]
    assert actual
    assert all(r["beats_controls"] is False for r in actual)


def test_a_class_that_two_targets_ask_for_is_judged_once():
    """As where a folder has maps of all predicted classes and, from a later run, of one of them."""
    result = judged(targets=[ClassScore(1), ClassScore(top_k=2)])
    keys = [(r["target"], r["method"], r["metric"]) for r in result.rows]
    assert {target for target, _, _ in keys} == {"ClassScore-class0", "ClassScore-class1"}
    assert len(keys) == len(set(keys)) == 2 * len(judged().rows)


def test_passes_are_counted_and_maps_that_cannot_be_judged_are_named():
    result = judged(["Saliency", "LRP"], METRICS[:2], [ClassScore(1, output="probability")], controls=False)
    assert {r["method"] for r in result.rows} == {"Saliency"}
    assert "linear" in result.failed["ClassScore-class1, LRP"]
    passes = {r["metric"].split("-")[0]: r["passes"] for r in result.rows}
    assert passes["RelevanceMass"] == 0
    assert passes["Deletion"] > 0


def test_metrics_of_one_name_are_refused():
    with pytest.raises(UsageError):
        Evaluator(Explainer(Linear()), ["Deletion", "Deletion"])


def test_masks_of_a_volume_that_is_one_voxel_thick():
    """(1, y, z) is a volume without a channel, not a slice with one."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.linspace(1, 2, 36, dtype=torch.float64).reshape(1, 6, 6))

        def forward(self, x):
            score = (x[:, 0] * self.w).sum((1, 2, 3))
            return torch.stack([-score, score], 1)

    image = MetaTensor(torch.rand(1, 1, 6, 6, dtype=torch.float64) + 0.5)
    label = torch.zeros(1, 6, 6)
    label[:, :3] = 1
    for mask in (label, label[None]):
        result = Evaluator(Explainer(Half()), ["RelevanceMass"], with_controls=False)(
            image, ["InputXGradient"], list(ONE), label=mask, body=torch.ones(1, 6, 6)
        )
        assert not result.failed
        assert 0.1 < result.rows[0]["value"] < 0.9
        assert {r["voxels"] for r in result.regions if r["region"] == "label 1"} == {18}


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "0.1", True])
def test_an_alarm_that_could_never_ring_is_refused(share):
    with pytest.raises(UsageError, match="share from 0 to 1"):
        Evaluator(Explainer(Linear()), outside_alarm=share)


def test_the_value_of_a_label_is_a_number_or_the_class():
    assert judged(metrics=["RelevanceMass"], label_value="1").rows[0]["value"] == pytest.approx(1.0)
    assert judged(metrics=["RelevanceMass"], label_value="class").rows[0]["value"] == pytest.approx(1.0)
    with pytest.raises(UsageError, match="label_value='klass'"):
        judged(label_value="klass")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("study")
    make_bundle(folder / "bundle")
    scan = nib.load(make_scan(folder / "scans" / "a.nii.gz"))
    (folder / "labels").mkdir()
    label = nib.Nifti1Image((scan.get_fdata() > 0.6).astype(np.uint8), scan.affine)
    nib.save(label, folder / "labels" / "a_label.nii.gz")
    return folder


def run(study: Path, command: str, output: str, *more: str) -> int:
    words = [command, "--bundle", study / "bundle", "--input", study / "scans", "--output", study / output, "-q", *more]
    return main([str(w) for w in words])


def rows_of(study: Path, output: str) -> dict[tuple[str, str, str], str]:
    with open(study / output / "metrics.csv", newline="", encoding="utf-8") as file:
        return {(r["target"], r["method"], r["metric"]): r["value"] for r in csv.DictReader(file)}


def test_the_command_judges_maps_from_disk_as_it_does_fresh_ones(study, capsys):
    what = ["--methods", "InputXGradient,Saliency", "--target", "MultiClassMask(class_index=1)"]
    how = ["--metrics", "RelevanceMass,PointingGame,Sparseness", "--label", str(study / "labels")]
    assert run(study, "explain", "maps", *what, "--no-pictures") == 0
    assert run(study, "evaluate", "fresh", *what, *how) == 0
    assert run(study, "evaluate", "disk", "--maps", str(study / "maps"), *how) == 0
    fresh, disk = rows_of(study, "fresh"), rows_of(study, "disk")
    assert fresh.keys() == disk.keys()
    assert len(fresh) == 5 * 3
    for key, value in fresh.items():
        assert float(disk[key]) == pytest.approx(float(value), rel=1e-5), key
    record = json.loads((study / "fresh" / "a" / "a_metrics.json").read_text(encoding="utf-8"))
    assert record["bundle"] == "Tiny brain"


def test_a_map_on_disk_that_cannot_be_read_leaves_the_others(study, capsys):
    what = ["--methods", "InputXGradient,Saliency", "--target", "MultiClassMask(class_index=1)"]
    assert run(study, "explain", "cut", *what, "--no-pictures") == 0
    (cut,) = (study / "cut" / "a").glob("*Saliency_attr.nii.gz")
    cut.write_bytes(b"cut")
    (study / "cut" / "other.json").write_text('{"case": "a", "map": "x.nii.gz", "status": "ok"}', encoding="utf-8")
    assert run(study, "evaluate", "rest", "--maps", str(study / "cut"), "--metrics", "Sparseness", "--no-controls") == 1
    assert {method for _, method, _ in rows_of(study, "rest")} == {"InputXGradient"}
    record = json.loads((study / "rest" / "a" / "a_metrics.json").read_text(encoding="utf-8"))
    ((name, why),) = record["failed"].items()
    assert name == "MultiClassMask-grey matter, Saliency"
    assert "was altered: its SHA-256" in why
    assert str(study) not in why.split(" (")[0]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--maps", "nowhere"], "no such folder"),
        (["--label", "nowhere.nii.gz"], "no such file"),
        (["--metrics", "PointingGam"], "PointingGame"),
        (["--regions", "{study}/scans", "--region-names", "liver"], "NUMBER=NAME"),
        (["--regions", "{study}/scans", "--region-names", "1"], "NUMBER=NAME"),
        (["--region-names", "1=liver"], "--regions or --label"),
        (["--label-value", "1"], "also give the label map by --label"),
        (
            ["--label", "{study}/labels", "--label-value", "klass"],
            "'klass' is neither a positive integer nor 'class'",
        ),
        (["--outside-alarm", "2"], "'2' is not a number from 0 to 1"),
        (["--label", "{study}/bundle/configs/inference.json"], "inference.json cannot be read as a label map"),
    ],
)
def test_errors_are_one_line(study, more, message, capsys):
    try:
        code = run(study, "evaluate", "wrong", *[m.format(study=study) for m in more])
    except SystemExit as stopped:  # by argparse
        code = stopped.code
    assert code in (1, 2)
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "Traceback" not in error


def test_the_table_of_metrics(capsys):
    assert main(["metrics"]) == 0
    text = capsys.readouterr().out
    assert "PointingGame" in text
    assert "higher is better; needs label" in text
    assert main(["metrics", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 25


def test_an_empty_target_is_reported_and_the_others_are_evaluated(study):
    image = MetaTensor(torch.rand(1, 8, 8, dtype=torch.float64))

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(1, 3, 1).double()
            nn.init.constant_(self.last.weight, 0.0)
            self.last.bias = nn.Parameter(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64))

        def forward(self, x):
            return self.last(x) + x * torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)[None, :, None, None]

    result = Evaluator(Explainer(Segments()), ["Sparseness"], with_controls=False)(
        image, ["InputXGradient"], [MultiClassMask(1), MultiClassMask(2)]
    )
    assert {r["target"] for r in result.rows} == {"MultiClassMask-class1"}
    assert "no voxel of the prediction" in result.empty["MultiClassMask-class2"]
    assert not result.failed
