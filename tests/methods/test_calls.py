"""Layer methods on ensembles and mirrored views: maps equal those of each call alone, brought back and averaged."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import EsegetaError
from esegeta_monai.explain.ensemble import EnsembleInferer
from tests.explain.test_ensemble import setting

SHARES = [0.25, 0.75]
CAMS = ["EigenCam('n', relu=False)", "ScoreCam('n', relu=False, baseline=0.0)", "AblationCam('n', relu=False)"]


def flips(axes: tuple[int, ...]) -> list[list[int]]:
    return [[a + 1 for a in c] for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]


@pytest.mark.parametrize("axes", [(), (0,), (0, 1)])
def test_cams_are_means_of_the_maps_of_each_call(axes: tuple[int, ...]) -> None:
    """Oracle: a plain explainer of each member on the mirrored image and target, its map mirrored back."""
    members, _, _ = setting()
    image = torch.rand(1, 1, 12, 10, dtype=torch.float64)
    inferer = SlidingWindowInferer((12, 10), 1)
    start, stop, shape = (2, 3), (7, 9), (12, 10)
    ensemble = EnsembleInferer(inferer, members, axes, weights=SHARES)
    result = list(Explainer(members[0], ensemble)(image, CAMS, [f"Box(1, {start}, {stop})"]))
    for number, method in enumerate(CAMS):
        expected = torch.zeros(12, 10, dtype=torch.float64)
        for share, member in zip(SHARES, members):
            for mirrored in flips(axes):
                low = [n - b if a + 1 in mirrored else s for a, (s, b, n) in enumerate(zip(start, stop, shape))]
                high = [n - s if a + 1 in mirrored else b for a, (s, b, n) in enumerate(zip(start, stop, shape))]
                target = f"Box(1, {tuple(low)}, {tuple(high)})"
                (alone,) = Explainer(member, inferer)(image.flip([a + 1 for a in mirrored]), [method], [target])
                expected += share / len(flips(axes)) * alone.map.as_tensor().flip(mirrored)[0]
        largest = float(expected.abs().max())
        torch.testing.assert_close(result[number].map.as_tensor()[0], expected, rtol=0, atol=1e-10 * largest)


@pytest.mark.parametrize("method", [*CAMS, "NeuronConductance('n', n_steps=4, baseline=0.0)",
                                    "LayerActivationGuidedBackprop('n')"])  # fmt: skip
def test_one_network_twice_is_the_network(method: str) -> None:
    members, inferer, image = setting()
    (twice,) = Explainer(members[0], EnsembleInferer(inferer, [members[0]] * 2))(image, [method], ["MultiClassMask(1)"])
    (once,) = Explainer(members[0], inferer)(image, [method], ["MultiClassMask(1)"])
    torch.testing.assert_close(twice.map.as_tensor(), once.map.as_tensor(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("index", [None, (3, 7)])
def test_conductance_of_mirrored_units_equals_autograd(index: tuple[int, int] | None) -> None:
    """F and the unit's activation of each call by a plain loop; the unit is that of the image's voxel."""
    members, _, _ = setting()
    image = torch.rand(1, 1, 12, 10, dtype=torch.float64)
    ensemble = EnsembleInferer(SlidingWindowInferer((12, 10), 1), members, (0, 1))
    method = f"NeuronConductance('n', index={index}, n_steps=3, baseline=0.0, method='riemann_middle')"
    (result,) = Explainer(members[0], ensemble)(image, [method], ["Box(1, (2, 2), (7, 6))"])
    expected = torch.zeros(1, 12, 10, dtype=torch.float64)
    for member in members:
        for mirrored in flips((0, 1)):
            for alpha in (1 / 6, 1 / 2, 5 / 6):
                x = (alpha * image).requires_grad_(True)
                kept: list[Tensor] = []
                handle = member.n.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
                out = member(x.flip([a + 1 for a in mirrored])).flip([a + 1 for a in mirrored])
                handle.remove()
                score = out[0, 1, 2:7, 2:6].sum() / 8
                (gradient,) = torch.autograd.grad(score, kept[0], retain_graph=True)
                chosen = torch.ones_like(gradient) if index is None else torch.zeros_like(gradient)
                if index is not None:
                    chosen[(..., *index)] = 1
                    chosen = chosen.flip([a + 1 for a in mirrored])
                (through,) = torch.autograd.grad(kept[0], x, gradient * chosen)
                expected += (through * image)[0].detach() / 3
    largest = float(expected.abs().max())
    torch.testing.assert_close(result.map.as_tensor(), expected, rtol=0, atol=1e-10 * largest)


def test_guided_backprop_of_a_mirrored_layer_is_the_mirrored_map() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).double().eval()
    image = torch.rand(1, 1, 12, 10, dtype=torch.float64)
    inferer, method = SlidingWindowInferer((12, 10), 1), "LayerActivationGuidedBackprop('1')"
    (result,) = Explainer(network, EnsembleInferer(inferer, mirror_axes=(0,)))(image, [method], ["MultiClassMask(0)"])
    (plain,) = Explainer(network, inferer)(image, [method], ["MultiClassMask(0)"])
    (other,) = Explainer(network, inferer)(image.flip(2), [method], ["MultiClassMask(0)"])
    expected = (plain.map.as_tensor() + other.map.as_tensor().flip(1)) / 2
    torch.testing.assert_close(result.map.as_tensor(), expected, rtol=1e-10, atol=1e-12)


def test_the_first_cam_of_an_ensemble_of_classifiers() -> None:
    torch.manual_seed(0)
    members = [
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        .double()
        .eval()
        for _ in "ab"
    ]
    image = torch.rand(1, 1, 9, 8, dtype=torch.float64)
    explainer = Explainer(members[0], EnsembleInferer(None, members, (1,), weights=SHARES))
    (result,) = explainer(image, ["Cam"], ["ClassScore(1)"])
    expected = torch.zeros(9, 8, dtype=torch.float64)
    for share, member in zip(SHARES, members):
        for mirrored in ([], [2]):
            activations = member[1](member[0](image.flip([a + 1 for a in mirrored])))[0].detach()
            values = torch.einsum("c,cij->ij", member[4].weight[1].detach(), activations)
            expected += share / 2 * values.flip([a - 1 for a in mirrored])
    torch.testing.assert_close(result.map.as_tensor()[0], expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "method", ["NeuronConductance('n', channel=1)", "LayerActivationGuidedBackprop('n', channel=1)"]
)
def test_a_channel_belongs_to_one_member(method: str) -> None:
    members, inferer, image = setting()
    with pytest.raises(EsegetaError, match="different channels"):
        list(Explainer(members[0], EnsembleInferer(inferer, members))(image, [method], ["MultiClassMask(1)"]))


def test_patterns_of_an_ensemble_are_refused() -> None:
    members, inferer, image = setting()
    method: Any = "PatternAttribution(patterns='none.pt')"
    with pytest.raises(EsegetaError, match="made for the weights of one network"):
        list(Explainer(members[0], EnsembleInferer(inferer, members))(image, [method], ["MultiClassMask(1)"]))
