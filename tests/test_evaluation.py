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
from esegeta_monai.cli import main
from esegeta_monai.commands.evaluate import to_network_grid
from esegeta_monai.errors import UsageError
from esegeta_monai.evaluation import Evaluator
from esegeta_monai.evaluation_writer import COLUMNS, REGION_COLUMNS, EvaluationWriter
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support_cli import make_bundle, make_scan

METRICS = [
    "RelevanceMass",
    "Deletion(features='grid(size=2)', baseline='zero')",
    "Infidelity(n_samples=20, baseline='zero')",
    "Sparseness",
]


class Linear(nn.Module):
    """Class 1 is ``w · x`` with w in one corner, so that the cause is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.zeros(8, 8, dtype=torch.float64)
        self.w[:4, :4] = torch.linspace(1, 2, 16, dtype=torch.float64).reshape(4, 4)
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x):
        score = (x[:, 0] * self.w).sum((1, 2))
        return torch.stack([-score, score], 1)


ONE = (ClassScore(1),)


def judged(methods=("InputXGradient",), metrics=METRICS, targets=ONE, **more):
    image = MetaTensor(torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5)
    label = torch.zeros(8, 8)
    label[:4, :4] = 1
    evaluator = Evaluator(
        Explainer(Linear(), on_error="record"), list(metrics), with_controls=more.pop("controls", True)
    )
    return evaluator(image, list(methods), list(targets), label=label, **more)


def test_the_exact_map_beats_the_controls_and_a_zero_map_does_not():
    found = judged()
    rows = {(r["method"], r["metric"].split("-")[0]): r for r in found.rows}
    assert not found.failed
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
    found = judged(maps=zeros)
    mine = [r for r in found.rows if r["method"] == "InputXGradient" and r["metric"] != "Sparseness"]
    assert mine
    assert all(r["beats_controls"] is False for r in mine)


def test_passes_are_counted_and_maps_that_cannot_be_judged_are_named():
    found = judged(["Saliency", "LRP"], METRICS[:2], [ClassScore(1, output="probability")], controls=False)
    assert {r["method"] for r in found.rows} == {"Saliency"}
    assert "linear" in found.failed["ClassScore-class1, LRP"]
    passes = {r["metric"].split("-")[0]: r["passes"] for r in found.rows}
    assert passes["RelevanceMass"] == 0
    assert passes["Deletion"] > 0


def test_metrics_of_one_name_are_refused():
    with pytest.raises(UsageError):
        Evaluator(Explainer(Linear()), ["Deletion", "Deletion"])


def test_the_table_is_tidy_and_grows_by_cases(tmp_path):
    found = judged()
    writer = EvaluationWriter(tmp_path, [], [], {"bundle": "none"})
    for case in ("a", "b", "a"):
        writer.write(case, found)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == COLUMNS
    assert [r["case"] for r in table] == ["b"] * len(found.rows) + ["a"] * len(found.rows)
    assert float(table[0]["value"]) == found.rows[0]["value"]
    record = json.loads((tmp_path / "a" / "a_metrics.json").read_text(encoding="utf-8"))
    assert record["bundle"] == "none"
    (curve,) = [c for c in record["curves"] if c["method"] == "InputXGradient" and c["metric"].startswith("Deletion")]
    assert len({len(v) for v in curve.values() if isinstance(v, list)}) == 1
    with open(tmp_path / "a" / "a_regions.csv", newline="") as file:
        regions = list(csv.DictReader(file))
    assert tuple(regions[0]) == REGION_COLUMNS
    assert {"all", "label 1", "body"} <= {r["region"] for r in regions}


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


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--maps", "nowhere"], "no such folder"),
        (["--label", "nowhere.nii.gz"], "no such file"),
        (["--metrics", "PointingGam"], "PointingGame"),
        (["--regions", "{study}/scans", "--region-names", "liver"], "NUMBER=NAME"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(study, more, said, capsys):
    code = run(study, "evaluate", "wrong", *[m.format(study=study) for m in more])
    assert code in (1, 2)
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "Traceback" not in error


def test_the_table_of_metrics(capsys):
    assert main(["metrics"]) == 0
    text = capsys.readouterr().out
    assert "PointingGame" in text
    assert "higher is better; needs label" in text
    assert main(["metrics", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) > 25


def test_a_map_on_the_scans_grid_keeps_its_sum_on_the_networks():
    """A smooth additive map at 1 mm, brought to 2 mm."""
    axes = [torch.linspace(-2, 2, n, dtype=torch.float64) for n in (32, 24, 28)]
    smooth = torch.exp(-4 * sum(a**2 for a in torch.meshgrid(*axes, indexing="ij")))[None]
    values = MetaTensor(smooth, affine=torch.eye(4, dtype=torch.float64))
    there = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    there[:3, 3] = 0.5
    image = MetaTensor(torch.zeros(1, 16, 12, 14), affine=there)
    moved = to_network_grid(values, image, additive=True)
    assert moved.shape == image.shape
    assert float(moved.sum()) == pytest.approx(float(smooth.sum()), rel=1e-2)
    same = to_network_grid(values, MetaTensor(torch.zeros(1, 32, 24, 28)), additive=True)
    assert torch.equal(same, smooth)


def test_an_empty_target_is_told_and_the_others_are_judged(study):
    image = MetaTensor(torch.rand(1, 8, 8, dtype=torch.float64))

    class Segments(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(1, 3, 1).double()
            nn.init.constant_(self.last.weight, 0.0)
            self.last.bias = nn.Parameter(torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64))

        def forward(self, x):
            return self.last(x) + x * torch.tensor([0.0, 0.1, 0.0], dtype=torch.float64)[None, :, None, None]

    found = Evaluator(Explainer(Segments()), ["Sparseness"], with_controls=False)(
        image, ["InputXGradient"], [MultiClassMask(1), MultiClassMask(2)]
    )
    assert {r["target"] for r in found.rows} == {"MultiClassMask-class1"}
    assert "no voxel of the prediction" in found.empty["MultiClassMask-class2"]
    assert not found.failed
