"""SVCCA: known correlations, an independent computation by eigenvalues, and layers through windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.similarity import layer_svcca, svcca
from tests.support.networks import network
from tests.support.tensors import noise


def by_eigenvalues(a: np.ndarray, b: np.ndarray, keep: int) -> float:
    """Classic CCA of the leading principal components: square roots of the eigenvalues of Saa⁻¹ Sab Sbb⁻¹ Sba."""
    parts = []
    for x in (a - a.mean(0), b - b.mean(0)):
        values, vectors = np.linalg.eigh(x.T @ x)
        parts.append(x @ vectors[:, np.argsort(-values)[:keep]])
    x, y = parts
    product = np.linalg.solve(x.T @ x, x.T @ y) @ np.linalg.solve(y.T @ y, y.T @ x)
    return float(np.sqrt(np.clip(np.linalg.eigvals(product).real, 0, 1)).mean())


def test_equals_classic_cca_of_the_leading_components():
    a, b = noise(300, 5), noise(300, 5, seed=1)
    b = b + a @ noise(5, 5, seed=2) * 0.5
    a = a * torch.tensor([5.0, 4.0, 3.0, 0.01, 0.01])  # 99 % of the variance in three directions
    assert svcca(a, b, 1.0) == pytest.approx(by_eigenvalues(a.numpy(), b.numpy(), 5), abs=1e-9)
    three = b * 0 + a @ noise(5, 5, seed=3)
    assert svcca(a, three) == pytest.approx(1.0, abs=1e-2)


def test_invariance_and_independence():
    a, mix = noise(500, 4), noise(4, 4, seed=3)
    assert svcca(a, a @ mix + 7, 1.0) == pytest.approx(1, abs=1e-9)
    assert svcca(a, noise(500, 4, seed=9), 1.0) < 0.2
    half = torch.cat([a[:, :2], noise(500, 2, seed=9)], 1)
    assert svcca(a, half, 1.0) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("dims", [2, 3])
def test_layers_and_epochs_through_windows(dims):
    first, image = network(dims, 1), noise(1, *[16] * dims)
    inferer = SlidingWindowInferer((8,) * dims, 2, 0.5)
    assert layer_svcca([first, first], ["a", "a"], [image], inferer) == 1.0
    later = network(dims, 1)
    with torch.no_grad():
        later.a.weight += 0.05 * torch.randn_like(later.a.weight)
    near = layer_svcca([first, later], ["a", "a"], [image], inferer)
    torch.manual_seed(5)
    nn.init.normal_(later.a.weight, std=0.3)
    far = layer_svcca([first, later], ["a", "a"], [image], inferer)
    assert 1 > near > far > 0
    assert not first.training
    assert 0 < layer_svcca([first, first], ["a", "b"], [image], inferer) <= 1


def test_a_finer_layer_is_averaged_over_cells():
    net = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(3, 2, 1)).double().eval()
    assert layer_svcca([net, net], ["0", "1"], [noise(1, 16, 16)]) == pytest.approx(1.0, abs=1e-9)


def test_errors_name_the_way_out():
    net, image = network(2, 1), noise(1, 8, 8)
    with pytest.raises(UsageError, match="two networks"):
        layer_svcca([net], ["a"], [image])
    with pytest.raises(UsageError, match="no layer 'x'"):
        layer_svcca([net, net], ["x", "a"], [image])
    with pytest.raises(InputError, match="too few"):
        svcca(noise(4, 5), noise(4, 5, seed=1))
    with pytest.raises(InputError, match="constant"):
        svcca(torch.ones(9, 2), noise(9, 2))
    with pytest.raises(UsageError, match="same rows"):
        svcca(noise(4, 2), noise(5, 2))
