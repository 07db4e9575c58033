"""Captum's algorithms on whole volumes: equal to Captum alone, on one window and on a function that blends them all."""

from __future__ import annotations

import random

import captum.attr
import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.baselines import noise_like
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import METHODS, Captum, SmoothGrad
from esegeta_monai.targets import Box, Target, TargetWrapper
from esegeta_monai.utils.registry import registered_names_only
from tests.support.objectives import explain, objective_of

SEED = 3
WHOLE = {2: (10, 12), 3: (8, 10, 12)}
EXACT = 1e-10
SINGLE = 1e-5
"""Lime and KernelShap solve their regression in float32."""


class Net(nn.Module):
    """Two channels, two levels, and modules for all that Captum knows."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        torch.manual_seed(dims + 10)  # some weights of the last layer are positive for each class
        self.a, self.r, self.b, self.q, self.c = (
            conv(2, 5, 3, padding=1),
            nn.ReLU(),
            conv(5, 4, 3, padding=1),
            nn.ReLU(),
            conv(4, 3, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.q(self.b(self.r(self.a(x)))))


def case(dims: int) -> tuple[nn.Module, Tensor]:
    net = Net(dims).double().eval()
    return net, torch.rand(2, *WHOLE[dims], dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.2


def target_of(dims: int, class_index: int = 1, output: str = "logit") -> Target:
    """A class in a box that several windows see."""
    return Box(class_index, (1,) * dims, (7,) * (dims - 1) + (9,), output=output)


def inferer_of(dims: int) -> SlidingWindowInferer:
    """Gaussian windows that overlap; one call for all windows of two volumes, as Captum's DeepLIFT requires."""
    return SlidingWindowInferer((8,) * dims, 1000, 0.5, "gaussian")


def features(dims: int) -> Tensor:
    """Number the halves of the image along two axes, 1 to 4, as in a label map."""
    labels = torch.ones(WHOLE[dims], dtype=torch.long)
    labels[..., 4:] += 1
    labels[5:] += 2
    return labels


def references(image: Tensor, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.stack([noise_like(image, 0.5, generator) for _ in range(n)])


def arguments(name: str, dims: int) -> dict[str, object]:
    return {
        "Occlusion": {"sliding_window_shapes": [2] + [4] * dims, "strides": [2] + [3] * dims},
        "IntegratedGradients": {"n_steps": 6},
        "GradientShap": {"n_samples": 4, "stdevs": 0.1},
        "ShapleyValueSampling": {"n_samples": 3},
        "KernelShap": {"n_samples": 12},
        "Lime": {"n_samples": 12},
    }.get(name, {})


NAMES = ["Saliency", "InputXGradient", "IntegratedGradients", "GradientShap", "DeepLift", "DeepLiftShap"]
NAMES += ["GuidedBackprop", "Deconvolution", "Occlusion", "FeatureAblation"]
NAMES += ["ShapleyValueSampling", "ShapleyValues", "KernelShap", "Lime"]
BASELINES = {"GradientShap": 3, "DeepLiftShap": 3, **dict.fromkeys(("IntegratedGradients", "DeepLift"), 1)}
FEATURES = ("FeatureAblation", "ShapleyValueSampling", "ShapleyValues", "KernelShap", "Lime")


def adapter(name: str, image: Tensor) -> Captum:
    more: dict[str, object] = {}
    if name in BASELINES:
        drawn = references(image, BASELINES[name])
        more["baseline"] = list(drawn) if len(drawn) > 1 else drawn[0]
    elif name in ("Occlusion", *FEATURES):
        more["baseline"] = 0.1
    if name in FEATURES:
        more["feature_mask"] = features(image.ndim - 1)
    return Captum(name, arguments(name, image.ndim - 1), **more)


def by_captum(name: str, function: nn.Module, image: Tensor) -> Tensor:
    """Captum alone, as its documentation calls it, with the seed of the run."""
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments(name, image.ndim - 1).items()}
    if name in BASELINES:
        options["baselines"] = references(image, BASELINES[name])
    elif name in ("Occlusion", *FEATURES):
        options["baselines"] = torch.full_like(image, 0.1)[None]
    if name in FEATURES:
        options["feature_mask"] = features(image.ndim - 1)[None, None] - 1
    torch.manual_seed(SEED), np.random.seed(SEED), random.seed(SEED)
    x = image[None].clone().requires_grad_(True)
    return getattr(captum.attr, name)(function).attribute(x, target=0, **options)[0].detach()


def deviation(values: Tensor, truth: Tensor) -> float:
    return float((values - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("windows", [False, True], ids=["whole", "windows"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_equal_to_captum(name, dims, windows):
    net, image = case(dims)
    inferer = inferer_of(dims) if windows else None
    target = target_of(dims)
    wrapper = TargetWrapper(net, target, inferer).freeze(image[None])
    objective = objective_of(net, image, [target, target_of(dims, 2)], inferer, seed=SEED)
    assert (len(objective.windows) > 3) == windows
    ours = explain(adapter(name, image), objective).maps[0]
    assert deviation(ours, by_captum(name, wrapper, image)) < (SINGLE if name in ("KernelShap", "Lime") else EXACT)


@pytest.mark.parametrize("name", ["Saliency", "IntegratedGradients", "GuidedBackprop", "Occlusion", "GradientShap"])
def test_equal_to_captum_for_a_target_that_is_not_linear(name):
    net, image = case(2)
    target = target_of(2, output="probability")
    wrapper = TargetWrapper(net, target, inferer_of(2)).freeze(image[None])
    objective = objective_of(net, image, [target], inferer_of(2), seed=SEED)
    assert not objective.linear
    assert deviation(explain(adapter(name, image), objective).maps[0], by_captum(name, wrapper, image)) < EXACT


@pytest.mark.parametrize("name", ["DeepLift", "DeepLiftShap"])
def test_windows_are_not_added_for_a_target_that_is_not_linear(name):
    net, image = case(2)
    with pytest.raises(MethodError, match="linear"):
        list(Explainer(net)(image[None], [adapter(name, image)], [target_of(2, output="probability")]))


class Calls(nn.Module):
    """Rectifiers as calls, which Captum's hooks do not find."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


class Leaky(Net):
    def __init__(self) -> None:
        super().__init__(2)
        self.r, self.q = nn.LeakyReLU(0.1), nn.LeakyReLU(0.1)


def test_a_sum_that_captum_misses_makes_the_map_incomplete():
    _, image = case(2)
    net = Calls().double().eval()
    (made,) = Explainer(net)(image[None], [Captum("DeepLift", baseline=references(image, 1)[0])], [target_of(2)])
    assert made.status == "incomplete"
    assert made.record["completeness_gap"] > 0.01
    assert any("use" in w or "DeepLift is the method of this package" in w for w in made.record["warnings"])
    net, image = case(2)
    (made,) = Explainer(net)(image[None], [Captum("DeepLift", baseline=references(image, 1)[0])], [target_of(2)])
    assert made.status == "ok"
    assert made.record["completeness_gap"] < 1e-12


@pytest.mark.parametrize("name", ["GuidedBackprop", "Deconvolution"])
@pytest.mark.parametrize(("network", "right"), [(lambda: Net(2), True), (Leaky, False), (Calls, False)])
def test_activations_that_captum_does_not_modify_are_reported(name, network, right):
    _, image = case(2)
    (made,) = Explainer(network().double().eval())(image[None], [Captum(name)], [target_of(2)])
    difference = made.record["difference_from_rule"]
    assert (difference < EXACT) == right
    assert any("nn.ReLU modules only" in w for w in made.record["warnings"]) != right


def test_an_algorithm_that_fails_names_captum_and_our_method():
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__(2)
            self.q = self.r  # Captum's DeepLIFT refuses a module that runs twice

    _, image = case(2)
    with pytest.raises(MethodError, match=r"Captum's DeepLift fails on this network.*use DeepLift of this package"):
        list(Explainer(Twice().double().eval())(image[None], [Captum("DeepLift")], [target_of(2)]))


def test_voxels_without_a_feature_are_refused():
    net, image = case(2)
    labels = features(2)
    labels[0] = 0
    with pytest.raises(MethodError, match="belong to no feature"):
        list(Explainer(net)(image[None], [Captum("Lime", feature_mask=labels)], [target_of(2)]))


def test_the_draws_leave_the_callers_random_numbers_alone_and_repeat():
    net, image = case(2)
    method = Captum("GradientShap", {"n_samples": 3, "stdevs": 0.1}, baseline=0.0)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = (torch.rand(1), np.random.rand(), random.random())
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    maps = [explain(method, objective_of(net, image, [target_of(2)], seed=SEED)).maps for _ in range(2)]
    assert (torch.rand(1), np.random.rand(), random.random()) == before
    assert torch.equal(*maps)


def test_noise_around_an_algorithm():
    net, image = case(2)
    (made,) = Explainer(net)(image[None], [SmoothGrad(Captum("Saliency"), n_samples=2)], [target_of(2)])
    (plain,) = Explainer(net)(image[None], [SmoothGrad("Saliency", n_samples=2)], [target_of(2)])
    assert deviation(made.map.as_tensor(), plain.map.as_tensor()) < EXACT


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Captum('os.system')", "Captum has no algorithm 'os.system'"),
        ("Captum('captum.attr._core.saliency.Saliency')", "has no algorithm"),
        ("Captum('visualization')", "has no algorithm"),
        ("Captum('Saliencey')", "did you mean Saliency"),
        ("Captum('LayerGradCam')", "use LayerGradCam"),
        ("Captum('LayerConductance')", r"a layer: use LayerConductance\(layer=…\)"),
        ("Captum('NeuronGradient')", "LayerNeuron"),
        ("Captum('NoiseTunnel')", "SmoothGrad"),
        ("Captum('LRP')", "use LRP"),
        ("Captum('IntegratedGradients', {'steps': 3})", "no argument 'steps': its arguments are multiply_by_inputs"),
        ("Captum('IntegratedGradients', {'baselines': 0})", "baselines cannot be an argument"),
        ("Captum('Occlusion')", "needs sliding_window_shapes"),
        ("Captum('Saliency', baseline=0)", "has no baseline"),
        ("Captum('DeepLiftShap', n_baselines=0)", "at least one"),
    ],
)
def test_what_is_refused_by_name(text, reason):
    with pytest.raises(UsageError, match=reason), registered_names_only():
        METHODS.create(text)


def test_a_config_and_a_text_make_the_same_method():
    config = {"_target_": "Captum", "algorithm": "captum.attr.DeepLiftShap", "arguments": {}, "n_baselines": 2}
    for method in (METHODS.create(config), METHODS.create("Captum(algorithm='DeepLiftShap', n_baselines=2)")):
        assert method.name == "CaptumDeepLiftShap"
        assert (method.additive, method.needs_linear, method.units) == (True, True, "target per voxel")
    free = METHODS.create("Captum('DeepLift', {'multiply_by_inputs': False})")
    assert (free.additive, free.units) == (False, "target per unit of image intensity")
    assert METHODS.create("Captum('Saliency', {'abs': False})").signed
    assert not METHODS.create("Captum('Saliency')").signed
