"""The cost of an evaluation, known before it begins; the quick set; numbers repeated from the files of a case."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.explain.evaluation_costs import Steps
from esegeta_monai.explain.metric_choice import METRIC_SETS, WITH_LABEL, chosen_metrics, metrics_for
from esegeta_monai.metrics import METRICS
from esegeta_monai.targets import MultiClassMask
from tests.explain.repeat_metrics import repeat
from tests.support.cli import make_bundle, make_scan

ROOT = Path(__file__).parents[2]


class Segments(nn.Module):
    """Counts the windows that pass through it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1)).double()
        self.windows = 0

    def forward(self, x):
        self.windows += len(x)
        return self.layers(x)


def setting():
    network = Segments()
    image = MetaTensor(torch.rand(2, 24, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    with torch.no_grad():  # so that each class is predicted somewhere
        network.layers[-1].bias -= network.layers(image.as_tensor()[None]).mean((0, 2, 3))
    return network, Explainer(network, SlidingWindowInferer((16, 16), 2, 0.5)), image


ONCE = sorted(
    metric.__name__ for metric in METRICS if metric.__name__ != "DataRandomisation"
)  # which needs a second network


@pytest.mark.parametrize("metric", ONCE)
def test_no_metric_takes_more_passes_than_it_states(metric):
    """With a map of distinct values, whose parts are drawn once; the passes are counted by the network itself."""
    network, explainer, image = setting()
    given = {"label": torch.ones(24, 24)} if "label" in {m.__name__: m for m in METRICS}[metric].needs else {}
    evaluator = Evaluator(explainer, [metric], with_controls=False)
    (cost,) = evaluator.costs(image, ["InputXGradient"], [MultiClassMask(1)], label=bool(given))
    assert not cost.unknown
    network.windows = 0
    evaluator.costs(image, ["InputXGradient"], [MultiClassMask(1)])
    overhead = network.windows  # the prediction, and the timed pass
    network.windows = 0
    result = evaluator(image, ["InputXGradient"], [MultiClassMask(1)], **given)
    (row,) = result.rows
    assert row["status"] in ("ok", "undefined"), row["reason"]
    measured = network.windows - overhead
    stated = cost.map_passes + cost.metric_passes
    assert measured <= stated
    if cost.metric_passes and metric != "IROF":  # the image is too small for its number of supervoxels
        assert stated <= 4 * measured  # an estimate that is much too high would deter


def test_controls_and_targets_are_in_the_estimate_and_given_maps_are_not():
    _, explainer, image = setting()
    evaluator = Evaluator(explainer, ["Deletion", "Entropy"])
    (cost,) = evaluator.costs(image, ["Saliency"], [MultiClassMask(1), MultiClassMask(0)], given=True)
    assert (cost.targets, cost.maps, cost.metrics, cost.map_passes) == (2, 2 * 4, 2, 0)
    (alone,) = Evaluator(explainer, ["Deletion", "Entropy"], with_controls=False).costs(
        image, ["Saliency"], [MultiClassMask(1)]
    )
    assert alone.map_passes > 0
    assert cost.metric_passes > 6 * alone.metric_passes
    assert cost.seconds > 0


def test_nothing_is_measured_for_an_estimate():
    """Every metric costs as many passes here as one that never runs the network: prediction and the timed batch."""
    counted = []
    for metrics in (["Entropy"], "all"):
        network, explainer, image = setting()
        Evaluator(explainer, metrics).costs(image, ["Saliency"], [MultiClassMask(1)])
        counted.append(network.windows)
    assert counted[0] == counted[1] > 0


def test_metrics_that_share_explanations_are_counted_once():
    _, explainer, image = setting()
    one, two = (
        Evaluator(explainer, metrics).costs(image, ["Saliency"], [MultiClassMask(1)])[0].metric_passes
        for metrics in (["MaxSensitivity"], ["MaxSensitivity", "AverageSensitivity"])
    )
    assert one == two


def test_a_metric_of_ones_own_without_a_cost_is_named():
    from esegeta_monai.metrics import Metric, MetricResult

    class Mine(Metric):
        group = "faithfulness"
        higher_is_better = True
        meaning = "One."
        needs = frozenset({"objective"})

        def measure(self, subject):
            return MetricResult(1.0)

    _, explainer, image = setting()
    (cost,) = Evaluator(explainer, [Mine()]).costs(image, ["Saliency"], [MultiClassMask(1)])
    assert cost.unknown == ("Mine",)
    assert "Mine (unknown)" in str(cost)


@pytest.mark.parametrize("choice", ["quick", "full", None, " Full "])
def test_sets_have_the_metrics_of_labels_only_with_a_label(choice):
    name = chosen_metrics(choice)
    assert name == (choice or "quick").strip().lower()
    without = [type(m).__name__ for m in metrics_for(name, label=False)]
    assert [text.split("(")[0] for text in METRIC_SETS[name]] == without
    assert [type(m).__name__ for m in metrics_for(name, label=True)] == [*without, *WITH_LABEL]


def test_the_quick_set_takes_fewer_passes_than_the_full_one():
    _, explainer, image = setting()
    quick, full = (
        Evaluator(explainer, name).costs(image, ["Saliency"], [MultiClassMask(1)])[0].metric_passes
        for name in ("quick", "full")
    )
    assert quick * 10 < full


def test_progress_is_logged_without_a_terminal(caplog):
    caplog.set_level("INFO", "esegeta_monai")
    steps = Steps(3)
    steps.measured("a")
    assert not caplog.records
    steps._shown -= 11
    steps.measured("MultiClassMask, Saliency, Entropy")
    assert "2 of 3 values" in caplog.text
    assert "Saliency, Entropy" in caplog.text


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    make_bundle(folder / "bundle")
    scan = nib.load(make_scan(folder / "a.nii.gz"))
    label = nib.Nifti1Image((scan.get_fdata() > 0.6).astype(np.uint8), scan.affine)
    nib.save(label, folder / "a_label.nii.gz")
    what = ["--methods", "InputXGradient,Saliency", "--target", "MultiClassMask(class_index=1)", "--no-pictures"]
    assert run(folder, "explain", "maps", *what) == 0
    return folder


def run(folder: Path, command: str, output: str, *more: str) -> int:
    words = [command, "--bundle", folder / "bundle", "--input", folder / "a.nii.gz", "--output", folder / output]
    return main([*map(str, words), "-q", *more])


def test_a_dry_run_writes_nothing_and_states_the_passes(study, capsys):
    assert run(study, "evaluate", "dry", "--maps", str(study / "maps"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert not (study / "dry").exists()
    header, case, total = printed.splitlines()
    assert header.split()[:2] == ["case", "targets"]
    assert case.split()[:5] == ["a", "1", "5", "3", "0"]
    assert total.startswith("At most about")


def test_the_numbers_of_a_case_are_repeated_from_its_files_by_another_program(study, capsys):
    label = study / "a_label.nii.gz"
    assert run(study, "evaluate", "judged", "--maps", str(study / "maps"), "--label", str(label)) == 0
    file = study / "judged" / "a" / "a_metrics.json"
    words = [study / "bundle", study / "a.nii.gz", study / "maps" / "a", file, label]
    done = subprocess.run(
        [sys.executable, "-m", "tests.explain.repeat_metrics", *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 2 * 4  # two methods; Infidelity, Sparseness, Entropy, RelevanceMass

    record = json.loads(file.read_text(encoding="utf-8"))
    record["metrics"] = [row | {"value": row["value"] * 1.001} for row in record["metrics"]]
    changed = repeat(*words[:3], record, label)
    assert not any(one.agrees for one in changed)
    (study / "maps" / "a" / record["sources"]["maps"][0]["map"]).write_bytes(b"another")
    with pytest.raises(ValueError, match="not the file that was evaluated"):
        repeat(*words[:3], record, label)


def test_a_set_among_metrics_is_refused_by_name():
    for metrics in ("full,Completeness", ["Completeness", "full"]):
        with pytest.raises(UsageError, match="'full' is a set of metrics and stands alone"):
            chosen_metrics(metrics)
