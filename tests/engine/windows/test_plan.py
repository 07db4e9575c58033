"""The window plan is MONAI's, and cutting, padding and blending are adjoint to each other."""

from __future__ import annotations

import pytest
import torch
from monai.data.utils import dense_patch_slices
from monai.inferers import (
    SlidingWindowInferer,
)

from esegeta_monai.engine.windows.inferers import plan_windows
from tests.support.tensors import inner, noise

PADDINGS = ["constant", "reflect", "replicate", "circular"]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.625, (0.5, 0.25)])
@pytest.mark.parametrize("shape", [(20, 13), (8, 8), (5, 20), (6, 7)])
def test_windows_are_those_that_monai_runs(shape, overlap):
    """Coordinates that MONAI hands its predictor, in its order."""
    inferer = SlidingWindowInferer((8, 8), 1, overlap, "gaussian", with_coord=True)
    seen = []

    def predictor(x, coordinates):
        seen.extend(coordinates)
        return x

    volume = noise(1, 1, *shape)
    inferer(volume, predictor)
    plan = plan_windows(inferer, shape, torch.float64)
    assert [plan.coordinates(w)[2:] for w in range(len(plan))] == [list(c[2:]) for c in seen]
    assert plan.with_coord
    assert plan.coverage == 1


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("shape", [(5, 20), (6, 7), (6, 8, 12), (5, 6, 7)])
def test_cutting_a_window_is_cutting_the_padded_volume(shape, padding_mode):
    fill = {"cval": 0.3} if padding_mode == "constant" else {}
    inferer = SlidingWindowInferer((8,) * len(shape), 1, 0.5, padding_mode=padding_mode, **fill)
    plan, volume = plan_windows(inferer, shape, torch.float64), noise(2, *shape)
    windows = []
    inferer(volume[None], lambda x: windows.append(x.clone()) or x)
    for w, window in enumerate(windows):
        assert torch.equal(plan.cut(volume, w), window[0])


@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("shape", [(12, 13), (5, 20), (6, 7), (6, 8, 12)])
def test_add_is_the_adjoint_of_cut(shape, padding_mode):
    """<cut x, y> = <x, add y>, what falls on constant padding aside."""
    inferer = SlidingWindowInferer((8,) * len(shape), 1, 0.5, padding_mode=padding_mode)
    plan, x = plan_windows(inferer, shape, torch.float64), noise(2, *shape)
    for w in range(len(plan)):
        y, volume = noise(2, *plan.roi, seed=w + 1), torch.zeros(2, *shape, dtype=torch.float64)
        lost = plan.add(volume, w, y)
        assert inner(plan.cut(x, w), y) == pytest.approx(inner(x, volume), rel=1e-10)
        assert float(lost.sum() + volume.sum()) == pytest.approx(float(y.sum()), rel=1e-10)
        assert plan.padded or not lost.any()


def test_touched_windows_hold_a_voxel_of_the_box():
    plan = plan_windows(SlidingWindowInferer((8, 8), 1, 0.5), (20, 6), torch.float64)
    for box in [((0, 1), (0, 1)), ((7, 9), (2, 3)), ((0, 20), (0, 6))]:
        place = tuple(slice(*b) for b in box)
        inside = torch.zeros(20, 6, dtype=torch.bool)
        inside[place] = True
        assert plan.touched(place) == [w for w in range(len(plan)) if inside[plan.place(w)].any()]


def test_coverage_of_dense_windows_is_whole():
    assert plan_windows(SlidingWindowInferer((8, 8), 1, 0.25), (21, 9)).coverage == 1


def test_roi_of_minus_one_takes_the_whole_axis():
    plan = plan_windows(SlidingWindowInferer((8, -1), 1, 0.5), (20, 13))
    assert plan.roi == (8, 13)
    assert len(plan) == len(dense_patch_slices((20, 13), (8, 13), (4, 13)))


@pytest.mark.parametrize("shape", [(20, 30), (9, 30), (5, 30), (20, 21), (8, 9)])
@pytest.mark.parametrize("overlap", [0.25, 0.5, (0.5, 0.75)])
def test_resized_is_the_plan_of_the_same_inferer(shape, overlap):
    inferer = SlidingWindowInferer((8, 10), 2, overlap, "gaussian", padding_mode="replicate")
    whole, expected = plan_windows(inferer, (20, 30)), plan_windows(inferer, shape)
    smaller = whole.resized(shape)
    assert (smaller.slices, smaller.pads, smaller.spatial_shape) == (
        expected.slices,
        expected.pads,
        expected.spatial_shape,
    )
    volume = torch.rand(2, *shape)
    for window in range(len(smaller)):
        assert torch.equal(smaller.cut(volume, window), expected.cut(volume, window))


def test_single_is_one_window_with_its_padding():
    plan = plan_windows(SlidingWindowInferer((8, 10), 2, 0.5, padding_mode="reflect"), (6, 30))
    single = plan.single()
    assert (len(single), single.spatial_shape, single.pads) == (1, (6, 10), plan.pads)
    volume = torch.rand(1, 6, 30)
    for window in range(len(plan)):
        part = volume[(slice(None), *plan.place(window))]
        assert torch.equal(single.cut(part, 0), plan.cut(volume, window))
    assert single.single() is single
