"""The score: its formula, its derivative, and its frozen mask."""

from __future__ import annotations

import math

import pytest
import torch

from esegeta_monai.errors import TargetError
from esegeta_monai.targets import WeightedScore
from tests.support.tensors import noise


def formula(p: torch.Tensor, mask: torch.Tensor, c: int, output: str, activation: str, reduction: str) -> float:
    """Σ_v m(v) φ(P)(c, v), voxel by voxel."""
    total = 0.0
    for v in torch.nonzero(mask).tolist():
        logits = p[(slice(None), *v)]
        if output == "logit":
            value = logits[c]
        else:
            parts = (
                torch.exp(logits) / torch.exp(logits).sum() if activation == "softmax" else 1 / (1 + (-logits).exp())
            )
            value = parts[c] if output == "probability" else parts[c].log()
        total += float(value)
    return total / int(mask.sum()) if reduction == "mean" else total


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
@pytest.mark.parametrize("shape", [(5, 6), (4, 3, 5)])
def test_value_is_the_formula(shape, output, activation, reduction):
    p, mask = noise(3, *shape), noise(*shape) > 0.5
    score = WeightedScore(mask, 1, 3, output=output, activation=activation, reduction=reduction)
    expected = formula(p, mask, 1, output, activation, reduction)
    assert float(score.value(score.crop(p))) == pytest.approx(expected, rel=1e-10)
    several = torch.stack([p, 2 * p, -p])
    values = score.value(score.crop(several))
    assert values.shape == (3,)
    for q, value in zip(several, values):
        assert float(value) == pytest.approx(formula(q, mask, 1, output, activation, reduction), rel=1e-10)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
def test_cotangent_is_the_jacobian(output, activation, reduction):
    p, mask = noise(3, 4, 5), noise(4, 5) > 0.2
    score = WeightedScore(mask, 2, 3, output=output, activation=activation, reduction=reduction)
    cropped = score.crop(p)
    cotangent = score.cotangent(cropped)
    assert cotangent.shape == cropped.shape
    step = 1e-6
    for index in range(cropped.numel()):
        change = torch.zeros_like(cropped).flatten()
        change[index] = step
        change = change.reshape(cropped.shape)
        slope = float(score.value(cropped + change) - score.value(cropped - change)) / (2 * step)
        assert float(cotangent.flatten()[index]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert bool((cotangent[:, ~score.mask] == 0).all())


def test_only_the_logit_is_linear_and_softmax_reads_all_channels():
    mask = torch.ones(2, 2, dtype=torch.bool)
    kinds = {
        (output, activation): WeightedScore(mask, 1, 3, output=output, activation=activation)
        for output in ("logit", "probability", "log_probability")
        for activation in ("softmax", "sigmoid")
    }
    assert [s.linear for s in kinds.values()] == [True, True, False, False, False, False]
    assert kinds["logit", "softmax"].channels == (1,)
    assert kinds["probability", "softmax"].channels == (0, 1, 2)
    assert kinds["probability", "sigmoid"].channels == (1,)
    assert WeightedScore(mask, 0, 1, output="probability").activation == "sigmoid"
    assert WeightedScore(mask, 0, 2, output="probability").activation == "softmax"


def test_extreme_logits_stay_finite():
    mask = torch.ones(1, 2, dtype=torch.bool)
    p = torch.tensor([[[1000.0, -1000.0]], [[0.0, 0.0]]])
    for activation in ("softmax", "sigmoid"):
        score = WeightedScore(mask, 0, 2, output="log_probability", activation=activation)
        assert torch.isfinite(score.value(score.crop(p)))
        assert torch.isfinite(score.cotangent(score.crop(p))).all()


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("odds", [-300.0, -50.0, 0.0, 50.0, 300.0])
def test_the_derivative_of_a_probability_that_rounds_to_one_is_exact(odds, classes, activation):
    """p (1 − p) of one logit, and −p p_j of the others: in float64 softmax and sigmoid give 0 from 37 on."""
    logits = torch.linspace(-1, 1, classes, dtype=torch.float64)[:, None]
    others = torch.cat([logits[:1], logits[2:]])
    logits[1] = odds + (torch.logsumexp(others[:, 0], 0) if activation == "softmax" else 0)
    score = WeightedScore(torch.ones(1, dtype=torch.bool), 1, classes, output="probability", activation=activation)
    cotangent = score.cotangent(logits[list(score.channels)])[:, 0]
    exact = math.exp(-abs(odds)) / (1 + math.exp(-abs(odds))) ** 2  # p (1 − p)
    expected = torch.full((len(score.channels),), exact, dtype=torch.float64)
    if activation == "softmax":  # shared by the others in proportion to their own softmax
        share = torch.softmax(others[:, 0], 0)
        expected = exact * torch.cat([-share[:1], torch.ones(1, dtype=torch.float64), -share[1:]])
    assert cotangent.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_reference_moves_the_value_and_not_the_cotangent():
    mask, p = torch.ones(2, 3, dtype=torch.bool), noise(1, 2, 3)
    plain, moved = (WeightedScore(mask, 0, 1, reduction="mean", reference=r) for r in (0.0, 2.5))
    assert float(plain.value(p) - moved.value(p)) == pytest.approx(2.5)
    assert torch.equal(plain.cotangent(p), moved.cotangent(p))


def test_the_mask_is_a_copy_cut_to_its_box():
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[2, 3] = mask[4, 5] = True
    score = WeightedScore(mask, 0, 2)
    mask.fill_(True)
    assert score.box == (slice(2, 5), slice(3, 6))
    assert score.voxels == int(score.mask.sum()) == 2
    assert not score.empty


def test_an_empty_mask_is_an_empty_score():
    score = WeightedScore(torch.zeros(4, 4, dtype=torch.bool), 0, 2, reduction="mean")
    assert score.empty
    assert score.box == (slice(0, 0), slice(0, 0))
    assert float(score.value(score.crop(noise(2, 4, 4)))) == 0


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_over_another_mask_it_is_the_mean_there(output):
    p, first = noise(3, 4, 5), torch.zeros(4, 5, dtype=torch.bool)
    first[0, 0] = True
    score = WeightedScore(first, 1, 3, output=output)
    second = torch.zeros(6, 5, dtype=torch.bool)  # on another grid
    second[2:5, 1:3] = True
    larger = noise(3, 6, 5)
    other = score.over(second)
    assert float(other.value(other.crop(larger))) == pytest.approx(
        formula(larger, second, 1, output, "softmax", "mean")
    )
    assert float(score.value(score.crop(p))) == pytest.approx(formula(p, first, 1, output, "softmax", "sum"))


@pytest.mark.parametrize("bad", [{"output": "prob"}, {"reduction": "max"}, {"activation": "relu"}])
def test_unknown_words_are_refused(bad):
    with pytest.raises(TargetError, match=next(iter(bad.values()))):
        WeightedScore(torch.ones(2, 2, dtype=torch.bool), 0, 2, **bad)
