"""Permutation tests: against SciPy and enumeration, with their error rates and the planted place."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import ttest_ind

from esegeta_monai.errors import UsageError
from esegeta_monai.output.cohort.groups import Design, cluster_mass, max_t, two_groups
from esegeta_monai.utils.multiple_tests import adjusted

HALF = [False] * 10 + [True] * 10


def test_t_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=(20, 6))
    values[:, 3] = 0.1  # does not vary
    second = np.array([False] * 8 + [True] * 12)
    design = Design.of(values, second.tolist(), None, 50)
    result = two_groups(values, design)
    varies = [0, 1, 2, 4, 5]
    peer = ttest_ind(values[second][:, varies], values[~second][:, varies]).statistic
    np.testing.assert_allclose(result.t[varies], peer, atol=1e-10)
    assert result.p[3] == result.p_adjusted[3] == 1
    np.testing.assert_allclose(result.difference, values[second].mean(0) - values[~second].mean(0), atol=1e-12)


def test_p_values_are_those_of_all_permutations():
    """Every split of 4 against 4: the sampled p is near the exact one; the adjusted one uses the largest |t|."""
    values = np.random.default_rng(3).normal(size=(8, 3))
    values[4:, 1] += 1.5
    second = np.array([False] * 4 + [True] * 4)
    exact = []
    for chosen in itertools.combinations(range(8), 4):
        drawn = np.isin(np.arange(8), chosen)
        exact.append(np.abs(ttest_ind(values[drawn], values[~drawn]).statistic))
    observed = np.abs(ttest_ind(values[second], values[~second]).statistic)
    exact = np.array(exact)
    design = Design.of(values, second.tolist(), None, 20_000)
    result = two_groups(values, design)
    np.testing.assert_allclose(result.p, (exact >= observed * (1 - 1e-9)).mean(0), atol=0.012)
    np.testing.assert_allclose(result.p_adjusted, (exact.max(1)[:, None] >= observed * (1 - 1e-9)).mean(0), atol=0.012)
    assert design.distinct == 70
    assert design.least_p == pytest.approx(2 / 70)
    np.testing.assert_allclose(two_groups(values, design, "BH").p_adjusted, adjusted(result.p, "BH"))


def test_the_order_of_patients_does_not_matter():
    values = np.random.default_rng(1).normal(size=(20, 4))
    order = np.random.default_rng(2).permutation(20)
    sites = ["a", "b"] * 10
    one = two_groups(values, Design.of(values, HALF, sites, 200))
    second, site = [HALF[i] for i in order], [sites[i] for i in order]
    two = two_groups(values[order], Design.of(values[order], second, site, 200))
    np.testing.assert_array_equal(one.t, two.t)
    np.testing.assert_array_equal(one.p_adjusted, two.p_adjusted)


def test_a_site_is_no_difference_between_groups():
    """Most of group two is of site b, whose values are larger: within sites nothing differs."""
    random = np.random.default_rng(0)
    sites = ["a"] * 8 + ["b"] * 2 + ["a"] * 2 + ["b"] * 8
    values = random.normal(size=(20, 3)) + 5 * (np.array(sites) == "b")[:, None]
    assert two_groups(values, Design.of(values, HALF, None, 499)).p_adjusted.max() < 0.05
    assert two_groups(values, Design.of(values, HALF, sites, 499)).p_adjusted.min() > 0.05


def test_groups_that_are_the_sites_are_refused():
    values = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(UsageError, match="patients of one group only"):
        Design.of(values, HALF, ["a"] * 10 + ["b"] * 10, 99)
    with pytest.raises(UsageError, match="at least two patients"):
        Design.of(values[:3], [False, False, True], None, 99)


@pytest.mark.parametrize("correction", ["max", "BH", "BY"])
def test_random_halves_differ_in_at_most_alpha(correction):
    """200 random halves of 20 patients, 12 dependent regions: any finding in at most α + 2 standard errors."""
    random = np.random.default_rng(11)
    hits = 0
    for run in range(200):
        values = random.normal(size=(20, 12)) + random.normal(size=(20, 1))
        second = (random.permutation(20) < 10).tolist()
        hits += bool(
            (two_groups(values, Design.of(values, second, None, 199, seed=run), correction).p_adjusted <= 0.05).any()
        )
    assert hits / 200 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_without_adjustment_random_halves_differ_too_often():
    """The same check fails for p-values that are not adjusted."""
    random = np.random.default_rng(11)
    hits = 0
    for run in range(60):
        values = random.normal(size=(20, 12))
        second = (random.permutation(20) < 10).tolist()
        hits += bool((two_groups(values, Design.of(values, second, None, 199, seed=run)).p <= 0.05).any())
    assert hits / 60 > 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


@pytest.mark.parametrize("shape", [(9, 8, 7), (16, 15, 1)])
@pytest.mark.parametrize("method", ["max-t", "cluster-mass"])
def test_the_planted_place_is_significant_and_nothing_else(shape, method):
    random = np.random.default_rng(4)
    maps = random.normal(size=(20, *shape))
    planted = np.zeros(shape, dtype=bool)
    planted[1:4, 2:5, 0 : min(3, shape[2])] = True
    maps[10:, planted] += 3
    tested = np.ones(shape, dtype=bool)
    design = Design.of(maps.reshape(20, -1), HALF, None, 199)
    test = max_t(maps, tested, design, 0.05) if method == "max-t" else cluster_mass(maps, tested, design)
    significant = test.p <= 0.05
    assert (significant & planted).sum() > 0.8 * planted.sum()
    assert (significant & ~planted).sum() <= 2
    assert planted[test.clusters[0].peak]
    assert test.clusters[0].t > 0
    peer = ttest_ind(maps[10:], maps[:10]).statistic
    np.testing.assert_allclose(test.t, peer, atol=1e-8)


@pytest.mark.parametrize("method", ["max-t", "cluster-mass"])
def test_random_halves_of_smooth_maps_differ_in_at_most_alpha(method):
    from scipy.ndimage import gaussian_filter

    random = np.random.default_rng(6)
    maps = np.stack([gaussian_filter(random.normal(size=(8, 8, 6)), 1) for _ in range(20)])
    tested, hits, runs = np.ones(maps.shape[1:], dtype=bool), 0, 100
    for run in range(runs):
        second = (random.permutation(20) < 10).tolist()
        design = Design.of(maps.reshape(20, -1), second, None, 99, seed=run)
        test = max_t(maps, tested, design, 0.05) if method == "max-t" else cluster_mass(maps, tested, design)
        hits += bool((test.p <= 0.05).any())
    assert hits / runs <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / runs)
