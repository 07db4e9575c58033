"""The second stage of a cascade: nnU-Net's own segmentation, and a first stage that stays frozen."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")

from esegeta_monai import Explainer
from esegeta_monai.bundle.nnunet import NnunetReader
from esegeta_monai.bundle.nnunet.cascade import PREVIOUS
from esegeta_monai.bundle.trust import TRUST_VARIABLE
from esegeta_monai.cli.main import build_parser, main
from esegeta_monai.cli.trust import require_trust
from esegeta_monai.errors import InputError, NetworkError, TrustError, UsageError
from tests.nnunet.folders import model_folder, scan
from tests.nnunet.test_nnunet import plain_loop, predictor_of

SECOND = {"name": "3d_cascade_fullres", "changes": {"previous_stage": "3d_lowres"}, "mirror": (0, 2)}


def cascade(tmp_path: Path) -> tuple[Path, Path, str]:
    """Return the folders of both stages and a scan."""
    low = model_folder(tmp_path / "model", name="3d_lowres", spacing=(2.2, 2.0, 1.8), folds=1, mirror=(1,))
    high = model_folder(tmp_path / "model", spacing=(1.2, 1.0, 0.8), **SECOND)
    return low, high, str(scan(tmp_path / "scans")[0])


def test_both_stages_give_the_segmentation_of_nnunet(tmp_path: Path) -> None:
    low, high, file = cascade(tmp_path)
    reader = NnunetReader(high)
    (tmp_path / "first").mkdir()
    first = predictor_of(NnunetReader(low))
    first.predict_from_files_sequential([[file]], [str(tmp_path / "first" / "case")], False, True)
    own = predictor_of(reader)
    own.predict_from_files_sequential(
        [[file]], [str(tmp_path / "own")], False, True, folder_with_segs_from_prev_stage=str(tmp_path / "first")
    )
    expected = np.asarray(nib.load(tmp_path / "own.nii.gz").dataobj)
    assert len(np.unique(expected)) > 1
    for number, each in enumerate((reader, NnunetReader(high, previous=tmp_path / "first"))):
        data = each.preprocessing({"image": [file]})
        assert data["image"].shape[0] == 1
        assert data[PREVIOUS].shape == (2, *data["image"].shape[1:])
        each.predict(data["image"], data, tmp_path / f"ours{number}")
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / f"ours{number}.nii.gz").dataobj), expected)


def test_the_first_stage_is_frozen_and_read(tmp_path: Path) -> None:
    """The gradient is that of the image channels of a plain loop that is given both."""
    _, high, file = cascade(tmp_path)
    reader = NnunetReader(high)
    data = reader.preprocessing({"image": [file]})
    given = reader.case_arguments(data["image"], data, predict=False)
    given["network_kwargs"]["condition"] = given["network_kwargs"]["condition"].double()
    inferer = reader.inferer
    inferer.members = tuple({name: value.double() for name, value in member.items()} for member in inferer.members)
    ours, occlusion = Explainer(reader.network.double(), inferer)(
        data["image"][None].double(), ["VanillaBackprop", "Occlusion(window=6, baseline=0.0)"], ["MultiClassMask(1)"],
        **given,
    )  # fmt: skip
    own = predictor_of(reader)
    x = torch.cat([data["image"].as_tensor(), data[PREVIOUS]]).double().requires_grad_(True)
    prediction = plain_loop(own, x)
    mask = prediction.argmax(0) == 1
    assert ours.record["target_voxels"] == int(mask.sum()) > 0
    score = (prediction[1] * mask).sum()
    (expected,) = torch.autograd.grad(score, x)
    assert float((ours.map.as_tensor() - expected[:1]).abs().max() / expected[:1].abs().max()) <= 1e-10
    assert bool(expected[1:].any())
    changed = x.detach().clone()
    changed[:1, :6, :6, :6] = 0
    with torch.no_grad():
        effect = float(score - (plain_loop(predictor_of(reader), changed)[1] * mask).sum())
    bound = 1e-10 * abs(float(score.detach()))
    assert float(occlusion.map[0, 0, 0, 0]) == pytest.approx(effect, rel=0, abs=bound)
    with pytest.raises(NetworkError, match="case_arguments"):
        list(Explainer(reader.network, inferer)(data["image"][None].double(), ["Saliency"], ["MultiClassMask(1)"]))


def test_the_command_explains_a_second_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, high, file = cascade(tmp_path)
    for what in ("info", "layers", "check"):
        assert main([what, "--nnunet", str(high)]) == 0
    assert "unknown" not in capsys.readouterr().out
    out = tmp_path / "out"
    assert main(["explain", "--nnunet", str(high), "--input", file, "--output", str(out), "--methods", "Saliency"]) == 0
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert {entry["status"] for entry in run["results"]} == {"ok"}


def test_a_missing_first_stage_is_named(tmp_path: Path) -> None:
    high = model_folder(tmp_path / "model", folds=1, **SECOND)
    with pytest.raises(UsageError, match="3d_lowres is not beside it"):
        NnunetReader(high)
    (tmp_path / "empty").mkdir()
    reader = NnunetReader(high, previous=tmp_path / "empty")
    with pytest.raises(RuntimeError) as caught:  # MONAI's Compose wraps it
        reader.preprocessing({"image": [str(scan(tmp_path / "scans")[0])]})
    assert isinstance(caught.value.__cause__, InputError)
    assert "empty has no segmentation 'case.nii.gz'" in str(caught.value.__cause__)
    with pytest.raises(UsageError, match="no second stage"):
        NnunetReader(model_folder(tmp_path / "other", folds=1), previous=tmp_path / "empty")


def test_the_first_stage_is_trusted_like_the_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first stage whose plans name foreign code does not run, though the second stage's plans are harmless."""
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    low, high, file = cascade(tmp_path)
    plans = json.loads((low / "plans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_lowres"]["architecture"]["network_class_name"] = "foreign.Network"
    (low / "plans.json").write_text(json.dumps(plans), encoding="utf-8")
    for more in ([], ["--previous-stage", str(low)]):
        args = build_parser().parse_args(
            ["explain", "--nnunet", str(high), "--input", file, "--output", str(tmp_path), *more]
        )
        with pytest.raises(TrustError):
            require_trust(args)


def test_a_folder_of_several_models_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cascade(tmp_path)
    command = ["explain", "--nnunet", str(tmp_path / "model"), "--input", "x.nii.gz", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "holds several nnU-Net models" in capsys.readouterr().err
