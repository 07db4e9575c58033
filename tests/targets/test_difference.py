"""Difference of networks: maps are differences of maps, under the mask of the first network."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import EsegetaError, MethodError, NetworkError, TargetError
from esegeta_monai.explain import NetworkPair
from esegeta_monai.methods import (
    LRP,
    METHODS,
    Cam,
    ConceptRelevance,
    DeepLift,
    FeatureAblation,
    GradCam,
    GuidedBackprop,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    Method,
    Occlusion,
    Saliency,
    ShapleyValueSampling,
)
from esegeta_monai.targets import Case, ClassScore, Difference, LabelMask, MultiClassMask, PredictedClasses, Voxel
from tests.support.networks import plain
from tests.support.tensors import close, noise

METHODS_OF_INPUT: list[Method] = [
    Saliency(abs=False),
    InputXGradient(),
    IntegratedGradients(n_steps=4),
    DeepLift(),
    LRP(),
    Occlusion(window=4, stride=4),
    FeatureAblation(feature_mask="grid(4)"),
    ShapleyValueSampling(feature_mask="grid(6)", n_samples=3),
]


def networks(dims: int, channels: int = 3) -> tuple[nn.Module, nn.Module, Tensor, SlidingWindowInferer]:
    """Two architectures, an image and windows; each class is predicted somewhere."""
    shape, conv = ((12, 12), nn.Conv2d) if dims == 2 else ((10, 8, 8), nn.Conv3d)
    torch.manual_seed(0)
    first = nn.Sequential(conv(1, 4, 3, padding=1), nn.Softplus(), conv(4, channels, 3, padding=1)).double().eval()
    second = nn.Sequential(conv(1, 5, 5, padding=2), nn.ReLU(), conv(5, channels, 1)).double().eval()
    image = noise(1, 1, *shape)
    with torch.no_grad():
        for net in (first, second):
            net[2].bias -= net(image).mean((0, *range(2, dims + 2)))
    return first, second, image, SlidingWindowInferer((8,) * dims, 1, 0.5, mode="gaussian")


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("method", METHODS_OF_INPUT, ids=lambda m: m.name)
def test_map_is_the_difference_of_maps(method, dims):
    first, second, image, inferer = networks(dims)
    with torch.no_grad():
        mask = inferer(image, first)[0].argmax(0) == 1
    settings = {"checks": False, "seed": 3}
    alone = [
        next(iter(Explainer(net, inferer, **settings)(image, [method], [LabelMask(mask, class_index=1)])))
        for net in (first, second)
    ]
    pair = Explainer(NetworkPair(first, second), inferer, **settings)
    (result,) = pair(image, [method], [Difference(MultiClassMask(1))])
    close(result.map.as_tensor(), (alone[0].map - alone[1].map).as_tensor())
    assert result.record["value"] == pytest.approx(alone[0].record["value"] - alone[1].record["value"], rel=1e-9)
    assert result.record["target_voxels"] == int(mask.sum())


def test_gradient_equals_autograd_through_both_networks():
    first, second, image, inferer = networks(2)
    (result,) = Explainer(NetworkPair(first, second), inferer)(
        image, [Saliency(abs=False)], [Difference(MultiClassMask(2, reduction="mean"))]
    )
    x = image.clone().requires_grad_(True)
    a, b = inferer(x, first)[0], inferer(x, second)[0]
    mask = a.argmax(0) == 2
    assert bool((mask != (b.argmax(0) == 2)).any())
    (gradient,) = torch.autograd.grad(a[2][mask].mean() - b[2][mask].mean(), x)
    close(result.map.as_tensor(), gradient[0])


@pytest.mark.parametrize("dims", [2, 3])
def test_classification_and_the_predicted_class_are_those_of_the_first_network(dims):
    first, x = plain(dims)
    second = copy.deepcopy(first)
    with torch.no_grad():
        second.head.weight.mul_(-1)
        second.head.bias.add_(100)
        values = first(x)[0] - second(x)[0]
    method = InputXGradient()
    (result,) = Explainer(NetworkPair(first, second))(x, [method], [Difference(ClassScore("predicted"))])
    best = int(first(x)[0].argmax())
    assert result.record["value"] == pytest.approx(float(values[best]), rel=1e-12)
    assert result.record["predicted_class"] == best
    alone = [next(iter(Explainer(net)(x, [method], [ClassScore(best)]))).map.as_tensor() for net in (first, second)]
    close(result.map.as_tensor(), alone[0] - alone[1])


def test_a_network_with_itself_differs_nowhere():
    first, _, image, inferer = networks(2)
    (result,) = Explainer(NetworkPair(first, copy.deepcopy(first)), inferer, checks=False)(
        image, [Occlusion(window=4, stride=4)], [Difference(MultiClassMask(1))]
    )
    assert result.record["value"] == 0
    (own,) = Explainer(first, inferer, checks=False)(image, [Occlusion(window=4, stride=4)], [MultiClassMask(1)])
    assert float(result.map.abs().max()) < 1e-13 * float(own.map.abs().max())


def test_the_evidence_against_the_second_of_two_classes_has_the_other_sign():
    prediction, case = torch.tensor([-0.5, 2.0]).double(), Case(class_names={0: "benign", 1: "malignant"}, networks=2)
    for name, expected in (("malignant", -2.5), ("benign", 2.5)):
        (score,) = Difference(ClassScore(name)).bind(prediction, case)
        assert float(score.value(score.crop(prediction))) == pytest.approx(expected)


def test_each_predicted_class_of_the_first_network():
    first, second, image, inferer = networks(2)
    prediction = torch.cat([inferer(image, first)[0], inferer(image, second)[0]]).detach()
    scores = Difference(PredictedClasses()).bind(prediction, Case(networks=2))
    assert [s.label for s in scores] == [f"MultiClassMask-class{c}-difference" for c in (1, 2)]
    (score,) = Difference(Voxel(1, index=(2, 3))).bind(prediction, Case(networks=2))
    assert float(score.value(score.crop(prediction))) == pytest.approx(
        float(prediction[1, 2, 3] - prediction[4, 2, 3]), rel=1e-12
    )


@pytest.mark.parametrize(
    "method", [GradCam(), Cam(), LayerActivation(), ConceptRelevance(), GuidedBackprop()], ids=lambda m: m.name
)
def test_methods_of_layers_and_of_positive_signals_are_refused(method):
    first, second, image, inferer = networks(2)
    explainer = Explainer(NetworkPair(first, second), inferer, checks=False)
    with pytest.raises(MethodError, match=r"belongs to one of the two networks|positive signals only"):
        list(explainer(image, [method], [Difference(MultiClassMask(1))]))


def test_every_cam_and_layer_method_is_refused():
    from esegeta_monai.explain.run import _reads_layer

    of_layers = [cls for cls in METHODS if ".cam." in cls.__module__ or ".layer." in cls.__module__]
    assert len(of_layers) > 15
    for cls in of_layers:
        assert cls.produces in ("layer map", "activation") or "layer" in cls.parameter_names(), cls
    assert not _reads_layer(Saliency())


def test_wrong_targets_and_networks_are_refused():
    first, second, image, inferer = networks(2)
    explainer = Explainer(NetworkPair(first, second), inferer, checks=False)
    with pytest.raises(TargetError, match=r"explains one network, and two are given"):
        list(explainer(image, [Saliency()], [MultiClassMask(1)]))
    with pytest.raises(TargetError, match=r"one is explained: explain.*NetworkPair"):
        list(Explainer(first, inferer, checks=False)(image, [Saliency()], [Difference(MultiClassMask(1))]))
    with pytest.raises(TargetError, match=r"use output='logit'"):
        list(explainer(image, [Saliency()], [Difference(MultiClassMask(1, output="probability"))]))
    with pytest.raises(TargetError, match="a layer belongs to one network"):
        Difference("LayerNeuron('0', 1)")
    other = networks(2, channels=2)[1]
    with pytest.raises((NetworkError, EsegetaError), match="only outputs of one shape can be compared"):
        list(Explainer(NetworkPair(first, other), inferer)(image, [Saliency()], [Difference(MultiClassMask(1))]))


def test_a_network_that_writes_into_its_input_does_not_change_that_of_the_other():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1).double())

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(0)
            return x.flatten(1)[:, :2] * self.scale

    x = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    second = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        assert torch.equal(NetworkPair(Writes(), second)(x.clone())[:, 2:], second(x))
