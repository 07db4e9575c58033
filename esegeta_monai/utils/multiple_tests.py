"""Permutation p-values, and corrections for testing several regions at once."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from scipy.stats import false_discovery_control

__all__ = [
    "Correction",
    "adjusted",
    "fewest_significant",
    "holm_adjusted",
    "needed_draws",
    "permutation_p",
    "significant",
]

Correction = Literal["BH", "BY"]

ROUNDING = 1e-9
"""Relative rounding error of products of p-values, which must not decide whether a bound is reached."""


def permutation_p(at_least: np.ndarray, draws: int) -> np.ndarray:
    """Return ``p = (1 + at_least)/(draws + 1)``: valid if the observed value and the draws are exchangeable.

    Args:
        at_least: how many draws are at least as extreme as the observed value, 0 to ``draws``, of any shape.
        draws: number of draws, K.

    Returns:
        p in [1/(K + 1), 1], of the shape of ``at_least``.

    >>> permutation_p(np.array([0, 3]), 3).tolist()
    [0.25, 1.0]
    """
    return (1 + at_least) / (draws + 1)


def adjusted(p: np.ndarray, correction: Correction) -> np.ndarray:
    """Return p-values adjusted for n tests: those at most q are significant at a false discovery rate of q.

    Args:
        p: p-values (…, n); each row is a family of n tests.
        correction: ``"BH"``, Benjamini & Hochberg 1995: assumes positive dependence of the tests; ``"BY"``, Benjamini &
            Yekutieli 2001: any dependence, with ``Σ_{i ≤ n} 1/i`` times larger values.

    Returns:
        (…, n), in [0, 1].

    >>> adjusted(np.array([0.01, 0.04, 0.5]), "BH").tolist()
    [0.03, 0.06, 0.5]
    """
    result: np.ndarray = false_discovery_control(p, axis=-1, method="bh" if correction == "BH" else "by")
    return result


def significant(p: np.ndarray, q: float, correction: Correction) -> np.ndarray:
    """Return which of n p-values (…, n) are significant at a false discovery rate of q, 0 to 1: (…, n), bool.

    >>> significant(np.array([0.01, 0.04, 0.5]), 0.05, "BH").tolist()
    [True, False, False]
    """
    return adjusted(p, correction) <= q * (1 + ROUNDING)


def fewest_significant(tests: int, draws: int, q: float, correction: Correction) -> int:
    """Return how many of n tests must have the least p, 1/(K + 1), for any to be significant: ``n c/(q (K + 1))``
    rounded up.

    c is 1 for BH, ``Σ_{i ≤ n} 1/i`` for BY. Above n: no test can be significant.

    Args:
        tests: number of tests, n.
        draws: number of draws, K.
        q: false discovery rate, 0 to 1.
        correction: see `adjusted`.

    >>> fewest_significant(40, 199, 0.05, "BH"), fewest_significant(10, 9, 0.05, "BH")
    (4, 20)
    """
    return max(1, math.ceil(tests * _factor(tests, correction) / (q * (draws + 1)) * (1 - ROUNDING)))


def needed_draws(tests: int, q: float, correction: Correction, alone: bool) -> int:
    """Return the least number of draws with which all n tests together, or one alone, can be significant.

    >>> needed_draws(40, 0.05, "BH", alone=True), needed_draws(40, 0.05, "BH", alone=False)
    (799, 19)
    """
    return math.ceil((tests if alone else 1) * _factor(tests, correction) / q * (1 - ROUNDING)) - 1


def _factor(tests: int, correction: Correction) -> float:
    return 1.0 if correction == "BH" else sum(1 / i for i in range(1, tests + 1))


def holm_adjusted(p: np.ndarray) -> np.ndarray:
    """Return p-values (n,) adjusted by Holm 1979: those at most α are significant, with at most α for any error.

    ``max_{j ≤ i} min(1, (n − j + 1) p_(j))`` over the sorted values; holds for any dependence.

    >>> holm_adjusted(np.array([0.01, 0.04, 0.03])).tolist()
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    steps = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    result = np.empty(len(p))
    result[order] = np.maximum.accumulate(steps)
    return result
