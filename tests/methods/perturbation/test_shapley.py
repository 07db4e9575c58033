"""Shapley values against exact enumeration, Captum, and their axioms."""

from __future__ import annotations

import functools

import captum.attr
import numpy as np
import pytest
import torch

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import ChannelShapley, KernelShap, ShapleyValueSampling, run
from esegeta_monai.methods.perturbation.shapley import all_coalitions, shapley_values
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import Computed, small
from tests.support.objectives import Naive
from tests.support.shapley import Quadratic, case_of, enumerated
from tests.support.tensors import assert_equal, noise


def boxes(rows: int, columns: int) -> torch.Tensor:
    """Labels 1 … rows * columns on 2 x 2 boxes."""
    return torch.arange(rows * columns).reshape(rows, columns).repeat_interleave(2, 0).repeat_interleave(2, 1) + 1


def table(explained, column: str = "value") -> torch.Tensor:
    notes = [explained.note(k) for k in range(len(explained.maps))]
    return torch.tensor([[row[column] for row in n["features"]] for n in notes], dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (2, 2), (2, 3)])
def test_kernel_shap_is_exact_where_all_coalitions_fit(rows, columns):
    labels, n = boxes(rows, columns), rows * columns
    net, image = Quadratic(4 * n), noise(1, 2 * rows, 2 * columns)
    case = case_of(net, image)
    with frozen(net):
        result = run(KernelShap(n_samples=4096, feature_mask=labels, baseline=0.2), case.objective)
    exact = enumerated(case, labels[None] - 1, n, torch.full_like(image, 0.2))
    assert_equal(table(result), exact)
    assert result.notes["exact"] is True
    assert result.note(0)["completeness_gap"] < 1e-10
    rise = case.value(image) - case.value(torch.full_like(image, 0.2))
    assert_equal(result.maps.flatten(1).sum(1), rise)


def test_kernel_shap_is_exact_for_twelve_features():
    net, image, exact = twelve()
    with frozen(net):
        result = run(KernelShap(4096, boxes(3, 4), "zero"), case_of(net, image).objective)
    assert_equal(table(result), exact)


def test_shapley_sampling_is_exact_with_all_orders():
    labels = boxes(2, 2)
    net, image = Quadratic(16), noise(1, 4, 4)
    case = case_of(net, image)
    with frozen(net):
        result = run(ShapleyValueSampling(n_samples=24, feature_mask=labels, baseline="zero"), case.objective)
    assert_equal(table(result), enumerated(case, labels[None] - 1, 4, torch.zeros_like(image)))
    assert result.notes["exact"] is True
    assert case.objective.context.progress.passes == 16  # the empty coalition to the full one: 15, and the image itself


@functools.cache
def twelve() -> tuple[Quadratic, torch.Tensor, torch.Tensor]:
    """A network, an image and the exact values of its twelve features."""
    net, image = Quadratic(48), noise(1, 6, 8)
    return net, image, enumerated(case_of(net, image), boxes(3, 4)[None] - 1, 12, torch.zeros_like(image))


@pytest.mark.parametrize(
    "method",
    [ShapleyValueSampling(n_samples=300), KernelShap(n_samples=1500)],
    ids=lambda m: type(m).__name__,
)
def test_sampled_values_are_within_their_stated_error(method):
    method.feature_mask, method.baseline = boxes(3, 4), "zero"
    net, image, exact = twelve()
    scores = []
    for seed in range(5):
        with frozen(net):
            result = run(method, case_of(net, image).objective.derive(seed=seed))
        error = table(result, "standard_error")
        assert float(error.min()) > 0
        assert float((table(result) - exact).abs().max() / exact.abs().max()) < 0.1
        assert result.note(0)["completeness_gap"] < 1e-10
        scores.append((table(result) - exact) / error)
    z = torch.cat(scores)
    assert 0.6 < float(z.square().mean().sqrt()) < 1.5  # the error bar is the error's size
    assert float(z.abs().max()) < 4.5


def test_sampling_equals_captum_with_the_same_orders():
    labels = boxes(2, 3)
    net, image = Quadratic(24), noise(1, 4, 6)
    case = case_of(net, image)
    method = ShapleyValueSampling(n_samples=7, feature_mask=labels, baseline="zero")
    orders = torch.from_numpy(method.orders(method.game(case.objective)))
    peer = captum.attr.ShapleyValueSampling(net)
    peer.permutation_generator = lambda n_features, n_samples: iter(orders.tolist())
    expected = peer.attribute(image[None], 0, target=1, feature_mask=labels[None, None] - 1, n_samples=7)[0]
    with frozen(net):
        result = run(method, case.objective)
    assert_equal(result.maps[0].float() * 4, expected)  # ours is a share a voxel; Captum adds up in float32


def test_kernel_shap_against_captum():
    """Both sample; Captum's is the noisier one (no complements, no constraint)."""
    labels = boxes(2, 3)
    net, image = Quadratic(24), noise(1, 4, 6)
    case = case_of(net, image)
    torch.manual_seed(0)
    np.random.seed(0)
    peer = captum.attr.KernelShap(net)
    expected = peer.attribute(image[None], 0, target=1, feature_mask=labels[None, None] - 1, n_samples=3000)[0]
    with frozen(net):
        result = run(KernelShap(n_samples=100, feature_mask=labels, baseline="zero"), case.objective)
    assert float((result.maps[0] * 4 - expected).abs().max() / expected.abs().max()) < 0.03
    exact = enumerated(case, labels[None] - 1, 6, torch.zeros_like(image))
    theirs_off = float((expected.flatten()[[0, 2, 4, 12, 14, 16]] - exact[0]).abs().max())
    assert float((table(result) - exact).abs().max()) < theirs_off


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_channel_shapley_is_exact_through_windows(output):
    image = noise(3, 6, 20)
    case = Naive(small(2, 3), image, [MultiClassMask(1, output=output), MultiClassMask(2, output=output)])
    with frozen(case.net):
        result = run(ChannelShapley(baseline=0.1, names=["T1", "T2", "DWI"]), case.objective)
    labels = torch.arange(3)[:, None, None].expand_as(image)
    exact = enumerated(case, labels, 3, torch.full_like(image, 0.1))
    assert_equal(table(result), exact)
    assert_equal(result.maps.sum((2, 3)), exact)
    assert [r["feature"] for r in result.note(1)["features"]] == ["T1", "T2", "DWI"]
    assert result.note(0)["baseline_value"] == pytest.approx(
        float(case.value(torch.full_like(image, 0.1))[0]), rel=1e-9
    )


def test_dummy_and_symmetry():
    def symmetric(x):
        a, b = x.flatten(1)[:, 0], x.flatten(1)[:, 1]
        return torch.stack([a * b, a * b + a + b], 1)

    image = torch.full((1, 2, 2), 3.0, dtype=torch.float64)
    case = case_of(Computed(symmetric), image)
    result = run(KernelShap(feature_mask="grid(1)", baseline="zero"), case.objective)
    assert table(result)[0].tolist() == pytest.approx([7.5, 7.5, 0, 0], abs=1e-12)


def test_values_of_all_coalitions():
    sets = all_coalitions(3)
    assert sets.tolist()[5] == [True, False, True]
    additive = torch.from_numpy(sets.astype(float) @ np.array([[1.0], [2.0], [4.0]])).T
    assert shapley_values(additive).tolist() == [[1.0, 2.0, 4.0]]


def test_what_is_refused():
    with pytest.raises(UsageError, match="two orders"):
        ShapleyValueSampling(n_samples=1)
    net, image = Quadratic(13 * 4), noise(13, 2, 2)
    with frozen(net), pytest.raises(MethodError, match=r"2\^13.*ShapleyValueSampling"):
        run(ChannelShapley(), case_of(net, image).objective)
    labels = boxes(3, 4)
    with frozen(net), pytest.raises(MethodError, match="at least 64"):
        run(KernelShap(n_samples=30, feature_mask=labels), case_of(Quadratic(48), noise(1, 6, 8)).objective)
    big = noise(1, 300, 300)
    with pytest.raises(MethodError, match=r"90000 features.*Occlusion"):
        run(ShapleyValueSampling(feature_mask="grid(1)"), case_of(Quadratic(90000), big).objective)
