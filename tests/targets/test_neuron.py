"""A unit of a layer as the target: against autograd through MONAI's inferer, and Captum's neuron methods."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.errors import TargetError, UsageError
from esegeta_monai.methods import DeepLift, GradCam, IntegratedGradients, NeuronConductance, Occlusion, Saliency
from esegeta_monai.targets import ClassScore, LayerNeuron, MultiClassMask
from tests.support.layers import setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close


@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "ViTAutoEnc", "DynUNet"])
def test_gradient_equals_autograd_of_the_blended_unit(name):
    s = setting(name)
    place = (5, s.image.shape[-1] - s.roi[-1] // 2 - 2)  # in several windows
    x = s.image[None].clone().requires_grad_(True)
    plan, module, total = s.objective.plan, s.network.get_submodule(s.layer), torch.zeros((), dtype=DOUBLE)
    count = torch.zeros(plan.padded_shape, dtype=DOUBLE)
    for slices in plan.slices:
        count[slices] += plan.importance
    holding = 0
    for slices in plan.slices:
        inside = [i - p.start for i, p in zip(place, slices)]
        if not all(0 <= i < n for i, n in zip(inside, s.roi)):
            continue
        kept: list[Tensor] = []
        handle = module.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o) or o.clone())
        s.network(x[(slice(None), slice(None), *slices)])
        handle.remove()
        units = s.as_map(kept[0])[0, 2]
        at = tuple(i // (n // p) for i, n, p in zip(inside, s.roi, units.shape))
        total = total + units[at] * plan.importance[tuple(inside)] / count[place]
        holding += 1
    assert holding > 1
    (gradient,) = torch.autograd.grad(total, x)
    image = MetaTensor(s.image[None], affine=torch.diag(torch.tensor([2.0, 2.0, 1.0, 1.0])).double())
    world = [2.0 * i for i in place]
    targets = [LayerNeuron(s.layer, 2, index=place), LayerNeuron(s.layer, 2, world=world, name="mm"), MultiClassMask(1)]
    result = list(Explainer(s.network, s.inferer, output=s.output)(image, [Saliency(abs=False)], targets))
    close(result[0].map.as_tensor(), gradient[0])
    assert result[0].record["value"] == pytest.approx(total.item(), rel=1e-10)
    assert result[0].record["blend_deviation"] < 1e-10
    assert result[1].label == "mm"
    close(result[1].map.as_tensor(), gradient[0])
    close(result[2].map.as_tensor(), explain(Saliency(abs=False), s.objective).maps[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_captum_neuron_methods(dims):
    network, image = plain(dims)
    x0 = torch.randn_like(image) / 2
    with torch.no_grad():
        alive = network.then(network.second(network.act(network.first(image))))[0, 1]
    unit = (1, *(int(i) for i in (alive == alive.max()).nonzero()[0]))
    explainer = Explainer(network)
    target = LayerNeuron("then", 1, index=unit[1:])

    def ours(method) -> Tensor:
        (result,) = explainer(image, [method], [target])
        return result.map.as_tensor()[None]

    layer = network.then
    gradient = captum.attr.NeuronGradient(network, layer).attribute(image.clone(), unit)
    close(ours(Saliency(abs=False)), gradient.detach())
    expected = captum.attr.NeuronIntegratedGradients(network, layer).attribute(
        image, unit, baselines=x0, n_steps=8, method="riemann_middle"
    )
    close(ours(IntegratedGradients(x0[0], n_steps=8, method="riemann_middle")), expected.detach())
    expected = captum.attr.NeuronDeepLift(network, layer).attribute(image, unit, baselines=x0)
    close(ours(DeepLift(x0[0])), expected.detach())
    assert bool(ours(Occlusion(window=2, baseline=0.0)).any())
    assert bool(ours(GradCam("act", relu=False)).any())

    given = {"baselines": x0, "n_steps": 8, "method": "riemann_middle"}
    expected = captum.attr.NeuronConductance(network, layer).attribute(image, unit, target=2, **given)
    objective = objective_of(network, image[0], [ClassScore(2)])
    shared = {"baseline": x0[0], "n_steps": 8, "method": "riemann_middle"}
    close(explain(NeuronConductance("then", 1, unit[1:], **shared), objective).maps, expected.detach())


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", ["MeshNet", "ViTAutoEnc"])
def test_conductance_of_all_units_is_integrated_gradients(name, output):
    s = setting(name, target=MultiClassMask(1, output=output), layer="blocks.0" if name == "ViTAutoEnc" else None)
    shared = {"baseline": torch.zeros_like(s.image), "n_steps": 3}
    whole = explain(IntegratedGradients(**shared), s.objective).maps
    close(explain(NeuronConductance(s.layer, **shared), s.objective).maps, whole)
    channels = s.pass_()[0].shape[1]
    close(sum(explain(NeuronConductance(s.layer, c, **shared), s.objective).maps for c in range(channels)), whole)


def test_a_vector_and_bad_input():
    network, image = plain(2)
    explainer = Explainer(network)
    (result,) = explainer(image, [Saliency(abs=False)], [LayerNeuron("head", 1)])
    close(
        result.map.as_tensor(), explain(Saliency(abs=False), objective_of(network, image[0], [ClassScore(1)])).maps[0]
    )
    for target, error, text in (
        (LayerNeuron("head", 1, index=(1, 1)), TargetError, "vector"),
        (LayerNeuron("act", 1), TargetError, r"LayerNeuron: layer 'act' has positions: give world"),
        (LayerNeuron("act", 1, index=(9, 9)), TargetError, "outside"),
        (LayerNeuron("act", 7, index=(1, 1)), TargetError, "has 4 channels"),
        (LayerNeuron("acts", 1, index=(1, 1)), UsageError, "near matches"),
    ):
        with pytest.raises(error, match=text):
            list(explainer(image, [Saliency()], [target]))
    objective = objective_of(network, image[0], [ClassScore(1)])
    with pytest.raises(UsageError, match="outside"):
        explain(NeuronConductance("act", 0, (9, 9)), objective)
    with pytest.raises(UsageError, match="channel=4"):
        explain(NeuronConductance("act", 4), objective)
