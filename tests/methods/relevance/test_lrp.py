"""LRP and excitation backpropagation through windows: conservation, linear networks, the whole volume."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.engine.rules import excitation, lrp
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import LRP, ExcitationBackprop, LayerLRP
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.networks import build

COMPOSITES = ["EpsilonPlus", "EpsilonPlusFlat", "EpsilonGammaBox", "DeepTaylor"]


def explain(network, image, method, target, inferer=None, output=None):
    (result,) = Explainer(network, inferer, output=output)(image, [method], [target])
    return result


@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "DenseNet121", "ViT"])
@pytest.mark.parametrize("method", [*map(LRP, COMPOSITES), ExcitationBackprop()], ids=[*COMPOSITES, "Excitation"])
def test_conserves_through_windows(name, method):
    case = build(name, spatial_dims=2)
    inferer, image, target = None, case.image, ClassScore(1)
    if case.kind == "segmentation":
        image = torch.cat([case.image, case.reference], -1)
        inferer, target = SlidingWindowInferer(case.roi, 2, 0.5, "gaussian"), MultiClassMask(1)
    result = explain(case.network, image, method, target, inferer, case.output)
    assert result.record["completeness_gap"] <= 1e-9
    assert result.status == "ok"


@pytest.mark.parametrize("dims", [2, 3])
def test_linear_network_gives_weight_times_input(dims):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6**dims, 2)).double()
    image = torch.rand(1, 1, *[6] * dims, dtype=torch.float64)
    result = explain(network, image, LRP("LRP0"), ClassScore(1))
    expected = network[1].weight[1].reshape(1, *[6] * dims) * image[0]
    assert float((result.map.as_tensor() - expected).abs().max() / expected.abs().max()) <= 1e-10
    assert result.record["booked"] == pytest.approx(float(network[1].bias[1]), abs=1e-12)


class ReadsPosition(nn.Module):
    """A network that reads the position of each window and a condition there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x, coordinates, condition):
        assert len(x) == len(coordinates) == len(condition)
        factors = torch.tensor([1.0 + place[2].start for place in coordinates], dtype=x.dtype)
        return self.last(torch.relu(self.first(torch.cat([x, condition], 1)))) * factors.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("method", [LRP(), LayerLRP("first"), ExcitationBackprop()], ids=lambda m: m.name)
def test_each_window_of_a_batch_gets_its_own_position_and_condition(method):
    image, condition = (torch.rand(1, 1, 20, 12, dtype=torch.float64) for _ in range(2))
    inferer = SlidingWindowInferer((8, 8), 1, 0.5, "gaussian", with_coord=True)
    result = [
        next(
            Explainer(ReadsPosition().double().eval(), inferer, window_batch=n).stream(
                image, [method], [MultiClassMask(1)], network_kwargs={"condition": condition}
            )
        )
        for n in (1, 4)
    ]
    single, together = (a.map.as_tensor() for a in result)
    assert float((single - together).abs().max() / single.abs().max()) <= 1e-12
    assert result[0].record["window_passes"] == result[1].record["window_passes"]
    if isinstance(method, LRP):
        assert result[1].record["completeness_gap"] <= 1e-9


def test_windows_are_the_sum_of_single_windows():
    case = build("UNet_batch", spatial_dims=2)
    image = torch.cat([case.image, case.reference], -1)
    n = case.roi[-1]
    inferer = SlidingWindowInferer(case.roi, 1, 0.0, "constant")  # two windows, side by side
    with torch.no_grad():
        mask = torch.cat([case.logits(p) for p in (image[..., :n], image[..., n:])], -1)[0].argmax(0) == 1
    for method, rule in ((LRP(), lrp), (ExcitationBackprop(), excitation)):
        result = explain(case.network, image, method, MultiClassMask(1), inferer, case.output)
        parts = []
        for part, seen in ((image[..., :n], mask[..., :n]), (image[..., n:], mask[..., n:])):
            cotangents = torch.zeros(1, 1, 3, *case.roi, dtype=image.dtype)
            cotangents[0, 0, 1] = seen
            parts.append(rule(case.logits, part, cotangents).input[0, 0])
        expected = torch.cat(parts, -1)
        assert float((result.map.as_tensor() - expected).abs().max() / expected.abs().max()) <= 1e-10


@pytest.mark.parametrize("method", [LRP("EpsilonGammaBox"), LayerLRP("0", composite="EpsilonGammaBox")], ids=repr)
def test_the_box_of_an_image_holds_its_constant_padding(method):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double()
    image = 2 + torch.rand(1, 1, 6, 6, dtype=torch.float64)
    result = explain(network, image, method, MultiClassMask(1), SlidingWindowInferer((8, 8), 1))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    cotangents = torch.zeros(1, 1, 2, 8, 8, dtype=torch.float64)
    cotangents[0, 0, 1, 1:7, 1:7] = network(padded)[0, :, 1:7, 1:7].argmax(0) == 1
    whole = lrp(network, padded, cotangents, "EpsilonGammaBox", low=0.0, layers={"0": network[0]})
    expected = whole.layers["0"].relevance.sum(2) if isinstance(method, LayerLRP) else whole.input[0]
    gap = (result.map.as_tensor() - expected[0, :, 1:7, 1:7]).abs().max() / expected.abs().max()
    assert float(gap) <= 1e-10


def test_only_linear_scores():
    case = build("UNet_batch", spatial_dims=2)
    with pytest.raises(MethodError, match="output='logit'"):
        explain(case.network, case.image, LRP(), MultiClassMask(1, output="probability"), output=case.output)


def test_an_unknown_composite_is_refused_at_once():
    with pytest.raises(UsageError):
        LRP("EpsilonMinus")
