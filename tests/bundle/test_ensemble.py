"""Bundles that ensemble are read to the networks and the mean that MONAI runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from esegeta_monai import Explainer
from esegeta_monai.bundle import BundleReader
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from tests.support.synthetic import NETWORK, network, wired, write, write_scan

KEYS = ["pred_0", "pred_1"]


def ensemble(tmp_path: Path, *, listed: bool = False, vote: bool = False, softmax_first: bool = False) -> Path:
    config = wired(tmp_path)
    del config["network"], config["network_def"]
    for i in range(2):
        config[f"network_{i}"] = dict(NETWORK)
    names = ["@networks#0", "@networks#1"] if listed else ["@network_0", "@network_1"]
    if listed:
        config["networks"] = [config.pop("network_0"), config.pop("network_1")]
    config["handlers"] = [
        {
            "_target_": "CheckpointLoader",
            "load_path": f"$@bundle_root + '/models/model_{i}.pt'",
            "load_dict": {"model": names[i]},
        }
        for i in range(2)
    ]
    evaluator = config["evaluator"]
    del evaluator["network"]
    evaluator |= {"_target_": "EnsembleEvaluator", "networks": "@networks" if listed else names, "pred_keys": KEYS}
    steps = config["postprocessing"]["transforms"]
    mean = {"_target_": "VoteEnsembled" if vote else "MeanEnsembled", "keys": KEYS, "output_key": "pred"}
    if softmax_first:
        steps[0] = {"_target_": "Activationsd", "keys": KEYS, "softmax": True}
        steps.insert(1, {**mean, "weights": [1.0, 3.0]})
    else:
        steps.insert(0, mean)
    folder = write(tmp_path / "bundle", config, weights=None)
    for i in range(2):
        torch.save(network(i).state_dict(), folder / "models" / f"model_{i}.pt")
    return folder


@pytest.mark.parametrize("softmax_first", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_equals_what_monai_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool, softmax_first: bool
) -> None:
    """Oracle: MONAI's own workflow writes the mean probability of the same scan."""
    folder = ensemble(tmp_path, listed=listed, softmax_first=softmax_first)
    write_scan(tmp_path)
    monkeypatch.chdir(folder)
    workflow = ConfigWorkflow(
        config_file=str(folder / "configs/inference.json"), meta_file=str(folder / "configs/metadata.json"),
        workflow_type="inference", logging_file=False, device=torch.device("cpu"),
    )  # fmt: skip
    workflow.initialize()
    workflow.run()
    (saved,) = (tmp_path / "eval").rglob("*_seg.nii")
    expected = np.moveaxis(np.asarray(nib.load(saved).dataobj).squeeze(), -1, 0)
    reader = BundleReader(folder)
    image = reader.preprocessing({"image": str(tmp_path / "scan.nii.gz")})["image"]
    if image.ndim == 4:
        image = image[..., 0]
    target = "Box(1, (20, 15), (21, 16), output='probability')"
    (result,) = Explainer(reader.network, reader.inferer, postprocessing=reader.output_use)(
        image[None], ["Saliency"], [target]
    )
    assert result.record["value"] == pytest.approx(float(expected[1, 20, 15]), rel=1e-4)
    assert len(reader.networks) == 2
    assert [source.path.name for source in reader.weight_sources] == ["model_0.pt", "model_1.pt"]
    assert {"models/model_0.pt", "models/model_1.pt"} <= set(reader.hashes())


def test_one_command_explains_it(tmp_path: Path) -> None:
    folder, scan = ensemble(tmp_path), write_scan(tmp_path)
    command = ["explain", "--bundle", str(folder), "--input", str(scan), "--output", str(tmp_path / "maps")]
    assert main([*command, "--methods", "VanillaBackprop", "--target", "Box(1, (20, 15), (24, 19))"]) == 0
    (sidecar,) = (tmp_path / "maps").rglob("*_attr.json")
    record: dict[str, Any] = json.loads(sidecar.read_text(encoding="utf-8"))
    assert record["inferer"]["name"] == "EnsembleInferer"
    assert len(set(record["inferer"]["members"])) == 2


def test_a_vote_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="explain the mean instead"):
        BundleReader(ensemble(tmp_path, vote=True)).inferer  # noqa: B018


def test_a_network_without_weights_is_refused(tmp_path: Path) -> None:
    folder = ensemble(tmp_path)
    reader = BundleReader(folder, overrides={"handlers": []})
    with pytest.raises(UsageError, match="names the weights of network 0"):
        reader.network  # noqa: B018


@pytest.mark.parametrize("file", ["algo_object.json", "algo_object.pkl"])
def test_a_folder_of_auto3dseg_is_refused_by_name(tmp_path: Path, file: str) -> None:
    for name in ("segresnet_0", "dints_1"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "configs" / "hyper_parameters.yaml").write_text("num_classes: 2\n", encoding="utf-8")
        (tmp_path / name / file).write_text("{}", encoding="utf-8")
        (tmp_path / name / "scripts").mkdir()
        code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass InferClass: ...\n"
        (tmp_path / name / "scripts" / "infer.py").write_text(code, encoding="utf-8")
    with pytest.raises(UsageError, match=r"folder of Auto3DSeg \(dints_1, segresnet_0\).*EnsembleInferer"):
        BundleReader(tmp_path)
    assert main(["info", "--bundle", str(tmp_path)]) == 2
    assert not (tmp_path / "ran").exists()
    with pytest.raises(UsageError, match=r"folder of Auto3DSeg \(dints_1\)"):
        BundleReader(tmp_path / "dints_1")
