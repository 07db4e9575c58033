"""Layers are captured and replaced by hooks that leave nothing behind."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from esegeta_monai.engine.network.hooks import capture, find_layer, replaced
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.rules import lrp
from esegeta_monai.errors import NetworkError, UsageError
from tests.support.networks import Computed, conv_norm_relu


def test_capture_records_what_the_layer_gave_before_an_inplace_change():
    network = conv_norm_relu().eval()
    x = torch.rand(1, 1, 6, 6)
    with capture(network, ["1", "2"]) as captured:
        out = network(x)
    assert float(captured["1"].detach().min()) < 0
    assert torch.equal(captured["2"], captured["1"].relu())
    assert torch.equal(out, network(x))
    assert {name: len(outputs) for name, outputs in captured.each.items()} == {"1": 1, "2": 1}
    assert not any(m._forward_hooks for m in network.modules())


def test_a_layer_that_returns_its_input_has_its_own_gradient():
    """Not that of the input's other uses: a skip connection through an identity beside a branch."""

    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.pad, self.branch = nn.Linear(3, 3), nn.Identity(), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.stem(x)
            return self.pad(h) + self.branch(h)

    network, x = Skip(), torch.rand(1, 3)
    with capture(network, ["pad", "stem"]) as captured:
        out = network(x)
    pad, stem = torch.autograd.grad(out.sum(), [captured["pad"], captured["stem"]])
    assert torch.equal(pad, torch.ones(1, 3))
    assert torch.allclose(stem, 1 + network.branch.weight.sum(0, keepdim=True))
    relevance = lrp(
        network.double(), x.double(), torch.ones(1, 1, 3, dtype=torch.float64), "LRP0", layers={"pad": network.pad}
    )
    assert torch.allclose(relevance.layers["pad"].gradient, torch.ones(1, 1, 3, dtype=torch.float64))


def test_capture_removes_its_hooks_after_an_error():
    network = conv_norm_relu()
    with pytest.raises(ZeroDivisionError), capture(network, ["0"]):
        raise ZeroDivisionError
    with pytest.raises(UsageError, match="no layer 'nope'; it has 0, 1"), capture(network, ["0", "nope"]):
        pass
    assert not any(m._forward_hooks for m in network.modules())


def test_capture_keeps_all_calls_and_returns_none_of_several_as_the_one():
    act = nn.Tanh()
    network = nn.Sequential(act, nn.Linear(3, 3), act)
    x = torch.rand(2, 3)
    with capture(network, ["0"]) as captured:
        out = network(x)
    first, last = captured.each["0"]
    assert torch.equal(first, act(x))
    assert torch.equal(last, out)
    with pytest.raises(NetworkError, match="runs 2 times"):
        captured["0"]


def test_capture_of_a_layer_without_a_tensor_is_refused():
    def as_dict(x):
        return {"x": x}

    network = nn.Sequential(Computed(as_dict))
    with pytest.raises(NetworkError, match="not a tensor"), capture(network, ["0"]):
        network(torch.rand(1))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@pytest.mark.parametrize("kind", [Pair, lambda *items: list(items), lambda *items: items])
def test_of_several_outputs_the_first_is_recorded_and_all_go_on(kind):
    def two(x: torch.Tensor) -> Any:
        return kind(x * 2, x * 3)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Computed(two)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pair = self.two(x)
            return pair[0] + (pair.second if isinstance(pair, Pair) else pair[1])

    network, x = Sum(), torch.rand(2, 3, dtype=torch.float64)
    with capture(network, ["two"]) as captured:
        assert torch.allclose(network(x), 5 * x)
    assert torch.equal(captured["two"], 2 * x)
    with replaced(network, "two", torch.zeros_like):
        assert torch.equal(network(x), 3 * x)
    layer = lrp(network, x, torch.ones(1, 2, 3, dtype=torch.float64), layers={"two": network.two}).layers["two"]
    assert torch.allclose(layer.relevance, 2 * x[None])


def test_a_layer_whose_rows_are_not_the_windows_is_refused():
    """Its rows would be taken for windows: attention inside parts of a window, tokens in front of the batch."""

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.reshape(-1, 1, 4)).reshape(x.shape)

    network, x = Parts().double(), torch.rand(2, 4, 4, dtype=torch.float64)
    with pytest.raises(NetworkError, match=r"'inner' gives \(8, 1, 4\) for 2 window"), capture(network, ["inner"]):
        network(x)
    with pytest.raises(NetworkError, match="first axis is not the windows"), replaced(network, "inner", lambda v: v):
        network(x)
    with pytest.raises(NetworkError, match="first axis is not the windows"):
        lrp(network, x, torch.ones(1, 2, 4, 4, dtype=torch.float64), layers={"inner": network.inner})
    with capture(network, ["inner"], of_windows=False) as captured:
        network(x)
    assert captured["inner"].shape == (8, 1, 4)
    assert not network._forward_pre_hooks


def test_find_layer_lists_near_matches():
    network = nn.ModuleDict({"encoder1": nn.Conv2d(1, 1, 1), "decoder1": nn.Conv2d(1, 1, 1)})
    assert find_layer(network, "encoder1") is network["encoder1"]
    with pytest.raises(UsageError, match="near matches: encoder1"):
        find_layer(network, "encoder")


class Skipping(nn.Module):
    """Two consecutive layers with a skip connection around both; a module that returns a buffer."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", torch.ones(1, 2, 8, 8, dtype=torch.float64))

        def forward(self, x):
            return self.value.expand(len(x), -1, -1, -1)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.front, self.first, self.second = (nn.Conv2d(n, 2, 3, padding=1) for n in (1, 2, 2))
        self.constant = self.Constant()

    def forward(self, x):
        x = self.front(x)
        return torch.tanh(self.second(torch.tanh(self.first(x)))) * x * self.constant(x)


def test_a_graph_that_begins_at_the_layers_has_their_gradients_and_nothing_in_front():
    network, x = Skipping().double().eval(), torch.randn(2, 1, 8, 8, dtype=torch.float64)
    layers, gradients = ["first", "second", "constant"], {}
    with frozen(network):
        for leaves in (True, False):
            with capture(network, [*layers, "front"][: 3 if leaves else 4], leaves=leaves) as captured:
                out = network(x if leaves else x.clone().requires_grad_())
            chosen = layers if leaves else layers[:2]  # the buffer is on no path from the image
            gradients[leaves] = torch.autograd.grad(out.sin().sum(), [captured[name] for name in chosen])
        assert captured["front"].requires_grad
        with capture(network, ["first"], leaves=True) as captured:
            outputs = []
            handle = network.front.register_forward_hook(lambda m, a, out: outputs.append(out))
            network(x)
            handle.remove()
        assert not outputs[0].requires_grad
        assert not network.constant.value.requires_grad
    for begun, whole in zip(gradients[True], gradients[False]):
        assert torch.equal(begun, whole)


def test_a_layer_that_does_not_run_as_a_module_is_named() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1))
    with capture(network, ["0"]) as captured:
        pass
    with pytest.raises(NetworkError, match="does not run as a module"):
        captured["0"]


def test_a_wrong_layer_in_a_plain_network():
    """The error helps without a bundle, and where there is no layer to choose."""
    with pytest.raises(UsageError, match=r"near matches: .*named_modules"):
        find_layer(nn.Sequential(OrderedDict(features=nn.Conv1d(1, 1, 1))), "feature")
    with pytest.raises(UsageError, match="one Conv1d without layers inside; omit the layer"):
        find_layer(nn.Conv1d(1, 1, 1), "features")
