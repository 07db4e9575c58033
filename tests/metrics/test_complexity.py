"""Sparseness, entropy and effective complexity by hand, by scipy, and for volumes of any size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from esegeta_monai.errors import UsageError
from esegeta_monai.metrics import EffectiveComplexity, Entropy, MetricInput, Sparseness
from tests.support.tensors import noise

ALL = [Sparseness, Entropy, EffectiveComplexity]


def value(metric, values):
    return metric.update(MetricInput(values)).value


@pytest.mark.parametrize("shape", [(2, 9, 7), (2, 6, 7, 8)])
def test_against_definitions(shape):
    values = noise(*shape)
    a = values.abs().sum(0).flatten().numpy()
    gini = np.abs(a[:, None] - a[None]).sum() / (2 * len(a) ** 2 * a.mean())
    assert value(Sparseness(), values) == pytest.approx(gini, rel=1e-12)
    assert value(Entropy(), values) == pytest.approx(entropy(a / a.sum()) / np.log(len(a)), rel=1e-12)
    ordered, needed = np.sort(a)[::-1], 0
    while ordered[:needed].sum() < 0.9 * a.sum():
        needed += 1
    assert value(EffectiveComplexity(), values) == pytest.approx(needed / len(a))


def test_by_hand():
    one = torch.zeros(1, 5, 4)
    one[0, 2, 2] = -3
    flat = torch.ones(1, 5, 4)
    assert value(Sparseness(), one) == pytest.approx(1 - 1 / 20)
    assert value(Sparseness(), flat) == pytest.approx(0, abs=1e-12)
    assert value(Entropy(), one) == 0
    assert value(Entropy(), flat) == pytest.approx(1)
    assert value(EffectiveComplexity(), one) == 1 / 20
    assert value(EffectiveComplexity(0.5), flat) == 1 / 2
    assert value(EffectiveComplexity(), flat) == 18 / 20


@pytest.mark.parametrize("metric", ALL)
def test_the_size_of_the_volume_does_not_matter_and_zero_is_undefined(metric):
    small, large = (value(metric(), noise(1, n, n, n)) for n in (16, 48))
    assert small == pytest.approx(large, abs=0.02)
    result = metric().update(MetricInput(torch.zeros(1, 4, 4)))
    assert result.value is None
    assert "zero" in result.notes["undefined"]


def test_mass_is_a_share():
    with pytest.raises(UsageError, match="mass"):
        EffectiveComplexity(0)
