"""Names of Python objects in nnU-Net's plans: which ones run without a question, and which are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.bundle.contents import NnunetContents
from esegeta_monai.bundle.trust import TRUST_VARIABLE
from esegeta_monai.cli.main import main

LAYERS: dict[str, Any] = {
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
    "dropout_op": None,
}


def model_folder(root: Path, network: str, **changes: Any) -> Path:
    """A model folder with plans as nnU-Net writes them, and a checkpoint that nothing may open."""
    folder = root / "Dataset001_Toy" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (folder / "fold_0").mkdir(parents=True)
    architecture = {
        "network_class_name": network,
        "arch_kwargs": {**LAYERS, **changes},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configurations = {"3d_fullres": {"patch_size": [16, 16, 16], "architecture": architecture}}
    (folder / "plans.json").write_text(json.dumps({"configurations": configurations}), encoding="utf-8")
    labels = {"background": 0, "liver": 1}
    (folder / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": labels}), encoding="utf-8")
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(b"no pickle")
    return folder


UNET = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


@pytest.fixture(autouse=True)
def nobody_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRUST_VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))


def test_known_classes_need_no_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path, UNET)
    assert NnunetContents(folder).runnables == []
    assert main(["info", "--nnunet", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "nothing of this folder runs" in shown
    assert "background 0, liver 1" in shown
    assert UNET in shown
    assert main(["layers", "--nnunet", str(folder)]) != 3


@pytest.mark.parametrize(
    ("network", "changes"),
    [
        ("os.system", {}),
        ("evil_module", {}),
        (UNET, {"nonlin": "os.system", "nonlin_kwargs": {"command": "touch marker"}}),
        (UNET, {"nonlin": "evil_module"}),
        (UNET, {"conv_op": "torch.nn.functional.importlib.import_module"}),
        (UNET, {"conv_op": "torch.nn.modules.module.torch.os.system"}),
        (UNET, {"conv_op": "torch.nn.Conv3d\n.x"}),
        ("dynamic_network_architectures.architectures.unet.torch.os.system", {}),
    ],
)
@pytest.mark.parametrize("command", ["layers", "check", "explain", "evaluate", "patterns"])
def test_others_are_listed_and_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], network: str, changes: dict[str, Any], command: str
) -> None:
    folder = model_folder(tmp_path, network, **changes)
    words = ["--nnunet", str(folder)]
    if command in ("explain", "evaluate", "patterns"):
        words += ["--input", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main([command, *words]) == 3
    error = capsys.readouterr().err
    assert "the nnU-Net folder" in error
    assert "plans.json configurations::3d_fullres::architecture" in error
    assert main(["info", "--nnunet", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"]
    assert "evil_module" not in sys.modules


def test_the_first_stage_of_a_cascade_counts_too(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, UNET)
    plans = json.loads((folder / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    (folder / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    assert NnunetContents(folder).runnables == []
    first = model_folder(tmp_path / "first", "os.system")
    first.rename(folder.with_name(folder.name.replace("3d_fullres", "3d_lowres")))
    (entry,) = NnunetContents(folder).runnables
    assert entry.text == "os.system"
    assert "3d_lowres/plans.json" in entry.file
    other = model_folder(tmp_path / "other", "posix.system")
    assert [entry.text for entry in NnunetContents(folder, other).runnables] == ["posix.system"]


@pytest.mark.parametrize("text", ["{", "[]", '{"configurations": 3}', "[" * 100_000])
def test_damaged_plans_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    folder = model_folder(tmp_path, UNET)
    (folder / "plans.json").write_text(text, encoding="utf-8")
    assert main(["info", "--nnunet", str(folder)]) == 2
    assert "plans.json" in capsys.readouterr().err
