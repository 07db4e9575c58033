"""Salient relevance: the saliency by loops over patches, and where it must be high."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import LRP, SalientRelevance
from esegeta_monai.methods.relevance.salient import context_saliency
from esegeta_monai.targets import ClassScore
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import noise


def naive(
    values: np.ndarray, grid: tuple[int, ...], sizes: list[float], k: int, c: float, threshold: float
) -> np.ndarray:
    """The definition, patch by patch."""
    shape, places = values.shape, list(itertools.product(*map(range, grid)))
    centres = [[(i + 0.5) * n / g for i, n, g in zip(p, shape, grid)] for p in places]
    total = np.zeros(len(places))
    for size in sizes:

        def patch(centre: list[float], size: float = size) -> np.ndarray:
            axes = [
                [int(min(max(x + o * size * n / g / 3, 0), n - 1e-9)) for o in (-1, 0, 1)]
                for x, n, g in zip(centre, shape, grid)
            ]
            return values[np.ix_(*axes)].ravel()

        patches = [patch(x) for x in centres]
        for i, p in enumerate(patches):
            distances = sorted(
                np.abs(p - q).mean() / (1 + c * math.dist(centres[i], centres[j]) / max(shape))
                for j, q in enumerate(patches)
                if j != i
            )
            total[i] += 1 - math.exp(-np.mean(distances[:k]))
    saliency = total / len(sizes)
    foci = [x for x, s in zip(centres, saliency) if s >= threshold * saliency.max()]
    near = [min(math.dist(x, f) for f in foci) / max(shape) for x in centres]
    return (saliency * np.clip(1 - np.array(near), 0, None)).reshape(grid)


@pytest.mark.parametrize(("shape", "grid"), [((11, 8), (5, 4)), ((6, 7, 5), (3, 3, 2))])
def test_equals_the_definition(shape, grid):
    values = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = context_saliency(values, grid, [1.0, 2.0], 5, 3.0, 0.8)
    np.testing.assert_allclose(result.numpy(), naive(values.numpy(), grid, [1.0, 2.0], 5, 3.0, 0.8), rtol=1e-10)


def test_what_stands_out_is_salient_and_not_what_repeats():
    values = torch.zeros(24, 24, dtype=torch.float64)
    values[:, :12:4] = 0.7  # stripes, which repeat
    values[8:12, 18:22] = 1.0
    saliency = context_saliency(values, (24, 24), [1.0], 32, 3.0, 0.8)
    assert float(saliency.max()) > 0.01
    assert float(saliency[8:12, 18:22].amax()) == float(saliency.max())
    assert float(saliency[:, :12].max()) < 0.5 * float(saliency.max())


@pytest.mark.parametrize("dims", [2, 3])
def test_of_the_relevance_of_a_network(dims):
    network, image = plain(dims)
    o = objective_of(network, image[0], [ClassScore(1), ClassScore(2)])
    maps = explain(SalientRelevance(neighbours=8), o).maps
    relevance = explain(LRP(), o).maps.sum(1)
    for k in range(2):
        scaled = (relevance[k] - relevance[k].min()) / (relevance[k].max() - relevance[k].min())
        expected = naive(scaled.numpy(), tuple(scaled.shape), [1.0, 2.0], 8, 3.0, 0.8)
        np.testing.assert_allclose(maps[k, 0].numpy(), expected, rtol=1e-9, atol=1e-12 * expected.max())
    assert (SalientRelevance().needs_linear, SalientRelevance("Saliency").needs_linear) == (True, False)


def test_a_coarser_grid_is_interpolated():
    network, _ = plain(2)
    o = objective_of(network, noise(2, 6, 6), [ClassScore(1)])
    explained = explain(SalientRelevance(max_patches=9), o)
    assert (explained.notes["patches"], explained.maps.shape) == (9, (1, 1, 6, 6))


@pytest.mark.parametrize("bad", [{"method": "GradCam"}, {"neighbours": 0}, {"sizes": ()}, {"threshold": 0.0}])
def test_bad_parameters(bad):
    with pytest.raises(UsageError):
        SalientRelevance(**bad)
