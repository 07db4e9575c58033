"""Guided Grad-CAM is the product of Grad-CAM and guided backpropagation, and Captum's."""

from __future__ import annotations

import captum.attr
import pytest
from torch import Tensor, nn

from esegeta_monai.methods import (
    GradCam,
    GuidedBackprop,
    GuidedGradCam,
)
from esegeta_monai.targets import ClassScore
from tests.support.networks import Pooled, pooled
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


def for_others(dims: int) -> tuple[Pooled, Tensor]:
    """For libraries that cannot do in-place activations, and that take ReLU before they interpolate: a positive map."""
    network, image = pooled(dims)
    network.features[3] = nn.ReLU()
    network.head.weight.data.abs_()
    return network, image


@pytest.mark.parametrize("dims", [2, 3])
def test_guided_grad_cam_is_the_product_and_equals_captum(dims):
    network, image = for_others(dims)
    objective = objective_of(network, image[0], [ClassScore(1)])
    result = explain(GuidedGradCam("features.3"), objective).maps
    close(result, explain(GradCam("features.3"), objective).maps * explain(GuidedBackprop(), objective).maps)
    expected = captum.attr.GuidedGradCam(network, network.features[3])
    up = {2: "bilinear", 3: "trilinear"}[dims]
    close(result, expected.attribute(image.clone(), target=1, interpolate_mode=up).detach())
