"""A network that counts the images it has seen, methods that fail, and helpers for the tests of an explainer."""

from __future__ import annotations

from typing import Any

import torch
from monai.inferers import Inferer, SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Attribution
from esegeta_monai.methods import (
    Saliency,
)

RECORDED = {  # docs/design.md, "Recorded"
    *("status", "method", "parameters", "target", "target_voxels", "sum", "completeness_gap", "blend_deviation"),
    *("value", "baseline_value", "predicted_class", "predicted_probability", "class_name", "units", "coverage"),
    *("windows_used", "windows_total", "seconds", "peak_memory_bytes", "warnings", "versions"),
}


SLIDING = SlidingWindowInferer((8, 8, 8), 2, 0.5, "gaussian")


class Spy(nn.Module):
    """A small segmenter that counts the images it has seen."""

    def __init__(self, channels: int = 1, dims: int = 3, classes: int = 2) -> None:
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.first, self.last = conv(channels, 4, 3, padding=1), conv(4, classes, 3, padding=1)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.last(torch.relu(self.first(x)))


def image(batch: int = 1, channels: int = 1, size: int = 12, dims: int = 3) -> Tensor:
    return torch.rand((batch, channels, *[size] * dims), generator=torch.Generator().manual_seed(7))


def only(result: Any) -> Attribution:
    (attribution,) = result
    return attribution


def autograd(network: nn.Module, x: Tensor, inferer: Any, class_index: int) -> Tensor:
    x = x.clone().requires_grad_(True)
    out = inferer(x, network)
    (gradient,) = torch.autograd.grad(out[0, class_index][out[0].argmax(0) == class_index].sum(), x)
    return gradient[0]


class Broken(Saliency):
    def attribute(self, objective: Any) -> Any:
        objective.gradient(objective.image[None])
        raise ZeroDivisionError("a bug")


class NotFinite(Saliency):
    def attribute(self, objective: Any) -> Tensor:
        maps = objective.new_maps()
        maps[..., 0] = torch.nan
        return maps


class Mirrored(Inferer):
    """An inferer that nobody knows: the mean over the image and its mirror image."""

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        return (network(inputs) + network(inputs.flip(2)).flip(2)) / 2
