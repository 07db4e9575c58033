"""Passes that another window could do otherwise are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esegeta_monai.engine.local.tape import NotLocal, record
from tests.engine.local.support import randomise, taped, worst_difference


class Net(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(1, 2, 3, padding=1), function
        self.register_buffer("state", torch.zeros(1, 2, 6, 6))

    def forward(self, x):
        return self.function(self, self.conv(x))


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def through_a_view(net, x):
    view = x[:, :1]
    view.add_(1)
    return x * 2


def statistics(net, x):
    net.state.copy_(x)
    return x + net.state


def kept_from_a_plain_reader(net, x):
    return x if x.mean() > 0 else -x


REFUSED = {
    "dropout": (lambda net, x: nn.functional.dropout(x, 0.5), "random"),
    "noise": (lambda net, x: x + torch.randn_like(x), "random"),
    "random": (lambda net, x: x + torch.rand(6), "random"),
    "batch statistics": (lambda net, x: nn.functional.batch_norm(x, None, None, training=True), "statistics"),
    "decision": (kept_from_a_plain_reader, "reads values"),
    "number": (lambda net, x: x * x.max().item(), "reads values"),
    "index": (lambda net, x: x[:, x[0, :, 0, 0].argsort()], "reads values"),
    "mask": (lambda net, x: x[x > 0].sum() + x, "reads values"),
    "TorchScript": (lambda net, x: scripted(x) + 1, "cannot see"),
    "TorchScript last": (lambda net, x: scripted(x), "cannot see"),
    "view": (through_a_view, "view"),
    "buffer": (statistics, "buffer"),
    "gradient": (lambda net, x: torch.autograd.grad(x.sum(), x)[0], "values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    function, reason = REFUSED[name]
    network = randomise(Net(function))
    with pytest.raises(NotLocal, match=reason):
        record(network, torch.rand(1, 1, 6, 6, dtype=torch.float64), network)


def test_a_network_that_swallows_the_refusal_is_refused():
    def swallows(net, x):
        try:
            return x * x.max().item()
        except Exception:
            return x

    network = randomise(Net(swallows))
    with pytest.raises(NotLocal, match="reads values"):
        record(network, torch.rand(1, 1, 6, 6, dtype=torch.float64), network)


def test_writes_in_place_keep_what_came_before():
    def in_place(net, x):
        before = x
        y = x * 2
        y.add_(x)
        x.relu_()
        return before + net.conv(y[:, :1]) + y

    worst, _ = worst_difference(Net(in_place), (1, 6, 6))
    assert worst < 1e-14


def test_memory_is_counted():
    network = randomise(nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 3)))
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    tape = taped(network, x)
    kept = tape.run(x, tape.cached)
    assert set(kept) == set(tape.cached)
    assert tape.cache_bytes == 8 * (36 + 72 + 16)  # window, ReLU, output
    assert tape.cache_bytes == sum(t.nbytes for t in kept.values())


def test_the_network_is_left_as_it_was():
    network = randomise(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    kept = x.clone()
    record(network, x, network)
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
