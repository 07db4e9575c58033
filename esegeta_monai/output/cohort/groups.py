"""Permutation tests between two groups of patients, for regions and for voxels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.ndimage import label as components
from scipy.stats import t as student

from esegeta_monai.errors import UsageError
from esegeta_monai.output.cohort.clusters import canonical_order
from esegeta_monai.utils.multiple_tests import Correction, adjusted, permutation_p

__all__ = ["Design", "VoxelCluster", "VoxelTest", "cluster_mass", "max_t", "two_groups"]

CHUNK = 20_000
"""Voxels per product with the permutations."""
FORMING = 0.001
"""Two-sided p of the t that forms clusters of voxels."""
RELATIVE = 1e-9
"""Relative tolerance of equal statistics: sums in another order differ by rounding."""

VoxelMethod = Literal["max-t", "cluster-mass"]


@dataclass(frozen=True)
class Design:
    """Two groups of patients and their permutations.

    Attributes:
        second: True for patients of the second group (n,).
        sites: site of each patient; patients are permuted within sites.
        order: canonical order of the patients; the permutations are of this order.
        draws: permutations (K, n), bool, in the canonical order.
        distinct: number of different permutations.
    """

    second: np.ndarray
    sites: np.ndarray
    order: list[int]
    draws: np.ndarray
    distinct: float

    @classmethod
    def of(
        cls, features: np.ndarray, second: Sequence[bool], sites: Sequence[str] | None, permutations: int, seed: int = 0
    ) -> Design:
        """Return the design of patients.

        Args:
            features: what makes a patient recognisable without a name (n, …): order and file names do not matter.
            second: True for the second group (n,).
            sites: site of each patient; None: one site.
            permutations: number of permutations, K.
            seed: of the permutations.

        Raises:
            UsageError: a group has fewer than two patients, or within the sites nothing can be permuted.
        """
        group = np.asarray(second, dtype=bool)
        site = np.unique(["" if s is None else str(s) for s in (sites or [""] * len(group))], return_inverse=True)[1]
        if min(int(group.sum()), int((~group).sum())) < 2:
            raise UsageError("a test between two groups needs at least two patients in each group")
        plain = np.concatenate([features.reshape(len(group), -1), group[:, None], site.reshape(-1, 1)], 1)
        order = canonical_order(plain)
        distinct = math.prod(math.comb(int((site == s).sum()), int(group[site == s].sum())) for s in set(site.tolist()))
        if distinct < 2:
            raise UsageError("every site has patients of one group only, so nothing can be permuted within the sites")
        random = np.random.default_rng(seed)
        sorted_group, sorted_site = group[order], site[order]
        draws = np.tile(sorted_group, (permutations, 1))
        for s in sorted(set(site.tolist())):
            members = np.flatnonzero(sorted_site == s)
            draws[:, members] = random.permuted(draws[:, members], axis=1)
        return cls(group, site, order, draws, float(distinct))

    @property
    def least_p(self) -> float:
        """Least p that this number of permutations, and of different ones, can give."""
        sizes = [(int(self.second[self.sites == s].sum()), int((self.sites == s).sum())) for s in set(self.sites)]
        mirrored = 2 if all(2 * a == n for a, n in sizes) else 1  # swapping the groups gives the same |t|
        return max(1 / (len(self.draws) + 1), mirrored / self.distinct)

    def statistics(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return t of each column, observed (V,) and of the permutations (K, V).

        t is the difference second − first of the means, in units of its pooled standard error, after the mean of each
        site has been subtracted. Columns that do not vary have t = 0.

        Args:
            values: (n, V), in the order of `second`.
        """
        x = np.asarray(values, dtype=np.float64)[self.order]
        site = self.sites[self.order]
        scale = np.abs(x).max(0)
        for s in set(site.tolist()):
            x[site == s] -= x[site == s].mean(0)
        total = (x**2).sum(0)
        constant = total <= len(x) * (1e-12 * scale) ** 2
        groups = np.concatenate([self.second[self.order][None], self.draws]).astype(np.float64)
        n, m = len(x), groups[0].sum()
        sums = groups @ x
        whole = x.sum(0)
        difference = sums / m - (whole - sums) / (n - m)
        rest = total - sums**2 / m - (whole - sums) ** 2 / (n - m)
        rest = np.maximum(rest, 1e-12 * np.where(constant, 1.0, total))
        t = np.where(constant, 0.0, difference / np.sqrt(rest / (n - 2) * (1 / m + 1 / (n - m))))
        return t[0], t[1:]

    @property
    def forming(self) -> float:
        """|t| at which voxels form clusters."""
        return float(student.ppf(1 - FORMING / 2, len(self.second) - 2))


@dataclass(frozen=True)
class RegionTest:
    """Tests of several regions.

    Attributes:
        t: statistic per region (R,).
        p: permutation p-values, not adjusted (R,).
        p_adjusted: of the family: by the maximum over regions, or by the false discovery rate (R,).
        difference: mean of the second group minus that of the first (R,).
    """

    t: np.ndarray
    p: np.ndarray
    p_adjusted: np.ndarray
    difference: np.ndarray


def two_groups(values: np.ndarray, design: Design, correction: Literal["max"] | Correction = "max") -> RegionTest:
    """Test regions between two groups; two-sided.

    Args:
        values: one row per patient, one column per region (n, R).
        design: groups and permutations.
        correction: ``"max"``: family-wise error by the largest |t| over regions (Westfall & Young 1993); ``"BH"`` or
            ``"BY"``: false discovery rate.

    >>> x = np.array([[0.0, 1.0], [0.1, 2.0], [0.2, 3.0], [5.0, 1.5], [5.1, 2.5], [5.2, 3.5]])
    >>> design = Design.of(x, [False] * 3 + [True] * 3, None, 999)
    >>> result = two_groups(x, design)
    >>> bool(abs(result.p[0] - 0.1) < 0.03), bool(result.p[1] > 0.5), design.least_p
    (True, True, 0.1)
    """
    t, drawn = design.statistics(values)
    draws = len(drawn)
    bound = np.abs(t) * (1 - RELATIVE)
    p = permutation_p((np.abs(drawn) >= bound).sum(0), draws)
    if correction == "max":
        p_adjusted = permutation_p((np.abs(drawn).max(1)[:, None] >= bound).sum(0), draws)
    else:
        p_adjusted = adjusted(p, correction)
    difference = values[design.second].mean(0) - values[~design.second].mean(0)
    return RegionTest(t, p, p_adjusted, difference)


@dataclass(frozen=True)
class VoxelCluster:
    """A cluster of voxels, or with max-t the voxels that are significant.

    Attributes:
        voxels: how many.
        peak: voxel of the largest |t|.
        t: there.
        p: family-wise p-value of the cluster; with max-t, of the peak.
    """

    voxels: int
    peak: tuple[int, ...]
    t: float
    p: float


@dataclass(frozen=True)
class VoxelTest:
    """A test of voxels.

    Attributes:
        t: (x, y, z), 0 where nothing is tested.
        p: family-wise p (x, y, z), 1 where nothing is tested; with cluster mass that of the voxel's cluster.
        tested: number of voxels.
        clusters: significant or not, by p.
    """

    t: np.ndarray
    p: np.ndarray
    tested: int
    clusters: list[VoxelCluster] = field(default_factory=list)


def max_t(maps: np.ndarray, tested: np.ndarray, design: Design, level: float) -> VoxelTest:
    """Test voxels between two groups by the largest |t| over all voxels.

    Args:
        maps: (n, x, y, z).
        tested: voxels that every case covers, bool (x, y, z).
        design: groups and permutations.
        level: p of the clusters that are listed: connected voxels with p ≤ level.
    """
    columns = maps[:, tested]
    largest, t = np.zeros(len(design.draws)), np.zeros(columns.shape[1])
    for start in range(0, columns.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        t[part], drawn = design.statistics(columns[:, part])
        np.maximum(largest, np.abs(drawn).max(1), out=largest)
    p = np.ones(tested.shape)
    ranked = np.sort(largest)
    at_least = len(ranked) - np.searchsorted(ranked, np.abs(t) * (1 - RELATIVE), side="left")
    p[tested] = permutation_p(at_least, len(ranked))
    whole = np.zeros(tested.shape)
    whole[tested] = t
    clusters = [
        VoxelCluster(int(inside.sum()), peak, float(whole[peak]), float(p[peak]))
        for inside, peak, _ in _clusters(whole, p <= level)
    ]
    return VoxelTest(whole, p, int(tested.sum()), sorted(clusters, key=lambda c: (c.p, -c.voxels)))


def cluster_mass(maps: np.ndarray, tested: np.ndarray, design: Design) -> VoxelTest:
    """Test clusters of voxels between two groups by their mass, the sum of |t| of voxels with p < 0.001.

    The cluster is significant, not its voxels (Bullmore et al. 1999).

    Args:
        maps: (n, x, y, z).
        tested: voxels that every case covers, bool (x, y, z).
        design: groups and permutations.
    """
    columns, limit, largest = maps[:, tested], design.forming, np.zeros(len(design.draws))
    block = max(1, int(4e6) // max(1, columns.shape[1]))
    whole = np.zeros(tested.shape)
    for start in range(0, len(design.draws), block):
        some = Design(design.second, design.sites, design.order, design.draws[start : start + block], design.distinct)
        observed, drawn = some.statistics(columns)
        whole[tested] = observed
        for k, row in enumerate(drawn):
            if (np.abs(row) > limit).any():
                image = np.zeros(tested.shape)
                image[tested] = row
                largest[start + k] = _largest_mass(image, np.abs(image) > limit)
    p, clusters = np.ones(tested.shape), []
    for inside, peak, mass in _clusters(whole, np.abs(whole) > limit):
        value = float(permutation_p(np.asarray((largest >= mass * (1 - RELATIVE)).sum()), len(largest)))
        p[inside] = value
        clusters.append(VoxelCluster(int(inside.sum()), peak, float(whole[peak]), value))
    return VoxelTest(whole, p, int(tested.sum()), sorted(clusters, key=lambda c: (c.p, -c.voxels)))


def _clusters(t: np.ndarray, above: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[int, ...], float]]:
    """Yield voxels, peak and mass of the connected parts (by faces) with one sign."""
    for sign in (1, -1):
        labels, n = components(above & (sign * t > 0))
        for k in range(1, n + 1):
            inside = labels == k
            strength = np.where(inside, np.abs(t), 0.0)
            peak = tuple(int(i) for i in np.unravel_index(int(strength.argmax()), t.shape))
            yield inside, peak, float(strength.sum())


def _largest_mass(t: np.ndarray, above: np.ndarray) -> float:
    """Return the largest mass of the parts that `_clusters` yields."""
    masses = [0.0]
    for sign in (1, -1):
        labels, _ = components(above & (sign * t > 0))
        masses.append(float(np.bincount(labels.ravel(), weights=np.abs(t).ravel())[1:].max(initial=0.0)))
    return max(masses)
