"""CAM: its mean plus the bias is the logit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.errors import MethodError
from esegeta_monai.methods import (
    Cam,
)
from esegeta_monai.targets import ClassScore
from tests.support.layers import setting
from tests.support.networks import pooled
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        *[("pooled", 2), ("pooled", 3), ("ResNet18", 2), ("ResNet18", 3)],
        *[("SEResNet50", 3), ("DenseNet121", 2), ("EfficientNet", 2)],
    ],
)
def test_cam_mean_plus_bias_is_the_logit(name, dims):
    if name == "pooled":
        network, image = pooled(dims)
    else:
        s = setting(name, dims)
        network, image = s.network, s.image[None]
        image = F.interpolate(image, scale_factor=2 if image.shape[-1] > 16 else 3)  # else one position is pooled
    objective = objective_of(network, image[0], [ClassScore(1), ClassScore(2)])
    result = explain(Cam(), objective)
    layer = result.notes["layer"]
    kept: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
    logits = network(image)[0].detach()
    handle.remove()
    head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    small = torch.einsum("kc,nc...->nk...", head.weight[1:].detach(), kept[-1].detach())
    close(small.flatten(2).mean(2)[0] + head.bias[1:].detach(), logits[1:])
    up = {2: "bilinear", 3: "trilinear"}[dims]
    close(result.maps[:, 0], F.interpolate(small, image.shape[2:], mode=up)[0])


def test_cam_refuses_a_network_without_pooling():
    s = setting("UNet_batch")
    with pytest.raises(MethodError, match="global average pooling"):
        explain(Cam(), s.objective)
    s = setting("ViT")
    with pytest.raises(MethodError, match="GradCam"):
        explain(Cam(), s.objective)
    network, image = pooled(2)
    with pytest.raises(MethodError, match=r"features\.0"):
        explain(Cam("features.0"), objective_of(network, image[0], [ClassScore(1)]))
