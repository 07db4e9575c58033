"""Networks with a property that other libraries overlook, for tests of the interfaces; a config names them."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BatchStatistics(nn.Module):
    """Normalises by the statistics of the batch in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4, track_running_stats=False)
        self.last = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Plain(nn.Module):
    """Two convolutions.

    Args:
        channels: number of outputs.
        inside: activation in which the network ends: ``"sigmoid"``; None: none.
    """

    def __init__(self, channels: int = 3, inside: str | None = None) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.last = nn.Conv3d(4, channels, 1)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(torch.relu(self.first(x)))
        return torch.sigmoid(out) if self.inside == "sigmoid" else out


class AuxiliaryFirst(Plain):
    """Returns an auxiliary output before the segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = torch.relu(self.first(x))
        return {"auxiliary": self.auxiliary(hidden), "segmentation": self.last(hidden)}


class WritesIntoInput(Plain):
    """Shifts its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x.requires_grad and x.is_leaf):
            x.sub_(0.3).mul_(2)
        else:
            x = (x - 0.3) * 2
        return super().forward(x)


class RunsTwice(Plain):
    """Sends the mirrored image through the same first layer and averages both predictions."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + super().forward(x.flip(2)).flip(2)) / 2


class NoGradEncoder(Plain):
    """Computes its first layer under ``no_grad`` and adds the image, so that a backward pass exists but is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.relu(self.first(x))
        return self.last(hidden + 0.1 * x)
