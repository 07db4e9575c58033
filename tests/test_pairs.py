"""Pairs of different windows, and the windows as they are, fill the batches; one batch of windows is held."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.change import change, passes_needed
from esegeta_monai.network import frozen
from esegeta_monai.targets import MultiClassMask
from tests.test_change import boxes_for, noise
from tests.test_objective import assert_equal, naive_change, network, objective


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("shape", [(20, 18), (5, 19)])  # the second is padded
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_batches_are_full_and_written_in_place(shape, batch, output):
    net, image = network(2, 2), noise(2, *shape)
    inferer = SlidingWindowInferer((8, 8), batch, 0.5, "gaussian", padding_mode="reflect")
    o, _ = objective(net, image, inferer, [MultiClassMask(1, output=output)])
    boxes = boxes_for(shape, 4, 0.3)
    sizes, memory, forward = [], set(), net.forward

    def seen(x):
        sizes.append(len(x))
        memory.add(x.untyped_storage().data_ptr())
        return forward(x)

    net.forward = seen
    with frozen(net):
        found = change(o, boxes)
    assert sum(sizes) == o.monitor.passes == passes_needed(o, boxes)
    assert set(sizes[:-1]) == {batch}
    assert sizes[-1] <= batch
    assert len(memory) == 1
    net.forward = forward
    assert_equal(found[0], naive_change(net, image, inferer, o.scores[0], boxes))


def test_a_batch_for_which_there_is_no_memory_is_made_smaller(monkeypatch):
    net, image = network(2, 1), noise(1, 13, 10)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 8, 0.5), [MultiClassMask(1)])
    boxes, new_empty = boxes_for((13, 10), 3, 0.3), torch.Tensor.new_empty

    def hungry(tensor, size, **options):
        if tuple(size[1:]) == (1, 8, 8) and size[0] > 2:
            raise torch.OutOfMemoryError("not enough memory")
        return new_empty(tensor, size, **options)

    with frozen(net):
        reference = change(o, boxes)
        monkeypatch.setattr(torch.Tensor, "new_empty", hungry)
        found = change(o, boxes)
    assert o.window_batch == 2
    assert_equal(found, reference, 1e-12)
