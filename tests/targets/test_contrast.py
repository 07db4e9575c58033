"""Contrast of classes: maps are differences of maps, and the score that of autograd through MONAI's inferer."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai import Explainer
from esegeta_monai.errors import MethodError, TargetError, UsageError
from esegeta_monai.methods import (
    LRP,
    BlurIG,
    DeepLift,
    FeatureAblation,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerGradientXActivation,
    Method,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
)
from esegeta_monai.targets import Case, ClassScore, Contrast, LabelMask, MultiClassMask, PredictedClasses
from tests.support.networks import network
from tests.support.objectives import full_gradient
from tests.support.tensors import close, noise

METHODS: list[Method] = [
    Saliency(abs=False),
    InputXGradient(),
    IntegratedGradients(n_steps=4),
    BlurIG(n_steps=3),
    DeepLift(),
    LRP(),
    Occlusion(window=4, stride=4),
    FeatureAblation(feature_mask="grid(4)"),
    ShapleyValueSampling(feature_mask="grid(6)", n_samples=3),
    KernelShap(feature_mask="grid(6)", n_samples=64),
    LayerGradientXActivation(layer="0"),
]
NAMES = {0: "background", 1: "tumour", 2: "oedema", 3: "core"}


def _case(dims: int) -> tuple[torch.nn.Module, torch.Tensor, SlidingWindowInferer]:
    shape = (12, 12) if dims == 2 else (10, 8, 8)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d
    net = torch.nn.Sequential(conv(1, 4, 3, padding=1), torch.nn.Softplus(), conv(4, 4, 3, padding=1)).double().eval()
    image = noise(1, 1, *shape)
    with torch.no_grad():
        net[2].bias -= net(image).mean((0, *range(2, dims + 2)))  # so that each class is predicted somewhere
    return net, image, SlidingWindowInferer((8,) * dims, 1, 0.5, mode="gaussian")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_map_is_the_difference_of_maps(method, dims):
    net, image, inferer = _case(dims)
    mask = torch.zeros(image.shape[2:], dtype=torch.bool)
    mask[3:9, 2:7] = True
    explainer = Explainer(net, inferer, class_names=NAMES, checks=False, seed=3)
    targets = [LabelMask(mask, class_index=c) for c in (1, 0, 2)]
    contrast = Contrast(targets[0], others=["background", 2], weight=0.5)
    of, first, second, result = explainer(image, [method], [*targets, contrast])
    expected = of.map - 0.5 * (first.map + second.map) / 2
    close(result.map.as_tensor(), expected.as_tensor())
    values = [a.record["value"] for a in (of, first, second)]
    assert result.record["value"] == pytest.approx(values[0] - 0.25 * (values[1] + values[2]), rel=1e-12)


@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
def test_gradient_equals_autograd(output):
    net, image, inferer = _case(2)
    (attribution,) = Explainer(net, inferer, checks=False)(
        image, [Saliency(abs=False)], [Contrast(MultiClassMask(1, output, reduction="mean"), weight=0.7)]
    )
    x = image.clone().requires_grad_(True)
    prediction = inferer(x, net)[0]
    mask = prediction.argmax(0) == 1
    phi = {"logit": prediction, "probability": prediction.softmax(0), "log_probability": prediction.log_softmax(0)}
    means = phi[output][:, mask].mean(1)
    value = means[1] - 0.7 * means[[0, 2, 3]].mean()
    (gradient,) = torch.autograd.grad(value, x)
    close(attribution.map.as_tensor(), gradient[0])
    assert attribution.record["value"] == pytest.approx(value.item(), rel=1e-12)
    score = Contrast(MultiClassMask(1, output, reduction="mean"), weight=0.7).bind(prediction.detach(), Case())[0]
    close(full_gradient(net, image[0], inferer, score), gradient[0])


def test_probability_by_perturbation_equals_inference():
    net, image, inferer = _case(2)
    target = Contrast(MultiClassMask(1, "probability"), others=2)
    (attribution,) = Explainer(net, inferer, checks=False)(
        image, [Occlusion(window=4, stride=4, baseline=0.0)], [target]
    )
    score = target.bind(inferer(image, net)[0].detach(), Case())[0]

    def value(x: torch.Tensor) -> torch.Tensor:
        return score.value(score.crop(inferer(x, net)[0].detach()))

    occluded = image.clone()
    occluded[..., 4:8, 4:8] = 0
    drop = float(value(image) - value(occluded))
    assert float(attribution.map[0, 5, 5]) == pytest.approx(drop, rel=1e-9)


def test_labels_and_every_predicted_class():
    prediction = noise(4, 6, 5)
    case = Case(class_names=NAMES)
    (score,) = Contrast("MultiClassMask('tumour')", others="oedema").bind(prediction, case)
    assert score.label == "MultiClassMask-tumour-against-oedema"
    assert (score.class_index, score.channels, score.linear, score.falls) == (1, (1, 2), True, True)
    several = Contrast(PredictedClasses()).bind(prediction, case)
    assert [s.label for s in several] == [f"MultiClassMask-{NAMES[c]}-against-others" for c in (1, 2, 3)]
    empty = torch.zeros(4, 6, 5)
    assert Contrast(MultiClassMask(3)).bind(empty, case)[0].empty


def test_targets_with_another_contrast_are_distinguished():
    prediction = noise(4, 6, 5)
    meanings = {
        Contrast(MultiClassMask(1), others=others, weight=weight).bind(prediction, Case())[0].meaning
        for others, weight in ((2, 1.0), (3, 1.0), (2, 0.5))
    }
    assert len(meanings) == 3


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (Contrast(MultiClassMask(1), others=1), "and not class 1, which is explained"),
        (Contrast(MultiClassMask(1), others=[2, 2]), "give each class once"),
        (Contrast(MultiClassMask(1), others=7), "others=7: no such class"),
    ],
)
def test_refused_classes(target, text):
    with pytest.raises(TargetError, match=text):
        target.bind(noise(4, 6, 5), Case())


def test_refused_networks_targets_and_methods():
    with pytest.raises(TargetError, match="several output channels, but the network has one"):
        Contrast(MultiClassMask(0)).bind(noise(1, 6, 5), Case())
    with pytest.raises(TargetError, match="a layer has none"):
        Contrast("LayerNeuron('0', 1)")
    with pytest.raises(UsageError, match="there is no target 'MultiClas'"):
        Contrast("MultiClas(1)")
    net = network(2, 1)
    with pytest.raises(MethodError, match="propagates positive signals only"):
        list(Explainer(net, checks=False)(noise(1, 1, 8, 8), [GuidedBackprop()], [Contrast(MultiClassMask(1))]))


def test_classification():
    prediction = torch.tensor([0.5, 2.0, -1.0]).double()
    (score,) = Contrast(ClassScore("predicted"), others=[0]).bind(prediction, Case())
    assert float(score.value(score.crop(prediction))) == 1.5
