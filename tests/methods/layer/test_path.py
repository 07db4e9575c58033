"""Path methods at a layer: against Captum on plain networks, against hooks through MONAI's inferer, completeness."""

from __future__ import annotations

import itertools

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import (
    InternalInfluence,
    LayerConductance,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import Setting, setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_captum(dims):
    network, image = plain(dims)
    x0 = torch.randn_like(image) / 2
    objective = objective_of(network, image[0], [ClassScore(1)])
    shared = {"layer": "act", "reduce": "channels", "baseline": x0[0], "n_steps": 8}  # Captum's are float32
    given = {"inputs": image, "baselines": x0, "target": 1}
    layer = network.act

    expected = captum.attr.LayerConductance(network, layer).attribute(**given, n_steps=8, method="riemann_trapezoid")
    close(explain(LayerConductance(**shared, rule="left"), objective).maps, expected.detach())
    for rule in ("riemann_middle", "riemann_right"):
        expected = captum.attr.InternalInfluence(network, layer).attribute(**given, n_steps=8, method=rule)
        close(explain(InternalInfluence(**shared, method=rule), objective).maps, expected.detach())
        expected = captum.attr.LayerIntegratedGradients(network, layer).attribute(**given, n_steps=8, method=rule)
        close(explain(LayerIntegratedGradients(**shared, method=rule), objective).maps, expected.detach())
    expected = captum.attr.LayerGradientXActivation(network, layer).attribute(image, target=1)
    close(explain(LayerGradientXActivation("act", "channels"), objective).maps, expected.detach())


NAMES = ["UNet_batch", "UNet_instance", "SegResNet", "ViTAutoEnc", "ResNet18"]


def along(s: Setting, x0: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Activations and gradients of all windows at a point of the path, through MONAI's inferer."""
    image, s.image = s.image, x0 + alpha * (s.image - x0)
    try:
        return s.pass_()
    finally:
        s.image = image


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", NAMES)
def test_windowed_equals_hooks_through_the_inferer(name, output):
    target = ClassScore(1, output=output) if name == "ResNet18" else MultiClassMask(1, output=output)
    s = setting(name, target=target)
    x0 = torch.randn(s.image.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    steps = [along(s, x0, j / 3) for j in range(4)]
    shared = {"layer": s.layer, "reduce": "channels", "baseline": x0}

    pairs = list(itertools.pairwise(steps))
    close(
        explain(LayerConductance(**shared, n_steps=3), s.objective).maps[0],
        s.scatter(sum((g + h) / 2 * (b - a) for (a, g), (b, h) in pairs)),
    )
    close(
        explain(InternalInfluence(**shared, n_steps=4, method="riemann_trapezoid"), s.objective).maps[0],
        s.scatter(sum(w * g for w, (_, g) in zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), steps))),
    )


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", NAMES)
def test_integrated_gradients_of_a_layer_equals_replacing_it_in_the_inferer(name, output):
    target = ClassScore(1, output=output) if name == "ResNet18" else MultiClassMask(1, output=output)
    s = setting(name, target=target)
    x0 = torch.randn(s.image.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    score, module = s.objective.scores[0], s.network.get_submodule(s.layer)

    def record(image: Tensor) -> list[Tensor]:
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        with torch.no_grad():
            s.inferer(image[None], s.model)
        handle.remove()
        return kept

    end, start = record(s.image), record(x0)

    def value(leaves: list[Tensor]) -> Tensor:
        given = iter(leaves)
        handle = module.register_forward_hook(lambda m, i, o: next(given))
        prediction = s.inferer(s.image[None], s.model)[0]
        handle.remove()
        return score.value(score.crop(prediction))

    total = 0
    for alpha in (0.25, 0.75):
        leaves = [(a + alpha * (b - a)).requires_grad_() for a, b in zip(start, end)]
        total = total + s.as_map(torch.cat(torch.autograd.grad(value(leaves), leaves))) / 2
    change = s.as_map(torch.cat(end)) - s.as_map(torch.cat(start))
    method = LayerIntegratedGradients(s.layer, "channels", baseline=x0, n_steps=2, method="riemann_middle")
    close(explain(method, s.objective).maps[0], s.scatter(total * change))

    result = explain(LayerIntegratedGradients(s.layer, baseline=x0, n_steps=2, method="riemann_middle"), s.objective)
    difference = float(value(end) - value(start))
    gap = abs(float((total * change).sum()) - difference) / abs(difference)
    assert result.note(0)["completeness_gap"] == pytest.approx(gap, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_complete(dims):
    network, image = plain(dims)
    network.act, network.then = nn.SiLU(), nn.SiLU()  # smooth: at the kinks of ReLU convergence is of first order
    network.head.weight.data[1].abs_()  # F changes by as much as its parts do
    objective = objective_of(network, image[0], [ClassScore(1), ClassScore(1, output="probability")])
    objective.context.window_batch = 64
    shared = {"layer": "act", "baseline": "zero", "n_steps": 32}
    conductance, integrated = (explain(m(**shared), objective) for m in (LayerConductance, LayerIntegratedGradients))
    for k in range(2):
        assert conductance.note(k)["share_through_layer"] == pytest.approx(1, abs=1e-3)
        assert integrated.note(k)["completeness_gap"] < 1e-3


def test_reductions():
    s = setting("UNet_batch")
    x0 = torch.zeros_like(s.image)
    maps = {
        how: explain(LayerConductance(s.layer, how, baseline=x0, n_steps=3), s.objective).maps[0]
        for how in ("channels", "sum", "mean", "abs", "positive")
    }
    channels = maps["channels"]
    close(maps["sum"], channels.sum(0, keepdim=True))
    close(maps["mean"], channels.mean(0, keepdim=True))
    close(maps["abs"], channels.abs().sum(0, keepdim=True))
    close(maps["positive"], F.relu(channels).sum(0, keepdim=True))


@pytest.mark.parametrize("method", [LayerConductance, InternalInfluence, LayerIntegratedGradients])
def test_bad_input(method):
    network, image = plain(2)
    objective = objective_of(network, image[0], [ClassScore(1)])
    with pytest.raises(MethodError, match="no spatial map"):
        explain(method("head", n_steps=2), objective)
    with pytest.raises(UsageError, match="near matches"):
        explain(method("acts"), objective)
    with pytest.raises(UsageError, match="reduce"):
        method(reduce="max")
    with pytest.raises(UsageError, match="n_steps=0"):
        method(n_steps=0)


@pytest.mark.parametrize("dims", [2, 3])
def test_internal_influence_keeps_the_sum_of_derivatives_at_a_strided_layer(dims):
    """F is linear in the layer, so the derivative is the same along the path; half the resolution, 2**dims voxels."""
    torch.manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    network = nn.Sequential(conv(1, 3, 3, 2, 1), nn.Flatten(), nn.Linear(3 * 4**dims, 2)).double().eval()
    objective = objective_of(network, torch.randn(1, *(8,) * dims).double(), [ClassScore(1)])
    result = explain(InternalInfluence("0", reduce="channels", n_steps=3), objective)
    derivative = network[2].weight[1].detach().reshape(1, 3, *(4,) * dims)
    close(result.maps.flatten(2).sum(2), derivative.flatten(2).sum(2), 1e-12)
    flat = network[2].weight.data
    flat[1] = torch.arange(3.0).repeat_interleave(4**dims)
    result = explain(InternalInfluence("0", reduce="channels", n_steps=3), objective)
    each = torch.arange(3.0, dtype=torch.float64).reshape(1, 3, *(1,) * dims) / 2**dims
    close(result.maps, each.expand_as(result.maps), 1e-12)
