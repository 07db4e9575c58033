"""Excitation backpropagation at a layer: equal to the tail of the network, and to the opposite by negated weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai.engine.rules import excitation
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import ContrastiveExcitationBackprop, ExcitationBackprop, LayerExcitationBackprop
from esegeta_monai.targets import ClassScore
from tests.support.layers import setting
from tests.support.networks import CONV, plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_tail_of_the_network(dims):
    """The layer's probabilities are those of the input of what comes after it."""
    network, image = plain(dims)
    o = objective_of(network, image[0], [ClassScore(1)])
    tail = nn.Sequential(network.second, network.then, network.pool, nn.Flatten(), network.head)
    prior = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64)
    with torch.no_grad():
        expected = excitation(tail, network.act(network.first(image)), prior).input[0]
    explained = explain(LayerExcitationBackprop("act", "channels"), o)
    close(explained.maps, expected)
    assert not LayerExcitationBackprop("act").signed
    (share,) = explain(LayerExcitationBackprop("act"), o).notes["share_at_layer"]
    assert share == pytest.approx(float(expected.sum()))
    close(explain(LayerExcitationBackprop("first:input"), o).maps.sum(), explain(ExcitationBackprop(), o).maps.sum())


class Around(nn.Module):
    """A path leads around layer ``b``."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(dims)
        conv = CONV[dims]
        self.a, self.b, self.c = conv(2, 4, 3, padding=1), conv(4, 4, 3, padding=1), conv(4, 4, 3, padding=1)
        self.top, self.head = nn.ReLU(), nn.Linear(4 * 6**dims, 3)

    def rest(self, a: Tensor, b: Tensor) -> Tensor:
        return self.top((b + self.c(a)).relu())

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu()
        return self.head(self.rest(a, self.b(a)).flatten(1))


def _opposite(network: Around, values: Tensor, target: int) -> Tensor:
    """Probabilities at ``top`` under negated weights of the head."""
    with torch.no_grad():
        network.head.weight.neg_()
        network.head.bias.neg_()
    prior = torch.zeros(1, 1, 3, dtype=torch.float64)
    prior[..., target] = 1
    result = excitation(nn.Sequential(nn.Flatten(), network.head), values, prior).input[0]
    with torch.no_grad():
        network.head.weight.neg_()
        network.head.bias.neg_()
    return result


@pytest.mark.parametrize("dims", [2, 3])
def test_the_contrast_is_formed_by_what_passes_the_contrast_layer(dims):
    network = Around(dims).double().eval()
    image = torch.randn(1, 2, *[6] * dims, dtype=torch.float64)
    o = objective_of(network, image[0], [ClassScore(1)])
    with torch.no_grad():
        a = network.a(image)
        b = network.b(a.relu())
        top = network.rest(a.relu(), b)
    prior = torch.tensor([[[0.0, 1.0, 0.0]]], dtype=torch.float64)
    at_top = excitation(nn.Sequential(nn.Flatten(), network.head), top, prior).input[0]
    opposite = _opposite(network, top, 1)
    t, against = at_top.sum(), opposite.sum()

    class Rest(nn.Module):
        """Everything from ``a`` to ``top``; the first half of the output is ``b`` alone."""

        def forward(self, a: Tensor) -> Tensor:
            return network.rest(a.relu(), network.b(a.relu()))

    whole = explain(LayerExcitationBackprop("a", "channels", contrast_layer="top", positive=False), o)
    down = [
        excitation(Rest(), a, signal[None].reshape(1, 1, *top.shape[1:])).input[0, 0] for signal in (at_top, opposite)
    ]
    close(whole.maps[0], down[0] / t - down[1] / against)

    class OnlyB(nn.Module):
        """The part that passes ``b``: the probability that reaches it, from ``top`` down, and from there to ``a``."""

        def forward(self, b: Tensor) -> Tensor:
            return network.top((b + network.c(a.relu())).relu())

    pair = torch.cat([b, a.relu()], 1)  # both operands of the sum are inputs, so that they share the probability

    class Sum(nn.Module):
        def forward(self, pair: Tensor) -> Tensor:
            return network.rest(pair[:, 4:], pair[:, :4])

    at_b = excitation(Sum(), pair, opposite[None].reshape(1, 1, *top.shape[1:])).input[0, :, :4]
    through = excitation(nn.Sequential(nn.ReLU(), network.b), a, at_b[None].reshape(1, 1, *b.shape[1:])).input[0, 0]
    result = explain(LayerExcitationBackprop("a", "channels", contrast_layer="b", positive=False), o)
    close(result.maps[0], down[0] / t - through / against)
    assert float((result.maps - whole.maps).abs().max()) > 0.01 * float(whole.maps.abs().max())
    positive = explain(LayerExcitationBackprop("a", contrast_layer="b"), o).maps
    close(positive, result.maps.sum(1, keepdim=True).clamp(min=0))


def test_all_contrast_layers_of_a_chain_give_the_contrast_at_the_image():
    network, image = plain(2)
    o = objective_of(network, image[0], [ClassScore(1)])
    maps = [
        explain(LayerExcitationBackprop("first:input", "channels", contrast_layer=at, positive=False), o).maps
        for at in ("first:input", "first", "second", "then", "pool")
    ]
    expected = explain(ContrastiveExcitationBackprop(positive=False), o).maps
    for result in maps:
        close(result, expected, 1e-9)


def test_windows_are_added_before_the_contrast():
    s = setting("UNet_batch", 2)
    result = explain(LayerExcitationBackprop(s.layer, contrast_layer=s.layer, positive=False), s.objective)
    sides = [torch.zeros_like(result.maps[0]) for _ in range(2)]
    assert len(s.objective.windows) > 1
    plain_map = explain(LayerExcitationBackprop(s.layer), s.objective)
    assert float(plain_map.notes["share_at_layer"][0]) <= 1 + 1e-9
    kept = [float(result.notes[n][0]) for n in ("kept_target", "kept_opposite")]
    assert all(0 < k <= 1 + 1e-9 for k in kept)
    sides[0] += plain_map.maps[0] / kept[0]
    sides[1] += sides[0] - result.maps[0]
    prior = float(plain_map.maps.sum()) / plain_map.notes["share_at_layer"][0]
    assert float(sides[1].min()) > -1e-12 * prior  # the opposite's probabilities
    assert 0 < float(sides[1].sum()) * kept[1] <= prior * (1 + 1e-9)


def test_bad_input():
    network, image = plain(2)
    o = objective_of(network, image[0], [ClassScore(1)])
    with pytest.raises(MethodError, match="between it and the output"):
        explain(LayerExcitationBackprop("then", contrast_layer="first"), o)
