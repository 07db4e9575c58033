"""Excitation backpropagation, its contrast, linear approximation and Grad-CAM against torchray, which is called and
never copied (its licence forbids commercial use)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esegeta_monai.engine.rules import excitation
from esegeta_monai.methods import (
    ContrastiveExcitationBackprop,
    ExcitationBackprop,
    ExtremalPerturbation,
    GradCam,
    LinearApproximation,
    Saliency,
)
from tests.peers.plain import TARGET, close, explain, network_and_image, objective_for

pytestmark = pytest.mark.peers
pytest.importorskip("torchray")

from torchray.attribution import extremal_perturbation as extremal  # noqa: E402
from torchray.attribution.excitation_backprop import (  # noqa: E402
    contrastive_excitation_backprop,
    excitation_backprop,
)
from torchray.attribution.grad_cam import grad_cam  # noqa: E402
from torchray.attribution.gradient import gradient  # noqa: E402
from torchray.attribution.linear_approx import linear_approx  # noqa: E402


@pytest.mark.parametrize("layer", ["start", "relu1", "pool", "relu2", "mean"])
def test_excitation_backprop(layer: str) -> None:
    """At the image and at inner layers; both drop biases, as the paper does."""
    network, image = network_and_image()
    expected = excitation_backprop(network, image.clone(), TARGET, saliency_layer=layer)
    prior = torch.zeros(1, 1, 4, dtype=image.dtype)
    prior[..., TARGET] = 1
    actual = excitation(network, image, prior, layers={layer: network.get_submodule(layer)})
    close(actual.layers[layer].gradient[0].sum(1), expected, 1e-10)
    if layer == "start":
        result = explain(ExcitationBackprop(), objective_for(network, image)).maps[0]
        close(result.sum(0), expected, 1e-10)


def test_contrastive_excitation_backprop() -> None:
    """torchray subtracts both sides unscaled below the last weights where we divide each by what it handed down
    (Zhang); with all probability handed down, as here, that is the same."""
    network, image = network_and_image()
    expected = contrastive_excitation_backprop(
        network, image.clone(), TARGET, saliency_layer="start", contrast_layer="relu3", classifier_layer="head"
    )
    explained = explain(ContrastiveExcitationBackprop(), objective_for(network, image))
    signed = explain(ContrastiveExcitationBackprop(positive=False), objective_for(network, image)).maps[0].sum(0)
    assert explained.note(0)["kept_target"] == pytest.approx(1)
    assert explained.note(0)["kept_opposite"] == pytest.approx(1)
    close(signed.clamp(min=0), expected.clamp(min=0), 1e-10)


@pytest.mark.parametrize("layer", ["relu1", "relu2"])
def test_linear_approximation_and_grad_cam(layer: str) -> None:
    network, image = network_and_image()
    objective = objective_for(network, image)
    expected = linear_approx(network, image.clone(), TARGET, saliency_layer=layer)
    if layer == "relu1":  # the image's own grid: nothing is interpolated
        close(explain(LinearApproximation(layer), objective).maps[0], expected, 1e-10)
    total = explain(LinearApproximation(layer), objective).maps.sum()
    close(total, expected.sum(), 1e-10)
    expected = grad_cam(network, image.clone(), TARGET, saliency_layer=layer)
    if layer == "relu1":
        close(explain(GradCam(layer), objective).maps[0], expected, 1e-10)


def test_gradient() -> None:
    """torchray shows the largest absolute value over the channels."""
    network, image = network_and_image()
    expected = gradient(network, image.clone(), TARGET)
    close(explain(Saliency(), objective_for(network, image)).maps[0].amax(0), expected, 1e-10)


class Spot(torch.nn.Module):
    """Class 1: brightness of a patch."""

    def forward(self, x: Tensor) -> Tensor:
        score = x[:, :, 6:14, 6:14].mean((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)[:, :, None, None]


def test_extremal_perturbation_finds_the_same_place() -> None:
    """Optimised with other steps and noise, so not voxel by voxel: the same patch. The area asked for is met by our
    last step; torchray only pulls towards it."""
    torch.manual_seed(0)
    image = 0.1 * torch.rand(1, 1, 32, 32)
    image[..., 6:14, 6:14] += 1
    area = 64 / 1024
    expected, _ = extremal.extremal_perturbation(
        Spot(),
        image,
        1,
        areas=[area],
        perturbation=extremal.FADE_PERTURBATION,
        step=2,
        sigma=2,
        jitter=False,
        resize=True,
    )
    network = torch.nn.Sequential(Spot(), torch.nn.Flatten())
    actual = explain(
        ExtremalPerturbation(areas=area, variant="preserve", baseline="zero"), objective_for(network, image)
    ).maps[0]
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[6:14, 6:14] = True
    shares = [float(m.reshape(32, 32)[inside].sum() / m.sum()) for m in (actual, expected[0])]
    areas = [float(m.mean()) for m in (actual, expected[0])]
    print("share in the patch", shares, "area", areas)
    assert min(shares) > 0.5
    assert areas[0] == pytest.approx(area, rel=1e-3)
