"""pytorch-grad-cam, with the function that puts tokens on their grid, as its examples have it. It needs torchvision, so
an environment of its own (`make test-peers`).

It adds 1e-7 and 1e-8 to the denominators of XGrad-CAM and Score-CAM, which is allowed for, and 1e-6 to that of
Grad-CAM++, beside squares of gradients, which is not: there the map depends on the scale of F. It centres activations
before EigenCAM's decomposition, and ablates a channel that has no zeros by a large negative number: the papers do not.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from tests.compatibility.checks import equals, score_cam, x_grad_cam
from tests.compatibility.peers.base import Map, Peer, installed, wrapped
from tests.compatibility.sight import Sight
from tests.support.layers import UP

__all__ = ["GRAD_CAM"]


class _Up(nn.Upsample):
    """Interpolation as ours."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__(size=size, mode=UP[len(size)])


_PRODUCTS = ("HiResCAM", "LayerCAM")  # shares of F at each position, which ours spreads with their sum kept


def _grad_cam(name: str, **options: Any) -> Map:
    """The weighted sum of activations, before it is clipped and scaled to [0, 1]."""

    def attribute(sight: Sight, layer: str, **parameters: Any) -> Tensor:
        import pytorch_grad_cam

        network = wrapped(sight)
        target = network.get_submodule(f"network.{layer}")
        cam = getattr(pytorch_grad_cam, name)(network, [target], reshape_transform=sight.s.as_map, **options)
        targets = [lambda output: output.reshape(-1)[0]]
        x = sight.image[None].clone().requires_grad_(True)
        held = cam.activations_and_grads
        try:
            output = held(x)
            if cam.uses_gradients:
                targets[0](output).backward()
            activations = held.activations[0].numpy()
            gradients = held.gradients[0].numpy() if cam.uses_gradients else None
            # it would round scores before it subtracts them, and interpolate between corners where ours does by cells
            rounded = mock.patch.object(np, "float32", np.float64)
            with rounded, mock.patch.object(nn, "UpsamplingBilinear2d", _Up):
                values = cam.get_cam_image(x.detach(), target, targets, activations, gradients, False)
        finally:
            held.release()
        small = torch.from_numpy(np.asarray(values))
        return sight.s.scatter(small[None]) if name in _PRODUCTS else sight.upsampled(small)

    return attribute


MAPS: dict[str, Map] = {
    "GradCam": _grad_cam("GradCAM"),
    "GradCamPlusPlus": _grad_cam("GradCAMPlusPlus"),
    "HiResCam": _grad_cam("HiResCAM"),
    "LayerCam": _grad_cam("LayerCAM"),
    "XGradCam": _grad_cam("XGradCAM"),
    "EigenCam": _grad_cam("EigenCAM"),
    "AblationCam": _grad_cam("AblationCAM", ratio_channels_to_ablate=1.0),
    "ScoreCam": _grad_cam("ScoreCAM"),
}

GRAD_CAM = Peer(
    "pytorch-grad-cam",
    MAPS,
    {"XGradCam": equals(x_grad_cam, 1e-5), "ScoreCam": equals(score_cam, 1e-5)},
    installed("pytorch_grad_cam"),
)
