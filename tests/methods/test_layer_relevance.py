"""Relevance at a layer is the relevance that the rest of the network gives its input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esegeta_monai.methods import LRP, LayerLRP
from esegeta_monai.rules import lrp
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.methods.whole import DOUBLE, close, explain, objective_of, setting


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
    found = explain(LayerLRP("0", "channels", composite=composite), objective_of(network, image, [ClassScore(1)]))
    close(found.maps, reference)


@pytest.mark.parametrize("name", ["UNet_batch", "MeshNet"])
def test_windows_add_up(name):
    """At a layer that keeps the image as it is, relevance is that of the image."""
    s = setting(name, target=MultiClassMask(1))
    network = nn.Sequential(nn.Identity(), s.network)
    objective = objective_of(network, s.image, [MultiClassMask(1)], s.inferer)
    close(explain(LayerLRP("0", "channels"), objective).maps, explain(LRP(), s.objective).maps)
