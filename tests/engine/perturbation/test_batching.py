"""Pairs of different windows, and the windows as they are, fill the batches; one batch of windows is held."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.perturbation import batching
from esegeta_monai.engine.perturbation.scoring import passes_needed, score_changes
from esegeta_monai.targets import MultiClassMask
from tests.engine.perturbation.test_scoring import boxes_for
from tests.support.networks import network
from tests.support.objectives import naive_change, objective
from tests.support.tensors import assert_equal, noise


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("shape", [(20, 18), (5, 19)])  # the second is padded
@pytest.mark.parametrize(("batch", "staged"), [(1, 1), (3, 1), (4, 1), (1, 8), (3, 2)])
def test_batches_are_full_and_written_in_place(shape, batch, staged, output, monkeypatch):
    net, image = network(2, 2), noise(2, *shape)
    inferer = SlidingWindowInferer((8, 8), batch, 0.5, "gaussian", padding_mode="reflect")
    o, _ = objective(net, image, inferer, [MultiClassMask(1, output=output)])
    boxes = boxes_for(shape, 4, 0.3)
    o.context.local = False  # what plain passes do
    sizes, memory, forward = [], set(), net.forward
    monkeypatch.setattr(batching, "STAGED", staged)

    def seen(x):
        sizes.append(len(x))
        memory.add((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))
        return forward(x)

    net.forward = seen
    with frozen(net):
        changes = score_changes(o, boxes)
    assert sum(sizes) == o.context.progress.passes == passes_needed(o, boxes)
    assert set(sizes[:-1]) == {batch}
    assert sizes[-1] <= batch
    ((_, held),) = memory
    assert held == staged * batch * 2 * 8 * 8 * 8
    net.forward = forward
    assert_equal(changes[0], naive_change(net, image, inferer, o.scores[0], boxes))


def test_large_windows_are_not_held_several_batches_at_a_time(monkeypatch):
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 2, 0.5), [MultiClassMask(1)])
    monkeypatch.setattr(batching, "STAGED_BYTES", 3 * 2 * (8 * 8 + 8 * 8) * 8)  # three batches and their outputs
    lengths, forward = set(), net.forward

    def seen(x):
        lengths.add(x.untyped_storage().nbytes() // (8 * 8 * 8))
        return forward(x)

    net.forward = seen
    with frozen(net):
        reference = score_changes(o, boxes_for((13, 10), 3, 0.3))
        monkeypatch.setattr(batching, "STAGED_BYTES", 1)
        assert_equal(score_changes(o, boxes_for((13, 10), 3, 0.3)), reference, 1e-12)
    assert lengths == {6, 2}


class Interrupted(Exception):  # noqa: N818 - reads as what happened
    """An error that the network itself raises."""


@pytest.mark.parametrize("output", ["logit", "probability"])
def test_what_went_through_the_network_counts_where_it_stops(output):
    """A batch that fails loses no earlier batch, although their results are added together."""
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 2, 0.5), [MultiClassMask(1, output=output)])
    boxes, forward, left = boxes_for((13, 10), 3, 0.3), net.forward, [3]

    def stops(x):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return forward(x)

    with frozen(net):
        reference = score_changes(o, boxes)
        passes = o.context.progress.passes
        fresh = o.derive()
        net.forward = stops
        with pytest.raises(Interrupted):
            score_changes(fresh, boxes)
        known = fresh.memo("window scores" if o.linear else "window outputs", dict)
        assert 0 < len(known) < len(o.windows)
        left[0], before, again = 1000, o.context.progress.passes, len(known)
        assert_equal(score_changes(fresh, boxes), reference, 1e-12)
    assert o.context.progress.passes - before == passes - again


def test_a_batch_for_which_there_is_no_memory_is_made_smaller(monkeypatch):
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 8, 0.5), [MultiClassMask(1)])
    boxes, new_empty = boxes_for((13, 10), 3, 0.3), torch.Tensor.new_empty

    def hungry(tensor, size, **options):
        if tuple(size[1:]) == (1, 8, 8) and size[0] > 2:
            raise torch.OutOfMemoryError("not enough memory")
        return new_empty(tensor, size, **options)

    with frozen(net):
        reference = score_changes(o, boxes)
        monkeypatch.setattr(torch.Tensor, "new_empty", hungry)
        changes = score_changes(o, boxes)
    assert o.window_batch == 2
    assert_equal(changes, reference, 1e-12)
