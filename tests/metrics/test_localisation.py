"""Localisation against hand-computed values, scikit-learn and brute force, 2D and 3D; ties and zeros gain nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.metrics import (
    METRICS,
    DistanceProfile,
    LocalisationAUC,
    MetricInput,
    PointingGame,
    RelevanceMass,
    RelevanceRank,
    TopKIntersection,
    better,
)
from esegeta_monai.metrics.controls import constant_map, random_map
from tests.support.tensors import noise

SHAPES = [(2, 10, 12), (1, 8, 9, 10)]


def label_in(shape) -> torch.Tensor:
    label = torch.zeros(shape[1:], dtype=torch.bool)
    label[tuple(slice(2, 5) for _ in shape[1:])] = True
    return label


def measured(metric, values, label, **more):
    return metric.update(MetricInput(values, label=label, spacing=(1.0, 2.0, 0.5)[: label.ndim], **more))


def test_by_hand():
    values = torch.tensor([[[4.0, -1.0], [2.0, 3.0]]])
    label = torch.tensor([[True, True], [False, False]])
    assert measured(PointingGame(), values, label).value == 1
    assert measured(RelevanceMass(), values, label).value == pytest.approx(5 / 10)
    assert measured(RelevanceMass("positive"), values, label).value == pytest.approx(4 / 9)
    assert measured(RelevanceMass("negative"), values, label).value == 1
    assert measured(RelevanceRank(), values, label).value == 1 / 2
    assert measured(TopKIntersection(k=3), values, label).value == pytest.approx(1 / 3)
    assert measured(TopKIntersection(k=0.25), values, label).value == 1
    assert measured(LocalisationAUC(), values, label).value == pytest.approx(2 / 4)
    # the second row is one voxel (1 mm) away
    assert measured(DistanceProfile(), values, label).value == pytest.approx(5 / 10)


@pytest.mark.parametrize("shape", SHAPES)
def test_auc_is_scikit_learns(shape):
    values, label = noise(*shape).round(decimals=1), label_in(shape)  # with ties
    reference = roc_auc_score(label.flatten(), values.abs().sum(0).flatten())
    assert measured(LocalisationAUC(), values, label).value == pytest.approx(reference, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_by_brute_force(shape):
    values, label = noise(*shape), label_in(shape)
    spacing = np.array((1.0, 2.0, 0.5)[: label.ndim])
    everywhere = np.argwhere(np.ones(label.shape)) * spacing
    distance = cdist(everywhere, np.argwhere(label.numpy()) * spacing).min(1)
    weight = values.abs().sum(0).flatten().numpy()
    body = torch.ones(label.shape, dtype=torch.bool)
    body[-1] = False
    result = measured(DistanceProfile(), values, label, body=body)
    assert result.value == pytest.approx((distance * weight).sum() / weight.sum(), rel=1e-12)
    outside = ~body.flatten().numpy()
    expected = {
        "inside": distance == 0,
        "0-5 mm": (distance > 0) & (distance <= 5) & ~outside,
        "5-10 mm": (distance > 5) & (distance <= 10) & ~outside,
        "10-20 mm": (distance > 10) & (distance <= 20) & ~outside,
        "beyond 20 mm": (distance > 20) & ~outside,
        "outside the body": outside,
    }
    profile = {p["shell"]: p for p in result.notes["profile"]}
    assert list(profile) == list(expected)
    for name, inside in expected.items():
        assert profile[name]["voxels"] == inside.sum()
        assert profile[name]["share"] == pytest.approx(weight[inside].sum() / weight.sum(), abs=1e-12)
    assert sum(p["share"] for p in profile.values()) == pytest.approx(1)


def test_ties_give_the_expectation_over_all_orders():
    label = torch.tensor([[True, False, False, True]])
    values = torch.tensor([[[2.0, 1.0, 1.0, 1.0]]])
    # the second of two places goes to one of three equal voxels, one of them in the label
    assert measured(RelevanceRank(), values, label).value == pytest.approx((1 + 1 / 3) / 2)
    assert measured(PointingGame(), torch.ones(1, 1, 4), label).value == 1 / 2


def test_a_hit_within_the_tolerance():
    label = torch.tensor([[True, False, False, False]])
    values = torch.tensor([[[0.0, 0.0, 1.0, 0.0]]])
    assert measured(PointingGame(tolerance_mm=4), values, label).value == 1  # two voxels of 2 mm
    assert measured(PointingGame(tolerance_mm=3.9), values, label).value == 0
    with pytest.raises(MetricError, match="voxel size"):
        PointingGame(tolerance_mm=1).update(MetricInput(values, label=label))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", [c for c in METRICS if c.group == "localisation"])
def test_perfect_beats_constant_and_random_and_zero_never_wins(metric, shape):
    label = label_in(shape)
    image = torch.zeros(shape, dtype=torch.float64)
    maps = {
        "perfect": label.double().expand(shape),
        "random": random_map(image),
        "constant": constant_map(image),
        "zero": image,
    }
    values = {name: measured(metric(), values, label).value for name, values in maps.items()}
    for other in ("random", "constant", "zero"):
        assert better(metric, values["perfect"], values[other]), values
        assert not better(metric, values["zero"], values[other]), values


def test_refusals():
    with pytest.raises(UsageError, match="k=0"):
        TopKIntersection(k=0)
    full = measured(LocalisationAUC(), torch.ones(1, 2, 2), torch.ones(2, 2))
    assert full.value is None
    assert "fills" in full.notes["undefined"]
