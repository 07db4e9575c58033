"""The input of a layer, ``layer='name:input'``, in place of its output: equal to Captum and to hooks on the input."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.hooks import INPUT
from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.methods import (
    GradCam,
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LayerLRP,
)
from esegeta_monai.targets import ClassScore, LayerNeuron
from tests.support.layers import setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close

STEPS = {"n_steps": 4, "method": "riemann_middle"}


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("ours", "original", "options"),
    [
        (LayerGradientXActivation, "LayerGradientXActivation", {}),
        (LayerIntegratedGradients, "LayerIntegratedGradients", STEPS),
        (InternalInfluence, "InternalInfluence", STEPS),
        (LayerDeepLift, "LayerDeepLift", {}),
    ],
)
def test_inputs_of_a_layer_are_those_of_captum(ours, original, options, dims):
    network, image = plain(dims)
    method = getattr(captum.attr, original)(network, network.second)
    given = {} if ours is LayerGradientXActivation else {"baselines": torch.zeros_like(image)}
    expected = method.attribute(image, target=1, attribute_to_layer_input=True, **given, **options)
    expected = expected[0] if isinstance(expected, tuple) else expected
    more = {"baseline": "zero"} if given else {}
    objective = objective_of(network, image[0], [ClassScore(1)])
    close(explain(ours("second" + INPUT, "channels", **more, **options), objective).maps, expected.detach())


class Copy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


class Skip(nn.Module):
    """The input of ``b`` is used a second time, beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.copy = Copy()
        self.a, self.b, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head((x + self.b(self.copy(x)).relu()).flatten(1))


def test_other_uses_of_the_input_do_not_count():
    network, image = Skip().double().eval(), torch.randn(1, 1, 6, 6, dtype=torch.float64)
    objective = objective_of(network, image[0], [ClassScore(1)])
    expected = captum.attr.LayerGradientXActivation(network, network.copy).attribute(image, target=1)
    network.copy = nn.Identity()
    result = explain(LayerGradientXActivation("b" + INPUT, "channels"), objective).maps
    close(result, expected.detach())
    whole = explain(LayerGradientXActivation("a", "channels"), objective).maps
    assert float((result - whole).abs().max()) > 0.1 * float(whole.abs().max())  # "a" also counts the skip


@pytest.mark.parametrize("name", ["UNet_batch", "SegResNet", "ViTAutoEnc"])
def test_windows_of_a_network_equal_hooks_on_the_input(name):
    s = setting(name)
    module, kept = s.network.get_submodule(s.layer), []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kept.append(args[0].clone())
        return (kept[-1], *args[1:])

    handle = module.register_forward_pre_hook(hook)
    x = s.image[None].clone().requires_grad_(True)
    prediction = s.inferer(x, s.model)[0]
    handle.remove()
    score = s.objective.scores[0]
    gradients = s.as_map(torch.cat(torch.autograd.grad(score.value(score.crop(prediction)), kept)))
    values = s.as_map(torch.cat(kept).detach())
    at = s.layer + INPUT
    close(explain(LayerGradientXActivation(at), s.objective).maps[0], s.scatter((values * gradients).sum(1, True)))


def test_every_kind_of_method_and_the_target_read_inputs():
    network, image = plain(2)
    objective = objective_of(network, image[0], [ClassScore(1)])
    before, after = "act", "second" + INPUT  # one and the same tensor
    for method in (GradCam, LayerActivation, LayerConductance, LayerLRP):
        close(explain(method(after), objective).maps, explain(method(before), objective).maps)
    maps = Explainer(network)(image, ["Saliency"], [LayerNeuron(layer, 2, index=(3, 3)) for layer in (before, after)])
    first, second = (m.map.as_tensor() for m in maps)
    assert first.any()
    close(second, first)


def test_bad_input():
    network, image = plain(2)
    objective = objective_of(network, image[0], [ClassScore(1)])
    with pytest.raises(UsageError, match="no layer 'secnd'"):
        explain(GradCam("secnd:input"), objective)

    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(input=self.a(x)).flatten(2).mean(2)

    with pytest.raises(NetworkError, match="takes no input by position"):
        explain(GradCam("b:input"), objective_of(ByName().double().eval(), image[0], [ClassScore(1)]))
