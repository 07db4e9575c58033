"""Windowed against full autograd through MONAI's own inferer, and blending against its prediction."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer, sliding_window_inference
from torch import Tensor, nn

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import GradCam, InputXGradient, IntegratedGradients, Saliency, run
from esegeta_monai.targets import Case, MultiClassMask, Voxel
from tests.support.networks import ConvNet, network
from tests.support.objectives import build_objective, full_gradient, naive_change, objective
from tests.support.tensors import assert_equal

SHAPES = {
    2: [(12, 17), (8, 8), (5, 8), (6, 20)],
    3: [(8, 8, 8), (10, 9, 13), (6, 8, 12), (5, 6, 7)],
}


@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.625])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize(("dims", "shape"), [(d, s) for d in SHAPES for s in SHAPES[d]])
def test_gradient_equals_full_autograd(dims, shape, channels, overlap, mode, output):
    net = network(dims, channels)
    torch.manual_seed(1)
    image = torch.randn(channels, *shape, dtype=torch.float64)
    inferer = SlidingWindowInferer((8,) * dims, 3, overlap, mode)
    o, prediction = objective(net, image, inferer, [MultiClassMask(1, output=output)])
    with frozen(net):
        maps = run(Saliency(abs=False), o).maps
    assert_equal(maps[0], full_gradient(net, image, inferer, o.scores[0]))
    assert o.blend_deviations()[0] <= 1e-12
    whole = o.predict(image[None])[0][0]
    assert_equal(whole * o.scores[0].mask, o.scores[0].crop(prediction) * o.scores[0].mask)


@pytest.mark.parametrize("padding_mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("shape", [(5, 20), (6, 7)])
def test_padding_is_adjoint(padding_mode, shape):
    net = network(2, 1)
    image = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fill = {"cval": 0.7} if padding_mode == "constant" else {}
    inferer = SlidingWindowInferer((8, 8), 2, 0.5, "gaussian", padding_mode=padding_mode, **fill)
    o, _ = objective(net, image, inferer, [MultiClassMask(2)])
    with frozen(net):
        explained = run(InputXGradient(), o)
    gradient = full_gradient(net, image, inferer, o.scores[0])
    assert_equal(explained.maps[0], gradient * image)
    if padding_mode != "constant":
        assert float(explained.note(0)["sum_in_padding"]) == pytest.approx(0, abs=1e-12)


def test_several_targets_share_windows_but_not_values():
    net = network(3, 2)
    image = torch.randn(2, 14, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer((8, 8, 8), 4, 0.5, "gaussian")
    targets = [MultiClassMask(0), Voxel(1, index=(13, 8, 7)), MultiClassMask(2, output="probability")]
    o, _ = objective(net, image, inferer, targets)
    with frozen(net):
        maps = run(Saliency(abs=False), o).maps
    for score, map_ in zip(o.scores, maps):
        assert_equal(map_, full_gradient(net, image, inferer, score))
    assert len(o.score_windows[1]) < len(o.score_windows[0])


def test_only_windows_in_the_support_are_computed():
    net = network(2, 1)
    image = torch.randn(1, 40, 40, dtype=torch.float64)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 4, 0.5), [Voxel(1, index=(1, 1))])
    with frozen(net):
        run(Saliency(), o)
    assert o.context.progress.passes == len(o.score_windows[0]) == 1
    assert len(o.plan) == 81


def test_slice_inferer_simple_inferer_and_partial():
    net = network(2, 1)
    volume = torch.randn(1, 12, 9, 5, dtype=torch.float64)
    slices = SliceInferer(roi_size=(8, 8), sw_batch_size=2, spatial_dim=2, overlap=0.5)
    o, _ = objective(net, volume, slices, [MultiClassMask(1)])
    with frozen(net):
        assert_equal(run(Saliency(abs=False), o).maps[0], full_gradient(net, volume, slices, o.scores[0]))
    image = volume[..., 0]
    partial = functools.partial(sliding_window_inference, roi_size=(8, 8), sw_batch_size=2, overlap=0.5)
    for inferer in (SimpleInferer(), partial):
        o, _ = objective(net, image, inferer, [MultiClassMask(1)])
        with frozen(net):
            assert_equal(run(Saliency(abs=False), o).maps[0], full_gradient(net, image, inferer, o.scores[0]))


class Scaled(nn.Module):
    """An output at half the resolution of its window."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(x))


@pytest.mark.parametrize("shape", [(16, 24), (6, 16)])
def test_rescaled_output(shape):
    torch.manual_seed(0)
    net = Scaled().double()
    image = torch.randn(1, *shape, dtype=torch.float64)
    inferer = SlidingWindowInferer((8, 8), 2, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    with frozen(net):
        assert_equal(run(Saliency(abs=False), o).maps[0], full_gradient(net, image, inferer, o.scores[0]))
    assert o.blend_deviations()[0] <= 1e-12


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("padding_mode", ["constant", "reflect"])
@pytest.mark.parametrize("shape", [(20, 9), (6, 20)])
def test_change_equals_naive(shape, padding_mode, norm, output):
    net = network(2, 2, norm=norm)
    image = torch.randn(2, *shape, dtype=torch.float64)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian", padding_mode=padding_mode)
    o, _ = objective(net, image, inferer, [MultiClassMask(1, output=output), Voxel(0, index=(2, 3), output=output)])
    starts = list(itertools.product(range(0, shape[0], 3), range(0, shape[1], 4)))
    stops = [(min(a + 4, shape[0]), min(b + 4, shape[1])) for a, b in starts]
    boxes = Boxes(starts, stops, torch.full_like(image, 0.3))
    with frozen(net):
        changes = score_changes(o, boxes)
    for k, score in enumerate(o.scores):
        assert_equal(changes[k], naive_change(net, image, inferer, score, boxes))


def test_a_box_that_changes_nothing_costs_nothing():
    net = network(2, 1)
    image = torch.randn(1, 8, 8, dtype=torch.float64)
    image[:, :3] = 0.5
    o, _ = objective(net, image, SimpleInferer(), [MultiClassMask(1)])
    with frozen(net):
        changes = score_changes(o, Boxes([(0, 0), (4, 4)], [(3, 8), (6, 6)], 0.5))
    assert changes[0, 0] == 0
    assert changes[0, 1] != 0
    assert o.context.progress.passes == 2  # the unperturbed window and one box


def test_memory_back_off_halves_the_batch_and_is_recorded():
    class Hungry(ConvNet):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("not enough memory")
            return super().forward(x)

    torch.manual_seed(0)
    net = Hungry(2, 1).double()
    image = torch.randn(1, 30, 30, dtype=torch.float64)
    reference, _ = objective(net, image, SlidingWindowInferer((8, 8), 2, 0.5), [MultiClassMask(1)])
    o = build_objective(net, image, reference.scores, reference.prediction, SlidingWindowInferer((8, 8), 8, 0.5))
    with frozen(net):
        assert_equal(run(Saliency(), o).maps, run(Saliency(), reference).maps)
    assert o.window_batch == 2
    assert any("out of memory" in w for w in o.context.progress.warnings)


def test_a_network_that_has_no_gradient_is_named():
    def overwritten(x):
        y = x.exp()
        y[:] = 2 * y  # exp needs its result for its gradient
        return y

    for function, reason in ((overwritten, "inplace operation"), (lambda x: torch.heaviside(x, x), "heaviside")):

        class Broken(ConvNet):
            def forward(self, x: Tensor, function=function) -> Tensor:
                return function(super().forward(x))

        o, _ = objective(Broken(2, 1).double(), torch.rand(1, 8, 8, dtype=torch.float64), None, [MultiClassMask(1)])
        for method in (Saliency(), GradCam(), IntegratedGradients(n_steps=2, baseline="zero")):
            with frozen(o.model.network), pytest.raises(MethodError, match=rf"cannot be differentiated \(.*{reason}"):
                run(method, o)


def test_values_at_the_image_are_kept_by_one_objective_alone():
    network, image = nn.Conv2d(1, 2, 3, padding=1), torch.randn(1, 12, 10, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer((8, 8), 2, 0.5)
    with torch.no_grad():
        prediction, elsewhere = inferer(image[None], network)[0], inferer(2 * image[None], network)[0]
    targets = [Voxel(0, index=(3, 4)), Voxel(1, index=(9, 2))]
    scores = [s for t in targets for s in t.bind(prediction, Case())]
    objective = build_objective(network, image, scores, prediction, inferer)
    expected = torch.stack([prediction[0, 3, 4], prediction[1, 9, 2]]).double()
    torch.testing.assert_close(objective.image_values(), expected)
    assert objective.image_values() is objective.image_values()
    with frozen(network):
        there = objective.derive(image=2 * image).image_values()
    torch.testing.assert_close(there, torch.stack([elsewhere[0, 3, 4], elsewhere[1, 9, 2]]).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(objective.derive(scores=[objective.scores[1]]).image_values(), expected[1:])
    torch.testing.assert_close(objective.derive(scores=scores[::-1]).image_values(), expected.flip(0))
