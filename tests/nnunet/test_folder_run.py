"""A config of ``monai.bundle run`` for an nnU-Net folder gives the maps of the command."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")

from monai.bundle import run as run_bundle

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
