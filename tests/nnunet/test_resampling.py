"""The way from the network's grid to nnU-Net's file: an exact transpose, and scores of masks on the scan's grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")

from esegeta_monai import Explainer
from esegeta_monai.bundle.nnunet import PROPERTIES, NnunetReader
from esegeta_monai.bundle.nnunet.resampling import cropped, inserted, linear_resampling, own_resampling, why_not_linear
from esegeta_monai.engine.resampled import OUTPUT_GRID
from tests.nnunet.folders import ORDER3, REGIONS, TORCH, model_folder, scan
from tests.nnunet.test_nnunet import plain_loop, predictor_of

CASES: dict[str, dict[str, Any]] = {
    "cropped": {"spacing": (1.2, 1.0, 0.8)},
    "transposed": {"spacing": (1.3, 0.9, 2.5), "transpose": (2, 0, 1)},
    "slices apart": {"spacing": (5.0, 1.0, 1.0)},
    "2D": {"name": "2d", "patch": (12, 10), "spacing": (1.3, 0.9), "mirror": None},
    "torch": {"spacing": (1.2, 1.0, 0.8), "changes": TORCH},
    "regions": {"spacing": (1.2, 1.0, 0.8), "labels": REGIONS},
}


def prepared(tmp_path: Path, **options: Any) -> tuple[NnunetReader, dict[str, Any]]:
    folder = model_folder(tmp_path / "model", **{"folds": 1, "mirror": (1,)} | options)
    reader = NnunetReader(folder)
    return reader, reader.preprocessing({"image": [str(f) for f in scan(tmp_path / "scans")]})


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_transpose_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    """``⟨R p, m⟩ = ⟨p, Rᵀ m⟩`` with R as nnU-Net computes it, and back through crop and transposition."""
    reader, data = prepared(tmp_path, **options)
    model, properties, size = reader.model, data[PROPERTIES], tuple(data["image"].shape[1:])
    resampling = linear_resampling(model, properties, size)
    p = torch.randn(2, *size, dtype=torch.float64)
    single = "changes" in options  # torch's function converts to float32
    moved = torch.as_tensor(own_resampling(model, properties)(p.clone(), list(resampling.shape))).double()
    assert float((resampling(p) - moved).abs().max()) <= (1e-6 if single else 1e-12)
    scan_shape = tuple(properties["shape_before_cropping"][i] for i in model.plans.transpose_backward)
    m = torch.randn(2, *scan_shape, dtype=torch.float64)
    left = sum(float((inserted(a, model, properties) * b).sum()) for a, b in zip(resampling(p), m))
    right = float((p * resampling.adjoint(torch.stack([cropped(b, model, properties) for b in m]))).sum())
    assert left == pytest.approx(right, rel=1e-10, abs=1e-10 * float(p.norm() * m.norm()))


@pytest.mark.parametrize("options", [CASES["cropped"], CASES["transposed"], CASES["regions"]], ids=str)
def test_the_score_is_the_sum_over_exported_logits(options: dict[str, Any], tmp_path: Path) -> None:
    """F, and its gradient, against autograd through nnU-Net's slicers and torch's own interpolation, in float64."""
    reader, data = prepared(tmp_path, **options)
    properties, model = data[PROPERTIES], reader.model
    own = reader.predict(data["image"], data)
    masks = own.masks
    mask, shape = masks.masks(1), list(masks.resampling.shape)
    exported = torch.as_tensor(own_resampling(model, properties)(own.logits.double(), shape))
    regions = reader.labels.has_regions
    inferer = reader.inferer
    inferer.members = tuple({name: value.double() for name, value in member.items()} for member in inferer.members)
    network = reader.network.double()
    image = data["image"].double()
    x = image.as_tensor().clone().requires_grad_(True)
    loop = plain_loop(predictor_of(reader), x)
    (map_,) = Explainer(network, inferer, head="sigmoid" if regions else "softmax")(
        image[None],
        ["VanillaBackprop"],
        ["MultiClassMask(1)"],
        data={**data, OUTPUT_GRID: own.masks},
        prediction=loop[None],
    )
    assert map_.record["mask_grid"] == "scan"
    assert map_.record["own_prediction"]["voxels_of_another_class"] >= 0
    assert map_.record["target_voxels"] == int(mask.sum()) > 0
    resampled = torch.nn.functional.interpolate(loop[None], shape, mode="trilinear", align_corners=False)[0]
    score = (resampled[1] * mask).sum()
    assert map_.record["value"] == pytest.approx(float(score.detach()), rel=1e-10)
    assert map_.record["value"] == pytest.approx(float((exported[1] * mask).sum()), rel=1e-4)
    (expected,) = torch.autograd.grad(score, x)
    assert float((map_.map.as_tensor() - expected).abs().max() / expected.abs().max()) <= 1e-10
    assert 0 < int(map_.mask.sum()) < map_.mask.numel()


def test_probabilities_are_those_on_the_scan(tmp_path: Path) -> None:
    reader, data = prepared(tmp_path, **CASES["cropped"])
    own = reader.predict(data["image"], data)
    masks = own.masks
    explainer = Explainer(reader.network, reader.inferer)
    (map_,) = explainer(
        data["image"][None],
        ["VanillaBackprop"],
        ["MultiClassMask(1, output='probability')"],
        data={**data, OUTPUT_GRID: own.masks},
        prediction=own.logits[None],
    )
    p = own.logits.double().requires_grad_(True)
    resampled = torch.nn.functional.interpolate(p[None], list(masks.resampling.shape), mode="trilinear")[0]
    score = (resampled.softmax(0)[1] * masks.masks(1)).sum()
    assert map_.record["value"] == pytest.approx(float(score), rel=1e-6)
    (cotangent,) = torch.autograd.grad(score, p)
    x = data["image"].as_tensor().clone().requires_grad_(True)
    (expected,) = torch.autograd.grad((plain_loop(predictor_of(reader), x) * cotangent.float()).sum(), x)
    assert float((map_.map.as_tensor() - expected).abs().max() / expected.abs().max()) <= 1e-5


def test_resampling_that_is_not_linear_leaves_the_mask_on_the_networks_grid(tmp_path: Path) -> None:
    reader, data = prepared(tmp_path, spacing=(1.2, 1.0, 0.8), changes=ORDER3)
    assert "order 3" in str(why_not_linear(reader.model))
    own = reader.predict(data["image"], data)
    (map_,) = Explainer(reader.network, reader.inferer)(
        data["image"][None], ["VanillaBackprop"], ["MultiClassMask(1)"], data={**data, OUTPUT_GRID: own.masks},
        prediction=own.logits[None],
    )  # fmt: skip
    assert map_.record["mask_grid"] == "network"
    assert "order 3" in map_.record["own_prediction"]["mask_grid"]
    assert map_.record["target_voxels"] == int((own.logits.argmax(0) == 1).sum())


def test_an_unknown_function_is_not_taken_for_linear(tmp_path: Path) -> None:
    reader, _ = prepared(tmp_path)

    def sharpened(values: Any, *_: Any) -> Any:
        return values

    configuration = SimpleNamespace(resampling_fn_probabilities=sharpened)
    assert "sharpened" in str(why_not_linear(replace(reader.model, configuration=configuration)))


def test_additive_methods_are_complete_over_folds_and_views(tmp_path: Path) -> None:
    """Completeness of DeepLIFT and conservation of LRP, with the mask on the scan's grid, in float64."""
    reader, data = prepared(tmp_path, folds=2, mirror=(2,), spacing=(1.2, 1.0, 0.8), transpose=(1, 0, 2))
    own = reader.predict(data["image"], data)
    inferer, network = reader.inferer, reader.network.double()
    inferer.members = tuple({name: value.double() for name, value in member.items()} for member in inferer.members)
    x = data["image"].as_tensor().double()
    loop = plain_loop(predictor_of(reader), x).detach()
    methods = ["DeepLift(baseline=0.0)", "LRP"]
    deep, lrp = Explainer(network, inferer)(
        data["image"][None].double(),
        methods,
        ["MultiClassMask(1)"],
        data={**data, OUTPUT_GRID: own.masks},
        prediction=loop[None],
    )
    assert [a.record["mask_grid"] for a in (deep, lrp)] == ["scan"] * 2
    assert deep.record["completeness_gap"] <= 1e-9
    absorbed = float(lrp.record["absorbed_share"])
    assert float(lrp.map.sum()) == pytest.approx((1 - absorbed) * lrp.record["value"], rel=1e-9)
