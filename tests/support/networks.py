"""Small networks that several tests need. `tests.networks` has the architectures of MONAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.tensors import DOUBLE

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
ELSEWHERE = ("AttentionRelevance", "AttentionRollout", "LeGrad", "PromptShapley")
"""Methods that need self-attention or prompts, which most networks do not have."""
NORMS = {
    ("instance", 2): nn.InstanceNorm2d,
    ("instance", 3): nn.InstanceNorm3d,
    ("batch", 2): nn.BatchNorm2d,
    ("batch", 3): nn.BatchNorm3d,
}


class ConvNet(nn.Module):
    """Two convolutions, a norm and SiLU in between.

    With an instance norm, every output voxel depends on its whole window.
    """

    def __init__(
        self, dims: int, channels: int, norm: str | None = "instance", width: int = 6, random_norm: bool = False
    ) -> None:
        super().__init__()
        self.a = CONV[dims](channels, width, 3, padding=1)
        self.n = NORMS[norm, dims](width, affine=True) if norm else nn.Identity()
        self.b = CONV[dims](width, 3, 3, padding=1)
        if random_norm:
            with torch.no_grad():
                for name, value in [*self.n.named_parameters(), *self.n.named_buffers()]:
                    if value.is_floating_point():
                        value.copy_(torch.rand_like(value) + (0.5 if "var" in name or name == "weight" else 0))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.silu(self.n(self.a(x))))


def network(dims: int, channels: int, dtype: torch.dtype = DOUBLE, norm: bool = True) -> nn.Module:
    """Build a `ConvNet` whose norm, if any, is an instance norm as it is initialised."""
    torch.manual_seed(dims * 10 + channels)
    return ConvNet(dims, channels, "instance" if norm else None).to(dtype).eval()


def small(dims: int = 2, channels: int = 1, norm: str = "instance") -> nn.Module:
    """Build a `ConvNet` whose norm has random parameters and statistics."""
    torch.manual_seed(10 * dims + channels)
    return ConvNet(dims, channels, norm, width=5, random_norm=True).double().eval()


def conv_norm_relu() -> nn.Sequential:
    """Build a 2D convolution, batch norm, in-place ReLU and a 1 x 1 convolution, in train mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))


class Plain(nn.Module):
    """A ReLU classifier whose layers ``first`` to ``then`` keep the image's resolution: no map is upsampled."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv, pool = CONV[dims], {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims]
        self.first, self.act = conv(2, 4, 3, padding=1), nn.ReLU()
        self.second, self.then, self.pool = conv(4, 4, 3, padding=1), nn.ReLU(), pool(2)
        self.head = nn.Linear(4 * 3**dims, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.then(self.second(self.act(self.first(x))))
        return self.head(self.pool(x).flatten(1))


def plain(dims: int) -> tuple[Plain, Tensor]:
    """Build a `Plain` network and a random image (1, 2, 6, …) for it."""
    torch.manual_seed(dims)
    return Plain(dims).double().eval(), torch.randn(1, 2, *[6] * dims, dtype=DOUBLE)


class Pooled(nn.Module):
    """Convolutions, global average pooling, one linear layer."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = CONV[dims]
        self.features = nn.Sequential(conv(1, 5, 3, 2, 1), nn.ReLU(), conv(5, 6, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(2).mean(2))


def pooled(dims: int) -> tuple[Pooled, Tensor]:
    """Build a `Pooled` network and a random image (1, 1, 16, …) for it."""
    torch.manual_seed(dims)
    return Pooled(dims).double().eval(), torch.randn(1, 1, *[16] * dims, dtype=DOUBLE)


class Coarse(nn.Module):
    """A network with a layer, ``down``, at half the resolution."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        up = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}[dims]
        self.down = CONV[dims](1, 4, 3, stride=2, padding=1)
        self.up = up(4, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.relu(self.down(x)))


def coarse(dims: int) -> nn.Module:
    """Build a `Coarse` network."""
    torch.manual_seed(dims)
    return Coarse(dims).double().eval()


class Computed(nn.Module):
    """A network whose output is a function of the image, or of another network's output, which may have weights."""

    def __init__(self, function: Callable[[Any], Any], network: nn.Module | None = None) -> None:
        super().__init__()
        self.function, self.network = function, network

    def forward(self, x: Tensor) -> Any:
        return self.function(x if self.network is None else self.network(x))
