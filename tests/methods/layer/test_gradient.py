"""Layer gradients at the image: equal to hooks through the inferer and to Captum; guided backpropagation of a layer."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.engine.rules import guided
from esegeta_monai.errors import EsegetaError, MethodError, UsageError
from esegeta_monai.methods import (
    HiResCam,
    LayerActivationGuidedBackprop,
    LayerGradCam,
    LayerGradientXActivation,
    LinearApproximation,
)
from esegeta_monai.targets import ClassScore, OutputValue
from tests.support.layers import position_weights, setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "ViTAutoEnc", "ResNet18"])
def test_gradient_times_activation_equals_hooks_through_the_inferer(name):
    s = setting(name)
    a, g = s.pass_()
    result = explain(LayerGradientXActivation(s.layer, "channels"), s.objective).maps[0]
    close(result, s.scatter(a * g))
    whole = explain(LinearApproximation(s.layer), s.objective).maps
    close(whole[0], result.sum(0, keepdim=True))
    close(whole, explain(HiResCam(s.layer, relu=False), s.objective).maps)


@pytest.mark.parametrize("dims", [2, 3])
def test_grad_cam_with_signs_equals_captum(dims):
    network, image = plain(dims)
    expected = captum.attr.LayerGradCam(network, network.act).attribute(image, target=1).detach()
    assert bool((expected < 0).any())
    close(explain(LayerGradCam("act"), objective_of(network, image[0], [ClassScore(1)])).maps, expected)


@pytest.mark.parametrize(("name", "channel"), [("UNet_batch", 3), ("UNet_batch", None), ("ResNet18", 1)])
def test_guided_backpropagation_of_a_layer_window_by_window(name, channel):
    s = setting(name)
    rows = slice(None) if channel is None else slice(channel, channel + 1)
    total = torch.zeros_like(s.image)
    for place, share in zip(s.objective.plan.slices, position_weights(s)):
        kept: list[Tensor] = []

        def activation(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            handle = s.network.get_submodule(s.layer).register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
            s.network(x)
            handle.remove()
            return kept.pop()

        window = s.image[(slice(None), *place)][None]
        with torch.no_grad():
            values = activation(window)
        sign = torch.zeros_like(values)
        sign[:, rows] = values[:, rows].sign() * share
        with torch.no_grad():
            total[(slice(None), *place)] += guided(activation, window, sign[None]).input[0, 0]
    close(explain(LayerActivationGuidedBackprop(s.layer, channel), s.objective).maps[0], total)


def test_guided_backpropagation_of_a_layer_in_captum_on_plain_relu():
    network, image = plain(2)

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act, self.first = network.act, network.first

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.first(x))[:, 2].flatten(1).sum(1, keepdim=True)  # ReLU: its own absolute value

    expected = captum.attr.GuidedBackprop(Norm()).attribute(image.clone(), target=0).detach()
    objective = objective_of(network, image[0], [ClassScore(1)])
    close(explain(LayerActivationGuidedBackprop("act", 2), objective).maps, expected)


def test_bad_input():
    network, image = plain(2)
    objective = objective_of(network, image[0], [ClassScore(1)])
    for method in (LayerGradientXActivation, LayerGradCam, LinearApproximation, LayerActivationGuidedBackprop):
        with pytest.raises(MethodError, match="no spatial map"):
            explain(method("head"), objective)
        with pytest.raises(UsageError, match="near matches"):
            explain(method("acts"), objective)
    with pytest.raises(UsageError, match="channel=9"):
        explain(LayerActivationGuidedBackprop("act", 9), objective)


def test_guided_backpropagation_of_a_layer_in_inference_mode_is_refused_by_name():
    class Frozen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
            self.head = torch.nn.Conv2d(3, 2, 1)

        def forward(self, x):
            with torch.inference_mode():
                h = self.encoder(x)
            return self.head(torch.cat([h.clone(), x[..., 1:-1, 1:-1]], 1))

    explainer = Explainer(Frozen().eval())
    with pytest.raises(EsegetaError, match="without gradients"):
        list(explainer(torch.rand(1, 1, 8, 8), [LayerActivationGuidedBackprop("encoder")], [OutputValue(0)]))
