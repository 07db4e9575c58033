"""The handler on MONAI's `EnsembleEvaluator`: maps equal autograd through a plain loop over its networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import EnsembleEvaluator
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    MeanEnsembled,
    VoteEnsembled,
)
from torch import Tensor, nn

from esegeta_monai.errors import UsageError
from esegeta_monai.handlers import EvaluationHandler, ExplanationHandler
from tests.support import oblique

KEYS = ["pred_0", "pred_1"]
CORNER = "Box(class_index=1, start=(0, 0, 0), stop=(3, 3, 3))"


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.SiLU(), nn.Conv3d(4, 2, 3, padding=1)).eval() for _ in KEYS]


def engine(members: list[nn.Module], tmp_path: Path, *before: Any, ensemble: Any = None) -> EnsembleEvaluator:
    scan = oblique.write_scan(tmp_path / "scans" / "alpha.nii.gz", 0)
    data = DataLoader(
        Dataset([{"image": str(scan)}], Compose([LoadImaged("image"), EnsureChannelFirstd("image")])), num_workers=0
    )
    mean = ensemble or MeanEnsembled(KEYS, output_key="pred", weights=[1.0, 3.0])
    return EnsembleEvaluator(
        torch.device("cpu"),
        data,
        members,
        KEYS,
        prepare_batch=lambda batch, *_, **__: (batch["image"], None),
        inferer=SlidingWindowInferer((6, 6, 6), 2, 0.5),
        postprocessing=Compose([*before, mean, AsDiscreted("pred", argmax=True)]),
    )


def image_of(tmp_path: Path) -> Tensor:
    loaded = Compose([LoadImaged("image"), EnsureChannelFirstd("image")])(
        {"image": str(tmp_path / "scans/alpha.nii.gz")}
    )
    return torch.as_tensor(loaded["image"]).as_subclass(Tensor)[None]


@pytest.mark.parametrize("softmax", [False, True])
def test_maps_equal_autograd_through_all_networks(tmp_path: Path, softmax: bool) -> None:
    members = networks()
    before = [{name: value.clone() for name, value in member.state_dict().items()} for member in members]
    runs = engine(members, tmp_path, *([Activationsd(KEYS, softmax=True)] if softmax else []))
    output = "probability" if softmax else "logit"
    target = CORNER[:-1] + f", output={output!r})"
    ExplanationHandler("VanillaBackprop", target, tmp_path / "out", pictures=False).attach(runs)
    runs.run()
    (path,) = (tmp_path / "out").rglob("*_attr.nii.gz")
    record = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text(encoding="utf-8"))

    x = image_of(tmp_path).requires_grad_(True)
    inferer = SlidingWindowInferer((6, 6, 6), 2, 0.5)
    parts = [inferer(x, member) for member in members]
    parts = [p.softmax(1) for p in parts] if softmax else parts
    score = (0.25 * parts[0] + 0.75 * parts[1])[0, 1, :3, :3, :3].sum()
    (expected,) = torch.autograd.grad(score, x)
    result = np.asarray(nib.load(path).dataobj)
    np.testing.assert_allclose(result, expected[0, 0].numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert record["value"] == pytest.approx(float(score), rel=1e-5)
    assert record["blend_deviation"] < 1e-5
    for states, member in zip(before, members):
        assert all(torch.equal(value, member.state_dict()[name]) for name, value in states.items())


def test_metrics_are_measured_on_an_ensemble(tmp_path: Path) -> None:
    runs = engine(networks(), tmp_path)
    EvaluationHandler("VanillaBackprop", CORNER, "Sparseness", tmp_path / "out").attach(runs)
    runs.run()
    assert "Sparseness" in next((tmp_path / "out").rglob("*.csv")).read_text(encoding="utf-8")


def test_a_vote_is_refused_before_any_work(tmp_path: Path) -> None:
    runs = engine(networks(), tmp_path, ensemble=VoteEnsembled(KEYS, output_key="pred"))
    ExplanationHandler("VanillaBackprop", CORNER, tmp_path / "out").attach(runs)
    with pytest.raises(UsageError, match="explain the mean instead"):
        runs.run()
    assert runs.state.iteration == 0


def test_agreement_of_the_networks_is_written(tmp_path: Path) -> None:
    runs = engine(networks(), tmp_path)
    ExplanationHandler("VanillaBackprop", CORNER, tmp_path / "out", pictures=False, agreement=True).attach(runs)
    runs.run()
    (sidecar,) = (tmp_path / "out").rglob("*_attr.json")
    result = json.loads(sidecar.read_text(encoding="utf-8"))["agreement"]["members"]
    assert result["mean_deviation"] < 1e-5
    assert sidecar.with_name(result["map"]).is_file()
