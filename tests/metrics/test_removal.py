"""The order in which features are removed."""

from __future__ import annotations

import collections
import itertools

import torch
from scipy.stats import chisquare

from esegeta_monai.metrics import (
    MetricInput,
)
from esegeta_monai.metrics.removal import ranking, removal_of
from tests.metrics.cases import windowed
from tests.support.tensors import noise


def test_a_flat_map_is_tied_for_features_of_any_size():
    """0.1 summed 3, 9 and 27 times and divided again: not the same number, but the same word."""
    case = windowed(3)
    shape = case.image.shape[1:]
    for value in (0.1, -0.7, 1e-12):
        flat = removal_of(MetricInput(torch.full((1, *shape), value), case.objective), "grid(size=3)", 0.0)
        assert flat.tied
        assert len(flat.means.unique()) == 1
    assert not removal_of(MetricInput(noise(1, *shape), case.objective), "grid(size=3)", 0.0).tied


def test_every_order_of_equal_values_is_drawn_equally_often():
    values = torch.tensor([1.0, 2.0, 1.0, 1.0, 3.0])
    orders = collections.Counter(tuple(ranking(values, seed).tolist()) for seed in range(15_000))
    assert all(order[:2] == (4, 1) for order in orders)
    assert sorted(orders) == [(4, 1, *rest) for rest in itertools.permutations((0, 2, 3))]
    assert chisquare(list(orders.values())).pvalue > 0.01
