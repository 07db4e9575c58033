"""Ensembles that average probabilities: maps equal autograd and brute force through the members and the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import EsegetaError, InputError, UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.methods import IntegratedGradients, Occlusion, VanillaBackprop
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.explain.test_ensemble import predict, setting

WEIGHTS = [0.3, 0.7]


def activated(values: Tensor, kind: str) -> Tensor:
    return values.softmax(1) if kind == "softmax" else values.sigmoid()


@pytest.mark.parametrize("output", ["probability", "logit", "log_probability"])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_maps_equal_autograd_and_brute_force(kind: str, output: str) -> None:
    members, inferer, image = setting()

    def mean(x: Tensor) -> Tensor:
        parts = [activated(predict(x, [m], inferer, (1,), False), kind) for m in members]
        return sum(w * p for w, p in zip(WEIGHTS, parts))  # type: ignore[return-value]

    mask = mean(image)[:, 1] > 0.5 if kind == "sigmoid" else mean(image).argmax(1) == 1
    assert mask.any()

    def score(x: Tensor) -> Tensor:
        values = mean(x)[:, 1].log() if output == "log_probability" else mean(x)[:, 1]
        return (values * mask).sum()

    inferer_of_both = EnsembleInferer(inferer, members, (1,), weights=WEIGHTS, average=kind)  # type: ignore[arg-type]
    methods = [VanillaBackprop(), Occlusion(window=8, baseline=0.0)]
    explainer = Explainer(members[0], inferer_of_both)
    gradient, occlusion = explainer(image, methods, [MultiClassMask(1, output=output)])
    x = image.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(score(x), x)
    assert gradient.record["target_voxels"] == int(mask.sum())
    assert gradient.record["value"] == pytest.approx(float(score(image)), rel=1e-12)
    assert gradient.record["blend_deviation"] == pytest.approx(0, abs=1e-12)
    largest = float(expected.abs().max())
    torch.testing.assert_close(gradient.map.as_tensor(), expected[0], rtol=0, atol=1e-10 * largest)
    changed = image.clone()
    changed[..., 8:16, 0:8] = 0
    assert float(occlusion.map[0, 9, 1]) == pytest.approx(float(score(image) - score(changed)), rel=1e-9)


def test_integrated_gradients_are_complete() -> None:
    members, inferer, image = setting()
    explainer = Explainer(members[0], EnsembleInferer(inferer, members, average="softmax"))
    method = IntegratedGradients(baseline=0.0, n_steps=64)
    (path,) = explainer(image, [method], ["Box(1, (2, 2), (12, 9), output='probability')"])

    def score(x: Tensor) -> float:
        mean = sum(predict(x, [m], inferer, (), False).softmax(1) / 2 for m in members)
        return float(mean[0, 1, 2:12, 2:9].detach().sum())  # type: ignore[index]

    assert float(path.map.sum()) == pytest.approx(score(image) - score(torch.zeros_like(image)), rel=1e-3)


def test_layer_maps_equal_hooks_with_the_gradient_of_the_mean() -> None:
    members, _, _ = setting()
    image = torch.rand(1, 1, 12, 10, dtype=torch.float64)
    explainer = Explainer(members[0], EnsembleInferer(None, members, average="softmax"))
    methods = ["GradCam('n', relu=False)", "HiResCam('n', relu=False)", "LayerActivation('n', reduce='sum')"]
    target = "Box(1, (2, 2), (7, 6), output='probability')"
    maps = [a.map.as_tensor()[0] for a in explainer(image, methods, [target])]
    kept: list[Tensor] = []
    handles = [m.n.register_forward_hook(lambda mod, i, o: kept.append(o)) for m in members]
    mean = sum(m(image).softmax(1) / 2 for m in members)
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(mean[0, 1, 2:7, 2:6].sum(), kept)
    expected = [torch.zeros(12, 10, dtype=torch.float64) for _ in methods]
    for a, g in zip(kept, gradients):
        expected[0] += (g[0].mean((1, 2), keepdim=True) * a[0].detach()).sum(0)
        expected[1] += (g[0] * a[0].detach()).sum(0)
        expected[2] += a[0].detach().sum(0) / 2
    for ours, truth in zip(maps, expected):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10 * float(truth.abs().max()))


def test_classifiers_average_their_probabilities() -> None:
    torch.manual_seed(0)
    members = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
        .double()
        .eval()
        for _ in "ab"
    ]
    image = torch.rand(1, 1, 9, 8, dtype=torch.float64)
    explainer = Explainer(members[0], EnsembleInferer(None, members, average="softmax"))
    (attribution,) = explainer(image, [VanillaBackprop()], [ClassScore(1, output="probability")])
    x = image.clone().requires_grad_(True)
    mean = (members[0](x).softmax(1) + members[1](x).softmax(1)) / 2
    (expected,) = torch.autograd.grad(mean[0, 1], x)
    torch.testing.assert_close(attribution.map.as_tensor(), expected[0], rtol=0, atol=1e-12)
    assert attribution.record["predicted_probability"] == pytest.approx(float(mean.max()), rel=1e-12)


def test_one_network_twice_is_its_probability() -> None:
    members, inferer, image = setting()
    twice = Explainer(members[0], EnsembleInferer(inferer, [members[0]] * 2, average="softmax"))
    once = Explainer(members[0], inferer)
    target = [MultiClassMask(1, output="probability")]
    methods = ["VanillaBackprop", "GradCam('n')", "DeepLift(baseline=0.0)", "RISE(n_masks=20)"]
    for a, b in zip(twice(image, methods, target), once(image, methods, target), strict=True):
        torch.testing.assert_close(a.map.as_tensor(), b.map.as_tensor(), rtol=1e-9, atol=1e-12)


def test_relevance_of_a_nonlinear_mean_is_refused() -> None:
    members, inferer, image = setting()
    explainer = Explainer(members[0], EnsembleInferer(inferer, members, average="softmax"))
    with pytest.raises(EsegetaError, match="not linear in the prediction"):
        list(explainer(image, ["LRP"], [MultiClassMask(1)]))


def test_a_vote_is_refused_and_the_mean_named() -> None:
    members, inferer, _ = setting()
    with pytest.raises(UsageError, match="no derivative: average the probabilities"):
        EnsembleInferer(inferer, members, average="vote")  # type: ignore[arg-type]


def test_a_given_prediction_has_the_channels_of_all_members() -> None:
    members, inferer, image = setting()
    explainer = Explainer(members[0], EnsembleInferer(inferer, members, average="softmax"))
    raw = torch.cat([predict(image, [m], inferer, (), False) for m in members], 1)
    (given,) = explainer(image, ["VanillaBackprop"], [MultiClassMask(1)], prediction=raw)
    (own,) = explainer(image, ["VanillaBackprop"], [MultiClassMask(1)])
    torch.testing.assert_close(given.map.as_tensor(), own.map.as_tensor(), rtol=1e-10, atol=1e-14)
    with pytest.raises(InputError, match="3 channels for 2 members"):
        list(explainer(image, ["VanillaBackprop"], [MultiClassMask(1)], prediction=raw[:, :3]))
