"""A plain ReLU network in 2D, which every library can explain, and an image of nowhere negative values."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from esegeta_monai.engine.objective import Objective
from esegeta_monai.targets import ClassScore
from tests.support.objectives import explain, objective_of

__all__ = ["TARGET", "close", "explain", "network_and_image", "objective_for"]

TARGET = 1


def network_and_image(bias: bool = True) -> tuple[nn.Sequential, Tensor]:
    """Two convolutions, both kinds of pooling, two linear layers; no activation is dead on the image."""
    torch.manual_seed(0)
    network = nn.Sequential(
        OrderedDict(
            start=nn.Identity(),
            conv1=nn.Conv2d(3, 6, 3, padding=1, bias=bias),
            relu1=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 8, 3, padding=1, bias=bias),
            relu2=nn.ReLU(),
            mean=nn.AvgPool2d(2),
            flat=nn.Flatten(),
            hidden=nn.Linear(8 * 9, 20, bias=bias),
            relu3=nn.ReLU(),
            head=nn.Linear(20, 4, bias=bias),
        )
    )
    return network.double().eval(), torch.rand(1, 3, 12, 12, dtype=torch.float64)


def objective_for(network: nn.Module, image: Tensor) -> Objective:
    """The logit of class `TARGET`."""
    return objective_of(network, image[0], [ClassScore(TARGET)])


def close(values: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within the tolerance of the largest value, which is printed."""
    expected = expected.detach().reshape(values.shape)
    result = float((values - expected).abs().max() / expected.abs().max())
    print(f"deviation {result:.1e}")
    assert result <= tolerance
