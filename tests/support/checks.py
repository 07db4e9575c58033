"""Checks of a network on a small image with a background of zeros."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.checks.network import check_network_once
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.windows.inferers import plan_windows

__all__ = ["blob", "checked"]


def checked(network: nn.Module, image: Tensor | None = None, amp: bool = False) -> dict[str, CheckResult]:
    """Check a network on an image (C, *spatial); results by name."""
    image = blob() if image is None else image
    model = Model(network.eval(), torch.device("cpu"), amp=amp)
    return {r.name: r for r in check_network_once(model, image, plan_windows(None, image.shape[1:]))}


def blob(seed: int = 0) -> Tensor:
    """An image with a background of zeros, where max pooling has ties."""
    image = torch.zeros(1, 12, 12)
    image[:, 3:8, 2:9] = torch.rand(1, 5, 7, generator=torch.Generator().manual_seed(seed)) + 1
    return image
