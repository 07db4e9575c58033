"""Class activation maps against pytorch-grad-cam: its weighted maps before it scales them to [0, 1]."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esegeta_monai.methods import (
    AblationCam,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    HiResCam,
    LayerCam,
    ScoreCam,
    XGradCam,
)
from tests.peers.plain import TARGET, close, explain, network_and_image, objective_for

pytestmark = pytest.mark.peers
pytorch_grad_cam = pytest.importorskip("pytorch_grad_cam")

from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402

LAYER = "relu1"  # the image's own grid: nothing is interpolated


def weighted(name: str, network: nn.Module, image: Tensor, **options: Any) -> Tensor:
    """The map of the layer before ReLU and scaling."""
    cam = getattr(pytorch_grad_cam, name)(network, [network.get_submodule(LAYER)], **options)
    targets = [ClassifierOutputTarget(TARGET)]
    x = image.clone().requires_grad_()
    outputs = cam.activations_and_grads(x)
    if cam.uses_gradients:
        network.zero_grad()
        sum(t(o) for t, o in zip(targets, outputs)).backward()
    activations = cam.activations_and_grads.activations[0].numpy()
    gradients = cam.activations_and_grads.gradients[0].numpy() if cam.uses_gradients else None
    result = cam.get_cam_image(x.detach(), network.get_submodule(LAYER), targets, activations, gradients, False)
    cam.activations_and_grads.release()
    return torch.from_numpy(np.asarray(result))


def our_map(method: Any, network: nn.Module, image: Tensor) -> Tensor:
    return explain(method, objective_for(network, image)).maps[0]


@pytest.mark.parametrize(
    ("name", "method"),
    [("GradCAM", GradCam), ("HiResCAM", HiResCam)],
)
def test_gradient_weighted(name: str, method: Any) -> None:
    network, image = network_and_image()
    close(our_map(method(LAYER, relu=False), network, image), weighted(name, network, image), 1e-6)


def test_layer_cam() -> None:
    """pytorch-grad-cam applies ReLU to the products summed over channels, we to the gradients: equal, as A ≥ 0 here."""
    network, image = network_and_image()
    close(our_map(LayerCam(LAYER, relu=False), network, image), weighted("LayerCAM", network, image), 1e-6)


def test_x_grad_cam() -> None:
    """pytorch-grad-cam adds 1e-7 to the sum of activations."""
    network, image = network_and_image()
    close(our_map(XGradCam(LAYER, relu=False), network, image), weighted("XGradCAM", network, image), 1e-6)


def test_grad_cam_plus_plus() -> None:
    """pytorch-grad-cam adds 1e-6 to the denominator 2 g² + Σ A g³: large gradients make it negligible."""
    network, image = network_and_image()
    with torch.no_grad():
        network.head.weight.mul_(1e4)
    close(
        our_map(GradCamPlusPlus(LAYER, relu=False), network, image), weighted("GradCAMPlusPlus", network, image), 1e-6
    )


def test_eigen_cam() -> None:
    """pytorch-grad-cam centres the activations before the singular value decomposition, unlike the paper: equal on
    activations of mean zero, which a linear layer provides. The sign is free."""
    network, image = network_and_image()
    network.relu1 = _Centred()
    result, reference = our_map(EigenCam(LAYER, relu=False), network, image), weighted("EigenCAM", network, image)
    sign = torch.sign((result[0] * reference[0]).sum())
    close(result * sign, reference, 1e-6)


class _Centred(nn.Module):
    """Each channel less its mean over the image."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


def test_ablation_cam(monkeypatch: pytest.MonkeyPatch) -> None:
    network, image = network_and_image()
    monkeypatch.setattr(
        np, "float32", np.float64
    )  # pytorch-grad-cam rounds the scores before it takes their differences
    with torch.no_grad():
        network.head.bias[TARGET] = 5  # pytorch-grad-cam divides by F, we by |F|
    reference = weighted("AblationCAM", network, image, ratio_channels_to_ablate=1.0)
    close(our_map(AblationCam(LAYER, relu=False), network, image), reference, 1e-10)


def test_score_cam() -> None:
    network, image = network_and_image()
    reference = weighted("ScoreCAM", network, image)
    close(our_map(ScoreCam(LAYER, relu=False, baseline="zero"), network, image), reference, 1e-5)
