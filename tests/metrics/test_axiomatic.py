"""Completeness, conservation and input invariance on networks whose answer is known, windowed and padded."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import GradTimesImage, InputXGradient, IntegratedGradients, Saliency
from esegeta_monai.metrics import Completeness, Conservation, InputInvariance, MetricInput
from esegeta_monai.targets import MultiClassMask
from tests.metrics.cases import linear_case, ranked, subject_of
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import noise

KINDS = [(k, d) for k in ("classification", "segmentation") for d in (2, 3)]


@pytest.mark.parametrize(("kind", "dims"), KINDS)
def test_the_perfect_map_is_complete_and_others_are_not(kind, dims):
    case = linear_case(kind, dims)
    for metric in (Completeness(baseline=0.0), Conservation()):
        values = ranked(metric, case)
        assert values["perfect"] == pytest.approx(0, abs=1e-10)
        assert values["zero"] == 1
        assert min(values["control:random"], values["control:constant"]) > 0.01


def test_the_methods_own_baseline_is_taken():
    case = Naive(small(2, 2, "batch"), noise(2, 9, 14))
    method = IntegratedGradients(baseline=0.7, n_steps=64)
    result = Completeness().update(subject_of(case, method))
    assert result.value < 1e-3
    assert result.notes["baseline"] == {"name": "constant", "value": 0.7}
    naive = case.value(torch.full_like(case.image, 0.7))[0]
    assert result.notes["baseline_value"] == pytest.approx(float(naive), rel=1e-10)
    gap = abs(float(subject_of(case, method).map.sum() - case.value(case.image)[0] + naive))
    assert result.value == pytest.approx(gap / abs(float(case.value(case.image)[0] - naive)), rel=1e-6)
    same = Completeness(baseline=case.image).update(subject_of(case, method))
    assert same.value is None


@pytest.mark.parametrize("shape", [(2, 9, 14), (2, 6, 7, 9), (1, 5, 12)])
def test_a_shift_that_the_network_takes_off_changes_no_gradient(shape):
    """Also where windows are padded with a constant."""
    dims = len(shape) - 1
    inferer = SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian")
    case = Naive(small(dims, shape[0]), noise(*shape), [MultiClassMask(1)], inferer)
    hooks = len(case.net._forward_pre_hooks)
    result = InputInvariance().update(subject_of(case, Saliency(abs=False)))
    assert result.value == pytest.approx(0, abs=1e-9)
    assert result.notes["value"] == pytest.approx(result.notes["value_shifted"], rel=1e-9)
    assert len(case.net._forward_pre_hooks) == hooks
    # the input itself is a factor: the map changes by c · gradient
    product = InputInvariance(0.5).update(subject_of(case, GradTimesImage()))
    gradient = subject_of(case, Saliency(abs=False)).map
    expected = (gradient * product.notes["shift"]).norm() / (gradient * case.image).norm()
    assert product.value == pytest.approx(float(expected), rel=1e-9)


def test_zero_maps_say_nothing_about_invariance():
    case = linear_case("segmentation", 2)
    zero = case.objective.derive(image=torch.zeros_like(case.image))
    result = InputInvariance().update(MetricInput(torch.zeros_like(case.image), zero, 0, InputXGradient()))
    assert result.value is None


def test_a_shift_of_nothing_leaves_invariance_undefined():
    case = Naive(small(2, 2, "batch"), torch.full((2, 9, 12), 0.7, dtype=torch.float64), [MultiClassMask(1)])
    result = InputInvariance().update(subject_of(case, Saliency()))
    assert result.value is None
    assert "constant" in result.notes["undefined"]
    with pytest.raises(UsageError, match="shift=0"):
        InputInvariance(0)
