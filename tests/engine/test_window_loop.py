"""Loops over windows: in batches that fit, the first one known, all jobs done once."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.engine.network.model import Model, out_of_memory
from esegeta_monai.engine.window_loop import WindowedNetwork
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.errors import MethodError
from tests.support.networks import network


def behind_windows() -> WindowedNetwork:
    """Five windows of an image, four of them a batch."""
    image = torch.rand(1, 8, 40)
    plan = plan_windows(SlidingWindowInferer((8, 8), 4, 0.0), image.shape[1:])
    return WindowedNetwork(Model(network(2, 1), torch.device("cpu")), image, plan)


@pytest.mark.parametrize(("memory", "sizes"), [(4, [4, 1, 2]), (2, [2, 2, 1, 2]), (1, [1] * 7)])
def test_jobs_are_done_once_in_batches_that_fit_and_groups_do_not_mix(memory, sizes):
    windowed, seen = behind_windows(), []

    def run(windows, sources, first):
        if len(windows) > memory:
            raise torch.OutOfMemoryError("out of memory")
        seen.append((windows, sources, first))

    groups = [[(0, w) for w in range(5)], [(1, 0), (1, 1)]]
    windowed.loop(groups, run)
    assert [len(windows) for windows, _, _ in seen] == sizes
    assert [(p, w) for windows, sources, _ in seen for w, p in zip(windows, sources)] == groups[0] + groups[1]
    assert [first for _, _, first in seen] == [True, *[False] * (len(seen) - 1)]


def test_one_window_that_does_not_fit_is_an_error_and_other_errors_are_none_of_memory():
    def fails(error):
        def run(windows, sources, first):
            raise error

        return run

    with pytest.raises(MethodError, match="out of memory with one window"):
        behind_windows().loop([[(0, 0)]], fails(torch.OutOfMemoryError("")))
    with pytest.raises(RuntimeError, match="shapes"):
        behind_windows().loop([[(0, 0)]], fails(RuntimeError("shapes")))
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
