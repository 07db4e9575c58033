"""Relevance at a layer is the relevance that the rest of the network gives its input."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule
from torch import nn

from esegeta_monai.engine.rules import lrp
from esegeta_monai.methods import LRP, LayerLRP
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import setting
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonAlpha2Beta1"])
def test_equals_the_relevance_of_the_tail_at_its_input(dims, composite):
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    head = nn.Sequential(conv(1, 3, 3, padding=1), nn.ReLU())
    tail = nn.Sequential(conv(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5**dims, 3))
    network = nn.Sequential(head, tail).double().eval()
    image = torch.randn(1, *[5] * dims, dtype=DOUBLE)
    cotangent = torch.zeros(1, 1, 3, dtype=DOUBLE)
    cotangent[..., 1] = 1
    reference = lrp(tail, head(image[None]).detach(), cotangent, composite).input[0]
    result = explain(LayerLRP("0", "channels", composite=composite), objective_of(network, image, [ClassScore(1)]))
    close(result.maps, reference)


@pytest.mark.parametrize("name", ["UNet_batch", "MeshNet"])
def test_windows_add_up(name):
    """At a layer that keeps the image as it is, relevance is that of the image."""
    s = setting(name, target=MultiClassMask(1))
    network = nn.Sequential(nn.Identity(), s.network)
    objective = objective_of(network, s.image, [MultiClassMask(1)], s.inferer)
    close(explain(LayerLRP("0", "channels"), objective).maps, explain(LRP(), s.objective).maps)


class _Flat(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flatten(1)  # Captum has no rule for the module that does this


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_equals_captum_on_plain_relu_without_biases(dims):
    """Captum keeps the relevance of biases, ours records it: without biases there is nothing to differ by."""
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    first = conv(1, 3, 3, padding=1, bias=False)  # on the image's grid: nothing is spread
    network = _Flat(first, nn.ReLU(), conv(3, 4, 3, bias=False), nn.ReLU(), conv(4, 3, 4, bias=False))
    network = network.double().eval()
    image = torch.rand(1, *[6] * dims, dtype=DOUBLE)
    objective = objective_of(network, image, [ClassScore(1)])
    actual = [explain(m, objective).maps for m in (LRP("EpsilonPlus"), LayerLRP("0", "channels"))]
    for result, expected in zip(actual, (captum.attr.LRP(network), captum.attr.LayerLRP(network, first))):
        for module in network:
            if isinstance(module, conv):
                module.rule = Alpha1_Beta0_Rule()  # it takes them away afterwards
        close(result, expected.attribute(image[None], target=1).detach(), 1e-6)  # its stabiliser of 1e-9 is everywhere
