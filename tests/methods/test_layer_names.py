"""A layer that is registered under two names is the same layer under both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.targets import ClassScore, LayerNeuron


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU())
        self.second = self.first
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(x).flatten(1))


METHODS = (
    "GradCam(layer={!r}, relu=False)",
    "ScoreCam(layer={!r})",
    "LayerActivation(layer={!r})",
    "LayerLRP(layer={!r})",
    "LayerIntegratedGradients(layer={!r}, baseline=0, n_steps=4)",
    "LayerActivationGuidedBackprop(layer={!r})",
    "DeepDream(layer={!r}, channel=0, n_iter=3, octaves=1, min_rise=0.0)",
    "FeatureVisualization(layer={!r}, channel=0, n_iter=3, min_rise=0.0)",
    "InvertedRepresentation(layer={!r}, n_iter=3, max_share=1e9)",
)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.split("(")[0])
def test_maps_of_both_names_are_equal(method: str) -> None:
    image = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    by_name = {
        name: next(iter(Explainer(TwoNames().eval())(image, [method.format(name)], [ClassScore(1)])))
        for name in ("first", "second")
    }
    assert by_name["second"].map is not None
    assert by_name["second"].map.any()
    torch.testing.assert_close(by_name["second"].map.as_tensor(), by_name["first"].map.as_tensor(), rtol=0, atol=0)


def test_a_target_of_both_names_is_the_same() -> None:
    image = torch.rand(1, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    targets = [LayerNeuron("first", 2, index=(5, 5)), LayerNeuron("second", 2, index=(5, 5))]
    first, second = Explainer(TwoNames().eval())(image, ["Saliency(abs=False)"], targets)
    assert first.map.any()
    assert torch.equal(first.map, second.map)
