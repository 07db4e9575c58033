"""Permutation p-values and the corrections against their definitions, and the false discovery rate by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from esegeta_monai.utils.multiple_tests import (
    adjusted,
    fewest_significant,
    needed_draws,
    permutation_p,
    significant,
)

Q, RUNS, DRAWS, TESTS = 0.1, 1000, 99, 20


def step_up(p: np.ndarray, q: float, factor: float) -> np.ndarray:
    """Benjamini & Hochberg's procedure as the paper states it: the largest k with p_(k) ≤ k q/(n c)."""
    n, order = len(p), np.argsort(p)
    ks = [k for k in range(1, n + 1) if p[order[k - 1]] <= k * q / (n * factor) + 1e-12]
    rejected = np.zeros(n, dtype=bool)
    rejected[order[: max(ks, default=0)]] = True
    return rejected


@pytest.mark.parametrize("correction", ["BH", "BY"])
def test_significance_equals_the_step_up_procedure(correction):
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        factor = 1.0 if correction == "BH" else np.sum(1 / np.arange(1, n + 1))
        for _ in range(50):
            p = permutation_p(rng.integers(0, 20, n) * rng.integers(0, 2, n), 99)
            assert (significant(p, Q, correction) == step_up(p, Q, factor)).all()
            assert (adjusted(p, correction) >= p).all()


@pytest.mark.parametrize(("correction", "draws"), itertools.product(["BH", "BY"], [9, 19, 99, 199, 799]))
def test_fewest_significant_is_the_least_number_of_least_p_values_that_is_rejected(correction, draws):
    n, q = 40, 0.05
    counts = []
    for at_least_p in range(1, n + 1):
        p = np.ones(n)
        p[:at_least_p] = 1 / (draws + 1)
        if significant(p, q, correction).any():
            counts.append(at_least_p)
    rejected = fewest_significant(n, draws, q, correction)
    assert rejected == min(counts) if counts else rejected > n


@pytest.mark.parametrize("correction", ["BH", "BY"])
def test_the_needed_draws_are_enough_and_one_fewer_is_not(correction):
    for n in (1, 3, 40):
        one = needed_draws(n, 0.05, correction, alone=True)
        assert fewest_significant(n, one, 0.05, correction) == 1
        assert fewest_significant(n, one - 1, 0.05, correction) > 1
        all_of_them = needed_draws(n, 0.05, correction, alone=False)
        assert fewest_significant(n, all_of_them, 0.05, correction) <= n
        assert fewest_significant(n, all_of_them - 1, 0.05, correction) > n


def discovery_rates(shared: bool, effects: int, correction: str) -> np.ndarray:
    """The share of false discoveries in each of 1000 runs.

    The score is linear, so the change of a region is its content in a donor minus that in the scan. Shared donors have
    the same content for all regions (one set of donors for all tests), which makes the p-values dependent.
    """
    rng = np.random.default_rng(7)
    donors = rng.normal(size=(RUNS, DRAWS, 1 if shared else TESTS))
    scan = rng.normal(size=(RUNS, TESTS)) + np.where(np.arange(TESTS) < effects, 3.0, 0.0)
    rejected = significant(permutation_p((donors >= scan[:, None]).sum(1), DRAWS), Q, correction)
    return rejected[:, effects:].sum(1) / rejected.sum(1).clip(min=1)


@pytest.mark.parametrize("correction", ["BH", "BY"])
@pytest.mark.parametrize("effects", [0, 6], ids=["null", "mixed"])
@pytest.mark.parametrize("shared", [False, True], ids=["independent", "shared"])
def test_the_false_discovery_rate_is_bounded(shared, effects, correction):
    rates = discovery_rates(shared, effects, correction)
    assert rates.mean() <= Q + 2 * rates.std() / RUNS**0.5
    assert effects == 0 or correction == "BY" or rates.mean() > Q / 4  # the simulation finds something


def test_without_a_correction_the_simulation_exceeds_the_bound():
    """The check can fail: p-values that are not corrected have more false discoveries among null regions."""
    p = permutation_p(np.random.default_rng(7).integers(0, DRAWS + 1, (RUNS, TESTS)), DRAWS)
    assert (p <= Q).any(1).mean() > 2 * Q
