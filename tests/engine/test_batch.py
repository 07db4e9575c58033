"""Batches of windows: cutting, scores, gradients."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError
from esegeta_monai.targets import MultiClassMask, Voxel
from tests.support.networks import network
from tests.support.objectives import objective
from tests.support.tensors import close, noise


def case(net: nn.Module | None = None) -> Objective:
    """Six windows; the second target is seen by the first window only."""
    targets = [MultiClassMask(1), Voxel(2, index=(0, 0))]
    o, _ = objective(net or network(2, 1), noise(1, 16, 12), SlidingWindowInferer((8, 8), 2, 0.5), targets)
    return o


def batches(o: Objective, volumes: int = 1, **options: object) -> list[Batch]:
    result: list[Batch] = []
    o.each(o.jobs(volumes), result.append, **options)
    return result


def test_windows_are_cut_from_the_volume_of_their_source():
    o = case()
    volumes = torch.stack([o.image, 2 * o.image])
    for batch in batches(o, 2):
        expected = torch.stack([(1 + s) * o.plan.cut(o.image, w) for w, s in zip(batch.windows, batch.sources)])
        close(batch.cut(volumes), expected)
        close(batch.image, torch.stack([o.plan.cut(o.image, w) for w in batch.windows]))
    assert [batch.first for batch in batches(o)] == [True, *[False] * (len(batches(o)) - 1)]


def test_scores_of_windows_add_up_to_the_value():
    o = case()
    with frozen(o.model.network), torch.no_grad():
        total = sum(batch.scores(batch.forward(batch.image)).sum(1) for batch in batches(o))
    close(total, o.image_values())


def test_a_target_that_sees_no_window_has_no_cotangent_and_zero_gradient():
    o = case()
    first, *_, last = batches(o)
    assert first.cotangents[1] is not None
    assert last.cotangents[1] is None
    with frozen(o.model.network):
        gradient, out = last.gradient(last.image)
        assert gradient.shape == (2, len(last), 1, 8, 8)
        assert bool(gradient[0].any())
        assert not bool(gradient[1].any())
        assert not bool(last.scores(out)[1].any())
    assert last.stacked_cotangents().shape == (2, *last.cotangents[0].shape)
    assert not bool(last.stacked_cotangents()[1].any())


def test_without_cotangents_there_are_none():
    assert all(batch.cotangents == [None, None] for batch in batches(case(), with_cotangents=False))


def test_no_path_to_the_input_is_an_error_with_a_remedy():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.detach().round())

    o = case(Cut())
    batch = batches(o)[0]
    with frozen(o.model.network), pytest.raises(MethodError, match="use a perturbation method such as Occlusion"):
        batch.gradient(batch.image)
