"""Which layer, how its positions lie in a window, and that what is spread keeps its sum."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.inferers import SliceInferer, SlidingWindowInferer

from esegeta_monai.engine.layer_maps import spatial_map, spread, to_window
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.errors import MethodError
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import network
from tests.support.objectives import objective
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


def tokens(grid: tuple[int, ...], channels: int, class_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A map (1, C, *grid), and the same as tokens (1, T, C) in row-major order."""
    values = noise(1, channels, *grid)
    rows = values.flatten(2).transpose(1, 2)
    return values, torch.cat([noise(1, 1, channels), rows], 1) if class_token else rows


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(("roi", "grid"), [((16, 16), (4, 4)), ((16, 8), (8, 4)), ((8, 12, 16), (2, 3, 4))])
def test_tokens_are_put_on_their_grid(roi, grid, class_token):
    net = network(len(roi), 1)
    o, _ = objective(net, noise(1, *roi), None, [MultiClassMask(1)])
    values, rows = tokens(grid, 5, class_token)
    assert torch.equal(spatial_map(rows, o, "a"), values)
    gradients = torch.stack([rows, 2 * rows])
    assert torch.equal(spatial_map(gradients, o, "a", lead=2), torch.stack([values, 2 * values]))


def test_what_is_no_map_is_refused():
    net = network(2, 1)
    o, _ = objective(net, noise(1, 16, 16), None, [MultiClassMask(1)])
    for values in (noise(1, 5), noise(1, 7, 5), noise(1, 2, 3, 4, 5)):
        with pytest.raises(MethodError, match="no spatial map"):
            spatial_map(values, o, "a")


def test_the_axis_of_slices_is_put_back():
    net = network(2, 1)
    inferer = SliceInferer(roi_size=(8, 8), sw_batch_size=2, spatial_dim=1)
    o, _ = objective(net, noise(1, 8, 3, 8), inferer, [MultiClassMask(1)])
    values = noise(2, 4, 8, 8)
    assert torch.equal(spatial_map(values, o, "a"), values.unsqueeze(3))
