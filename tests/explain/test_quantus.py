"""The function that Quantus calls; what Quantus makes of it is in tests/peers/test_quantus.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.errors import InputError, MethodError, UsageError
from esegeta_monai.explain.quantus import quantus_explain_func
from esegeta_monai.targets import MultiClassMask, TargetWrapper


def classifier(dims: int) -> nn.Module:
    torch.manual_seed(0)
    conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    return nn.Sequential(conv(2, 4, 3, padding=1), nn.ReLU(), pool(2), nn.Flatten(), nn.Linear(4 * 2**dims, 3)).eval()


@pytest.mark.parametrize("dims", [2, 3])
def test_each_image_is_explained_for_its_own_class(dims: int) -> None:
    network = classifier(dims)
    images = torch.rand(3, 2, *[6, 7, 8][:dims])
    classes = [2, 0, 1]
    maps = quantus_explain_func(network, images.numpy().astype(np.float64), np.array(classes), method="InputXGradient")
    assert maps.shape == images.shape
    assert maps.dtype == np.float64
    for image, k, result in zip(images, classes, maps):
        x = image[None].requires_grad_()
        (gradient,) = torch.autograd.grad(network(x)[0, k], x)
        assert np.abs(result - (x * gradient)[0].detach().numpy()).max() <= 1e-6 * np.abs(result).max()


def test_a_segmentation_by_the_columns_of_a_wrapper() -> None:
    torch.manual_seed(0)
    network, image = nn.Conv2d(1, 3, 3, padding=1).eval(), torch.rand(1, 1, 8, 9)
    wrapper = TargetWrapper(network, [MultiClassMask(1), MultiClassMask(2)]).freeze(image).eval()
    actual = quantus_explain_func(wrapper, image.numpy(), [1], method="Saliency(abs=False)")
    (expected,) = Explainer(network)(image, ["Saliency(abs=False)"], [MultiClassMask(2)])
    assert np.abs(actual[0] - expected.map.numpy()).max() <= 1e-6 * np.abs(actual).max()


def test_an_image_that_a_metric_has_emptied_is_explained() -> None:
    """Quantus' Continuity moves the image out of the frame, and Explainer refuses a constant image."""
    network, empty = classifier(2), np.zeros((1, 2, 6, 6), np.float32)
    assert quantus_explain_func(network, empty, [1], method="Saliency").shape == empty.shape
    with pytest.raises(InputError, match="every voxel is 0"):
        list(Explainer(network)(torch.from_numpy(empty), ["Saliency"], ["ClassScore(1)"]))


def test_what_cannot_be_explained_is_refused() -> None:
    network, image = classifier(2), np.arange(72, dtype=np.float32).reshape(1, 2, 6, 6)
    with pytest.raises(UsageError, match="Salienc"):
        quantus_explain_func(network, image, [0], method="Salience")
    segmenter = nn.Conv2d(2, 2, 1).eval()
    nn.init.zeros_(segmenter.weight)
    segmenter.bias = nn.Parameter(torch.tensor([1.0, 0.0]))
    with pytest.raises(MethodError, match="image 0 has no map"):
        quantus_explain_func(segmenter, image, [1], target="MultiClassMask")
