"""Networks with layers that run several times in one pass, and layers whose axes a shape does not show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

View = Callable[[Tensor], Tensor]


class Encoder(nn.Module):
    """A small U without skips: `down` has half the resolution."""

    def __init__(self, dims: int, channels: int = 1) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.stem = nn.Sequential(conv(channels, 4, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(conv(4, 6, 3, 2, 1), nn.ReLU())
        self.up, self.head = nn.Upsample(scale_factor=2), conv(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.down(self.stem(x))))


class Views(nn.Module):
    """``Σ_m weight · undo_m(n(do_m(x)))``."""

    def __init__(self, n: nn.Module, views: Sequence[tuple[View, View]], weight: float) -> None:
        super().__init__()
        self.n, self.views, self.weight = n, views, weight

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.weight * undo(self.n(do(x))) for do, undo in self.views)


def flip(*axes: int) -> tuple[View, View]:
    """Return the flip of spatial axes of (…, *spatial), and its inverse; no axes: the identity."""

    def turn(x: Tensor) -> Tensor:
        return x.flip([a - 3 if x.ndim == 5 else a - 2 for a in axes]) if axes else x

    return turn, turn


class Blocks(nn.Module):
    """Blocks of their own class that return (n, *positions, C)."""

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(channels), nn.Linear(channels, channels)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(self.norm(x))

    def __init__(self, dims: int, channels: int, swap: bool = False) -> None:
        super().__init__()
        self.stem = {2: nn.Conv2d, 3: nn.Conv3d}[dims](1, channels, 4, stride=4)
        self.block, self.head, self.swap = self.Block(channels), nn.Linear(channels, 2), swap

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x).movedim(1, -1)
        return self.head(self.block(y.transpose(1, 2) if self.swap else y).flatten(1, -2).mean(1))


class Slices(nn.Module):
    """A 2D network on each slice of a volume along its first axis, then an LSTM: slices in a loop, or in the batch."""

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.n = nn.Sequential(nn.Conv2d(1, 5, 3, 2, 1), nn.Tanh())
        self.lstm, self.head, self.loop = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 2), loop

    def forward(self, x: Tensor) -> Tensor:
        if self.loop:
            rows = torch.stack([self.n(x[:, :, i]).mean((2, 3)) for i in range(x.shape[2])], 1)
        else:
            rows = self.n(x.transpose(1, 2).flatten(0, 1)).mean((2, 3)).unflatten(0, x.shape[::2][:2])
        return self.head(self.lstm(rows)[0][:, -1])


def hooked(network: nn.Module, layer: str, x: Tensor, score: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return activation and gradient of each call of a layer, in its own shape, by plain hooks and autograd."""
    calls: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda m, a, out: calls.append(out))
    try:
        value = score(network(x.detach().requires_grad_(True)))
    finally:
        handle.remove()
    return list(zip([c.detach() for c in calls], torch.autograd.grad(value, calls)))
