"""Scores of a resampled prediction against autograd through the resampling of the whole prediction."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn
from torch.nn.functional import interpolate

from esegeta_monai import Explainer
from esegeta_monai.engine.contrast import ContrastScore
from esegeta_monai.engine.resampled import OUTPUT_GRID, OutputMasks, ResampledScore, Resampling
from esegeta_monai.engine.score import WeightedScore
from esegeta_monai.errors import TargetError

SIZE, SHAPE = (9, 14, 11), (13, 10, 11)


def linear(before: int, after: int) -> torch.Tensor:
    """The matrix (after, before) of torch's linear interpolation."""
    return interpolate(torch.eye(before, dtype=torch.float64)[None], after, mode="linear")[0].T


RESAMPLING = Resampling(tuple(linear(a, b) for a, b in zip(SIZE, SHAPE)))


def resample(prediction: torch.Tensor) -> torch.Tensor:
    return interpolate(prediction[None], SHAPE, mode="trilinear")[0]


def a_mask() -> torch.Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[4:9, 2:6, 3:8] = torch.rand((5, 4, 5), generator=torch.Generator().manual_seed(0)) > 0.4
    return mask


def test_the_adjoint_is_the_transpose() -> None:
    p, m = torch.randn(2, *SIZE, dtype=torch.float64), torch.randn(2, *SHAPE, dtype=torch.float64)
    torch.testing.assert_close(RESAMPLING(p), resample(p))
    assert float((RESAMPLING(p) * m).sum()) == pytest.approx(float((p * RESAMPLING.adjoint(m)).sum()), rel=1e-12)
    small, box = RESAMPLING.inside((slice(3, 7), slice(0, 2), slice(4, 5)))
    torch.testing.assert_close(small(p[(slice(None), *box)]), RESAMPLING(p)[:, 3:7, 0:2, 4:5])


@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("classes", [2, 3])
def test_value_and_cotangent(output: str, reduction: str, classes: int) -> None:
    p = torch.randn(classes, *SIZE, dtype=torch.float64, requires_grad=True)
    score = ResampledScore(a_mask(), 1, classes, RESAMPLING, output=output, reduction=reduction)  # type: ignore[arg-type]
    plain = WeightedScore(a_mask(), 1, classes, output=output, reduction=reduction)  # type: ignore[arg-type]
    expected = plain.value(plain.crop(resample(p)))
    assert float(score.value(score.crop(p.detach()))) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(expected, p)
    whole = torch.zeros_like(p)
    whole[(list(score.channels), *score.box)] = score.cotangent(score.crop(p.detach()))
    torch.testing.assert_close(whole, gradient, rtol=1e-10, atol=1e-14)
    assert score.voxels == int(a_mask().sum())
    assert bool((score.mask | ~score.shown).all())


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_maps_through_windows(output: str) -> None:
    """The gradient, an occlusion and the completeness of a path, against the whole volume without windows."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ELU(), nn.Conv3d(4, 3, 1)).double()
    image = torch.randn(1, 1, *SIZE, dtype=torch.float64)
    inferer = SlidingWindowInferer((6, 8, 8), 2, 0.5, "gaussian")
    masks = OutputMasks(lambda channel: a_mask(), True, RESAMPLING, {"note": 1})
    methods = ["VanillaBackprop", "Occlusion(window=4, baseline=0.0)", "DeepLift(baseline=0.0)"]
    gradient, occlusion, deep = Explainer(network, inferer, head="softmax")(
        image, methods, [f"MultiClassMask(1, output={output!r})"], data={OUTPUT_GRID: masks}
    )
    plain = WeightedScore(a_mask(), 1, 3, output=output)  # type: ignore[arg-type]

    def score(x: torch.Tensor) -> torch.Tensor:
        return plain.value(plain.crop(resample(inferer(x, network)[0])))

    x = image.clone().requires_grad_(True)
    value = score(x)
    (expected,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient.map.as_tensor(), expected[0], rtol=0, atol=1e-10 * float(expected.abs().max()))
    record = gradient.record
    assert (record["mask_grid"], record["own_prediction"]) == ("scan", {"note": 1})
    assert record["value"] == pytest.approx(float(value.detach()), rel=1e-10)
    changed = image.clone()
    changed[..., 4:8, 4:8, 4:8] = 0
    with torch.no_grad():
        effect = float(value - score(changed))
    bound = 1e-10 * abs(float(value.detach()))
    assert float(occlusion.map[0, 4, 4, 4]) == pytest.approx(effect, rel=0, abs=bound)
    if output == "logit":
        assert deep.record["completeness_gap"] <= 1e-9


def test_another_activation_than_the_masks_is_refused() -> None:
    network = nn.Conv3d(1, 3, 1)
    masks = OutputMasks(lambda channel: a_mask(), True, RESAMPLING)
    explainer = Explainer(network, head="softmax")
    with pytest.raises(TargetError, match="contradicts the model's own segmentation"):
        list(
            explainer(
                torch.randn(1, 1, *SIZE), ["Saliency"], ["MultiClassMask(1, activation='sigmoid')"],
                data={OUTPUT_GRID: masks},
            )
        )  # fmt: skip


def test_an_empty_mask_is_an_empty_target() -> None:
    score = ResampledScore(torch.zeros(SHAPE, dtype=torch.bool), 1, 3, RESAMPLING)
    assert score.empty
    assert not score.shown.numel()


def test_targets_of_the_same_place_and_other_masks_differ() -> None:
    other = a_mask()
    other[6, 4, 5] = ~other[6, 4, 5]
    first, second = (ResampledScore(mask, 1, 3, RESAMPLING) for mask in (a_mask(), other))
    assert first.meaning != second.meaning
    assert first.altered(3, class_index=2, output="probability").value(torch.zeros(3, *first.mask.shape)) > 0


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_a_contrast_of_resampled_scores_is_their_difference(output: str) -> None:
    score = ResampledScore(a_mask(), 1, 3, RESAMPLING, output=output)  # type: ignore[arg-type]
    contrast = ContrastScore(score, [0, 2], 3, weight=0.5, label="contrast")
    p = torch.randn(3, *SIZE, dtype=torch.float64, requires_grad=True)
    plain = [WeightedScore(a_mask(), c, 3, output=output) for c in (1, 0, 2)]  # type: ignore[arg-type]
    moved = resample(p)
    first, *others = (s.value(s.crop(moved)) for s in plain)
    expected = first - 0.25 * (others[0] + others[1])
    assert float(contrast.value(contrast.crop(p.detach()))) == pytest.approx(float(expected.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(expected, p)
    whole = torch.zeros_like(p)
    whole[(list(contrast.channels), *contrast.box)] = contrast.cotangent(contrast.crop(p.detach()))
    torch.testing.assert_close(whole, gradient, rtol=1e-10, atol=1e-14)
