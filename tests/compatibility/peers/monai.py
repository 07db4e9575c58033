"""MONAI's own `monai.visualize`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import monai.visualize
import torch
from torch import Tensor, nn

from tests.compatibility.checks import equals
from tests.compatibility.peers.base import Map, Peer, relu_first, wrapped
from tests.compatibility.sight import Sight
from tests.support.layers import UP

__all__ = ["MONAI"]


def _monai_gradient(name: str, reduce: Callable[[Tensor], Tensor] = lambda g: g) -> Map:
    def attribute(sight: Sight, **parameters: Any) -> Tensor:
        return reduce(getattr(monai.visualize, name)(wrapped(sight))(sight.image[None].clone(), index=0)[0])

    return attribute


def _monai_smooth_grad(sight: Sight, n_samples: int, **parameters: Any) -> Tensor:
    method = monai.visualize.SmoothGrad(wrapped(sight), n_samples=n_samples, magnitude=False, verbose=False)
    return method(sight.image[None].clone(), index=0)[0]


def _monai_cam(name: str) -> Map:
    def attribute(sight: Sight, layer: str, **parameters: Any) -> Tensor:
        sight.network.requires_grad_(True)  # MONAI asks for gradients of the parameters only
        up: dict[str, Any] = {"upsampler": lambda size: nn.Upsample(size, mode=UP[sight.dims])}
        method = getattr(monai.visualize, name)(wrapped(sight), f"network.{layer}", postprocessing=lambda m: m, **up)
        return method(sight.image[None].clone(), class_idx=0)[0]

    return attribute


MAPS: dict[str, Map] = {
    "Saliency": _monai_gradient("VanillaGrad", torch.abs),
    "VanillaBackprop": _monai_gradient("VanillaGrad"),
    "GuidedBackprop": _monai_gradient("GuidedBackpropGrad"),
    "SmoothGrad": _monai_smooth_grad,
    "GradCam": _monai_cam("GradCAM"),
    "GradCamPlusPlus": _monai_cam("GradCAMpp"),
}

MONAI = Peer("MONAI", MAPS, {"GradCam": equals(relu_first)})
