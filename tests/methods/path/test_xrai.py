"""XRAI: the ranking against a naive one, and a planted cause."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import XRAI, IntegratedGradients
from esegeta_monai.methods.path.xrai import rank_regions
from esegeta_monai.targets import ClassScore
from tests.support.networks import Computed
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close


def naive(attribution: np.ndarray, labels: np.ndarray) -> np.ndarray:
    regions = [row == n for row in labels for n in np.unique(row)]
    joined, result = np.zeros(attribution.shape, bool), np.zeros(attribution.shape)
    while not joined.all():
        new = [r & ~joined for r in regions]
        means = [attribution[r].mean() if r.any() else -np.inf for r in new]
        best = int(np.argmax(means))
        result[new[best]] = means[best]
        joined |= new[best]
    return result


@pytest.mark.parametrize("shape", [(9, 8), (5, 6, 4)])
def test_ranking_equals_the_naive_one(shape):
    rng = np.random.default_rng(0)
    attribution = rng.normal(size=shape)
    labels = np.stack([rng.integers(0, n, shape) for n in (3, 7, 12)])
    result = rank_regions(attribution, labels)
    np.testing.assert_allclose(result, naive(attribution, labels), rtol=1e-10)


def brightness(x: Tensor) -> Tensor:
    """Class 1: how much lies above a half."""
    return torch.stack([torch.zeros(len(x)).to(x), torch.relu(x - 0.5).flatten(1).sum(1)], 1)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_planted_cause_is_found_as_a_region(dims):
    torch.manual_seed(0)
    image = 0.2 + 0.05 * torch.rand(1, *[16] * dims, dtype=DOUBLE)
    lesion = (slice(None), *(slice(5, 10),) * dims)
    image[lesion] += 0.7
    objective = objective_of(Computed(brightness), image, [ClassScore(1)])
    result = explain(XRAI(n_segments=(8, 60), n_steps=16), objective)
    inside = torch.zeros_like(image, dtype=torch.bool)
    inside[lesion] = True
    top = result.maps[0].flatten().topk(int(inside.sum())).indices
    assert float(inside.flatten()[top].double().mean()) > 0.9
    assert len(result.note(0)["supervoxels"]) == 2
    given = explain(XRAI(n_segments=(8, 60), method=IntegratedGradients("zero", n_steps=4)), objective)
    values = explain(IntegratedGradients("zero", n_steps=4), objective).maps
    close(given.maps.sum(), values.sum())  # means of regions that tile the image


def test_bad_parameters():
    with pytest.raises(UsageError, match="n_segments"):
        XRAI(n_segments=())
    with pytest.raises(UsageError, match="no input map"):
        XRAI(method="GradCam")
