"""Full gradients add up to the target; the absolute map is built of the parts of the whole volume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.methods import FullGrad
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


@pytest.mark.parametrize(
    ("name", "dims"),
    [("UNet_batch", 2), ("UNet_batch", 3), ("UNet_instance", 2), ("SegResNet", 2), ("ResNet18", 3), ("MeshNet", 3)],
)
def test_complete(name, dims):
    s = setting(name, dims)
    score = s.objective.scores[0]
    with torch.no_grad():
        value = score.value(score.crop(s.inferer(s.image[None], s.model)[0]))
    result = explain(FullGrad(abs=False), s.objective)
    close(result.maps.sum() + result.note(0)["booked"], value, 1e-9)
    assert result.note(0)["completeness_gap"] < 1e-9


def test_functional_operations_are_missing_and_reported():
    s = setting("ViTAutoEnc")  # attention, position embeddings
    assert explain(FullGrad(abs=False), s.objective).note(0)["completeness_gap"] > 1e-3


@pytest.mark.parametrize("dims", [2, 3])
def test_parts_by_hand(dims):
    network, image = plain(dims)
    x = image.clone().requires_grad_()
    first = network.first(x)
    second = network.second(network.act(first))
    out = network.head(network.pool(network.then(second)).flatten(1))[0, 1]
    gx, g1, g2 = torch.autograd.grad(out, [x, first, second])
    shape = (1, -1, *[1] * dims)
    parts = [gx * image, g1 * network.first.bias.view(shape), g2 * network.second.bias.view(shape)]
    objective = objective_of(network, image[0], [ClassScore(1)])
    result = explain(FullGrad(abs=False), objective)
    close(result.maps, sum(p.sum(1, keepdim=True) for p in parts).detach())
    assert result.note(0)["booked"] == pytest.approx(float(network.head.bias[1]), rel=1e-10)
    result = explain(FullGrad(), objective)
    close(result.maps, sum(p.abs().sum(1, keepdim=True) for p in parts).detach())
    assert result.note(0)["completeness_gap"] < 1e-10


def test_in_place_and_shared_modules():
    torch.manual_seed(0)
    act = nn.Softplus()
    network = nn.Sequential(nn.Conv2d(1, 3, 3), act, nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True), act, nn.Flatten())
    network = network.append(nn.Linear(48, 3)).double().eval()
    image = torch.randn(1, 8, 8).double()
    result = explain(FullGrad(abs=False), objective_of(network, image, [ClassScore(1)]))
    assert result.note(0)["completeness_gap"] < 1e-9


class Reused(nn.Module):
    """One upsampling for maps of 6 and of 4 channels, as U-Nets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 6, 3, 4, 1), nn.Conv2d(6, 4, 3, 1, 1), nn.Conv2d(4, 3, 3, 1, 1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x):
        return self.c(self.up(self.b(self.up(self.a(x).relu())).relu()))


def test_a_module_that_runs_twice_with_other_channels():
    torch.manual_seed(0)
    network = Reused().double().eval()
    objective = objective_of(network, torch.rand(1, 16, 16, dtype=torch.float64), [MultiClassMask(1)])
    assert explain(FullGrad(abs=False), objective).notes["completeness_gap"][0] <= 1e-9
    assert explain(FullGrad(), objective).maps.min() >= 0


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_a_parametrised_network_has_the_map_of_the_plain_one(dims, norm):
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    network = nn.Sequential(conv(1, 4, 3, padding=1), nn.Softplus(), conv(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten())
    network = network.append(nn.Linear(4 * 4**dims, 3)).double()
    plain_network = copy.deepcopy(network).eval()
    for i in (0, 2, 5):
        getattr(nn.utils.parametrizations, norm)(network[i])
    network.eval()
    for i in (0, 2, 5):
        plain_network[i].weight.data = network[i].weight.detach()
    image = torch.randn(1, *(8,) * dims).double()
    for absolute in (False, True):
        result, expected = (
            explain(FullGrad(abs=absolute), objective_of(n, image, [ClassScore(1)])) for n in (network, plain_network)
        )
        close(result.maps, expected.maps, 1e-12)
        assert result.note(0)["booked"] == pytest.approx(expected.note(0)["booked"], rel=1e-12)
        assert result.note(0)["completeness_gap"] < 1e-10


class Entry(nn.Module):
    """A convolution of the window after a function, and a linear head."""

    def __init__(self, function) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.function = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(3 * 64, 2), function

    def forward(self, x):
        return self.head(self.conv(self.function(x)).relu().flatten(1))


def written(x):
    x = x.clone()
    x[x < 0] = 0
    return x


def test_biases_without_a_known_place_are_warned_of():
    """A roll alone has no frame; a value that is set by a mask of the window keeps it."""
    image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_name = {}
    for name, function in {"roll": lambda x: x.roll(2, 3), "index": written, "relu": torch.relu}.items():
        network = Entry(function).double().eval()
        (by_name[name],) = Explainer(network)(image, [FullGrad(abs=False)], [ClassScore(1)])
    warned = {name: any("'booked' only" in w for w in a.record["warnings"]) for name, a in by_name.items()}
    assert warned == {"roll": True, "index": False, "relu": False}
    close(by_name["index"].map.as_tensor(), by_name["relu"].map.as_tensor(), 1e-12)
