"""Class scores, argmax masks and thresholds."""

from __future__ import annotations

import pytest
import torch
from skimage.filters import threshold_otsu

from esegeta_monai.errors import TargetError, UsageError
from esegeta_monai.targets import Case, ClassScore, MultiClassMask, ThresholdMask
from esegeta_monai.targets.classes import otsu
from tests.support.tensors import noise

CASE = Case(class_names={0: "background", 1: "lesion"})


def full(score, shape) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[score.box] = score.mask
    return mask


@pytest.mark.parametrize("shape", [(), (1, 1), (1, 1, 1)])
def test_class_score(shape):
    p = torch.tensor([0.5, 2.0, -1.0]).reshape(3, *shape)
    (score,) = ClassScore("lesion").bind(p, CASE)
    assert (score.class_index, score.class_name, score.label) == (1, "lesion", "ClassScore-lesion")
    assert float(score.value(score.crop(p))) == 2.0
    (probable,) = ClassScore(1, output="probability").bind(p, CASE)
    assert float(probable.value(probable.crop(p))) == pytest.approx(float(torch.softmax(p.flatten(), 0)[1]))
    assert [s.class_index for s in ClassScore(top_k=2).bind(p, CASE)] == [1, 0]


def test_class_score_refuses_maps_and_too_many():
    with pytest.raises(TargetError, match="use MultiClassMask"):
        ClassScore().bind(noise(2, 4, 4), CASE)
    with pytest.raises(TargetError, match="top_k=4"):
        ClassScore(top_k=4).bind(noise(3), CASE)


@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 6)])
def test_multi_class_mask_is_the_argmax_map(shape):
    p = noise(3, *shape)
    masks = []
    for c in range(3):
        (score,) = MultiClassMask(c).bind(p, CASE)
        masks.append(full(score, shape))
        assert torch.equal(masks[-1], p.argmax(0) == c)
        assert score.channels == (c,)
        assert float(score.value(score.crop(p))) == pytest.approx(float(p[c][p.argmax(0) == c].sum()))
    assert bool((torch.stack(masks).sum(0) == 1).all())


def test_the_first_of_equal_channels_wins():
    """Every voxel has one class, as in torch's own argmax, also where channels tie."""
    p = noise(4, 6, 5).round()
    assert bool((p.sort(0, descending=True).values[0] == p.sort(0, descending=True).values[1]).any())
    for c in range(4):
        (score,) = MultiClassMask(c).bind(p, CASE)
        mask = torch.zeros(6, 5, dtype=torch.bool) if score.empty else full(score, (6, 5))
        assert torch.equal(mask, p.argmax(0) == c)


def test_one_channel_and_sigmoid_channels_are_cut_at_half():
    p = noise(1, 6, 5)
    assert torch.equal(full(MultiClassMask(0).bind(p, Case())[0], (6, 5)), torch.sigmoid(p[0]) > 0.5)
    p = noise(3, 6, 5)
    (score,) = MultiClassMask(1, activation="sigmoid").bind(p, CASE)
    assert torch.equal(full(score, (6, 5)), p[1] > 0)


def test_the_mask_is_frozen():
    p = noise(2, 6, 5)
    (score,) = MultiClassMask(1).bind(p, CASE)
    before = score.mask.clone()
    p.neg_()
    assert torch.equal(score.mask, before)


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("value", ["sigmoid", "softmax", "raw"])
def test_threshold_mask(value, above):
    p = noise(2, 6, 5)
    compared = {"sigmoid": torch.sigmoid(p[1]), "softmax": torch.softmax(p, 0)[1], "raw": p[1]}[value]
    (score,) = ThresholdMask(0.4, channel="lesion", above=above, value=value).bind(p, CASE)
    expected = compared > 0.4 if above else compared <= 0.4
    assert torch.equal(full(score, (6, 5)), expected)
    # the logits under the mask, never a count of voxels
    assert float(score.value(score.crop(p))) == pytest.approx(float(p[1][expected].sum()))
    assert bool((score.cotangent(score.crop(p))[0] == score.mask).all())


def test_otsu_parts_two_groups():
    p = torch.cat([torch.full((1, 3, 5), -4.0), torch.full((1, 3, 5), 5.0)], 1) + 0.1 * noise(1, 6, 5).float()
    (score,) = ThresholdMask("otsu", value="raw").bind(p, CASE)
    assert score.box == (slice(3, 6), slice(0, 5))
    values = torch.cat([noise(300), 3 + 2 * noise(200)])
    spread = float(values.max() - values.min())
    # skimage's 256 bins move the cut by up to a bin on either side; the exact answer is that of trying every cut
    assert otsu(values) == pytest.approx(threshold_otsu(values.numpy()), abs=2 * spread / 256)
    cut = min(values.unique()[:-1], key=lambda t: _within(values, t))
    assert cut < otsu(values) < values[values > cut].min()
    with pytest.raises(TargetError, match="all values of the channel are equal"):
        ThresholdMask("otsu").bind(torch.zeros(1, 6, 5), CASE)


def _within(values: torch.Tensor, threshold: torch.Tensor) -> float:
    """The variance that is left within the two groups."""
    groups = values[values <= threshold], values[values > threshold]
    return sum(float((g - g.mean()).square().sum()) for g in groups)


def test_the_probability_of_a_threshold_follows_what_was_compared():
    p = noise(2, 6, 5)
    (score,) = ThresholdMask(0.4, channel=1, output="probability").bind(p, CASE)
    assert score.activation == "sigmoid"
    (score,) = ThresholdMask(0.4, channel=1, value="softmax", output="probability").bind(p, CASE)
    assert score.activation == "softmax"


def test_errors():
    with pytest.raises(TargetError, match="'mean'"):
        ThresholdMask("mean").bind(noise(1, 4, 4), CASE)
    with pytest.raises(UsageError, match="give 'sigmoid', 'softmax' or 'raw'"):
        ThresholdMask(0.5, value="tanh")
    for target in (MultiClassMask(1), ThresholdMask(0.5)):
        with pytest.raises(TargetError, match="use ClassScore"):
            target.bind(noise(3), CASE)


def test_a_given_name_is_the_label():
    assert MultiClassMask(1, name="tumour").bind(noise(2, 4, 4), CASE)[0].label == "tumour"
    assert MultiClassMask(1).bind(noise(2, 4, 4), CASE)[0].label == "MultiClassMask-lesion"
