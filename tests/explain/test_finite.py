"""Values that are not finite, predictions of another shape, and images without structure are refused or named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import EsegetaError, InputError, MethodError, NetworkError
from esegeta_monai.methods import (
    DeepLift,
    DeepLiftShap,
    FeatureAblation,
    GradientShap,
    GuidedIG,
    IntegratedGradients,
    KernelShap,
    LayerConductance,
    LayerDeepLift,
    LayerIntegratedGradients,
    Lime,
    Occlusion,
    Rise,
    Saliency,
    ShapleyValueSampling,
)
from esegeta_monai.targets import MultiClassMask
from tests.explain.support import Spy, image, only


class Standardises(nn.Module):
    """A network that divides its input by its deviation: it has no output for a constant one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Spy(dims=2)

    def forward(self, x: Tensor) -> Tensor:
        dims = (1, 2, 3)
        return self.inner((x - x.mean(dims, keepdim=True)) / x.std(dims, keepdim=True))


ZERO = {"baseline": 0.0}
METHODS = [
    GradientShap(**ZERO),
    IntegratedGradients(**ZERO),
    IntegratedGradients(tolerance=0.1, max_steps=20, **ZERO),
    DeepLift(**ZERO),
    DeepLiftShap(n_samples=2, **ZERO),
    GuidedIG(n_steps=4, **ZERO),
    GuidedIG(n_steps=4, fraction=1.0, **ZERO),
    GuidedIG(n_steps=4, fraction=1e-9, max_dist=0.0, **ZERO),
    KernelShap(feature_mask="grid(6)", **ZERO),
    ShapleyValueSampling(feature_mask="grid(6)", **ZERO),
    FeatureAblation("grid(12)", **ZERO),
    Lime(n_samples=5, feature_mask="grid(12)", **ZERO),
    Rise(n_masks=4, grid=1, p=0.1, **ZERO),
    Occlusion(12, **ZERO),
    LayerDeepLift("inner.first", **ZERO),
    LayerIntegratedGradients("inner.first", **ZERO),
    LayerConductance("inner.first", **ZERO),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{type(m).__name__}")
def test_a_baseline_without_an_output_is_refused(method: Any) -> None:
    x = image(dims=2)
    with torch.no_grad():
        assert torch.isnan(Standardises()(0 * x)).all()
    with pytest.raises(MethodError, match=r"not finite|at the baseline"):
        list(Explainer(Standardises())(x, [method], [MultiClassMask(0)]))


def test_the_same_method_runs_with_another_baseline() -> None:
    x = image(dims=2)
    result = only(Explainer(Standardises())(x, [GuidedIG(x[0].flip(-1), n_steps=8)], [MultiClassMask(0)]))
    assert result.status in ("ok", "incomplete")


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.25, 1.0])
def test_guided_ig_ends_where_gradients_are_zero(fraction: float) -> None:
    """A constant network: the path ends at the image all the same."""
    network = nn.Conv2d(1, 2, 1)
    nn.init.zeros_(network.weight)
    result = only(Explainer(network)(image(dims=2), [GuidedIG(0.0, 4, fraction)], [MultiClassMask(0)]))
    assert result.status in ("zero", "empty_target")


P = Spy(dims=2)(image(dims=2)).detach()
GIVEN = {
    "NaN": (P * torch.nan, NetworkError, "NaN or infinite"),
    "one NaN": (P.clone().index_fill_(2, torch.tensor(3), torch.inf), NetworkError, "NaN or infinite"),
    "cut": (P[..., :6], InputError, "but the network gives"),
    "resampled": (P.repeat_interleave(2, 2).repeat_interleave(2, 3), InputError, "but the network gives"),
    "other channels": (torch.cat([P, P], 1), InputError, "but the network gives"),
    "two for one image": (torch.cat([P, P]), InputError, "2 images|for 1 image"),
    "none": (P[:0], InputError, "for 1 image"),
    "without batch": (P[0], InputError, "for 1 image"),
    "complex": (P.to(torch.complex64), InputError, "complex"),
}


@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer((6, 6), 2)], ids=["whole", "windows"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_prediction_that_is_not_the_networks_is_refused(name: str, inferer: Any) -> None:
    given, error, text = GIVEN[name]
    for method in (Saliency(), Occlusion(4)):
        with pytest.raises(EsegetaError, match=text) as raised:
            list(Explainer(Spy(dims=2), inferer)(image(dims=2), [method], [MultiClassMask(0)], prediction=given))
        assert isinstance(raised.value, error)
    own = P if inferer is None else inferer(image(dims=2), Spy(dims=2)).detach()
    result = only(Explainer(Spy(dims=2), inferer)(image(dims=2), [Saliency()], [MultiClassMask(0)], prediction=own))
    assert (result.status, result.record["warnings"]) == ("ok", [])


def test_a_complex_image_is_refused() -> None:
    with pytest.raises(InputError, match="complex numbers"):
        list(Explainer(Spy(dims=2))(image(dims=2) * 1j, [Saliency()], [MultiClassMask(0)]))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("checks", [True, False])
def test_an_image_of_one_value_is_refused(value: float, checks: bool) -> None:
    constant, text = torch.full((1, 1, 12, 12), value), f"every voxel is {value:g}"
    with pytest.raises(InputError, match=text):
        list(Explainer(Spy(dims=2), checks=checks)(constant, [Saliency()], [MultiClassMask(0)]))
    recording = Explainer(Spy(dims=2), checks=checks, on_error="record")
    both = torch.cat([constant, image(dims=2)])
    failed, other = recording(both, [Saliency()], [MultiClassMask(0)])
    assert (failed.status, failed.map, other.status) == ("failed", None, "ok")
    (entry,) = failed.record["checks"]
    assert (entry["check"], entry["verdict"]) == ("finite", "refused")
    assert text in entry["text"] == failed.record["reason"]
    assert [(c.name, c.verdict) for c in recording.check(constant)] == [("finite", "refused")]
    fine = only(Explainer(Spy(dims=2), checks=checks)(image(dims=2), [Saliency()], [MultiClassMask(0)]))
    entries = [c["verdict"] for c in fine.record.get("checks", []) if c["check"] == "finite"]
    assert (entries, fine.record["warnings"]) == (["passed"] if checks else [], [])
