"""Occlusion equals Captum's around MONAI's whole inferer, and computes only what an occluder touches."""

from __future__ import annotations

import pytest
import torch
from captum.attr import Occlusion as CaptumOcclusion
from monai.inferers import SimpleInferer, SlidingWindowInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import Occlusion, run
from esegeta_monai.targets import MultiClassMask, TargetWrapper, Voxel
from tests.networks import build
from tests.support.networks import network
from tests.support.objectives import objective
from tests.support.tensors import noise

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-6}  # of the absolute F


def captums(net, image, inferer, targets, window, stride, baseline, per_channel):
    wrapper = TargetWrapper(net, targets, inferer).freeze(image[None])
    rows = 1 if per_channel else image.shape[0]
    with torch.no_grad():
        return [
            CaptumOcclusion(wrapper).attribute(
                image[None],
                sliding_window_shapes=(rows, *window),
                strides=(rows, *stride),
                baselines=baseline,
                target=column,
            )[0]
            for column in range(len(targets))
        ]


CASES = [  # (image, occluder, stride): dividing, overlapping, not dividing, one that is larger than an axis
    ((2, 16, 12), (4, 4), (4, 4)),
    ((2, 16, 12), (4, 6), (2, 3)),
    ((2, 13, 11), (5, 4), (3, 4)),
    ((2, 20, 6), (6, 6), (4, 2)),
    ((1, 9, 8, 10), (4, 3, 5), (4, 3, 5)),
    ((2, 10, 9, 8), (4, 4, 4), (3, 4, 2)),
]


@pytest.mark.parametrize(
    ("output", "dtype"),
    [(o, torch.float64) for o in ("logit", "probability", "log_probability")] + [("probability", torch.float32)],
)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("shape", "window", "stride"), CASES)
def test_equals_captum_around_monais_inferer(shape, window, stride, per_channel, output, dtype, captum_in_float64):
    dims = len(shape) - 1
    net, image = network(dims, shape[0], dtype), noise(*shape).to(dtype)
    inferer = SlidingWindowInferer((8,) * dims, 4, 0.5, "gaussian")
    targets = [MultiClassMask(1, output=output), Voxel(0, index=(4,) * dims, output=output)]
    o, _ = objective(net, image, inferer, targets)
    with frozen(net):
        maps = run(Occlusion(window, stride, baseline=0.3, per_channel=per_channel), o).maps
    expected = captums(net, image, inferer, targets, window, stride, 0.3, per_channel)
    assert maps.shape[1] == (shape[0] if per_channel else 1)
    for actual, reference, value in zip(maps, expected, o.image_values()):
        assert float(reference.abs().max()) > 0
        scale = max(float(value.abs()), float(reference.abs().max()))
        assert float((actual - reference).abs().max()) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("name", ["UNet_batch", "SegResNet"])
def test_equals_captum_on_monais_networks(name, captum_in_float64):
    case = build(name, 2)
    image = torch.cat([case.image[0], case.reference[0]], 1)
    inferer = SlidingWindowInferer(case.roi, 4, 0.25, "gaussian")
    o, _ = objective(case.network, image, inferer, [MultiClassMask(1)])
    with frozen(case.network):
        maps = run(Occlusion(8, baseline="zero"), o).maps
    (expected,) = captums(case.network, image, inferer, [MultiClassMask(1)], (8, 8), (8, 8), 0, False)
    assert float((maps[0] - expected).abs().max()) <= 1e-10 * float(o.image_values()[0].abs())


def test_every_voxel_is_held_by_an_occluder_and_averaged():
    """A linear network: hiding a box changes F by the sum of w·(x − b) in it."""
    net = torch.nn.Conv2d(1, 1, 1).double()
    image = noise(1, 7, 9)
    o, _ = objective(net, image, SimpleInferer(), [MultiClassMask(0)])
    part = (net.weight.item() * (image[0] - 0.5) * _mask(o)).detach()
    with frozen(net):
        maps = run(Occlusion((3, 4), (2, 3), baseline=0.5), o).maps[0, 0]
    total, count = torch.zeros(7, 9).double(), torch.zeros(7, 9).double()
    for i in range(0, 7, 2):
        for j in range(0, 9, 3):
            if i < 7 - 3 + 2 and j < 9 - 4 + 3:
                total[i : i + 3, j : j + 4] += part[i : i + 3, j : j + 4].sum()
                count[i : i + 3, j : j + 4] += 1
    assert count.min() > 0
    assert float((maps - total / count).abs().max()) <= 1e-10 * float(part.abs().sum())


@pytest.mark.parametrize(
    ("window", "stride", "axis"), [(2, 4, 0), ((3, 2), (3, 3), 1), ((8, 3), (2, 4), 1), (3, 7, 0), (6, 7, 0)]
)
def test_a_stride_that_leaves_voxels_out_is_refused(window, stride, axis):
    o, _ = objective(torch.nn.Conv2d(1, 1, 1), noise(1, 7, 9).float(), SimpleInferer(), [MultiClassMask(0)])
    method = Occlusion(window, stride)
    for call in (lambda: run(method, o), lambda: method.passes(o)):
        with pytest.raises(UsageError, match=rf"larger than window=\d along axis {axis} .* at most \d"):
            call()


@pytest.mark.parametrize(("window", "stride"), [(2, 2), ((7, 4), (9, 4)), (16, 20), (9, 12), ((3, 9), (2, 11))])
def test_a_stride_that_leaves_no_voxel_out_is_not_refused(window, stride):
    """Where one occluder covers an axis, the next one would begin outside."""
    net = torch.nn.Conv2d(1, 1, 1).double()
    o, _ = objective(net, noise(1, 7, 9), SimpleInferer(), [MultiClassMask(0)])
    with frozen(net):
        boxes = Occlusion(window, stride).occluders(o, o.image).boxes
    covered = torch.zeros(7, 9)
    for place in boxes:
        covered[place] += 1
    assert covered.min() > 0


def _mask(o) -> torch.Tensor:
    mask = torch.zeros(o.plan.spatial_shape, dtype=torch.float64)
    mask[o.scores[0].box] = o.scores[0].mask.double()
    return mask


def test_only_touched_windows_are_computed():
    net, image = network(2, 1), noise(1, 40, 40)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 4, 0.5), [Voxel(1, index=(20, 20))])
    method = Occlusion(4)
    with frozen(net):
        explained = run(method, o)
    held = sum(
        all(a.start < b.stop and b.start < a.stop for a, b in zip(place, box))
        for place in map(o.plan.place, o.windows)
        for box in method.occluders(o, image).boxes
    )
    assert o.context.progress.passes == held + len(o.windows) == method.passes(o)
    assert o.context.progress.passes < 0.02 * len(o.plan) * explained.notes["occluders"]
    o.context.progress.start()
    with frozen(net):
        again = run(method, o)  # the unperturbed scores are cached
    assert o.context.progress.passes == held
    assert torch.equal(again.maps, explained.maps)


def test_the_default_baseline_is_the_background():
    net, image = network(2, 1), noise(1, 12, 12).abs() + 1
    image[:, [0, -1]] = image[:, :, [0, -1]] = 0.25
    o, _ = objective(net, image, SimpleInferer(), [MultiClassMask(1)])
    with frozen(net):
        auto, given = run(Occlusion(4), o), run(Occlusion(4, baseline=0.25), o)
    assert torch.equal(auto.maps, given.maps)
    assert auto.notes["baseline"]["name"] == "background"


def test_a_baseline_equal_to_the_image_changes_nothing():
    net, image = network(2, 1), noise(1, 12, 12)
    o, _ = objective(net, image, SimpleInferer(), [MultiClassMask(1)])
    with frozen(net):
        explained = run(Occlusion(4, baseline=image.clone()), o)
    assert not explained.maps.any()
    assert o.context.progress.passes == 0


@pytest.mark.parametrize("bad", [{"window": 0}, {"stride": -1}, {"window": (4, 4, 4)}, {"stride": (2,) * 3}])
def test_bad_shapes_are_refused(bad):
    net = network(2, 1)
    o, _ = objective(net, noise(1, 12, 12), SimpleInferer(), [MultiClassMask(1)])
    with frozen(net), pytest.raises(UsageError, match="Occlusion"):
        run(Occlusion(**bad), o)
