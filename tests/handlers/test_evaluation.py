"""Evaluation inside an evaluator: the figures of the command, the predictions as they were, failures recorded."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

import esegeta_monai.bundle
from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.overlay import METRICS_OVERLAY, fitted_overlay, shipped_overlay
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.handlers import EvaluationHandler, ExplanationHandler
from esegeta_monai.metrics import Metric, MetricInput, MetricResult
from esegeta_monai.utils.distributed import Processes
from tests.handlers.test_explanation import Small, evaluator, loader, preprocessing, trainer
from tests.support import oblique

OVERLAY = Path(esegeta_monai.bundle.__file__).parent / METRICS_OVERLAY
METHODS, TARGET = ["Saliency", "InputXGradient"], "MultiClassMask(2)"
METRICS = ["Deletion(steps=3)", "Infidelity(n_samples=10)", "MaxSensitivity(n_samples=2)", "Sparseness"]


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    return [oblique.write_scan(tmp_path / "scans" / f"{name}.nii.gz", i) for i, name in enumerate(("alpha", "beta"))]


def handler(output: Path | str, **options: Any) -> EvaluationHandler:
    options = {"methods": METHODS, "targets": "MultiClassMask(1)", "metrics": METRICS, "controls": False, **options}
    return EvaluationHandler(output_dir=output, checks=False, **options)


def table(output: Path) -> list[dict[str, str]]:
    """All columns but how long it took."""
    with open(output / "metrics.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def record(output: Path, case: str) -> dict[str, Any]:
    return json.loads((output / case / f"{case}_metrics.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that has run with the overlay, without it, and been evaluated by the command."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("bundle")
    names = ("alpha", "beta")
    scans = [oblique.write_scan(folder / "scans" / f"{name}.nii.gz", i) for i, name in enumerate(names)]
    oblique.write(folder, oblique.config(scans, folder / "plain"))
    config = str(folder / "configs" / "inference.json")
    monai.bundle.run(config_file=config, bundle_root=str(folder))
    settings = {"explain_methods": METHODS, "explain_targets": TARGET, "explain_metrics": METRICS}
    monai.bundle.run(
        config_file=[config, str(OVERLAY)], bundle_root=str(folder), output_dir=str(folder / "overlay"), **settings
    )
    words = ["evaluate", "--bundle", folder, "--input", folder / "scans", "--output", folder / "command", "-q"]
    words += ["--methods", ",".join(METHODS), "--target", TARGET, "--metrics", ",".join(METRICS)]
    assert main([str(w) for w in words]) == 0
    return folder


def test_the_overlay_finds_what_the_command_finds_to_the_last_digit(judged: Path) -> None:
    actual, expected = table(judged / "overlay"), table(judged / "command")
    assert actual == expected
    assert len(actual) == 2 * 5 * len(METRICS)  # cases, methods and controls, metrics
    assert sum(bool(row["value"]) for row in actual) > 30
    for case in ("alpha", "beta"):
        a, b = record(judged / "overlay", case), record(judged / "command", case)
        assert a["curves"] == b["curves"]
        assert a["weights_sha256"] == b["weights_sha256"]
        assert (a["bundle"], a["configs_sha256"]) == (b["bundle"], b["configs_sha256"])
        regions = [(judged / f / case / f"{case}_regions.csv").read_bytes() for f in ("overlay", "command")]
        assert regions[0] == regions[1]


def test_predictions_are_bit_equal_with_and_without(judged: Path) -> None:
    for case in ("alpha", "beta"):
        with_overlay, without = (nib.load(judged / f / case / f"{case}_seg.nii.gz") for f in ("overlay", "plain"))
        assert np.asarray(with_overlay.dataobj).tobytes() == np.asarray(without.dataobj).tobytes()
        assert np.asarray(without.dataobj).any()


def test_both_overlays_in_one_run_and_the_report_shows_them(judged: Path) -> None:
    files = [str(judged / "configs" / "inference.json"), str(shipped_overlay()), str(OVERLAY)]
    settings = {"explain_methods": METHODS, "explain_targets": TARGET, "explain_metrics": METRICS}
    monai.bundle.run(
        config_file=files,
        bundle_root=str(judged),
        output_dir=str(judged / "both"),
        explain_report=True,
        **settings,
    )
    assert table(judged / "both") == table(judged / "command")
    report = (judged / "both" / "alpha" / "alpha_report.html").read_text(encoding="utf-8")
    assert "Infidelity" in report
    assert len(list((judged / "both").rglob("*_attr.nii.gz"))) == 4


def test_the_shipped_overlay_is_the_fitted_one_of_the_usual_ids(tmp_path: Path) -> None:
    parser = ConfigParser(oblique.config([], tmp_path))
    shipped = json.loads(OVERLAY.read_text(encoding="utf-8"))
    assert fitted_overlay(parser, BundleMetadata(oblique.METADATA), METRICS_OVERLAY) == shipped


def test_the_command_writes_the_overlay(judged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "some.json"
    assert main(["overlay", "--bundle", str(judged), "--metrics", "--output", str(output)]) == 0
    assert json.loads(output.read_text(encoding="utf-8")) == json.loads(OVERLAY.read_text(encoding="utf-8"))
    assert "--explain_metrics" in capsys.readouterr().out
    assert main(["overlay", "--metrics", "--path"]) == 0
    assert Path(capsys.readouterr().out.strip()) == OVERLAY


# ---- maps that an ExplanationHandler has just computed -----------------------------------------------------------


class Counted(Small):
    """How many windows have gone through it."""

    passes = 0

    def forward(self, x: Tensor) -> Any:
        self.passes += len(x)
        return super().forward(x)


LAYER = "GradCam(layer=first)"


TRACE = 2
"""Passes of the trace of layers, which runs once for a network; two runs make it twice."""


def passes(scans: list[Path], *handlers: Any, **options: Any) -> int:
    network = Counted()
    engine = evaluator(scans, network, **options)
    for one in handlers:
        one.attach(engine)
    engine.run()
    return network.passes


def explains(folder: Path, **options: Any) -> ExplanationHandler:
    options = {"methods": ["Saliency", LAYER], "targets": "MultiClassMask(1)", "pictures": False, **options}
    return ExplanationHandler(output_dir=folder, checks=False, **options)


def judges(output: Path, **options: Any) -> EvaluationHandler:
    """By a metric that never asks the network."""
    return handler(output, **{"methods": ["Saliency", LAYER], "metrics": "Sparseness", **options})


def test_maps_that_were_just_computed_are_judged_as_they_are(scans: list[Path], tmp_path: Path) -> None:
    """No window goes through the network for judging, and the figures are those of judging alone."""
    explained = passes(scans, explains(tmp_path / "maps"))
    assert passes(scans, judges(tmp_path / "alone")) > passes(scans)
    assert passes(scans, explains(tmp_path / "both"), judges(tmp_path / "both")) == explained
    assert table(tmp_path / "both") == table(tmp_path / "alone")
    for case in ("alpha", "beta"):
        files = [tmp_path / f / case / f"{case}_regions.csv" for f in ("both", "alone")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_metrics_that_explain_again_find_the_same(scans: list[Path], tmp_path: Path) -> None:
    more = {"methods": "Saliency", "metrics": ["MaxSensitivity(n_samples=2)", "Deletion(steps=3)"], "controls": True}
    alone = passes(scans, judges(tmp_path / "alone", **more))
    both = passes(scans, explains(tmp_path / "both", methods="Saliency"), judges(tmp_path / "both", **more))
    assert both == alone
    assert table(tmp_path / "both") == table(tmp_path / "alone")


@pytest.mark.parametrize(
    "other",
    [
        {"methods": ["Saliency(abs=False)", "InputXGradient"]},
        {"targets": "MultiClassMask(0)"},
        {"targets": "MultiClassMask(1, output=probability)"},
        {"seed": 1},
        {"output": 0},
        {"cases": ["nobody"]},
    ],
    ids=str,
)
def test_what_is_not_the_same_in_all_is_computed(scans: list[Path], tmp_path: Path, other: dict[str, Any]) -> None:
    alone = passes(scans, judges(tmp_path / "alone")) - passes(scans)
    explained = passes(scans, explains(tmp_path / "maps", **other))
    # the trace is made again for another output, and not at all without a layer method or a case
    shared = TRACE if {"methods", "cases", "output"}.isdisjoint(other) else 0
    assert passes(scans, explains(tmp_path / "both", **other), judges(tmp_path / "both")) == explained + alone - shared
    assert table(tmp_path / "both") == table(tmp_path / "alone")


def test_maps_that_were_finished_before_are_computed(scans: list[Path], tmp_path: Path) -> None:
    alone = passes(scans, judges(tmp_path / "alone"))
    passes(scans, explains(tmp_path / "maps"))
    again = passes(scans, explains(tmp_path / "maps"), judges(tmp_path / "maps"))
    assert again == alone
    assert table(tmp_path / "maps") == table(tmp_path / "alone")


def test_no_map_of_another_epoch_is_judged(scans: list[Path], tmp_path: Path) -> None:
    """Weights change between the epochs; only the first epoch is explained."""

    def run(*handlers: Any) -> None:
        torch.manual_seed(0)
        engine = trainer(scans, Small(), 2)
        for one in handlers:
            one.attach(engine)
        engine.run()

    fixed = {"methods": "Saliency", "targets": "Box(class_index=1, start=(0, 0, 0), stop=(2, 2, 2))"}
    run(judges(tmp_path / "alone{epoch}", **fixed))
    run(explains(tmp_path / "maps", epochs=2, **fixed), judges(tmp_path / "both{epoch}", **fixed))
    tables = [table(tmp_path / f"{kind}{epoch}") for kind in ("alone", "both") for epoch in (1, 2)]
    assert tables[:2] == tables[2:]
    assert tables[0] != tables[1]


def test_maps_that_another_process_lacks_are_computed_by_all(
    scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else those that compute would wait for those that do not."""
    alone = passes(scans, judges(tmp_path / "alone")) - passes(scans)
    explained = passes(scans, explains(tmp_path / "maps"))
    monkeypatch.setattr(Processes, "gather", lambda self, value: [value, False] if value is True else [value])
    assert passes(scans, explains(tmp_path / "both"), judges(tmp_path / "both")) == explained + alone - TRACE


def test_a_judge_that_comes_first_computes_its_maps(scans: list[Path], tmp_path: Path) -> None:
    alone = passes(scans, judges(tmp_path / "alone")) - passes(scans)
    explained = passes(scans, explains(tmp_path / "maps"))
    assert passes(scans, judges(tmp_path / "both"), explains(tmp_path / "both")) == explained + alone - TRACE


# ---- labels ------------------------------------------------------------------------------------------------------


def labelled(scans: list[Path], label: Any) -> Any:
    """A loader whose data has a label, made of the image by ``label``."""
    data = loader(scans)
    before = preprocessing()

    def with_label(item: Mapping[str, Any]) -> dict[str, Any]:
        made = dict(before(item))
        return {**made, "label": label(made["image"])}

    data.dataset.transform = with_label
    return data


def bright(image: Tensor) -> Tensor:
    return (image > 1.2).float()


def test_the_label_of_the_data_marks_the_cause(scans: list[Path], tmp_path: Path) -> None:
    data = labelled(scans, bright)
    engine = evaluator(scans, Small(), val_data_loader=data)
    handler(tmp_path, metrics=["RelevanceMass", "PointingGame"]).attach(engine)
    engine.run()
    rows = {(r["case"], r["method"]): r["value"] for r in table(tmp_path) if r["metric"] == "RelevanceMass"}
    network, image = Small().eval(), data.dataset[0]["image"].as_tensor()[None].requires_grad_(True)
    out = engine.inferer(image, network)
    (gradient,) = torch.autograd.grad(out[0, 1][out[0].argmax(0) == 1].sum(), image)
    magnitude, inside = gradient.abs()[0, 0].double(), data.dataset[0]["label"][0] > 0
    assert float(rows["alpha", "Saliency"]) == pytest.approx(float(magnitude[inside].sum() / magnitude.sum()), rel=1e-5)
    with open(tmp_path / "alpha" / "alpha_regions.csv", newline="", encoding="utf-8") as file:
        assert "label 1" in {row["region"] for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("label", "problem"),
    [(lambda image: torch.tensor(1), None), (lambda image: torch.cat([image > 1, image <= 1]).float(), "one-hot")],
)
def test_a_label_without_a_map_is_ignored_and_an_unreadable_one_reported(
    scans: list[Path], tmp_path: Path, label: Any, problem: str | None
) -> None:
    engine = evaluator(scans[:1], Small(), val_data_loader=labelled(scans[:1], label))
    handler(tmp_path, metrics=None, methods="Saliency").attach(engine)
    engine.run()
    assert {r["metric"] for r in table(tmp_path)} >= {"Infidelity", "Sparseness"}
    assert not [r for r in table(tmp_path) if r["metric"] == "PointingGame"]
    failed = record(tmp_path, "alpha")["failed"]
    assert failed == {} if problem is None else problem in failed["label"]


# ---- failures, epochs ---------------------------------------------------------------------------------------------


class Breaks(Metric):
    """Fails on every second map."""

    group = "complexity"
    higher_is_better = True
    meaning = "nothing"
    calls = 0

    def measure(self, subject: MetricInput) -> MetricResult:
        Breaks.calls += 1
        if Breaks.calls % 2:
            raise ZeroDivisionError("injected")
        return MetricResult(1.0)


class Stumbles(nn.Module):
    """A network that fails when it is asked again about the first case."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.asked = Small(), 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            self.asked += 1
            if self.asked == 1:
                raise RuntimeError("stumbled")
        return self.inner(x)


def test_what_fails_is_recorded_and_the_run_goes_on(
    scans: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = evaluator(scans, Stumbles())
    handler(tmp_path, methods="Saliency", metrics=[Breaks(), "Sparseness"], name="my.logger").attach(engine)
    with caplog.at_level(logging.INFO):
        engine.run()
    assert "stumbled" in record(tmp_path, "alpha")["failed"]["MultiClassMask-class1, Saliency"]
    result = {(r["method"], r["metric"]): r for r in record(tmp_path, "beta")["metrics"]}
    assert result["Saliency", "Breaks"]["status"] == "failed"
    assert "ZeroDivisionError: injected" in result["Saliency", "Breaks"]["reason"]
    assert result["Saliency", "Sparseness"]["status"] == "ok"
    reported = [r.getMessage() for r in caplog.records if r.name == "my.logger"]
    assert [line for line in reported if "stumbled" in line]
    assert [line for line in reported if "injected" in line]
    assert "2 case(s) evaluated" in reported[-1]


def test_epochs_and_cases_as_the_explanation_handler(scans: list[Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    engine = trainer(scans, Small(), 3)
    handler(
        f"{tmp_path}/epoch{{epoch:02d}}", epochs=2, cases=["beta"], metrics="Sparseness",
        targets="Box(class_index=1, start=(0, 0, 0), stop=(2, 2, 2))",
    ).attach(engine)  # fmt: skip
    engine.run()
    assert engine.network.training
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("epoch")) == ["epoch01", "epoch03"]
    values = [{r["case"]: r["value"] for r in table(tmp_path / f"epoch{n}")} for n in ("01", "03")]
    assert set(values[0]) == set(values[1]) == {"beta"}
    assert values[0] != values[1]


@pytest.mark.parametrize("option", [{"metrics": "Deletio"}, {"metrics": ["Deletion", "Deletion"]}, {"controls": "?"}])
def test_wrong_options_are_refused_at_construction(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        handler(tmp_path, **option)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("region_names", v) for v in ("1=liver", ["liver"], {"liver": 1})),
        *(("label_value", v) for v in ("klass", 1.5)),
        *(("outside_alarm", v) for v in (2, "0.2")),
    ],
)
def test_wrong_settings_are_refused_before_the_run(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=option):
        handler(tmp_path, **{option: value})
