"""Maps that miss their sum: the status, the ratios of the record, and the second run of rule methods in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.methods import (
    LRP,
    DeepLift,
    DeepLiftShap,
    IntegratedGradients,
    LayerDeepLift,
    LayerLRP,
    SmoothGrad,
)
from esegeta_monai.targets import ClassScore
from tests.explain.support import only


class Saturated(nn.Module):
    """A classifier whose logits move together by ``shift``: their differences are lost in the rounding of float32."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Linear(48, 4)
        self.shift = 1e5

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.first(x)).flatten(1)
        return torch.softmax(self.last(features) + self.shift * features.mean(1, keepdim=True), 1)


def case(network: nn.Module) -> tuple[Tensor, Tensor]:
    dtype = next(network.parameters()).dtype
    x, x0 = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(2)).to(dtype)
    return 3 * x, 3 * x0


def change(network: nn.Module, x: Tensor, x0: Tensor, c: int) -> float:
    """F(x) − F(x₀) by plain inference in float64."""
    double = copy.deepcopy(network).double()
    with torch.no_grad():
        return float(double(x.double())[0, c] - double(x0.double())[0, c])


def worst_class(network: nn.Module, x: Tensor, x0: Tensor) -> int:
    """The class whose change of the score is smallest beside the scores."""
    return min(range(4), key=lambda c: abs(change(network, x, x0, c)))


@pytest.mark.parametrize("kind", [DeepLift, DeepLiftShap, LayerDeepLift])
def test_a_float32_map_of_rounding_is_computed_again_in_float64(kind) -> None:
    network = Saturated()
    x, x0 = case(network)
    c = worst_class(network, x, x0)
    method = {
        DeepLift: lambda: DeepLift(x0[0]),
        DeepLiftShap: lambda: DeepLiftShap([x0[0], x0[0] / 2]),
        LayerDeepLift: lambda: LayerDeepLift("first", baseline=x0[0]),
    }[kind]()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = only(Explainer(network)(x, [method], [ClassScore(c)]))
    expected = only(Explainer(copy.deepcopy(network).double())(x.double(), [method], [ClassScore(c)]))
    assert "the float32 map misses its sum by" in result.record["float64_fallback"]
    assert result.map is not None
    assert float((result.map - expected.map).abs().max()) <= 1e-9 * float(expected.map.abs().max())
    assert result.status == expected.status == "ok"
    assert result.record["completeness_gap"] <= 1e-3
    if kind is DeepLift:
        assert float(result.map.sum()) == pytest.approx(change(network, x, x0, c), rel=1e-3)
        assert result.record["value"] - result.record["baseline_value"] == pytest.approx(
            change(network, x, x0, c), rel=1e-3
        )
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert "float64_fallback" not in expected.record


class Single(Saturated):
    """A network that computes in float32, whatever its input, so that no copy of it runs in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def test_without_float64_the_map_is_kept_and_incomplete() -> None:
    network = Single()
    x, x0 = case(network)
    c = worst_class(Saturated(), x, x0)
    result = only(Explainer(network)(x, [DeepLift(x0[0])], [ClassScore(c)]))
    assert result.status == "incomplete"
    assert result.map is not None
    assert result.map.dtype == torch.float32
    assert "float64_fallback" not in result.record
    texts = " ".join(result.record["warnings"])
    assert "float64 is not possible" in texts
    assert "misses what it should add up to" in texts
    missed = abs(float(result.map.double().sum()) - (result.record["value"] - result.record["baseline_value"]))
    size = float(result.map.double().abs().sum())
    assert result.record["completeness_gap_of_map"] == pytest.approx(missed / size, rel=1e-6)


def test_a_complete_float32_map_stays_as_it_is() -> None:
    network = Saturated()
    network.shift = 1.0
    x, x0 = case(network)
    result = only(Explainer(network)(x, [DeepLift(x0[0])], [ClassScore(1)]))
    assert (result.status, result.map.dtype) == ("ok", torch.float32)
    assert "float64_fallback" not in result.record


def test_a_method_inside_another_one_runs_again_too() -> None:
    network = Saturated()
    x, x0 = case(network)
    c = worst_class(network, x, x0)
    method = SmoothGrad(DeepLift(x0[0]), n_samples=2, std=1e-3)
    result = only(Explainer(network)(x, [method], [ClassScore(c)]))
    expected = only(Explainer(copy.deepcopy(network).double())(x.double(), [method], [ClassScore(c)]))
    assert float((result.map - expected.map).abs().max()) <= 1e-5 * float(expected.map.abs().max())


@pytest.mark.parametrize(("tolerance", "status"), [(None, "ok"), (1e-5, "incomplete")])
def test_a_stated_tolerance_is_the_bound(tolerance, status) -> None:
    """Few steps on a curved path: a gap between 1e-5 and 5e-2."""
    network = Saturated().double()
    network.shift = 1.0
    x, x0 = case(network)
    method = IntegratedGradients(x0[0], n_steps=16, tolerance=tolerance, max_steps=18)
    result = only(Explainer(network)(x, [method], [ClassScore(3)]))
    assert 1e-5 < result.record["completeness_gap"] < 5e-2
    assert result.status == status
    assert any("misses what it should add up to" in w for w in result.record["warnings"]) == (status == "incomplete")


@pytest.mark.parametrize(("bias", "warned"), [(0.4, False), (3.0, True)])
def test_the_share_that_biases_keep_is_recorded_and_warned_of(bias, warned) -> None:
    """A linear network: biases keep b of F = w·x + b, in the record of a layer's map too."""
    network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(16, 2)).double()
    with torch.no_grad():
        network[0].weight.fill_(1.0)
        network[0].bias.fill_(0.0)
        network[2].weight.fill_(1 / 16)
        network[2].bias.fill_(bias)
    x = torch.linspace(0.5, 1.5, 16, dtype=torch.float64).reshape(1, 1, 4, 4)  # of mean 1
    for method in (LRP("LRP0"), LayerLRP("0", composite="LRP0")):
        result = only(Explainer(network)(x, [method], [ClassScore(1)]))
        assert result.record["booked"] == pytest.approx(bias)
        assert result.record["absorbed_share"] == pytest.approx(bias / (1 + bias))
        assert result.record["completeness_gap"] == pytest.approx(0, abs=1e-9)
        assert any("biases keep" in w for w in result.record["warnings"]) == warned
