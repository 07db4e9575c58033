"""`score_changes` equals the naive computation in 3D, for several targets, keyed coalitions, and with little memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.perturbation import batching
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import passes_needed, score_changes
from esegeta_monai.targets import Box, MultiClassMask, Score, Voxel
from esegeta_monai.utils.tensors import bounding_box
from tests.support.networks import network
from tests.support.objectives import full_gradient, naive_change, objective
from tests.support.tensors import assert_equal, noise


def targets(output: str, dims: int):
    return [
        MultiClassMask(1, output=output),
        Voxel(0, index=(2,) * dims, output=output),
        Box(2, (1,) * dims, (5,) * dims, output=output, reduction="mean"),
    ]


def boxes_for(shape, size: int, baseline, channels=None) -> Boxes:
    starts = list(itertools.product(*(range(0, n, size + 1) for n in shape)))
    stops = [tuple(min(a + size, n) for a, n in zip(s, shape)) for s in starts]
    return Boxes(starts, stops, baseline, None if channels is None else [channels] * len(starts))


class Coalitions(Perturbations):
    """Random sets of stripes hidden together, each stripe a feature: what sampling methods ask for."""

    def __init__(self, members: Tensor, width: int, baseline: Tensor, keyed: bool) -> None:
        self.members, self.width, self.baseline, self.keyed = members, width, baseline, keyed

    def __len__(self) -> int:
        return len(self.members)

    def apply(self, index, crop, place):
        perturbed = crop.clone()
        for column in range(place[-1].start, place[-1].stop):
            if self.members[index, column // self.width]:
                at = column - place[-1].start
                perturbed[..., at] = self.baseline[(slice(None), *place)][..., at]
        return perturbed

    def key(self, index, window, place):
        if not self.keyed:
            return None
        first, last = place[-1].start // self.width, (place[-1].stop - 1) // self.width
        return tuple(self.members[index, first : last + 1].tolist())


@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
@pytest.mark.parametrize("channels", [None, (1,)])
@pytest.mark.parametrize(("dims", "shape"), [(2, (13, 10)), (3, (9, 10, 8)), (3, (6, 12, 7))])
def test_boxes_equal_naive(dims, shape, channels, output):
    net, image = network(dims, 2), noise(2, *shape)
    inferer = SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, targets(output, dims))
    boxes = boxes_for(shape, 4, noise(2, *shape, seed=1), channels)
    with frozen(net):
        changes = score_changes(o, boxes)
    assert changes.shape == (3, len(boxes))
    for k, score in enumerate(o.scores):
        assert_equal(changes[k], naive_change(net, image, inferer, score, boxes))


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_float32_keeps_to_its_tolerance(output):
    net, image = network(2, 1, torch.float32), noise(1, 20, 18).float()
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, targets(output, 2))
    boxes = boxes_for((20, 18), 4, 0.3)
    exact = naive_change(net.double(), image.double(), inferer, o.scores[0], boxes)
    net.float()
    with frozen(net):
        changes = score_changes(o, boxes)[0]
    assert float((changes - exact).abs().max()) <= 1e-6 * float(o.image_values()[0].abs())


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_keyed_coalitions_equal_naive_and_are_computed_once(output):
    net, image = network(2, 1), noise(1, 10, 24)
    inferer = SlidingWindowInferer((8, 8), 4, 0.5, "gaussian")
    members = torch.rand(24, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    baseline = noise(1, 10, 24, seed=1)
    keyed, plain = (Coalitions(members, 4, baseline, k) for k in (True, False))
    counts, results = [], []
    for perturbations in (keyed, plain):
        o, _ = objective(net, image, inferer, targets(output, 2))
        with frozen(net):
            results.append(score_changes(o, perturbations))
        counts.append(o.context.progress.passes)
    for k, score in enumerate(o.scores):
        naive = naive_change(net, image, inferer, score, plain)
        assert_equal(results[0][k], naive)
        assert_equal(results[1][k], naive)
    if output == "logit":  # windows are 8 wide: two or three stripes, so at most 8 parts a window
        assert counts[0] <= len(o.windows) * 8 < 0.5 * counts[1]


def test_equal_coalitions_in_one_batch_share_their_score():
    net, image = network(2, 1), noise(1, 8, 8)
    o, _ = objective(net, image, None, [MultiClassMask(1)])
    o.context.window_batch = 16
    members = torch.tensor([[True, False]] * 5 + [[False, True]] * 2)
    with frozen(net):
        changes = score_changes(o, Coalitions(members, 4, torch.zeros_like(image), keyed=True))
    assert o.context.progress.passes == 3
    assert changes[0, 0] != 0
    assert bool((changes[0, :5] == changes[0, 0]).all())
    assert changes[0, 5] == changes[0, 6] != changes[0, 0]


@pytest.mark.parametrize("chunk_bytes", [1, 2_000])
def test_blocks_and_evicted_outputs_give_the_same(monkeypatch, chunk_bytes):
    """CHUNK_BYTES so small that perturbations go one by one and unperturbed outputs are computed again."""
    net, image = network(2, 1), noise(1, 20, 18)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    boxes = boxes_for((20, 18), 5, 0.3)
    o, _ = objective(net, image, inferer, targets("probability", 2))
    with frozen(net):
        whole = score_changes(o, boxes)
        passes = o.context.progress.passes
        o.context.progress.start()
        monkeypatch.setattr(batching, "CHUNK_BYTES", chunk_bytes)
        blocks = score_changes(o, boxes)
    assert o.context.progress.passes > passes
    assert_equal(blocks, whole, 1e-12)


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("batch", [1, 2, 7, 100])
def test_the_batch_does_not_matter(batch, output):
    net, image = network(2, 1), noise(1, 13, 10)
    boxes = boxes_for((13, 10), 3, 0.3)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5)
    o, _ = objective(net, image, inferer, targets(output, 2))
    with frozen(net):
        reference = score_changes(o, boxes)
        o.context.window_batch = batch
        assert_equal(score_changes(o, boxes), reference, 1e-12)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_memory_back_off(output):
    net, image = network(2, 1), noise(1, 13, 10)
    boxes = boxes_for((13, 10), 3, 0.3)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 8, 0.5), targets(output, 2))
    with frozen(net):
        reference = score_changes(o, boxes)
        forward = net.forward

        def hungry(x):
            if len(x) > 3:
                x.zero_()  # what a pass that failed leaves of its input is not known
                raise torch.OutOfMemoryError("not enough memory")
            return forward(x)

        net.forward = hungry
        o.memo("window scores", dict).clear()
        changes = score_changes(o, boxes)
    assert o.window_batch <= 3
    assert any("out of memory" in w for w in o.context.progress.warnings)
    assert_equal(changes, reference, 1e-12)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_passes_needed_is_exact(output):
    net, image = network(2, 1), noise(1, 20, 18)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 3, 0.5), [MultiClassMask(1, output=output)])
    boxes = boxes_for((20, 18), 3, 0.3)
    with frozen(net):
        score_changes(o, boxes)
    assert o.context.progress.passes == passes_needed(o, boxes)
    image[:, :8] = 0.3
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 3, 0.5), [MultiClassMask(1, output=output)])
    with frozen(net):
        score_changes(o, boxes)
    assert o.context.progress.passes == passes_needed(o, boxes)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_what_perturbed_windows_are_compared_with_is_computed_once(output):
    """For one set of perturbations after the other; another image or precision begins anew."""
    net, image = network(2, 1), noise(1, 20, 18)
    rounds = [boxes_for((20, 18), 3, 0.3), boxes_for((20, 18), 4, 0.1), boxes_for((20, 18), 3, 0.3)]
    inferer, target = SlidingWindowInferer((8, 8), 3, 0.5), MultiClassMask(1, output=output)
    o, _ = objective(net, image, inferer, [target])
    windows = len(o.windows)
    needed = [passes_needed(o, boxes) for boxes in rounds]
    with frozen(net):
        results = [score_changes(o, boxes) for boxes in rounds]
        assert o.context.progress.passes == passes_needed(o, *rounds) == sum(needed) - 2 * windows
        for boxes, changes in zip(rounds, results):
            fresh, _ = objective(net, image, inferer, [target])
            assert_equal(changes, score_changes(fresh, boxes))
        for other in (o.derive(image=image + 1), o.derive(), o.derive(scores=o.scores[:1])):
            before = other.context.progress.passes
            score_changes(other, rounds[0])
            assert other.context.progress.passes - before == needed[0] + (
                0 if o.linear or other.prediction is not None else windows
            )
    fresh, _ = objective(net, image, inferer, [target])
    with pytest.MonkeyPatch.context() as patch, frozen(net):
        patch.setattr(batching, "CHUNK_BYTES", 1)  # what does not fit is not kept
        score_changes(fresh, rounds[0])
        assert not fresh.memo("window outputs", dict)


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_windows_that_no_perturbation_changes_are_not_computed(output):
    net, image = network(2, 1), noise(1, 20, 18)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, targets(output, 2))
    corner = Boxes([(0, 0), (1, 2)], [(2, 2), (3, 3)], 0.3)
    with frozen(net):
        changes = score_changes(o, corner)
    assert o.context.progress.passes == passes_needed(o, corner) == 2 + 1 < len(o.windows)
    for k, score in enumerate(o.scores):
        assert_equal(changes[k], naive_change(net, image, inferer, score, corner))


def test_the_image_is_never_changed():
    net, image = network(2, 1), noise(1, 13, 10)
    before = image.clone()
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 3, 0.5), [MultiClassMask(1)])
    with frozen(net):
        score_changes(o, boxes_for((13, 10), 3, 0.3))
    assert torch.equal(image, before)


def test_no_perturbations_give_no_columns():
    net, image = network(2, 1), noise(1, 8, 8)
    o, _ = objective(net, image, None, [MultiClassMask(1)])
    with frozen(net):
        assert score_changes(o, Boxes([], [])).shape == (1, 0)


class SoftDice(Score):
    """``2 Σ p m / (Σ p + Σ m)`` of a sigmoid against a fixed reference: no sum over voxels."""

    linear, channels, label = False, (1,), "dice"

    def __init__(self, mask: Tensor, reference: Tensor) -> None:
        self.box = bounding_box(mask)
        self.mask, self.reference = mask[self.box], reference[self.box][mask[self.box]]
        self.voxels = int(mask.sum())

    def value(self, prediction: Tensor) -> Tensor:
        p = prediction[..., 0, self.mask].double().sigmoid()
        return 2 * (p * self.reference).sum(-1) / (p.sum(-1) + self.reference.sum())


def test_a_score_that_is_no_sum_over_voxels():
    net, image = network(2, 1), noise(1, 20, 18)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    score = SoftDice(noise(20, 18, seed=3) > 0.2, (noise(20, 18, seed=4) > 0).double())
    o = o.derive(scores=[score])
    boxes = boxes_for((20, 18), 4, 0.3)
    with frozen(net):
        changes = score_changes(o, boxes)
    assert float(changes.abs().max()) > 1e-3
    assert_equal(changes[0], naive_change(net, image, inferer, score, boxes))


class Thirds(Score):
    """``Σ_v P(1, v) w(v)``: linear, differentiated by autograd, also where the network runs under inference mode."""

    linear, channels, label = True, (1,), "thirds"

    def __init__(self, mask: Tensor, weights: Tensor) -> None:
        self.box, self.voxels = bounding_box(mask), int(mask.sum())
        self.mask, self.weights = mask[self.box], (weights * mask)[self.box]

    def value(self, prediction: Tensor) -> Tensor:
        return (prediction[..., 0, :, :].double() * self.weights).sum((-1, -2))


def test_a_linear_score_of_a_users_own():
    net, image = network(2, 1), noise(1, 20, 18)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    score = Thirds(noise(20, 18, seed=3) > 0.2, noise(20, 18, seed=4) / 3)
    o = o.derive(scores=[score])
    boxes = boxes_for((20, 18), 4, 0.3)
    with frozen(net):
        changes = score_changes(o, boxes)
    assert_equal(changes[0], naive_change(net, image, inferer, score, boxes))


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_where_indices_of_windows_do_not_fit_they_are_made_again(monkeypatch, output):
    """The cache of what windows hold is dropped, the scores stay."""
    net, image = network(2, 2), noise(2, 20, 18)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"), targets(output, 2))
    boxes = boxes_for((20, 18), 5, 0.3)
    with frozen(net):
        whole = score_changes(o, boxes)
        monkeypatch.setattr(batching, "CHUNK_BYTES", 1)
        o.memo("window scores", dict).clear()
        assert_equal(score_changes(o, boxes), whole, 1e-12)


class Crossed(Score):
    """``Σ_v w(v) P(2, v) − P(0, v)``: linear, of channels that are no neighbours and in an order of its own."""

    linear, channels, label = True, (2, 0), "crossed"

    def __init__(self, mask: Tensor, weights: Tensor) -> None:
        self.box, self.voxels = bounding_box(mask), int(mask.sum())
        self.mask, self.weights = mask[self.box], torch.stack([weights * mask, -1.0 * mask])[(slice(None), *self.box)]

    def value(self, prediction: Tensor) -> Tensor:
        return (prediction.double() * self.weights).sum((-1, -2, -3))


@pytest.mark.parametrize("others", [[], [MultiClassMask(1)]])
def test_channels_that_are_no_neighbours(others):
    net, image = network(2, 1), noise(1, 20, 18)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, others or [MultiClassMask(1)])
    score = Crossed(noise(20, 18, seed=3) > 1.5, noise(20, 18, seed=4))
    o = o.derive(scores=[*(o.scores if others else []), score])
    boxes = boxes_for((20, 18), 4, 0.3)
    with frozen(net):
        assert_equal(score_changes(o, boxes)[-1], naive_change(net, image, inferer, score, boxes))
        gradient = o.gradient(image[None])
        assert_equal(gradient.maps[-1, 0], full_gradient(net, image, inferer, score))
        assert_equal(gradient.values[-1], o.value(image[None])[-1])
