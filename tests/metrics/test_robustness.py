"""Stability against Captum's sensitivity, written-out formulas and linear networks; one set of explanations for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.metrics import sensitivity_max
from monai.inferers import SimpleInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.methods import Saliency, run
from esegeta_monai.metrics import (
    AverageSensitivity,
    LocalLipschitz,
    MaxSensitivity,
    MetricInput,
    RelativeInputStability,
    RelativeOutputStability,
)
from esegeta_monai.metrics.controls import SobelControl
from esegeta_monai.targets import Box, ClassScore, MultiClassMask
from tests.metrics.cases import linear_case, subject_of
from tests.support.networks import Computed, small
from tests.support.objectives import Naive
from tests.support.tensors import noise

ALL = [MaxSensitivity, AverageSensitivity, LocalLipschitz, RelativeInputStability, RelativeOutputStability]
GRADIENT = Saliency(abs=False)


def noises(case: Naive, radius: float, n: int) -> list[torch.Tensor]:
    generator = case.objective.generator()
    scale = radius * case.image.flatten(1).std(1).reshape(-1, *(1,) * (case.image.ndim - 1))
    shape = case.image.shape
    return [(torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1).double() * scale for _ in range(n)]


@pytest.mark.parametrize("dims", [2, 3])
def test_sensitivity_is_captums(dims):
    shape = (2, 8, 10) if dims == 2 else (2, 6, 7, 8)

    mean = Computed(lambda out: out.flatten(2).mean(-1), small(dims, 2))
    case = Naive(mean, noise(*shape), [ClassScore(1)], SimpleInferer())
    draws = torch.stack(noises(case, 0.1, 12))

    def explain(inputs, **_):
        x = inputs[0] if isinstance(inputs, tuple) else inputs
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return torch.autograd.grad(case.net(x)[:, 1].sum(), x)

    expected = sensitivity_max(explain, case.image[None], perturb_func=lambda x: x + draws, n_perturb_samples=12)
    result = MaxSensitivity(0.1, 12).update(subject_of(case, GRADIENT))
    assert result.value == pytest.approx(float(expected), rel=1e-9)
    assert result.low <= result.high <= result.value


@pytest.mark.parametrize("dims", [2, 3])
def test_formulas_with_windows_and_two_targets(dims):
    shape = (2, 9, 11) if dims == 2 else (1, 8, 8, 11)
    case = Naive(small(dims, shape[0]), noise(*shape), [MultiClassMask(1), Box(2, (1,) * dims, (5,) * dims)])
    with frozen(case.net):
        base = run(GRADIENT, case.objective).maps
        result = {k: [] for k in ("max", "lip", "rel", "ris", "ros", "ris_e")}
        for delta in noises(case, 0.05, 4):
            maps = run(GRADIENT, case.objective.derive(image=case.image + delta)).maps
            d = (maps - base).flatten(1).norm(dim=1)
            n = base.flatten(1).norm(dim=1)
            values = case.value(case.image)
            moved = (case.value(case.image + delta) - values).abs() / values.abs()
            result["max"].append(d / n)
            result["lip"].append(d / n / delta.norm())
            result["ris"].append(d / n / (delta.norm() / case.image.norm()))
            result["ros"].append(d / n / moved)
            result["ris_e"].append(((maps - base) / base).flatten(1).norm(dim=1) / (delta / case.image).norm())
    shared: dict = {}
    case.objective.context.progress.start()
    for k in (0, 1):
        subject = MetricInput(base[k], case.objective, k, GRADIENT, shared=shared)

        def value(metric, subject=subject):
            return metric.update(subject).value

        def worst(name, k=k):
            return pytest.approx(max(float(v[k]) for v in result[name]), rel=1e-9)

        assert value(MaxSensitivity(0.05, 4)) == worst("max")
        mean = np.mean([float(v[k]) for v in result["max"]])
        assert value(AverageSensitivity(0.05, 4)) == pytest.approx(mean, rel=1e-9)
        assert value(LocalLipschitz(0.05, 4)) == worst("lip")
        assert value(RelativeInputStability(0.05, 4)) == worst("ris")
        assert value(RelativeOutputStability(0.05, 4)) == worst("ros")
        if bool((base[k] != 0).all()):
            assert value(RelativeInputStability(0.05, 4, ratio="elementwise")) == worst("ris_e")
        if k == 0:
            passes = case.objective.context.progress.passes
    assert case.objective.context.progress.passes == passes  # the second target was explained along with the first


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@pytest.mark.parametrize("metric", ALL)
def test_the_gradient_of_a_linear_network_is_perfectly_stable_and_zero_is_undefined(metric, kind):
    case = linear_case(kind, 2)
    assert metric(n_samples=3).update(subject_of(case, GRADIENT)).value == pytest.approx(0, abs=1e-10)
    image = case.objective.image
    flat = case.objective.derive(image=torch.zeros_like(image))
    zero = metric(n_samples=3).update(MetricInput(torch.zeros_like(image), flat, 0, SobelControl()))
    assert zero.value is None
    assert not metric.compared


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("metric", ALL)
def test_near_a_constant_image_there_is_no_noise_by_which_a_map_could_be_stable(metric):
    case = Naive(small(2, 2, "batch"), torch.full((2, 9, 12), 0.7, dtype=torch.float64), [MultiClassMask(1)])
    subject = subject_of(case, Saliency())
    assert bool(subject.map.any())
    result = metric(n_samples=3).update(subject)
    assert result.value is None
    assert "constant" in result.notes["undefined"]


def test_missing_or_wrong_input_is_refused():
    case = linear_case("segmentation", 2)
    with pytest.raises(MetricError, match="the method"):
        MaxSensitivity().update(MetricInput(case.image, case.objective))
    with pytest.raises(UsageError, match="radius"):
        MaxSensitivity(radius=0)
    with pytest.raises(UsageError, match="n_samples"):
        MaxSensitivity(n_samples=1)
    with pytest.raises(UsageError, match="least=0"):
        RelativeOutputStability(least=0)
    with pytest.raises(UsageError, match="norms"):
        RelativeInputStability(n_samples=2, ratio="other").update(subject_of(case, GRADIENT))
