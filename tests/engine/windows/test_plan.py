"""The window plan is MONAI's, and cutting, padding and blending are adjoint to each other."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from monai.data.utils import dense_patch_slices
from monai.inferers import (
    AvgMerger,
    PatchInferer,
    SimpleInferer,
    SliceInferer,
    SlidingWindowInferer,
    SlidingWindowInfererAdapt,
    SlidingWindowSplitter,
    sliding_window_inference,
)

from esegeta_monai import Explainer
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.errors import NetworkError
from esegeta_monai.methods import Saliency
from esegeta_monai.targets import MultiClassMask

PADDINGS = ["constant", "reflect", "replicate", "circular"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum())


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


def test_kinds_of_inferer():
    assert plan_windows(as_inferer(None), (5, 6)).whole
    assert plan_windows(SimpleInferer(), (5, 6)).roi == (5, 6)
    adapt = SlidingWindowInfererAdapt((8, 8), 2, 0.5)
    assert len(plan_windows(adapt, (20, 13))) == len(plan_windows(SlidingWindowInferer((8, 8), 2, 0.5), (20, 13)))
    slices = plan_windows(SliceInferer(roi_size=(8, 8), spatial_dim=1, sw_batch_size=2), (12, 5, 9))
    assert slices.roi == (8, 1, 8)
    assert slices.slice_axis == 1
    with pytest.warns(UserWarning, match="memory of a backward pass"):
        assert plan_windows(lambda x, network: network(x), (5, 6)).whole


def test_a_partial_of_monais_function_is_understood():
    options = {"roi_size": (8, 8), "sw_batch_size": 3, "overlap": 0.5, "mode": "gaussian"}
    partial = functools.partial(sliding_window_inference, **options)
    plan = plan_windows(as_inferer(partial), (20, 13))
    same = plan_windows(SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"), (20, 13))
    assert plan.slices == same.slices
    assert plan.batch_size == 3
    assert torch.equal(plan.importance, same.importance)


def test_roi_weight_map_is_used():
    weights = torch.rand(8, 8, dtype=torch.float64) + 0.1
    partial = functools.partial(
        sliding_window_inference, roi_size=(8, 8), sw_batch_size=3, overlap=0.5, roi_weight_map=weights
    )
    plan = plan_windows(as_inferer(partial), (20, 13), torch.float64)
    assert torch.equal(plan.importance, weights)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (lambda: SlidingWindowInferer((8, 8), 1), (8, 8, 8), "do not fit"),
        (lambda: SliceInferer(roi_size=(8, 8)), (8, 8), "SliceInferer takes a 2D roi"),
        (
            lambda: functools.partial(sliding_window_inference, roi_size=(8, 8), sw_batch_size=1, process_fn=print),
            (8, 8),
            "process_fn",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(make, shape, message):
    with pytest.raises(NetworkError, match=message):
        plan_windows(as_inferer(make()), shape)


def test_a_classification_output_under_a_sliding_window_is_refused():
    plan = plan_windows(SlidingWindowInferer((8, 8), 1), (20, 13))
    with pytest.raises(NetworkError, match="SimpleInferer"):
        OutputGrid(plan, (), torch.float32)


def test_rescaled_output_off_the_voxels_is_refused():
    plan = plan_windows(SlidingWindowInferer((5, 5), 1, 0.0), (50, 50))
    with pytest.raises(NetworkError, match="whole output voxels"):
        OutputGrid(plan, (7, 7), torch.float32)  # 45 * 7/5 is 62.99… in floating point, and MONAI cuts it to 62


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


def patch_inferer(size=(8, 8), overlap=0.5, offset=0, pad_mode="constant", **options):
    splitter = SlidingWindowSplitter(size, overlap, offset, pad_mode=pad_mode)
    merger = {"merger_cls": AvgMerger, "value_dtype": torch.float64, **options}
    return PatchInferer(splitter, batch_size=3, **merger)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((16, 24), {}),
        ((14, 20), {"overlap": 0.25, "size": (8, 8)}),
        ((14, 20), {"overlap": 2}),
        ((6, 16), {"pad_mode": "reflect"}),
        ((16, 16), {"offset": (0, 0), "pad_mode": None}),
        ((12, 8, 8), {"size": (4, 8, 8), "overlap": 0.5}),
    ],
)
def test_a_patch_inferer_that_averages_is_a_plan(shape, options):
    """Blended by the plan it gives what MONAI gives, and its patches are those that MONAI cuts."""
    inferer, volume = patch_inferer(**options), noise(2, *shape)
    plan = plan_windows(inferer, shape, torch.float64)
    seen: list[torch.Tensor] = []

    def network(x):
        seen.extend(x)
        return torch.cumsum(x, -1) * x

    expected = inferer(volume[None], network)[0]
    cut = [plan.cut(volume, w) for w in range(len(plan))]
    assert len(cut) == len(seen)
    assert all(torch.equal(a, b) for a, b in zip(cut, seen))
    grid = OutputGrid(plan, plan.roi, torch.float64)
    box = tuple(slice(0, n) for n in grid.shape)
    blended = torch.zeros(2, *grid.shape, dtype=torch.float64)
    for w, window in enumerate(cut):
        grid.blend(blended, box, w, network(window))
    torch.testing.assert_close(blended, expected, rtol=1e-12, atol=0)


def square(x):
    return x**2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"overlap": 0.25, "size": (8, 7)}, "pads behind its last patches"),
        ({"postprocessing": square}, "transforms patches"),
        ({"merged_shape": (1, 1, 16, 24)}, "settings of its own"),
    ],
)
def test_other_patch_inferers_are_one_window_and_say_why(options, reason):
    with pytest.warns(UserWarning, match=reason):
        plan = plan_windows(patch_inferer(**options), (16, 24))
    assert plan.whole


def test_patches_that_leave_voxels_out_are_refused():
    with pytest.raises(NetworkError, match="cover 67 % of the image"):
        plan_windows(patch_inferer(overlap=0.0, pad_mode=None), (8, 12))


@pytest.mark.parametrize("shape", [(16, 24), (6, 16), (16, 22)], ids=["fits", "padded", "one window"])
def test_the_gradient_through_a_patch_inferer_is_autograds(shape):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(4, 2, 1))
    network = network.double()
    inferer, image = patch_inferer(), noise(1, 3, *shape).requires_grad_(True)
    prediction = inferer(image, network)
    (expected,) = torch.autograd.grad(prediction[0, 1][prediction[0].argmax(0) == 1].sum(), image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        (attribution,) = Explainer(network, inferer)(image.detach(), [Saliency(abs=False)], [MultiClassMask(1)])
    torch.testing.assert_close(
        attribution.map.as_tensor(), expected[0], rtol=0, atol=1e-10 * float(expected.abs().max())
    )
    assert attribution.record["blend_deviation"] < 1e-10


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
