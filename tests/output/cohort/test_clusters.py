"""Clusters, similarity, embedding and outliers of maps with a known structure."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import kneighbors_graph

from esegeta_monai.output.cohort.cells import Cells, cells_for, pooled
from esegeta_monai.output.cohort.clusters import (
    affinity,
    amplitudes,
    associations,
    cluster_maps,
    embedding,
    outlier_scores,
    phase_randomised,
    similarity,
    spectrum,
)
from esegeta_monai.output.cohort.maps import Volume


def planted(n=40, shape=(10, 12, 8), second=True, seed=0):
    """Maps of noise with a box near the middle, at a random place; every other one has a box in a corner instead."""
    random = np.random.default_rng(seed)
    maps = random.normal(size=(n, *shape)) * 0.02
    for k in range(n):
        corner = second and k % 2
        start = [0 if corner or s == 1 else s // 2 - 2 + random.integers(0, 3) for s in shape]
        maps[k][tuple(slice(a, a + 3) for a in start)] += 1
    return maps / np.abs(maps).sum((1, 2, 3), keepdims=True)


@pytest.mark.parametrize("shape", [(10, 12, 8), (16, 16, 1)])
def test_the_planted_cluster_is_the_one_that_is_returned(shape):
    result = cluster_maps(planted(shape=shape), copies=60, resamples=5)
    truth = np.arange(40) % 2
    assert result.labels is not None
    corner = result.labels[1]
    assert ((result.labels == corner) == truth.astype(bool)).all()
    assert result.p[0] <= 0.05


def test_maps_of_one_kind_are_no_clusters():
    result = cluster_maps(planted(second=False), copies=60, resamples=5)
    assert result.labels is None
    assert "gap" in result.reason


def test_fewer_than_thirty_cases_are_not_clustered():
    result = cluster_maps(planted(29))
    assert result.labels is None
    assert "fewer than 30 cases (29)" in result.reason


def test_the_order_of_cases_does_not_matter():
    maps = planted(36)
    order = np.random.default_rng(5).permutation(36)
    one = cluster_maps(maps, copies=20, resamples=5)
    two = cluster_maps(maps[order], copies=20, resamples=5)
    assert one.labels is not None
    assert two.labels is not None
    np.testing.assert_array_equal(one.labels[order], two.labels)
    assert (one.gaps, one.p, one.stability) == (two.gaps, two.p, two.stability)
    np.testing.assert_allclose(embedding(maps)[0][order], embedding(maps[order])[0], atol=1e-12)


def test_the_graph_is_that_of_scikit_learn():
    rows = np.random.default_rng(0).normal(size=(35, 50))
    peer = kneighbors_graph(rows, 10, include_self=False).toarray()
    np.testing.assert_array_equal(affinity(rows), (peer + peer.T) / 2)


def test_the_laplacian_has_a_zero_for_each_part():
    graph = np.kron(np.eye(3), np.ones((4, 4))) - np.eye(12)
    values, _ = spectrum(graph)
    np.testing.assert_allclose(values[:3], 0, atol=1e-12)
    assert values[3] > 0.5


@pytest.mark.parametrize("shape", [(6, 5, 8), (6, 5, 7), (6, 8, 1)])
def test_copies_have_the_distances_of_maps_with_random_phases(shape):
    """Rows of coefficients against the inverse transform of the same phases."""
    maps = np.random.default_rng(1).normal(size=(4, *shape))
    rows = phase_randomised(maps, amplitudes(maps), np.random.default_rng(7))
    noise = np.fft.fftn(np.random.default_rng(7).standard_normal(maps.shape), axes=(1, 2, 3))
    copies = np.fft.ifftn(np.abs(np.fft.fftn(maps, axes=(1, 2, 3))) * noise / np.abs(noise), axes=(1, 2, 3))
    assert np.abs(copies.imag).max() < 1e-12
    flat = copies.real.reshape(4, -1)
    np.testing.assert_allclose(rows @ rows.T, flat @ flat.T, atol=1e-10)
    np.testing.assert_allclose((rows**2).sum(1), (maps**2).sum((1, 2, 3)), rtol=1e-10)


def test_similarity_is_the_cosine():
    maps = np.random.default_rng(0).normal(size=(5, 3, 4, 2))
    maps[4] = 0
    rows = maps[:4].reshape(4, -1)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(similarity(maps)[:4, :4], unit @ unit.T, atol=1e-12)
    assert not similarity(maps)[4].any()


def test_one_far_map_is_an_outlier():
    maps = np.random.default_rng(0).normal(size=(20, 4, 4, 4)) * 0.01 + 1
    maps[3] = 0
    scores = outlier_scores(maps)
    assert np.flatnonzero(scores > 3.5).tolist() == [3]
    assert not outlier_scores(maps[:3]).any()


def test_clusters_against_variables():
    labels = np.array([1] * 10 + [2] * 10)
    random = np.random.default_rng(0)
    variables = {
        "scanner": ["A"] * 10 + ["B"] * 10,
        "age": random.normal(size=20).tolist(),
        "spacing": [1.0] * 10 + [2.0] * 10,
        "constant": [1.0] * 20,
    }
    scanner, age, spacing, constant = associations(labels, variables)
    assert scanner.strength == pytest.approx(1)
    assert scanner.by_cluster == ["A: 10", "B: 10"]
    assert spacing.p is not None
    assert spacing.p < 1e-4
    assert age.p is not None
    assert age.p > 0.01
    assert constant.p is None


# -- cells -------------------------------------------------------------------------------------------------------------


def test_cells_add_up_and_do_not_see_how_the_axes_are_stored():
    """The same map with other voxel axes has the same cells; nothing is lost."""
    values = np.random.default_rng(0).normal(size=(12, 9, 7))
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[:3, 3] = [-11, 5, 8]
    turned = values.transpose(1, 2, 0)[:, ::-1]
    other = np.eye(4)
    other[:3, 0], other[:3, 1], other[:3, 2] = affine[:3, 1], -affine[:3, 2], affine[:3, 0]
    other[:3, 3] = affine[:3, 3] + affine[:3, 2] * 6
    one, two = Volume(values, affine), Volume(turned, other)
    cells = cells_for([one])
    assert cells == cells_for([two])
    assert max(cells.shape) <= 20
    centre = affine[:3, :3] @ ((np.array(values.shape) - 1) / 2) + affine[:3, 3]
    a, b = pooled(one.values, affine, centre, cells), pooled(two.values, other, centre, cells)
    np.testing.assert_allclose(a, b, atol=1e-12)
    assert a.sum() == pytest.approx(values.sum())


def test_cells_by_hand():
    values = np.arange(16.0).reshape(4, 4, 1)
    cells = Cells((2, 2, 1), 2.0)
    result = pooled(values, np.eye(4), np.array([1.5, 1.5, 0.0]), cells)
    np.testing.assert_array_equal(
        result[..., 0], [[0 + 1 + 4 + 5, 2 + 3 + 6 + 7], [8 + 9 + 12 + 13, 10 + 11 + 14 + 15]]
    )
