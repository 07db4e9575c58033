"""DeepLIFT over windows: complete to rounding, equal to Captum where Captum is right."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import nn

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import DeepLift, DeepLiftShap, LayerDeepLift, LayerDeepLiftShap
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_captum_on_plain_relu(dims):
    network, image = plain(dims)
    references = torch.randn(3, *image.shape[1:], dtype=DOUBLE) / 2
    objective = objective_of(network, image[0], [ClassScore(1)])
    actual = explain(DeepLift(references[0]), objective).maps
    close(actual, captum.attr.DeepLift(network).attribute(image, references[:1], target=1).detach())
    several = [r.clone() for r in references]
    actual = explain(DeepLiftShap(several), objective).maps
    close(actual, captum.attr.DeepLiftShap(network).attribute(image, references, target=1).detach())
    actual = explain(LayerDeepLift("first", "channels", baseline=references[0]), objective).maps
    expected = captum.attr.LayerDeepLift(network, network.first).attribute(image, references[:1], target=1)
    close(actual, expected.detach())
    actual = explain(LayerDeepLiftShap("first", "channels", baseline=several), objective).maps
    expected = captum.attr.LayerDeepLiftShap(network, network.first).attribute(image, references, target=1)
    close(actual, expected.detach())


@pytest.mark.parametrize("output", ["logit", "probability", "log_probability"])
@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "ViTAutoEnc", "SwinUNETR", "ResNet18"])
def test_windowed_maps_are_complete(name, output):
    classifies = name == "ResNet18"
    target = ClassScore(1, output=output) if classifies else MultiClassMask(1, output=output)
    s = setting(name, target=target)
    x0 = torch.randn(s.image.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    score = s.objective.scores[0]
    with torch.no_grad():
        values = [score.value(score.crop(s.inferer(v[None], s.model)[0])) for v in (s.image, x0)]
    result = explain(DeepLift(x0), s.objective)
    close(result.maps.sum(), values[0] - values[1], 1e-9)
    assert result.note(0)["completeness_gap"] < 1e-9
    assert result.note(0)["baseline_value"] == pytest.approx(float(values[1]), rel=1e-9)


def test_linear_network():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    image, x0 = torch.randn(2, 2, 4, 4, dtype=DOUBLE)
    result = explain(DeepLift(x0), objective_of(network, image, [ClassScore(1)])).maps[0]
    close(result, network[1].weight[1].detach().reshape(image.shape) * (image - x0))


def test_a_mean_over_a_distribution_is_complete():
    s = setting("UNet_instance")
    result = explain(DeepLiftShap("noise(std=0.5)", n_samples=3), s.objective)
    assert result.note(0)["completeness_gap"] < 1e-9
    assert result.note(0)["n_baselines"] == 3
    with pytest.raises(UsageError, match="n_samples=0"):
        DeepLiftShap(n_samples=0)


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", ["MeshNet", "ViTAutoEnc", "ResNet18"])
def test_all_flows_through_a_layer_that_nothing_leads_round(name, output):
    target = ClassScore(1, output=output) if name == "ResNet18" else MultiClassMask(1, output=output)
    s = setting(name, target=target, layer="blocks.0" if name == "ViTAutoEnc" else None)
    x0 = torch.randn(s.image.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    for method in (LayerDeepLift(s.layer, baseline=x0), LayerDeepLiftShap(s.layer, baseline=[x0, x0 / 2])):
        assert explain(method, s.objective).note(0)["share_through_layer"] == pytest.approx(1, abs=1e-9)
