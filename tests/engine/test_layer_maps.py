"""Spreading over a window keeps the sum of a map, and interpolation keeps its values."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.engine.layer_maps import spread, to_window
from esegeta_monai.engine.windows.inferers import plan_windows
from tests.support.tensors import assert_equal, noise


@pytest.mark.parametrize("dims", [2, 3])
def test_spread_keeps_the_sum_of_every_channel_for_every_factor(dims):
    plan = plan_windows(SlidingWindowInferer((8,) * dims), (16,) * dims)
    for positions in itertools.product(*[(1, 2, 3, 5, 8, 12, 16)] * dims):
        values = noise(2, 3, *positions)
        assert_equal(spread(values, plan).flatten(2).sum(2), values.flatten(2).sum(2), 1e-10)


def test_spread_keeps_signs_apart_and_equal_maps_equal():
    plan = plan_windows(SlidingWindowInferer((12, 8)), (12, 8))
    ones = torch.ones(1, 1, 3, 2, dtype=torch.float64)
    assert bool((spread(ones, plan) > 0).all())
    assert torch.equal(spread(noise(1, 1, 12, 8), plan), noise(1, 1, 12, 8))
    single = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    single[0, 0, 1, 1] = 1
    plan = plan_windows(SlidingWindowInferer((8, 8)), (8, 8))
    centre = (spread(single, plan)[0, 0] * torch.arange(8)[:, None]).sum()
    assert float(centre) == pytest.approx(2.5)  # the middle of position 1 of 4 in 8 voxels


def test_to_window_is_monotone_and_keeps_constants():
    plan = plan_windows(SlidingWindowInferer((8, 8, 8)), (8, 8, 8))
    assert_equal(to_window(torch.full((1, 2, 3, 2, 4), 1.5).double(), plan), torch.full((1, 2, 8, 8, 8), 1.5).double())
