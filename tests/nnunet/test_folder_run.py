"""A config of ``monai.bundle run`` for an nnU-Net folder gives the maps of the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")

from monai.bundle import run as run_bundle

from esegeta_monai.bundle.nnunet import NnunetReader
from esegeta_monai.cli.main import main
from tests.nnunet.folders import model_folder, scan


def test_the_maps_are_those_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, (file,) = model_folder(tmp_path / "model"), scan(tmp_path / "scans")
    model = ["--nnunet", str(folder), "--folds", "1", "--no-mirroring"]
    assert main(["overlay", *model]) == 0
    assert "monai.bundle run --config_file" in capsys.readouterr().out
    config = folder / "explain.json"
    assert json.loads(config.read_text(encoding="utf-8"))["explain_methods"] == ["Saliency", "GradCam"]
    run_bundle(
        config_file=str(config),
        scans=[str(file)],
        explain_methods=["Saliency", "Occlusion(window=8)"],
        explain_output_dir=str(tmp_path / "run"),
        explain_checks=False,
    )
    command = ["explain", *model, "--input", str(file), "--output", str(tmp_path / "command"), "--no-checks"]
    assert main([*command, "--methods", "Saliency", "--methods", "Occlusion(window=8)"]) == 0
    maps = sorted(f.relative_to(tmp_path / "command") for f in (tmp_path / "command").rglob("*_attr.nii.gz"))
    assert len(maps) >= 2
    for name in maps:
        ours, expected = (np.asarray(nib.load(tmp_path / which / name).dataobj) for which in ("run", "command"))
        np.testing.assert_array_equal(ours, expected)
        assert expected.any()
    assert main(["overlay", *model, "--metrics"]) == 2
    with pytest.raises(SystemExit) as stopped:
        run_bundle(
            config_file=str(config), scans=[str(tmp_path / "none.nii.gz")], explain_output_dir=str(tmp_path / "x")
        )
    assert stopped.value.code in (1, 2)


def test_a_dry_run_counts_the_passes_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The passes that ``--dry-run`` prints are those counted at the network, by folds, views and windows."""
    folder = model_folder(tmp_path / "model", mirror=(0,), spacing=(1.2, 1.0, 0.8), folds=1)
    (file,) = scan(tmp_path / "scans", shape=(16, 14, 12))
    counted, network_of = [0], NnunetReader.network.func  # type: ignore[attr-defined]

    def count(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        counted[0] += len(inputs[0])

    def counting(self: NnunetReader) -> torch.nn.Module:
        network = network_of(self)
        network.register_forward_pre_hook(count)
        return network

    monkeypatch.setattr(NnunetReader.network, "func", counting)
    command = ["explain", "--nnunet", str(folder), "--input", str(file), "--no-checks", "--target", "MultiClassMask(1)"]
    once = []
    for method in ("VanillaBackprop", "IntegratedGradients(n_steps=2)"):
        counted[0], out = 0, tmp_path / method
        assert main([*command, "--output", str(out), "--methods", method]) in (0, 1)  # two steps are incomplete
        (sidecar,) = out.rglob("*_attr.json")
        passes = json.loads(sidecar.read_text(encoding="utf-8"))["window_passes"]
        once.append(counted[0] - passes)
        capsys.readouterr()
        assert main([*command, "--output", str(tmp_path / "dry"), "--methods", method, "--dry-run"]) == 0
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if method.split("(")[0] in line]
        assert f" {passes:,} " in line, (line, passes)
    # once per case: nnU-Net's predictor, and where no gradient at the image does, a comparison with its prediction
    assert once[1] == 2 * once[0] > 0
    assert not (tmp_path / "dry").exists()


def test_the_agreement_of_one_fold_given_twice(tmp_path: Path) -> None:
    """A copy of a fold has no spread; another fold has, and shuffled maps agree less."""
    folder, (file,) = model_folder(tmp_path / "model", mirror=None), scan(tmp_path / "scans", shape=(16, 14, 12))
    shutil.copytree(folder / "fold_0", folder / "fold_2")
    agreement = {}
    for folds in ("0,2", "0,1"):
        out = tmp_path / folds
        command = ["explain", "--nnunet", str(folder), "--input", str(file), "--output", str(out), "--folds", folds]
        assert main([*command, "--methods", "VanillaBackprop", "--target", "MultiClassMask(1)", "--agreement"]) == 0
        (sidecar,) = out.rglob("*_attr.json")
        agreement[folds] = json.loads(sidecar.read_text(encoding="utf-8"))["agreement"]["members"]
        (sd,) = out.rglob("*_attr_members_sd.nii.gz")
        assert nib.load(sd).shape == nib.load(file).shape
        assert bool(np.asarray(nib.load(sd).dataobj).any()) is (folds == "0,1")
    assert (agreement["0,2"]["sd"], agreement["0,2"]["rank_correlation"]) == (0, pytest.approx(1))
    assert agreement["0,1"]["sd"] > 0
    assert agreement["0,2"]["rank_correlation"] > agreement["0,2"]["shuffled"]["rank_correlation"] + 0.5
