"""Subjects refuse what does not fit; results are summed up with the right interval."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.metrics import METRICS, MetricInput, MetricResult, PointingGame, RelevanceMass, better
from esegeta_monai.metrics.base import bootstrap, magnitude, mean_interval, summarise, wilson
from esegeta_monai.utils.registry import json_ready
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import noise

BASELINED = [cls.__name__ for cls in METRICS if "baseline" in cls.parameter_names()]
WRONG = [f"{cls.__name__}(features='blokcs')" for cls in METRICS if "features" in cls.parameter_names()]
WRONG += ["PointingGame(tolerance_mm=-1)", "Infidelity(size=0)", "Infidelity(std=0)", "ROAD(noise=-1)"]


def test_every_metric_states_its_properties_and_builds_by_name():
    for cls in METRICS:
        metric = METRICS.create(cls.__name__)
        assert cls.group
        assert cls.meaning
        assert cls.higher_is_better in (True, False, None)
        assert (cls.__doc__ or "").strip()
        assert json_ready(metric.parameters) == metric.parameters
        assert cls.reference or cls.__name__ in {"DistanceProfile"}


@pytest.mark.parametrize("text", [f"{name}(baseline='blurr')" for name in BASELINED] + WRONG)
def test_wrong_parameters_are_refused_before_anything_is_computed(text):
    with pytest.raises(UsageError, match=r"there is no|must be at least|must be above"):
        METRICS.create(text)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"map": torch.zeros(4, 4)}, "2D or 3D"),
        ({"map": torch.full((1, 4, 4), torch.nan)}, "not finite"),
        ({"label": torch.zeros(4, 5)}, "label mask has shape"),
        ({"body": torch.zeros(3, 4)}, "body mask has shape"),
        ({"spacing": (1.0, 1.0, 1.0)}, "does not fit"),
        ({"spacing": (1.0, 0.0)}, "does not fit"),
        ({"objective": Naive(small(), noise(1, 8, 12)).objective}, "the image"),
    ],
)
def test_subjects_that_do_not_fit_are_refused(more, text):
    with pytest.raises(MetricError, match=text):
        MetricInput(**{"map": torch.ones(1, 4, 4), **more})


def test_what_a_metric_needs_is_named():
    with pytest.raises(MetricError, match="PointingGame needs a label"):
        PointingGame().update(MetricInput(torch.ones(1, 4, 4)))
    with pytest.raises(MetricError, match="label is empty"):
        PointingGame().update(MetricInput(torch.ones(1, 4, 4), label=torch.zeros(4, 4)))


def test_several_maps_give_the_mean_and_students_interval():
    metric = RelevanceMass()
    label = torch.zeros(4, 4)
    label[0] = 1
    results = [metric.update(MetricInput(noise(1, 4, 4, seed=seed), label=label)) for seed in range(5)]
    values = [r.value for r in results]
    result = summarise(metric, results)
    low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
    assert result.value == pytest.approx(np.mean(values))
    assert (result.low, result.high, result.n) == (pytest.approx(low), pytest.approx(high), 5)
    with pytest.raises(MetricError):
        summarise(metric, [])


def test_wilson_and_bootstrap_against_scipy():
    outcomes = [1.0] * 7 + [0.0] * 5
    reference = stats.binomtest(7, 12).proportion_ci(method="wilson")
    assert wilson(outcomes) == pytest.approx((reference.low, reference.high))
    sample = np.random.default_rng(0).normal(size=60)
    low, high = bootstrap(lambda s: s.mean(1), sample, draws=4000)
    assert (low, high) == pytest.approx(mean_interval(sample), abs=0.05)
    assert bootstrap(lambda s: s.mean(1), sample[:2]) == (None, None)
    assert mean_interval([1.0]) == (None, None)


def test_undefined_never_beats_and_is_beaten():
    metric = RelevanceMass()
    assert better(metric, 0.1, None)
    assert not better(metric, None, 0.1)
    assert not better(metric, None, None)
    assert not better(metric, 0.1, 0.1)
    assert MetricResult.undefined("why").as_json()["notes"] == {"undefined": "why"}


def test_magnitude_by_sign_sums_channels():
    values = torch.tensor([[[1.0, -2.0]], [[-3.0, 4.0]]])
    assert magnitude(values).tolist() == [[4.0, 6.0]]
    assert magnitude(values, "positive").tolist() == [[1.0, 4.0]]
    assert magnitude(values, "negative").tolist() == [[3.0, 2.0]]
    with pytest.raises(UsageError):
        magnitude(values, "both")
