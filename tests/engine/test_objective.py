"""Windowed against full autograd through MONAI's own inferer, and blending against its prediction."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.inferers import SimpleInferer, SliceInferer, SlidingWindowInferer, sliding_window_inference
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import GradCam, InputXGradient, IntegratedGradients, Saliency, run
from esegeta_monai.targets import Case, MultiClassMask, Target, Voxel
from tests.support.networks import ConvNet, network
from tests.support.objectives import build_objective, full_gradient, naive_change, objective
from tests.support.tensors import assert_equal, noise

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


def windowed(targets: tuple[Target, ...] = (MultiClassMask(1), MultiClassMask(2))) -> Objective:
    """Several windows, a prediction, and everything that an objective computes lazily already computed."""
    o, _ = objective(network(2, 1), noise(1, 14, 9), SlidingWindowInferer((8, 8), 2, 0.5), list(targets))
    o.memo("default layer", lambda: "b")
    for key in ("value", "prediction", "window scores", "window outputs", "perturbation scores", "anything"):
        o.memo(key, lambda key=key: key)
    return o


CHANGES: dict[str, Callable[[Objective], dict[str, Any]]] = {
    "nothing": lambda o: {},
    "image": lambda o: {"image": o.image + 1},
    "image and prediction": lambda o: {"image": o.image + 1, "prediction": o.prediction},
    "scores": lambda o: {"scores": o.scores[:1]},
    "plan": lambda o: {"plan": plan_windows(SimpleInferer(), o.image.shape[1:])},
    "model": lambda o: {"model": Model(network(2, 1, norm=False), torch.device("cpu"))},
    "seed": lambda o: {"seed": 5},
    "context": lambda o: {"context": RunContext()},
    "first windows": lambda o: {"first_windows": 1, "context": RunContext.for_sample(4, 2)},
    "full precision": lambda o: {"full_precision": True},
    "full precision of first windows": lambda o: {"full_precision": True, "first_windows": 1},
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_derived_objective_has_what_was_asked_for_and_no_computed_value(kind):
    parent = windowed()
    changes = CHANGES[kind](parent)
    child = parent.derive(**changes)
    for name, value in changes.items():
        if name != "full_precision":
            assert getattr(child, name) is value
    kept = {"image", "scores", "plan", "model", "seed", "context", "first_windows"} - set(changes)
    if "full_precision" in changes:
        kept.remove("model")
        assert child.model.network is parent.model.network
        assert child.model.autocast_dtype is None
    assert all(getattr(child, name) is getattr(parent, name) for name in kept)
    same_problem = not {"scores", "plan", "model"} & set(changes)
    expected = {"default layer"} if same_problem else set()
    if "full_precision" in changes:
        expected.add("blend deviations")
    computed = {"default layer", "blend deviations", "value", "prediction", "window scores", "window outputs"}
    computed |= {"perturbation scores", "anything"}
    assert {key for key in computed if child.knows(key)} == expected
    child.memo("of the child", lambda: 1)
    assert not parent.knows("of the child")


def test_another_image_has_no_prediction_unless_it_is_given():
    o = windowed()
    assert o.derive(image=o.image + 1).prediction is None
    assert o.derive(image=o.image + 1, prediction=o.prediction).prediction is o.prediction
    assert o.derive(seed=3).prediction is o.prediction


def test_the_first_windows_are_those_that_each_target_sees_first():
    o = windowed((Voxel(1, index=(0, 0)), Voxel(1, index=(13, 8)), MultiClassMask(2)))
    first = o.derive(first_windows=1, context=RunContext.for_sample(4, 2))
    assert first.score_windows == [windows[:1] for windows in o.score_windows]
    assert list(first.all_windows) == first.windows == sorted({w[0] for w in o.score_windows})
    assert len(o.windows) > len(first.windows) > 1


def test_nothing_is_assigned_to_an_objective():
    o = windowed()
    for name in ("image", "scores", "prediction", "seed", "window_batch", "context", "anything"):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            setattr(o, name, 1)


def test_memo_computes_once_even_where_the_value_is_none():
    o, calls = windowed(), []
    for _ in range(2):
        assert o.memo("new", lambda: calls.append(1)) is None
    assert calls == [1]
    assert o.knows("new")


def test_stored_scores_have_a_key_for_each_image_and_precision_and_none_for_another_problem(tmp_path):
    o = windowed()
    assert o.checkpoint is None
    o = o.derive(context=RunContext(checkpoint=ScoreCheckpoint(tmp_path, {"case": "a"})))
    variants = {
        "itself": o,
        "seed": o.derive(seed=3),
        "image": o.derive(image=o.image + 1),
        "image again": o.derive(image=o.image + 1).derive(seed=3),
        "other image": o.derive(image=o.image + 2),
        "precision": o.derive(full_precision=True),
        "image and precision": o.derive(image=o.image + 1).derive(full_precision=True),
    }
    keys = {name: variant.checkpoint.key for name, variant in variants.items()}
    assert keys["itself"] == keys["seed"]
    assert keys["image"] == keys["image again"]
    assert len(set(keys.values())) == 5
    for name in ("scores", "plan", "model"):
        other = o.derive(**CHANGES[name](o))
        assert other.checkpoint is None
        assert other.derive(image=o.image + 1).checkpoint is None
