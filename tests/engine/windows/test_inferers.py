"""MONAI's inferers become window plans, one window with a warning, or an error."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
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
from tests.support.tensors import noise


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
        ({"overlap": 0.25, "size": (8, 7)}, "pads after its last patches"),
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


@pytest.mark.parametrize("name", ["AlgoEnsembleBestN", "AlgoEnsembleBestByFold"])
def test_an_ensemble_of_auto3dseg_is_refused_by_name(name: str) -> None:
    from monai.apps import auto3dseg

    with pytest.raises(NetworkError, match=rf"{name} joins the finished predictions.*EnsembleInferer"):
        as_inferer(getattr(auto3dseg, name)())
