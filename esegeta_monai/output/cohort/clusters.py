"""Spectral clustering of maps (SpRAy), similarity, embedding, outliers, and clusters against other variables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.fft import rfftn
from scipy.spatial.distance import cdist
from scipy.stats import chi2_contingency, kruskal
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from esegeta_monai.utils.multiple_tests import permutation_p

__all__ = [
    "Association",
    "Clusters",
    "associations",
    "canonical_order",
    "cluster_maps",
    "embedding",
    "outlier_scores",
    "similarity",
]

NEIGHBOURS = 10
LEAST_CASES = 30
"""Cases below which maps are embedded and not clustered."""
MOST_CLUSTERS = 10
COPIES = 200
RESAMPLES = 50
LEVEL = 0.05
FAR = 3.5
"""Modified z-score above which a case is an outlier (Iglewicz & Hoaglin 1993)."""


@dataclass(frozen=True)
class Clusters:
    """The result of `cluster_maps`.

    Attributes:
        labels: cluster of each case, from 1 in the order of size (n,); None: no clusters.
        reason: why there are none; empty if there are.
        gaps: ``λ_{k+1} − λ_k`` for k = 1, 2, ….
        null: 95th percentile of the gaps of phase-randomised copies, for the same k.
        p: for each k ≥ 2, share of copies whose largest gap over all k ≥ 2 is at least the gap after k.
        stability: mean adjusted Rand index between the clusters and those of bootstrap samples.
    """

    labels: np.ndarray | None
    reason: str
    gaps: list[float] = field(default_factory=list)
    null: list[float] = field(default_factory=list)
    p: list[float] = field(default_factory=list)
    stability: float | None = None

    @property
    def number(self) -> int:
        """Number of clusters; 0 if there are none."""
        return 0 if self.labels is None else int(self.labels.max())


def canonical_order(features: np.ndarray) -> list[int]:
    """Return an order of cases that depends on their maps only, not on names or on the order of files.

    Args:
        features: one row per case (n, …).
    """
    rows = np.ascontiguousarray(features, dtype=np.float64)
    return sorted(range(len(rows)), key=lambda i: hashlib.sha256((rows[i] + 0.0).tobytes()).hexdigest())


def similarity(maps: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of maps: (n, …) to (n, n), in [−1, 1]; 0 with a zero map.

    >>> similarity(np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])).tolist()
    [[1.0, 0.0, -1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 1.0]]
    """
    rows = maps.reshape(len(maps), -1)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.where(length > 0, length, 1)
    result: np.ndarray = np.clip(1 - cdist(rows, rows, "sqeuclidean") / 2, -1, 1)
    zero = (length == 0).ravel()
    result[zero] = result[:, zero] = 0.0
    return result + 0.0


def affinity(maps: np.ndarray) -> np.ndarray:
    """Return the symmetric nearest-neighbour graph of maps: (n, …) to (n, n), 1 for mutual neighbours, else ½ or 0.

    Equally distant neighbours all count, so that the order of cases does not matter.
    """
    rows = maps.reshape(len(maps), -1)
    return _neighbours(cdist(rows, rows))


def _neighbours(distance: np.ndarray) -> np.ndarray:
    """Return the graph of `affinity` from distances (n, n)."""
    np.fill_diagonal(distance, np.inf)
    k = min(NEIGHBOURS, len(distance) - 1)
    limit = np.partition(distance, k - 1, axis=1)[:, k - 1 : k]
    near = (distance <= limit).astype(np.float64)
    result: np.ndarray = (near + near.T) / 2
    return result


def spectrum(graph: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues, ascending (n,), and eigenvectors (n, n) of the normalised Laplacian ``I − D^−½ A D^−½``."""
    degree = np.sqrt(graph.sum(1))
    values, vectors = np.linalg.eigh(np.eye(len(graph)) - graph / degree[:, None] / degree[None])
    return values, vectors


def amplitudes(maps: np.ndarray) -> np.ndarray:
    """Return the amplitudes of the spatial frequencies of maps (n, x, y, z), of the half that a real transform has.

    They are scaled so that their squares add up to the sum of the squared values.
    """
    last = maps.shape[-1]
    weight = np.full(last // 2 + 1, 2.0)  # the other half has the same amplitudes
    weight[0] = 1.0
    if last % 2 == 0:
        weight[-1] = 1.0
    result: np.ndarray = np.abs(rfftn(maps, axes=(1, 2, 3))) * np.sqrt(weight / np.prod(maps.shape[1:]))
    return result


def phase_randomised(maps: np.ndarray, amplitude: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return maps with the same amplitudes of all spatial frequencies and random phases.

    Args:
        maps: (n, x, y, z).
        amplitude: from `amplitudes`.
        random: source of the phases.

    Returns:
        Coefficients (n, m), real: rows have the distances of the randomised maps, since the Fourier transform keeps
        distances.
    """
    noise = rfftn(random.standard_normal(maps.shape), axes=(1, 2, 3))  # of real noise, so that the copy is real
    spectra = noise * (amplitude / np.maximum(np.abs(noise), 1e-300))
    rows = spectra.reshape(len(maps), -1)
    return np.concatenate([rows.real, rows.imag], 1)


def cluster_maps(
    maps: np.ndarray, *, seed: int = 0, copies: int = COPIES, resamples: int = RESAMPLES, level: float = LEVEL
) -> Clusters:
    """Cluster maps by spectral relevance analysis (SpRAy, Lapuschkin et al. 2019).

    There are clusters if the largest gap of the Laplacian's eigenvalues is not the first one, and a gap after k ≥ 2 is
    larger than those of copies with random phases. The number of clusters is the smallest such k.

    Args:
        maps: maps divided by ``Σ |a|``, summed over cells (n, x, y, z).
        seed: of the copies, the k-means and the bootstrap; the order of cases does not matter.
        copies: number of phase-randomised copies.
        resamples: number of bootstrap samples.
        level: largest p of the gap.
    """
    n = len(maps)
    if n < LEAST_CASES:
        return Clusters(None, f"fewer than {LEAST_CASES} cases ({n}): the embedding is shown, and no clusters")
    order = canonical_order(maps)
    rows = maps[order]
    rows = rows / np.maximum(np.abs(rows).sum(tuple(range(1, rows.ndim)), keepdims=True), 1e-300)
    values, vectors = spectrum(affinity(rows))
    gaps = np.diff(values)[:MOST_CLUSTERS]
    random, amplitude = np.random.default_rng(seed), amplitudes(rows)
    null = np.stack([_gaps_of_copy(rows, amplitude, random) for _ in range(copies)])
    p = permutation_p((null[:, 1:].max(1)[:, None] >= gaps[None, 1:]).sum(0), copies)
    figures = {"gaps": gaps.tolist(), "null": np.quantile(null, 0.95, axis=0).tolist(), "p": p.tolist()}
    if not (p <= level).any():
        return Clusters(None, "no gap of the eigenvalues is larger than those of maps with random phases", **figures)
    if int(gaps.argmax()) == 0:
        return Clusters(None, "the largest gap of the eigenvalues is the first one: the maps are one group", **figures)
    k = int(np.flatnonzero(p <= level)[0]) + 2
    labels = _numbered(_k_means(vectors, k))
    agreement = []
    for _ in range(resamples):
        drawn = np.unique(random.integers(0, n, n))
        again = _k_means(spectrum(affinity(rows[drawn]))[1], k, starts=3)
        agreement.append(float(adjusted_rand_score(labels[drawn], again)))
    back = np.empty(n, dtype=np.int64)
    back[order] = labels
    return Clusters(back, "", **figures, stability=float(np.mean(agreement)))


def _gaps_of_copy(rows: np.ndarray, amplitude: np.ndarray, random: np.random.Generator) -> np.ndarray:
    copy = phase_randomised(rows, amplitude, random)
    products = copy @ copy.T
    square = np.diag(products)
    graph = _neighbours(square[:, None] + square[None] - 2 * products)  # squares have the same neighbours
    result: np.ndarray = np.diff(spectrum(graph)[0])[:MOST_CLUSTERS]
    return result


def _k_means(vectors: np.ndarray, k: int, starts: int = 20) -> np.ndarray:
    rows = vectors[:, :k]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    labels: np.ndarray = KMeans(k, n_init=starts, random_state=0).fit_predict(rows)
    return labels


def _numbered(labels: np.ndarray) -> np.ndarray:
    """Number clusters from 1 in the order of size, equal ones by their first case (n,)."""
    names, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    ranked = sorted(range(len(names)), key=lambda i: (-sizes[i], first[i]))
    new = {int(names[i]): rank for rank, i in enumerate(ranked, 1)}
    return np.array([new[int(label)] for label in labels])


def embedding(maps: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Return principal coordinates of maps in two dimensions (n, 2), and their shares of the variance.

    Args:
        maps: (n, …), at least one.
    """
    order = canonical_order(maps)
    rows = maps.reshape(len(maps), -1)[order]
    rows = rows - rows.mean(0)
    u, s, _ = np.linalg.svd(rows, full_matrices=False)
    points = np.zeros((len(maps), 2))
    m = min(2, s.size)
    points[:, :m] = u[:, :m] * s[:m]
    for axis in range(2):  # a sign that does not depend on the library
        points[:, axis] *= np.sign(points[np.abs(points[:, axis]).argmax(), axis]) or 1.0
    total = float((s**2).sum())
    shares = [float(v) ** 2 / total if total > 0 else 0.0 for v in s[:2]] + [0.0, 0.0]
    back = np.empty_like(points)
    back[order] = points
    return back, (shares[0], shares[1])


def outlier_scores(maps: np.ndarray) -> np.ndarray:
    """Return how far each map is from its nearest neighbours, as a modified z-score: (n, …) to (n,).

    ``0.6745 (d − median)/MAD`` of the mean distance d to the 10 nearest maps; above `FAR` the case is an outlier. Zeros
    with fewer than four cases, or if most distances are equal.
    """
    n = len(maps)
    if n < 4:
        return np.zeros(n)
    rows = maps.reshape(n, -1)
    distance = np.sort(cdist(rows, rows), axis=1)[:, 1 : min(NEIGHBOURS, max(2, (n - 1) // 2)) + 1].mean(1)
    centre = np.median(distance)
    spread = np.median(np.abs(distance - centre))
    result: np.ndarray = 0.6745 * (distance - centre) / spread if spread > 0 else np.zeros(n)
    return result


@dataclass(frozen=True)
class Association:
    """A variable beside the clusters.

    Attributes:
        variable: its name.
        kind: ``"number"`` (Kruskal-Wallis test) or ``"category"`` (chi-squared test).
        strength: η² of ranks or Cramér's V, 0 to 1; None if it cannot be computed.
        p: p-value, one per variable, not adjusted; None if it cannot be computed.
        by_cluster: median or counts in each cluster, as text.
    """

    variable: str
    kind: str
    strength: float | None
    p: float | None
    by_cluster: list[str]


def associations(labels: np.ndarray, variables: Mapping[str, Sequence[Any]]) -> list[Association]:
    """Compare clusters with variables of the cases, such as the scanner, the spacing or the size of the target.

    Args:
        labels: clusters from 1 (n,).
        variables: values by name, one per case; None: unknown.
    """
    results = []
    clusters = sorted(set(labels.tolist()))
    for name, values in variables.items():
        known = [(c, v) for c, v in zip(labels.tolist(), values) if v is not None and v != ""]
        groups = [[v for c, v in known if c == cluster] for cluster in clusters]
        numeric = bool(known) and all(isinstance(v, (int, float)) for _, v in known)
        distinct = {v for _, v in known}
        strength, p = None, None
        if len(distinct) > 1 and all(groups):
            if numeric:
                test = kruskal(*groups)
                free = len(known) - len(groups)
                p = float(test.pvalue)
                strength = None if free < 1 else float(np.clip((test.statistic - len(groups) + 1) / free, 0, 1))
            else:
                table = np.array([[g.count(v) for v in sorted(distinct, key=str)] for g in groups])
                test = chi2_contingency(table, correction=False)
                p = float(test.pvalue)
                strength = float(np.sqrt(test.statistic / (table.sum() * (min(table.shape) - 1))))
        texts = []
        for group in groups:
            if numeric:
                texts.append(f"{float(np.median(group)):.4g}" if group else "–")
            else:
                counts = {v: group.count(v) for v in sorted(set(group), key=str)}
                texts.append(", ".join(f"{v}: {m}" for v, m in counts.items()) or "–")
        results.append(Association(name, "number" if numeric else "category", strength, p, texts))
    return results
