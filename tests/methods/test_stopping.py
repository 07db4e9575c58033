"""Sampling until a stated precision: the looks, the coverage, and the methods that use it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import GradientShap, Method, SmoothGrad, SmoothGradSquared, VarGrad
from esegeta_monai.methods.stopping import CONFIDENCE, FEWEST, RunningMean, looks

NETWORK = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)).double()


def test_looks_double_and_end_at_the_largest_number() -> None:
    assert looks(16) == [16]
    assert looks(17) == [16, 17]
    assert looks(128) == [16, 32, 64, 128]


@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_the_stated_precision_is_met_with_the_stated_confidence(noise: float) -> None:
    """In 200 runs: at least the nominal share, less two standard errors."""
    generator = torch.Generator().manual_seed(0)
    truth, hits, counts = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 1, 3, 4), 0, []
    for _ in range(200):
        mean = RunningMean(100_000, tolerance=0.25)
        while not mean.add(truth + noise * torch.randn(truth.shape, generator=generator, dtype=torch.float64)):
            pass
        counts.append(mean.count)
        hits += bool((mean.mean - truth).abs().max() <= 0.25 * mean.mean.abs().max())
    assert hits / 200 >= CONFIDENCE - 2 * math.sqrt(CONFIDENCE * (1 - CONFIDENCE) / 200)
    assert min(counts) >= FEWEST
    assert (max(counts) > FEWEST) == (noise > 0.5)  # it stops early, and not always at once


@pytest.mark.parametrize("kind", [SmoothGrad, SmoothGradSquared, partial(GradientShap, "noise")])
def test_a_map_that_stops_is_the_mean_of_its_samples(kind: Callable[..., Method]) -> None:
    torch.manual_seed(0)
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    (stopped,) = Explainer(NETWORK)(image, [kind(tolerance=0.5)], ["MultiClassMask(1)"])
    n = stopped.record["n_samples"]
    (fixed,) = Explainer(NETWORK)(image, [kind(n_samples=n)], ["MultiClassMask(1)"])
    torch.testing.assert_close(stopped.map.as_tensor(), fixed.map.as_tensor(), rtol=0, atol=1e-12)
    assert n in looks(1024)
    assert stopped.record["sampling_error"] <= 0.5


def test_the_largest_number_ends_it_and_the_record_has_the_error() -> None:
    image = torch.rand(1, 1, 6, 6, dtype=torch.float64)
    (attribution,) = Explainer(NETWORK)(image, [SmoothGrad(tolerance=1e-6, max_samples=20)], ["MultiClassMask(1)"])
    assert attribution.record["n_samples"] == 20
    assert attribution.record["sampling_error"] > 1e-6


def test_wrong_values_are_refused() -> None:
    for wrong in ({"tolerance": 0.0}, {"tolerance": 0.1, "max_samples": 8}):
        with pytest.raises(UsageError, match="max_samples"):
            SmoothGrad(**wrong)
    with pytest.raises(UsageError, match="n_samples"):
        VarGrad(tolerance=0.1)
