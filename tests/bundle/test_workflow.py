"""Bundles whose ids differ: the overlay that fits, the workflow, the tracking file and the merged config."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

import esegeta_monai.bundle
from esegeta_monai.bundle import ExplainWorkflow
from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.overlay import fitted_overlay, multi_gpu_overlay, shipped_overlay
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from tests.support import oblique

TRACKING = Path(esegeta_monai.bundle.__file__).parent / "tracking.json"
SMALL = {"explain_targets": "MultiClassMask(2)", "explain_methods": "Saliency"}
Change = Callable[[dict[str, Any]], None]


def as_it_is(config: dict[str, Any]) -> None:
    """The usual ids."""


def val_handlers(config: dict[str, Any]) -> None:
    config["val_handlers"] = config.pop("handlers")
    config["evaluator"]["val_handlers"] = "@val_handlers"


def inline(config: dict[str, Any]) -> None:
    config["evaluator"]["val_handlers"] = config.pop("handlers")


def expression(config: dict[str, Any]) -> None:
    config["evaluator"]["val_handlers"] = "$@handlers[:1]"


def other_names(config: dict[str, Any]) -> None:
    config["evaluating"] = config.pop("run")
    config["where"] = config.pop("output_dir")
    config["postprocessing"]["transforms"][-1]["output_dir"] = "@where"


def none(config: dict[str, Any]) -> None:
    """No handlers at all: the checkpoint is loaded in `initialize`."""
    config["loader"] = config.pop("handlers")[0]
    del config["evaluator"]["val_handlers"]
    config["initialize"] = ["$@loader(@evaluator)"]


CHANGES = (as_it_is, val_handlers, inline, expression, other_names, none)


def make(tmp_path: Path, change: Change) -> Path:
    scan = oblique.write_scan(tmp_path / "scans" / "alpha.nii.gz")
    config = oblique.config([scan], tmp_path / "eval")
    change(config)
    return oblique.write(tmp_path / "bundle", config)


def reference(tmp_path: Path, scan: Path) -> np.ndarray:
    """The map that the usual bundle gives."""
    folder = oblique.write(tmp_path / "usual", oblique.config([scan], tmp_path / "usual_eval"))
    files = [str(folder / "configs" / "inference.json"), str(shipped_overlay())]
    monai.bundle.run(config_file=files, bundle_root=str(folder), **SMALL)
    (result,) = (tmp_path / "usual_eval").rglob("*_attr.nii.gz")
    return np.asarray(nib.load(result).dataobj)


def the_map(folder: Path) -> np.ndarray:
    (result,) = folder.rglob("*_attr.nii.gz")
    return np.asarray(nib.load(result).dataobj)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_fitted_overlay_explains(tmp_path: Path, change: Change, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path, change)
    assert main(["overlay", "--bundle", str(folder)]) == 0
    reported = capsys.readouterr().out
    assert "1 shell, 2 core" in reported
    assert "windows (12, 12, 12)" in reported or "windows [12, 12, 12]" in reported
    run_id = "evaluating" if change is other_names else "run"
    if run_id != "run":
        assert f"monai.bundle run {run_id}" in reported
    files = [str(folder / "configs" / name) for name in ("inference.json", "explain.json")]
    maps = tmp_path / "maps"
    monai.bundle.run(run_id=run_id, config_file=files, bundle_root=str(folder), explain_output_dir=str(maps), **SMALL)
    np.testing.assert_array_equal(the_map(maps), reference(tmp_path, tmp_path / "scans" / "alpha.nii.gz"))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_the_workflow_explains(tmp_path: Path, change: Change) -> None:
    folder, maps = make(tmp_path, change), tmp_path / "maps"
    workflow = ExplainWorkflow(
        str(folder / "configs" / "inference.json"),
        bundle_root=str(folder),
        explain_output_dir=str(maps),
        **{**SMALL, "explain_handler#pictures": False},
    )
    assert workflow.run_id == ("evaluating" if change is other_names else "run")
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    assert not list(maps.rglob("*.png"))
    np.testing.assert_array_equal(the_map(maps), reference(tmp_path, tmp_path / "scans" / "alpha.nii.gz"))


def test_the_bundles_own_handlers_stay_first(tmp_path: Path) -> None:
    for change in (as_it_is, val_handlers, inline, expression):
        folder = make(tmp_path / change.__name__, change)
        parser = ConfigParser()
        parser.read_config(str(folder / "configs" / "inference.json"))
        workflow = ExplainWorkflow(str(folder / "configs" / "inference.json"), bundle_root=str(folder))
        workflow.initialize()
        handlers = workflow.parser.get_parsed_content("evaluator#val_handlers")
        assert [type(h).__name__ for h in handlers] == ["CheckpointLoader", "ExplanationHandler"], change


def test_the_shipped_overlay_is_the_fitted_one_of_the_usual_ids(tmp_path: Path) -> None:
    parser = ConfigParser(oblique.config([], tmp_path))
    shipped = json.loads(shipped_overlay().read_text(encoding="utf-8"))
    assert fitted_overlay(parser, BundleMetadata(oblique.METADATA)) == shipped
    tracking = json.loads(TRACKING.read_text(encoding="utf-8"))["configs"]
    assert tracking["evaluator"] == shipped["explain_handler"]
    settings = {k: v for k, v in shipped.items() if k not in ("explain_handler", "+handlers")}
    assert settings.items() <= tracking.items()


@pytest.mark.parametrize("change", [as_it_is, none], ids=lambda change: change.__name__)
def test_the_tracking_file_explains(tmp_path: Path, change: Change) -> None:
    folder, maps = make(tmp_path, change), tmp_path / "maps"
    config = str(folder / "configs" / "inference.json")
    monai.bundle.run(
        config_file=config, bundle_root=str(folder), tracking=str(TRACKING), explain_output_dir=str(maps), **SMALL
    )
    np.testing.assert_array_equal(the_map(maps), reference(tmp_path, tmp_path / "scans" / "alpha.nii.gz"))
    assert json.loads(
        (folder / "configs" / "inference.json").read_text(encoding="utf-8")
    )  # and nothing was written into it
    assert not list((tmp_path / "eval").glob("config_*.json"))


@pytest.mark.slow
def test_run_workflow_on_the_command_line(tmp_path: Path) -> None:
    folder, maps = make(tmp_path, none), tmp_path / "maps"
    command = [
        *(sys.executable, "-m", "monai.bundle", "run_workflow", "esegeta_monai.bundle.ExplainWorkflow"),
        *("--bundle_root", ".", "--explain_methods", "Saliency", "--explain_targets", "MultiClassMask('core')"),
        *("--explain_output_dir", str(maps)),
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.any(the_map(maps))


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_merge_writes_one_config(tmp_path: Path, change: Change) -> None:
    folder, maps = make(tmp_path, change), tmp_path / "maps"
    merged = folder / "configs" / "merged.json"
    assert main(["merge", "--bundle", str(folder), "--output", str(merged), "--override", "maximum=0.5"]) == 0
    content = json.loads(merged.read_text(encoding="utf-8"))
    assert content["maximum"] == 0.5
    assert not [key for key in content if key.startswith("+")]
    assert str(tmp_path / "bundle") not in merged.read_text(encoding="utf-8")
    run_id = "evaluating" if change is other_names else "run"
    monai.bundle.run(
        run_id=run_id, config_file=str(merged), bundle_root=str(folder), explain_output_dir=str(maps), **SMALL
    )
    assert np.any(the_map(maps))
    assert main(["merge", "--bundle", str(folder), "--output", str(merged)]) == 2  # never over another file


def test_merge_of_files_of_ones_own(tmp_path: Path) -> None:
    folder = make(tmp_path, as_it_is)
    (tmp_path / "more.json").write_text(
        json.dumps({"+handlers": [{"_target_": "StatsHandler"}], "batch_size": 2}), encoding="utf-8"
    )
    merged = tmp_path / "merged.json"
    add = ["--add", str(tmp_path / "more.json")]
    assert main(["merge", "--bundle", str(folder), *add, "--output", str(merged)]) == 0
    content = json.loads(merged.read_text(encoding="utf-8"))
    assert [h["_target_"] for h in content["handlers"]] == ["CheckpointLoader", "StatsHandler"]
    assert content["batch_size"] == 2
    assert main(["merge", "--bundle", str(folder), "--add", "nowhere.json", "--output", str(tmp_path / "x.json")]) == 2


def test_a_config_without_an_evaluator_is_refused() -> None:
    with pytest.raises(UsageError, match="builds no evaluator"):
        fitted_overlay(ConfigParser({"network": {"_target_": "UNet"}}), BundleMetadata({}))


def test_an_evaluator_of_another_name() -> None:
    parser = ConfigParser({"engine": {"_target_": "scripts.Vista3dEvaluator", "val_handlers": "@hooks"}, "hooks": []})
    assert fitted_overlay(parser, BundleMetadata({}))["+hooks"] == ["@explain_handler"]


@pytest.mark.parametrize(
    ("outputs", "chosen"),
    [
        ({"pred": {"format": "segmentation"}}, None),
        ({"pred": {}, "aux": {}}, None),
        ({"distance": {"format": "regression"}, "nuclei": {"format": "segmentation"}}, "nuclei"),
        ({"distance": {"format": "regression"}, "more": {}}, "distance"),
        ({}, None),
    ],
)
def test_which_of_several_outputs(outputs: dict[str, Any], chosen: str | None) -> None:
    metadata = BundleMetadata({"network_data_format": {"outputs": outputs}})
    assert metadata.explained_output == chosen
    overlay = fitted_overlay(ConfigParser({"evaluator": {"_target_": "SupervisedEvaluator"}}), metadata)
    assert overlay["explain_output"] == chosen


def test_a_regression_is_explained_by_its_value() -> None:
    metadata = BundleMetadata({"network_data_format": {"outputs": {"pred": {"type": "tuples", "format": "points"}}}})
    overlay = fitted_overlay(ConfigParser({"evaluator": {"_target_": "SupervisedEvaluator"}}), metadata)
    assert overlay["explain_targets"] == ["OutputValue(channel=0)"]


@pytest.mark.parametrize("inside", [False, True])
def test_the_multi_gpu_overlay_finds_the_data_loader(
    tmp_path: Path, inside: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is called; one process alone runs it too. An overlay that was written before is no obstacle, unless
    somebody has changed it."""
    config = oblique.config([oblique.write_scan(tmp_path / "a.nii.gz")], tmp_path / "eval")
    config["loads"] = config.pop("dataloader")
    config["evaluator"]["val_data_loader"] = config.pop("loads") if inside else "@loads"
    folder = oblique.write(tmp_path / "bundle", config)
    assert main(["overlay", "--bundle", str(folder)]) == 0
    assert main(["overlay", "--bundle", str(folder), "--multi-gpu"]) == 0
    assert "torchrun --nproc_per_node NUMBER_OF_GPUS -m monai.bundle run" in capsys.readouterr().out
    written = json.loads((folder / "configs" / "multi_gpu_explain.json").read_text(encoding="utf-8"))
    where = "evaluator#val_data_loader" if inside else "loads"
    assert written[f"{where}#sampler"] == "@explain_sampler"
    assert written["explain_sampler"]["dataset"] == f"@{where}#dataset"
    for name in ("explain.json", "multi_gpu_explain.json"):
        own = {**json.loads((folder / "configs" / name).read_text(encoding="utf-8")), "explain_seed": 7}
        (folder / "configs" / name).write_text(json.dumps(own), encoding="utf-8")
        assert main(["overlay", "--bundle", str(folder), "--multi-gpu"]) == 2
        assert json.loads((folder / "configs" / name).read_text(encoding="utf-8")) == own
        (folder / "configs" / name).unlink()
    assert main(["overlay", "--output", str(tmp_path / "x.json"), "--multi-gpu"]) == 2


def test_a_data_loader_that_the_config_does_not_show_is_refused() -> None:
    with pytest.raises(UsageError, match="--share windows"):
        multi_gpu_overlay(ConfigParser({"evaluator": {"val_data_loader": "$make_loader()"}}))


def test_the_transforms_of_label_and_deploy_explain_without_ignite(tmp_path: Path) -> None:
    folder = make(tmp_path, as_it_is)
    add = str(TRACKING.with_name("explain_transforms.json"))
    merged = folder / "configs" / "merged.json"
    assert main(["merge", "--bundle", str(folder), "--add", add, "--output", str(merged)]) == 0
    reader = esegeta_monai.bundle.BundleReader(folder, "configs/merged.json")
    scan = tmp_path / "scans" / "alpha.nii.gz"
    data = reader.preprocessing({"image": str(scan)})
    with torch.no_grad():
        data["pred"] = reader.inferer(data["image"][None], reader.network)[0]
        reader.postprocessing(data)
    (path,) = (folder / "explained").rglob("*_explanation.nii.gz")
    image, source = nib.load(path), nib.load(scan)
    assert image.shape == source.shape
    np.testing.assert_allclose(image.affine, source.affine, atol=1e-5)
    assert np.any(np.asarray(image.dataobj))
