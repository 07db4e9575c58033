"""A bundle whose network ends in a sigmoid: every interface explains the same voxels, or refuses alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.bundle import BundleReader
from esegeta_monai.bundle.overlay import fitted_overlay
from esegeta_monai.cli.main import main
from esegeta_monai.errors import NetworkError
from esegeta_monai.handlers import ExplanationHandler
from esegeta_monai.transforms import Explaind
from tests.support.cli import config, metadata

SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
DISCRETE = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}


def make(folder: Path, inside: bool, transforms: list[dict[str, Any]]) -> Path:
    """A bundle that finds the bright cube of a scan: logit 4 in it, -4 outside."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    last = "torch.nn.Sigmoid()" if inside else "torch.nn.Identity()"
    more = {
        "network_def": f"$torch.nn.Sequential(torch.nn.Conv3d(1, 1, 1), {last})",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}],
        },
        "postprocessing": {"_target_": "Compose", "transforms": transforms},
        "dataset": {
            "_target_": "Dataset",
            "data": [{"image": str(folder / "scan.nii.gz")}],
            "transform": "@preprocessing",
        },
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
        },
        "handlers": [],
        "imports": ["$import torch"],
    }
    (folder / "configs" / "inference.json").write_text(json.dumps(config(**more)), encoding="utf-8")
    content = metadata()
    content["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "background", "1": "lesion"}
    (folder / "configs" / "metadata.json").write_text(json.dumps(content), encoding="utf-8")
    network = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Identity())
    with torch.no_grad():
        network[0].weight.fill_(2.0)
        network[0].bias.fill_(-4.0)
    torch.save(network.state_dict(), folder / "models" / "model.pt")
    scan = np.zeros((12, 12, 12), dtype=np.float32)
    scan[3:6, 3:6, 3:6] = 4
    nib.save(nib.Nifti1Image(scan, np.eye(4)), folder / "scan.nii.gz")
    return folder


Interface = Callable[[Path, Path], list[dict[str, Any]]]


def sidecars(folder: Path) -> list[dict[str, Any]]:
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))["results"]
    written = [json.loads(p.read_text(encoding="utf-8")) for p in folder.rglob("*_attr.json")]
    return written or run


def by_python(bundle: Path, output: Path) -> list[dict[str, Any]]:
    reader = BundleReader(bundle)
    image = reader.preprocessing({"image": str(bundle / "scan.nii.gz")})["image"]
    explainer = Explainer(
        reader.network,
        reader.inferer,
        class_names=reader.class_names,
        postprocessing=reader.postprocessing,
        on_error="record",
    )
    return [a.record for a in explainer(image[None], ["Saliency"], ["PredictedClasses"])]


def by_command(bundle: Path, output: Path) -> list[dict[str, Any]]:
    words = ["explain", "--bundle", bundle, "--input", bundle / "scan.nii.gz", "--output", output]
    main([str(w) for w in [*words, "--methods", "Saliency", "--no-pictures"]])
    return sidecars(output)


def by_handler(bundle: Path, output: Path) -> list[dict[str, Any]]:
    reader = BundleReader(bundle)
    engine = reader.resolve("evaluator")
    reader.network  # noqa: B018 - loads the weights into the engine's network
    ExplanationHandler("Saliency", None, output, bundle, pictures=False).attach(engine)
    engine.run()
    return sidecars(output)


def by_overlay(bundle: Path, output: Path) -> list[dict[str, Any]]:
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "inference.json"))
    overlay = fitted_overlay(parser, BundleReader(bundle).metadata)
    overlay |= {"explain_methods": ["Saliency"], "explain_output_dir": str(output)}
    (bundle / "configs" / "explain.json").write_text(json.dumps(overlay), encoding="utf-8")
    reader = BundleReader(bundle, ["configs/inference.json", "configs/explain.json"])
    reader.network  # noqa: B018 - loads the weights into the engine's network
    reader.resolve("evaluator").run()
    return sidecars(output)


def by_transform(bundle: Path, output: Path) -> list[dict[str, Any]]:
    reader = BundleReader(bundle)
    data = reader.preprocessing({"image": str(bundle / "scan.nii.gz")})
    explain = Explaind(
        "image",
        reader.network,
        reader.inferer,
        "Saliency",
        class_names=reader.class_names,
        postprocessing=reader.postprocessing,
    )
    try:
        result = explain(data)
    except NetworkError as error:
        return [{"status": "failed", "reason": str(error)}]
    return [json.loads(value.meta["record"]) for key, value in result.items() if key != "image"]


INTERFACES: dict[str, Interface] = {
    "python": by_python,
    "command": by_command,
    "handler": by_handler,
    "overlay": by_overlay,
    "transform": by_transform,
}


@pytest.mark.parametrize("name", INTERFACES)
@pytest.mark.parametrize("inside", [True, False])
def test_all_interfaces_explain_the_same_voxels(name: str, inside: bool, tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", inside, [DISCRETE] if inside else [SIGMOID, DISCRETE])
    (record,) = INTERFACES[name](bundle, tmp_path / "out")
    assert record["target_voxels"] == 27
    assert record.get("class", record.get("class_name")) == "lesion"
    assert record["head"]["kind"] == ("sigmoid inside" if inside else "sigmoid")
    assert record["head"]["certain"]
    logit = torch.tensor(4.0)
    assert record["value"] == pytest.approx(27 * float(torch.sigmoid(logit) if inside else logit), rel=1e-5)


@pytest.mark.parametrize("name", INTERFACES)
def test_all_interfaces_refuse_an_output_that_is_squashed_twice(name: str, tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", True, [SIGMOID, DISCRETE])
    (record,) = INTERFACES[name](bundle, tmp_path / "out")
    assert record["status"] == "failed"
    assert "squashed twice" in record["reason"]
    assert not list((tmp_path / "out").rglob("*_attr.nii.gz"))


def test_the_command_line_takes_the_users_statement(tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", True, [SIGMOID, DISCRETE])
    words = ["explain", "--bundle", bundle, "--input", bundle / "scan.nii.gz", "--output", tmp_path / "out"]
    words += ["--methods", "Saliency", "--no-pictures", "--head", "sigmoid inside"]
    assert main([str(w) for w in words]) == 0
    (record,) = sidecars(tmp_path / "out")
    assert (record["target_voxels"], record["head"]["kind"]) == (27, "sigmoid inside")
    assert record["head"]["evidence"] == ["head='sigmoid inside' was given"]


def test_check_names_the_head_and_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for inside in (True, False):
        transforms = [DISCRETE] if inside else [SIGMOID, DISCRETE]
        bundle = make(tmp_path / f"bundle{inside}", inside, transforms)
        assert main(["check", "--bundle", str(bundle), "--json"]) == 0
        (head,) = [c for c in json.loads(capsys.readouterr().out) if c["check"] == "head"]
        assert ("the network ends in sigmoid" in head["text"]) == inside
        assert "sigmoid" in head["text"]


def test_the_default_of_a_regression_is_its_value(tmp_path: Path) -> None:
    bundle = make(tmp_path / "bundle", False, [])
    file = bundle / "configs" / "metadata.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["network_data_format"]["outputs"]["pred"] = {"type": "tuples"}
    file.write_text(json.dumps(content), encoding="utf-8")
    for name in ("command", "handler", "overlay"):
        (record,) = INTERFACES[name](bundle, tmp_path / name)
        assert (record["target"], record["head"]["kind"]) == ("OutputValue", "raw")
