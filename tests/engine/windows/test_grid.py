"""Blending on the output grid equals MONAI's, and is adjoint to cutting."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import (
    SlidingWindowInferer,
)

from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.errors import NetworkError
from tests.support.tensors import inner, noise


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("shape", [(20, 13), (6, 20), (10, 9, 13)])
def test_weights_sum_to_one_and_blend_like_monai(shape, mode):
    inferer = SlidingWindowInferer((8,) * len(shape), 2, 0.5, mode)
    plan = plan_windows(inferer, shape, torch.float64)
    grid = OutputGrid(plan, plan.roi, torch.float64)
    whole = tuple(slice(0, n) for n in shape)
    total, blended = torch.zeros(1, *shape, dtype=torch.float64), torch.zeros(1, *shape, dtype=torch.float64)
    volume = noise(1, *shape)

    def predictor(x):  # differs from window to window at the same voxel
        return x * x.flatten(1).std(1).reshape(-1, *(1,) * (len(shape) + 1))

    for w in range(len(plan)):
        grid.blend(total, whole, w, torch.ones_like(grid.weight(w))[None])
        grid.blend(blended, whole, w, predictor(plan.cut(volume, w)[None])[0])
    assert torch.allclose(total, torch.ones_like(total), rtol=1e-12, atol=0)
    reference = inferer(volume[None], predictor)[0]
    assert float((blended - reference).abs().max() / reference.abs().max()) <= 1e-10


@pytest.mark.parametrize("box", [((3, 9), (2, 5)), ((0, 20), (0, 13)), ((19, 20), (12, 13))])
def test_blending_into_a_box_is_the_adjoint_of_the_weighted_cut(box):
    plan = plan_windows(SlidingWindowInferer((8, 8), 1, 0.5), (20, 13), torch.float64)
    grid, place = OutputGrid(plan, plan.roi, torch.float64), tuple(slice(*b) for b in box)
    size = [b[1] - b[0] for b in box]
    x = noise(3, *size)
    for w in range(len(plan)):
        y, values = noise(3, *plan.roi, seed=w + 1), torch.zeros(3, *size, dtype=torch.float64)
        grid.blend(values, place, w, y)
        assert inner(grid.cut(x, place, w) * grid.weight(w), y) == pytest.approx(inner(x, values), rel=1e-10)
        assert values.any() == (w in grid.windows_of(place))


def test_windows_of_a_mask_are_those_that_hold_one_of_its_voxels():
    plan = plan_windows(SlidingWindowInferer((8, 8), 1, 0.5), (20, 20), torch.float64)
    grid = OutputGrid(plan, plan.roi, torch.float64)
    mask = torch.zeros(20, 20, dtype=torch.bool)
    mask[1, 1] = mask[18, 18] = True
    expected = [w for w in range(len(plan)) if mask[plan.place(w)].any()]
    box = (slice(1, 19), slice(1, 19))
    assert grid.windows_of(box, mask[box]) == expected
    assert len(expected) < len(grid.windows_of(box)) == len(plan)


def test_a_classification_output_under_a_sliding_window_is_refused():
    plan = plan_windows(SlidingWindowInferer((8, 8), 1), (20, 13))
    with pytest.raises(NetworkError, match="SimpleInferer"):
        OutputGrid(plan, (), torch.float32)


def test_rescaled_output_off_the_voxels_is_refused():
    plan = plan_windows(SlidingWindowInferer((5, 5), 1, 0.0), (50, 50))
    with pytest.raises(NetworkError, match="whole output voxels"):
        OutputGrid(plan, (7, 7), torch.float32)  # 45 * 7/5 is 62.99… in floating point, and MONAI cuts it to 62


def test_weights_that_are_kept_are_those_of_their_window_and_serve_in_a_graph():
    plan = plan_windows(SlidingWindowInferer((4, 4), 1, 0.5, "gaussian"), (9, 10))
    grid = OutputGrid(plan, plan.roi, torch.float64)
    with torch.inference_mode():
        first = [grid.weight(w) for w in range(len(plan))]
    total = torch.zeros(plan.padded_shape, dtype=torch.float64)
    for w, weight in enumerate(first):
        assert grid.weight(w) is weight
        assert torch.equal(grid.weight(w, (slice(1, 3), slice(0, 2))), weight[1:3, 0:2])
        total[plan.slices[w]] += weight
        x = torch.ones(4, 4, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad((x * weight).sum(), x)
        assert torch.equal(gradient, weight)
    assert float((total - 1).abs().max()) < 1e-12
    assert torch.equal(grid.unblended().weight(0), torch.ones(4, 4, dtype=torch.float64))


def test_weights_of_large_windows_are_not_kept():
    plan = plan_windows(SlidingWindowInferer((256, 256), 1, 0.5, "gaussian"), (300, 300))
    grid = OutputGrid(plan, plan.roi, torch.float64)
    assert grid.weight(0) is not grid.weight(0)
