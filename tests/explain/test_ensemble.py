"""Ensembles and mirrored views: maps equal autograd and brute force through a plain loop over members and views."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.methods import LRP, DeepLift, IntegratedGradients, Occlusion, VanillaBackprop
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.networks import small


class Uneven:
    """Windows at uneven places with asymmetric weights, declared by the inferer, as those of nnU-Net are."""

    def __init__(self, roi: tuple[int, ...], starts: list[tuple[int, ...]], seed: int = 5) -> None:
        self.roi, self.starts = roi, starts
        self.importance = torch.rand(roi, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2

    def places(self) -> list[tuple[slice, ...]]:
        return [tuple(slice(a, a + r) for a, r in zip(start, self.roi)) for start in self.starts]

    def declared_windows(self, shape: tuple[int, ...], dtype: torch.dtype) -> WindowPlan:
        pads = ((0, 0),) * len(shape)
        return WindowPlan(shape, self.roi, tuple(self.places()), pads, importance=self.importance.to(dtype))

    def __call__(self, x: Tensor, network: Any) -> Tensor:
        total, count = 0, torch.zeros(x.shape[2:], dtype=x.dtype)
        for place in self.places():
            out = torch.zeros((1, 3, *x.shape[2:]), dtype=x.dtype)
            out[(..., *place)] = network(x[(..., *place)]) * self.importance
            total = total + out
            count[place] += self.importance
        return total / count


def views(axes: tuple[int, ...]) -> list[list[int]]:
    return [[a + 2 for a in c] for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]


def predict(x: Tensor, members: list[nn.Module], inferer: Any, axes: tuple[int, ...], around: bool) -> Tensor:
    """Compute the prediction by a plain loop: 1 / (members x views) of each."""
    total = torch.zeros((), dtype=x.dtype)
    for member in members:
        for flips in views(axes):
            if around:
                part = inferer(x.flip(flips), member).flip(flips)
            else:
                part = inferer(x, lambda w, m=member, f=flips: m(w.flip(f)).flip(f))
            total = total + part / (len(members) * len(views(axes)))
    return total


def setting() -> tuple[list[nn.Module], Uneven, Tensor]:
    members = [small(2), small(2)]
    torch.manual_seed(1)
    with torch.no_grad():
        for p in members[1].parameters():
            p.add_(0.3 * torch.randn_like(p))
    starts = [(a, b) for a in (0, 7, 15) for b in (0, 5)]
    return members, Uneven((16, 10), starts), torch.rand(1, 1, 31, 15, dtype=torch.float64)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("axes", [(), (0,), (0, 1)])
def test_maps_equal_autograd_and_brute_force(axes: tuple[int, ...], around: bool) -> None:
    members, inferer, image = setting()
    if around:  # MONAI's own places and weights; mirrored views of the volume have mirrored places
        inferer = SlidingWindowInferer((16, 10), 1, 0.25, "gaussian")
    prediction = predict(image, members, inferer, axes, around)
    mask = prediction.argmax(1) == 1

    def score(x: Tensor) -> Tensor:
        return (predict(x, members, inferer, axes, around)[:, 1] * mask).sum()

    explainer = Explainer(members[0], EnsembleInferer(inferer, members, axes, around=around))
    methods = [VanillaBackprop(), IntegratedGradients(baseline=0.0, n_steps=64), Occlusion(window=8, baseline=0.0)]
    gradient, path, occlusion = explainer(image, methods, [MultiClassMask(1)])
    x = image.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(score(x), x)
    assert gradient.record["target_voxels"] == int(mask.sum())
    assert gradient.record["value"] == pytest.approx(float(score(image)), rel=1e-12)
    torch.testing.assert_close(gradient.map.as_tensor(), expected[0], rtol=1e-10, atol=1e-12)
    change = float(score(image) - score(torch.zeros_like(image)))
    assert float(path.map.sum()) == pytest.approx(change, rel=1e-3)
    changed = image.clone()
    changed[..., 8:16, 0:8] = 0
    assert float(occlusion.map[0, 9, 1]) == pytest.approx(float(score(image) - score(changed)), rel=1e-9)
    assert gradient.record["blend_deviation"] == pytest.approx(0, abs=1e-12)


def test_the_two_kinds_of_view_differ_for_asymmetric_windows() -> None:
    members, inferer, image = setting()
    inside, around = (predict(image, members, inferer, (0,), kind) for kind in (False, True))
    assert float((inside - around).abs().max() / inside.abs().max()) > 1e-3


def test_rules_are_complete_over_members_and_views() -> None:
    torch.manual_seed(0)
    members = [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).double() for _ in "ab"
    ]
    _, inferer, image = setting()
    explainer = Explainer(members[0].eval(), EnsembleInferer(inferer, members, (0, 1)))
    lift, relevance = explainer(image, [DeepLift(baseline=0.0), LRP(composite="Epsilon")], ["Box(1, (0, 0), (31, 15))"])
    assert lift.record["completeness_gap"] < 1e-10
    kept = relevance.record["absorbed_share"]
    assert float(relevance.map.sum()) / relevance.record["value"] == pytest.approx(1 - kept, abs=1e-6)


def test_a_network_listed_twice_is_the_network() -> None:
    members, inferer, image = setting()
    twice = Explainer(members[0], EnsembleInferer(inferer, [members[0], members[0]]))
    once = Explainer(members[0], inferer)
    layer = [
        "GradCam('n')",
        "LayerActivation('n', reduce='sum')",
        "LayerCam('n')",
        "GradCamPlusPlus('n')",
        "XGradCam('n')",
    ]
    methods = ["VanillaBackprop", "SmoothGrad", "LRP", "FullGrad(abs=False)", *layer]
    for a, b in zip(twice(image, methods, [MultiClassMask(1)]), once(image, methods, [MultiClassMask(1)]), strict=True):
        torch.testing.assert_close(a.map.as_tensor(), b.map.as_tensor(), rtol=1e-10, atol=1e-12)


def test_an_ensemble_of_classifiers() -> None:
    torch.manual_seed(0)
    members = [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        for _ in "ab"
    ]
    members = [m.double().eval() for m in members]
    image = torch.rand(1, 1, 9, 8, dtype=torch.float64)
    explainer = Explainer(members[0], EnsembleInferer(None, members, (1,), weights=[0.25, 0.75]))
    (attribution,) = explainer(image, [VanillaBackprop()], [ClassScore(1)])
    x = image.clone().requires_grad_(True)
    score = sum(w * (m(x) + m(x.flip(3)))[0, 1] / 2 for w, m in zip((0.25, 0.75), members))
    (expected,) = torch.autograd.grad(score, x)
    torch.testing.assert_close(attribution.map.as_tensor(), expected[0], rtol=1e-10, atol=1e-12)


def test_the_network_keeps_its_weights() -> None:
    members, inferer, image = setting()
    before = {name: value.clone() for name, value in members[0].state_dict().items()}
    second = {name: value.clone() for name, value in members[1].state_dict().items()}
    list(Explainer(members[0], EnsembleInferer(inferer, members))(image, [VanillaBackprop()], [MultiClassMask(1)]))
    for states, now in ((before, members[0]), (second, members[1])):
        assert all(torch.equal(value, now.state_dict()[name]) for name, value in states.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"members": [nn.Conv2d(1, 2, 1), nn.Conv2d(1, 2, 3)]}, "members 0 and 1 differ"),
        ({"weights": [1.0, 2.0]}, "2 entries for 1 member"),
        ({"mirror_axes": (0, 0)}, "different spatial axes"),
    ],
)
def test_wrong_parameters_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        EnsembleInferer(**arguments)


def test_windows_that_leave_voxels_out_are_refused() -> None:
    inferer = Uneven((4, 4), [(0, 0), (0, 4)])
    with pytest.raises(EsegetaError, match="cover 50 %"):
        next(
            iter(
                Explainer(small(2), inferer)(torch.rand(1, 1, 8, 8).double(), [VanillaBackprop()], [MultiClassMask(0)])
            )
        )


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("axes", [(), (0,), (0, 1)])
def test_layer_maps_equal_explicit_hooks_on_each_call(axes: tuple[int, ...], around: bool) -> None:
    """One window per volume: each member and view is called by itself, and its map is mirrored back."""
    members, _, _ = setting()
    image = torch.rand(1, 1, 12, 10, dtype=torch.float64)
    explainer = Explainer(members[0], EnsembleInferer(SlidingWindowInferer((12, 10), 1), members, axes, around=around))
    methods = ["GradCam('n', relu=False)", "HiResCam('n', relu=False)", "LayerActivation('n', reduce='sum')"]
    expected = [torch.zeros(12, 10, dtype=torch.float64) for _ in methods]
    share = 1 / (len(members) * len(views(axes)))
    for member in members:
        for flips in views(axes):
            kept: list[Tensor] = []
            handle = member.n.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
            out = member(image.flip(flips)).flip(flips)
            handle.remove()
            (gradient,) = torch.autograd.grad(share * out[0, 1, 2:7, 2:6].sum(), kept[0])
            a, g = kept[0].detach().flip(flips)[0], gradient.flip(flips)[0]
            expected[0] += (g.mean((1, 2), keepdim=True) * a).sum(0)
            expected[1] += (g * a).sum(0)
            expected[2] += share * a.sum(0)
    for ours, truth in zip(explainer(image, methods, ["Box(1, (2, 2), (7, 6))"]), expected, strict=True):
        torch.testing.assert_close(ours.map.as_tensor()[0], truth, rtol=1e-10, atol=1e-12)


def test_the_wrong_kind_of_view_does_not_pass() -> None:
    members, inferer, image = setting()
    wrong_kind = Explainer(members[0], EnsembleInferer(inferer, members, (0,), around=True))
    (wrong,) = wrong_kind(image, [VanillaBackprop()], ["Box(1, (0, 0), (31, 15))"])
    x = image.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad(predict(x, members, inferer, (0,), around=False)[:, 1].sum(), x)
    assert float((wrong.map.as_tensor() - expected[0]).abs().max() / expected.abs().max()) > 1e-3


def test_channels_of_different_members_are_not_added() -> None:
    members, inferer, image = setting()
    explainer = Explainer(members[0], EnsembleInferer(inferer, members))
    with pytest.raises(EsegetaError, match="different channels"):
        list(explainer(image, ["LayerActivation('n', reduce='channels')"], [MultiClassMask(1)]))


@pytest.mark.parametrize("around", [False, True])
def test_the_inferer_itself_predicts_the_mean_over_views(around: bool) -> None:
    members, _, image = setting()
    inner = SlidingWindowInferer((16, 10), 1, 0.25, "gaussian")
    inferer = EnsembleInferer(inner, mirror_axes=(0, 1), around=around)
    expected = predict(image, members[:1], inner, (0, 1), around)
    torch.testing.assert_close(inferer(image, members[0]), expected, rtol=1e-12, atol=1e-14)


def test_views_of_an_inferer_are_kept_in_an_ensemble() -> None:
    members, inferer, image = setting()
    nested = EnsembleInferer(EnsembleInferer(inferer, mirror_axes=(0,)), members)
    plain = EnsembleInferer(inferer, members, (0,))
    (a,) = Explainer(members[0], nested)(image, [VanillaBackprop()], [MultiClassMask(1)])
    (b,) = Explainer(members[0], plain)(image, [VanillaBackprop()], [MultiClassMask(1)])
    torch.testing.assert_close(a.map.as_tensor(), b.map.as_tensor(), rtol=1e-12, atol=1e-14)
    with pytest.raises(UsageError, match="already has members"):
        EnsembleInferer(plain, members)


def test_weights_are_hashed_again_only_after_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    members, inferer, _ = setting()
    ensemble = EnsembleInferer(inferer, members)
    first = ensemble.record["members"]
    calls = []
    monkeypatch.setattr("esegeta_monai.explain.ensemble.tensor_hash", lambda *a: calls.append(a) or "new")
    assert ensemble.record["members"] == first
    assert calls == []
    with torch.no_grad():
        next(members[1].parameters()).add_(1)
    assert ensemble.record["members"] == [first[0], "new"]


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize(
    "method", ["VanillaBackprop", "Occlusion(window=8)", "GradCam('n')", "HiResCam('n')", "LayerActivation('n')"]
)
def test_finished_maps_of_an_ensemble_pass_their_check(method: str, around: bool) -> None:
    members, inferer, image = setting()
    if around:
        inferer = SlidingWindowInferer((16, 10), 1, 0.25, "gaussian")
    explainer = Explainer(members[0], EnsembleInferer(inferer, members, (0,), around=around), checks="maps")
    (attribution,) = explainer(image, [method], ["Box(1, (2, 2), (24, 12))"])
    assert attribution.record["map_check"] == "passed", attribution.record["checks"]
