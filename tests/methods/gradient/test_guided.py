"""Guided backpropagation and deconvolution: other than the gradient; equal to Captum where Captum is right."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import LRP, Deconvolution, DeepLift, ExcitationBackprop, GuidedBackprop, Saliency
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.networks import build

NAMES = [
    "UNet_instance",
    "BasicUNet",
    "DynUNet",
    "SegResNet",
    "VNet",
    "ResNet18",
    "DenseNet121",
    "UNETR",
    "SwinUNETR",
]


def explain(network, image, method, target, inferer=None, output=None) -> Tensor:
    (result,) = Explainer(network, inferer, output=output)(image, [method], [target])
    assert result.map is not None
    return result.map.as_tensor()


@pytest.mark.parametrize("name", NAMES)
def test_differs_from_the_gradient(name):
    case = build(name, spatial_dims=3)
    kind = ClassScore if case.kind == "classification" else MultiClassMask
    # a head with negative weights only for a class leaves nothing of it under the rule, rightly
    target = next(
        kind(index)
        for index in (1, 2, 0)
        if explain(case.network, case.image, GuidedBackprop(), kind(index), output=case.output).any()
    )
    plain = explain(case.network, case.image, Saliency(abs=False), target, output=case.output)
    for method in (GuidedBackprop(), Deconvolution()):
        modified = explain(case.network, case.image, method, target, output=case.output)
        assert bool(modified.any())
        cosine = torch.cosine_similarity(plain.flatten(), modified.flatten(), 0)
        assert float(cosine) < 0.99, name


class Plain(nn.Module):
    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims]
        self.layers = nn.Sequential(
            conv(2, 6, 3), nn.ReLU(), pool(2), conv(6, 6, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_captum_on_plain_relu(dims):
    torch.manual_seed(dims)
    image = torch.randn(1, 2, *[12] * dims, dtype=torch.float64)
    network = Plain(dims).double()
    network(image)
    for actual, expected in (
        (GuidedBackprop(), captum.attr.GuidedBackprop(network)),
        (Deconvolution(), captum.attr.Deconvolution(network)),
    ):
        reference = expected.attribute(image.clone().requires_grad_(True), target=1)[0].detach()
        result = explain(network, image, actual, ClassScore(1))
        assert float((result - reference).abs().max() / reference.abs().max()) <= 1e-10


@pytest.mark.parametrize("name", ["UNet_batch", "SegResNet"])
def test_windows_add_up(name):
    """Each window's map through the importance map, added: a hand-written loop over MONAI's windows."""
    case = build(name, spatial_dims=2)
    image = torch.cat([case.image, case.reference], -1)
    roi = case.image.shape[2:]
    inferer = SlidingWindowInferer(roi, 1, 0.5, "constant")
    result = explain(case.network, image, GuidedBackprop(), MultiClassMask(1), inferer, case.output)
    n = roi[-1]
    starts = [0, n // 2, n]
    count = torch.zeros(image.shape[-1], dtype=image.dtype)
    for s in starts:
        count[s : s + n] += 1
    with torch.no_grad():
        blended = sum(
            torch.nn.functional.pad(case.logits(image[..., s : s + n]) / count[s : s + n], (s, n - s)) for s in starts
        )
    mask = blended[0].argmax(0) == 1
    total = torch.zeros_like(image[0])
    from esegeta_monai.engine.rules import guided

    for s in starts:
        weights = torch.zeros_like(blended[..., s : s + n])[None]
        weights[0, 0, 1] = mask[..., s : s + n] / count[s : s + n]
        total[..., s : s + n] += guided(case.logits, image[..., s : s + n], weights).input[0, 0]
    assert float((result - total).abs().max() / total.abs().max()) <= 1e-10


def test_a_network_without_activations_is_refused():
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(MethodError, match="has none"):
        explain(network, torch.rand(1, 1, 4, 4), GuidedBackprop(), ClassScore(1))


class Shaken(nn.Module):
    """Random, from the window of a number on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.after, self.seen = nn.Conv2d(1, 2, 3, padding=1), after, 0
        self.inside.bias.data[1] = 10.0  # class 1 everywhere

    def forward(self, x):
        self.seen += len(x)
        shift = torch.rand(()) if self.seen > self.after else 0.0
        return torch.relu(self.inside(x)) + shift


@pytest.mark.parametrize("method", [GuidedBackprop(), LRP(), DeepLift("zero"), ExcitationBackprop()], ids=repr)
def test_a_loops_first_window_is_compared_with_the_plain_output(method):
    """A network that is not the same twice is refused, whatever rule explains it, and nothing is looked at twice but
    that window."""
    image, inferer = torch.rand(1, 1, 16, 24), SlidingWindowInferer((8, 8), 2, 0.5)
    (result,) = Explainer(Shaken(10**9).eval(), inferer)(image, [method], [MultiClassMask(1)])
    assert result.status == "ok"
    windows = 15
    assert result.record["window_passes"] == windows * (1 + isinstance(method, DeepLift)) + 1
    with pytest.raises(MethodError, match="or keeps state"):
        list(Explainer(Shaken(windows).eval(), inferer)(image, [method], [MultiClassMask(1)]))
