"""Relevance through channels of a layer: against the definition, and against LRP where channels or layers add up."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from monai.networks.layers.simplelayers import SkipConnection
from monai.networks.nets import SegResNet
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import LRP, ConceptRelevance
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import Setting, setting
from tests.support.networks import Plain, plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close

COMPOSITES = ["EpsilonPlus", "EpsilonPlusFlat", "EpsilonGammaBox", "DeepTaylor", "Epsilon"]


# -- the definition on a plain ReLU network ---------------------------------------------------------------------------


def share_out(layer: nn.Module, x: Tensor, relevance: Tensor, rule: str) -> Tensor:
    """One rule of LRP at one layer, from its formula: ε, or z⁺ with the positive part of the bias."""
    x = x.detach().requires_grad_(True)
    if rule == "Epsilon":
        z = layer(x)
        quotient = relevance / (z + 1e-6 * torch.where(z >= 0, 1.0, -1.0))
        return x.detach() * torch.autograd.grad(z, x, quotient.detach())[0]
    weight, bias = layer.weight.detach(), layer.bias.detach().clamp(min=0)
    parts = [(x.detach().clamp(min=0), weight.clamp(min=0)), (x.detach().clamp(max=0), weight.clamp(max=0))]
    convolve = {4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}[x.ndim]
    z = sum(convolve(a, w, padding=layer.padding) for a, w in parts) + bias.reshape(1, -1, *(1,) * (x.ndim - 2))
    quotient, result = torch.where(z > 0, relevance / z, 0.0), torch.zeros_like(x)
    for a, w in parts:
        leaf = a.clone().requires_grad_(True)
        (back,) = torch.autograd.grad(convolve(leaf, w, padding=layer.padding), leaf, quotient)
        result = result + a * back
    return result.detach()


def by_definition(net: Plain, x: Tensor, rule: str, target: int, channels: list[int]) -> tuple[Tensor, Tensor]:
    """Relevance of the image through channels of ``act``: at the layer, all other channels are masked (zennit-crp).

    Returns the map, and the relevance of the channels at the layer.
    """
    with torch.no_grad():
        a = net.act(net.first(x))
        b = net.then(net.second(a))
        pooled = net.pool(b).flatten(1)
        y = net.head(pooled)
    relevance = torch.zeros_like(y)
    relevance[0, target] = y[0, target]
    relevance = share_out(net.head, pooled, relevance, "Epsilon")
    leaf = b.clone().requires_grad_(True)  # average pooling is linear without bias: ε without ε
    out = net.pool(leaf).flatten(1)
    relevance = b * torch.autograd.grad(out, leaf, torch.where(pooled == 0, 0.0, relevance / pooled))[0]
    relevance = share_out(net.second, a, relevance, rule)
    mask = torch.zeros_like(relevance)
    mask[:, channels] = 1
    at_layer = relevance * mask
    return share_out(net.first, x, at_layer, rule)[0], at_layer.sum()


@pytest.mark.parametrize("channels", [[0], [1, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize(("composite", "rule"), [("Epsilon", "Epsilon"), ("EpsilonPlus", "ZPlus")])
@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_definition_on_a_plain_relu_network(dims, composite, rule, channels):
    net, x = plain(dims)
    result = explain(ConceptRelevance("act", channels, composite=composite), objective_of(net, x[0], [ClassScore(1)]))
    expected, at_layer = by_definition(net, x, rule, 1, channels)
    close(result.maps[0], expected, 1e-8)
    note = result.note(0)
    assert float(result.maps.sum()) + note["booked"] == pytest.approx(float(at_layer), rel=1e-8)
    assert note["completeness_gap"] < 1e-9
    assert note["share_through_layer"] == pytest.approx(1, abs=1e-9)


# -- sums over channels and layers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dims", "composite"), [*((2, composite) for composite in COMPOSITES), (3, "EpsilonPlus")])
def test_the_sum_over_channels_is_the_whole_map_where_all_paths_pass_the_layer(dims, composite):
    """Through windows, at the stem of a U-Net: the first unit, whose output all paths read."""
    s = setting("SegResNet", dims, target=MultiClassMask(1))
    layer = "convInit"
    whole = explain(LRP(composite), s.objective).maps
    channels = s.network.get_submodule(layer).conv.out_channels
    groups = [[0], [1, channels - 1], list(range(2, channels - 1))]
    parts = [explain(ConceptRelevance(layer, g, composite=composite), s.objective) for g in groups]
    close(sum(p.maps for p in parts), whole)
    assert sum(p.note(0)["share_of_channels"] for p in parts) == pytest.approx(1, abs=1e-9)
    for part in parts:
        assert part.note(0)["share_through_layer"] == pytest.approx(1, abs=1e-9)
        assert abs(part.note(0)["share_around"]) < 1e-9
        assert part.note(0)["completeness_gap"] < 1e-9
    assert float((parts[0].maps - whole).abs().max()) > 0.1 * float(whole.abs().max())  # one channel is not all


class Skip(nn.Module):
    """MONAI's SkipConnection of a U-Net, with a module on the skip connection itself."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.skip, self.submodule = nn.Identity(), inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.skip(x), self.submodule(x)], 1)


def cut(s: Setting) -> tuple[list[str], str]:
    """Give the skip connections modules; return their names with that of the bottom, a set that every path passes
    exactly once, and the bottom."""
    network = s.network
    if isinstance(network, SegResNet):
        network.skips = nn.ModuleList(nn.Identity() for _ in network.up_samples)

        def decode(self: SegResNet, x: Tensor, down: list[Tensor]) -> Tensor:
            for i, (up, layer) in enumerate(zip(self.up_samples, self.up_layers)):
                x = layer(up(x) + self.skips[i](down[i + 1]))
            return self.conv_final(x)

        network.decode = MethodType(decode, network)
        bottom = "down_layers.2"
        return [bottom, *(f"skips.{i}" for i in range(len(network.skips)))], bottom
    connections = [n for n, m in network.named_modules() if isinstance(m, SkipConnection)]
    for name in reversed(connections):  # inner ones first
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, Skip(network.get_submodule(name).submodule))
    bottom = f"{connections[-1]}.submodule"
    return [bottom, *(f"{name}.skip" for name in connections)], bottom


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["UNet_batch", "SegResNet"])
def test_the_sum_over_a_cut_set_is_the_whole_map_and_the_bottom_alone_is_not(name, dims):
    s = setting(name, dims, target=MultiClassMask(1))
    whole = explain(LRP(), s.objective).maps
    layers, bottom = cut(s)
    objective = objective_of(s.network, s.image, [MultiClassMask(1)], s.inferer, s.output)
    close(explain(LRP(), objective).maps, whole)  # the modules on the skip connections change nothing
    assert len(layers) > 2
    parts = {layer: explain(ConceptRelevance(layer), objective) for layer in layers}
    close(sum(p.maps for p in parts.values()), whole)
    alone = parts[bottom]
    assert float((alone.maps - whole).abs().max()) > 0.1 * float(whole.abs().max())
    note = alone.note(0)
    assert note["share_through_layer"] < 0.9
    assert note["share_through_layer"] + note["share_around"] == pytest.approx(1, abs=1e-9)
    assert note["completeness_gap"] < 1e-9


def test_a_layer_that_most_relevance_flows_around_is_warned_of():
    """Two branches of known share: 3 x and x, the second one is the layer."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(1, 2, 1, bias=False)
            nn.init.constant_(self.wide.weight, 3.0)
            nn.init.constant_(self.narrow.weight, 1.0)

        def forward(self, x: Tensor) -> Tensor:
            return (self.wide(x) + self.narrow(x)).mean((2, 3))

    explainer, image = Explainer(Branches().double(), checks=False), torch.rand(1, 1, 5, 5, dtype=DOUBLE) + 0.1
    narrow, wide = explainer(image, [ConceptRelevance("narrow"), ConceptRelevance("wide")], [ClassScore(1)])
    assert narrow.record["share_through_layer"] == pytest.approx(0.25, abs=1e-9)
    assert narrow.record["share_around"] == pytest.approx(0.75, abs=1e-9)
    assert wide.record["share_through_layer"] == pytest.approx(0.75, abs=1e-9)
    assert any("25 % of the relevance passes layer 'narrow'" in text for text in narrow.record["warnings"])
    assert not any("passes layer 'wide'" in text for text in wide.record["warnings"])
    assert float(wide.map.sum() / narrow.map.sum()) == pytest.approx(3, rel=1e-9)


def test_shares_do_not_depend_on_biases_above_the_layer():
    """All paths pass the layer, and the last bias takes most of the score: the share is still 1."""
    net, x = plain(2)
    with torch.no_grad():
        net.head.bias.fill_(50.0)
    note = explain(ConceptRelevance("act"), objective_of(net, x[0], [ClassScore(1)])).note(0)
    assert note["share_through_layer"] == pytest.approx(1, abs=1e-9)


def test_two_planted_causes_are_two_channels():
    """Class 1 adds the left half by channel 0 and the right half by channel 1 of the first layer."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(2).reshape(2, 2, 1, 1))
        net[0].bias.zero_()
        weight = torch.zeros(2, 2, 6, 6)
        weight[1, 0, :, :3] = 1
        weight[1, 1, :, 3:] = 1
        net[3].weight.copy_(weight.flatten(1))
    objective = objective_of(net, torch.rand(2, 6, 6, dtype=DOUBLE), [ClassScore(1)])
    left, right = (explain(ConceptRelevance("1", c), objective).maps[0] for c in (0, 1))
    assert not bool(left[1].any() or left[0, :, 3:].any() or right[0].any() or right[1, :, :3].any())
    assert float(left.sum()) == pytest.approx(float(objective.image[0, :, :3].sum()), rel=1e-6)
    assert float(right.sum()) == pytest.approx(float(objective.image[1, :, 3:].sum()), rel=1e-6)


def test_the_network_is_left_as_it_was_and_wrong_channels_are_refused():
    net, x = plain(2)
    objective = objective_of(net, x[0], [ClassScore(1)])
    with frozen(net), pytest.raises(UsageError, match=r"channels=\[4\]: layer 'act' has the channels 0 to 3"):
        explain(ConceptRelevance("act", 4), objective)
    for wrong in ([], -1, [1, 1]):
        with pytest.raises(UsageError, match="each once"):
            ConceptRelevance("act", wrong)
    assert not any(m._forward_hooks for m in net.modules())
