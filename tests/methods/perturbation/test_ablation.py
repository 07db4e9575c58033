"""Ablation and permutation of features against Captum, and by hand."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from monai.inferers import SimpleInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.methods import FeatureAblation, FeaturePermutation, run
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.shapley import Quadratic, case_of
from tests.support.tensors import assert_equal, noise

MASK = (torch.arange(6)[:, None] // 2 * 3 + torch.arange(9) // 3)[None]  # nine boxes of 2 x 3


def test_ablation_equals_captum():
    net, image = Quadratic(2 * 54), noise(2, 6, 9)
    case = case_of(net, image)
    with frozen(net):
        actual = run(FeatureAblation(MASK[0], baseline=0.4), case.objective)
    # our label 0 is background, Captum's is a feature
    expected = captum.attr.FeatureAblation(net).attribute(image[None], 0.4, target=1, feature_mask=MASK)[0]
    expected[MASK.expand_as(expected) == 0] = 0
    assert_equal(actual.maps[0].expand_as(expected), expected)
    rows = actual.note(0)["features"]
    assert [r["feature"] for r in rows] == [f"label {j}" for j in range(1, 9)]
    assert rows[2]["voxels"] == 6
    assert rows[2]["value"] == pytest.approx(float(expected[0][MASK[0] == 3][0]), rel=1e-12)


def test_ablation_of_channels_equals_captum():
    net, image = Quadratic(3 * 54), noise(3, 6, 9)
    with frozen(net):
        actual = run(FeatureAblation("channels", baseline="zero"), case_of(net, image).objective)
    mask = torch.arange(3)[:, None, None].expand(3, 6, 9)
    expected = captum.attr.FeatureAblation(net).attribute(image[None], 0, target=1, feature_mask=mask)[0]
    assert actual.maps.shape == (1, 3, 6, 9)
    assert_equal(actual.maps[0], expected)


def test_permutation_equals_captum():
    """Captum gives a case the feature of the next one; the mean over all rotations is that over all cases."""
    net, image, others = Quadratic(54), noise(1, 6, 9), [noise(1, 6, 9, seed=s) for s in (1, 2, 3)]
    mask = MASK + 1
    with frozen(net):
        actual = run(FeaturePermutation(others, mask[0]), case_of(net, image).objective)
    batch = torch.stack([image, *others])

    def rotation(by: int):
        def rotated(x: torch.Tensor, feature: torch.Tensor) -> torch.Tensor:
            return torch.where(feature.bool(), x.roll(-by, 0), x)

        return rotated

    expected = [
        captum.attr.FeaturePermutation(net, rotation(by)).attribute(batch, target=1, feature_mask=mask[None])[0]
        for by in (1, 2, 3)
    ]
    assert_equal(actual.maps[0], torch.stack(expected).mean(0))
    spread = torch.stack(expected).std(0)[0, 0, 0]
    assert actual.note(0)["features"][0]["standard_deviation"] == pytest.approx(float(spread), rel=1e-9)


def test_permutation_of_a_single_case_is_refused():
    with pytest.raises(UsageError, match=r"cases= has 1.*FeatureAblation"):
        FeaturePermutation([noise(1, 6, 9)])
    net, image = Quadratic(54), noise(1, 6, 9)
    wrong = [noise(1, 6, 9), noise(1, 5, 9)]
    with frozen(net), pytest.raises(InputError, match="shape"):
        run(FeaturePermutation(wrong, "grid(3)"), case_of(net, image).objective)


def test_a_feature_outside_the_windows_of_the_target_costs_nothing():
    from esegeta_monai.targets import Voxel

    case = Naive(small(), noise(1, 8, 40), [Voxel(1, index=(1, 1))])
    with frozen(case.net):
        result = run(FeatureAblation("grid(size=4)"), case.objective)
    assert case.objective.context.progress.passes == 1 + 4  # one window of 8 x 8 in 20 boxes of 4 x 4
    assert bool((result.maps[..., 8:] == 0).all())


def test_the_map_shows_each_value_at_all_voxels_and_a_single_window_is_enough():
    case = Naive(small(2, 1), noise(1, 6, 9), [MultiClassMask(1)], SimpleInferer())
    with frozen(case.net):
        result = run(FeatureAblation("grid(size=3)"), case.objective)
    rows = result.note(0)["features"]
    assert [r["feature"] for r in rows][:4] == ["box 0 0", "box 0 3", "box 0 6", "box 3 0"]
    assert bool((result.maps[0, 0, :3, 3:6] == rows[1]["value"]).all())
    assert case_of(Quadratic(54), noise(1, 6, 9), ClassScore(0)).objective.plan.whole
