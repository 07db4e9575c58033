"""Compare passes in parts with plain passes, at every position of a box."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from esegeta_monai.engine.local.reach import Box, whole
from esegeta_monai.engine.local.replay import Planner, replay
from esegeta_monai.engine.local.tape import Tape, record


def positions(shape: Sequence[int], size: int, step: int = 1) -> Iterator[Box]:
    """All boxes of one size, and those cut at the end."""
    for at in itertools.product(*(range(0, n, step) for n in shape)):
        yield tuple((a, min(a + size, n)) for a, n in zip(at, shape))


def randomise(network: nn.Module) -> nn.Module:
    """Statistics of norms that change the values; double precision."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval().double().requires_grad_(False)


def taped(network: nn.Module, x: Tensor) -> Tape:
    return record(network, x, network)[0]


def worst_difference(
    network: nn.Module,
    shape: Sequence[int],
    *,
    size: int = 2,
    step: int = 1,
    wanted: Sequence[Box] | None = None,
) -> tuple[float, float]:
    """Return the largest difference from plain passes over all boxes of the window and wanted boxes of the output, and
    the least share of the work."""
    torch.manual_seed(0)
    randomise(network)
    x = torch.randn(1, *shape, dtype=torch.float64)
    tape, out = record(network, x, network)
    with torch.inference_mode():
        assert torch.equal(out, network(x))
        cache = tape.run(x, tape.cached)
        assert torch.equal(out, cache[tape.output])
        worst, least = 0.0, 1.0
        for box in positions(shape[1:], size, step):
            changed = (*whole(x.shape[:2]), *box)
            at = tuple(slice(*side) for side in changed)
            y = x.clone()
            y[at] = torch.randn_like(y[at])
            plain = network(y)
            for inside in wanted or [whole(out.shape[2:])]:
                seen = (*whole(out.shape[:2]), *inside)
                plan = Planner(tape, seen).plan(changed)
                part = replay(plan, cache, y[at], tape)
                ours = out.clone()
                if part is not None:
                    ours[tuple(slice(*side) for side in plan.output)] = part
                here = tuple(slice(*side) for side in seen)
                worst = max(worst, float((ours - plain)[here].abs().max() / plain.abs().max()))
                least = min(least, plan.share)
    return worst, least
