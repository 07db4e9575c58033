"""Concepts that are found, not given: directions of a layer's activations that parts of many cases share.

Parts of each case (supervoxels, boxes) get the mean activation of the layer over the part, through the windows. ACE
(Ghorbani et al. 2019) clusters these; CRAFT (Fel et al. 2023) factorises them into non-negative concepts. Unlike in the
publications, parts are seen in their place in the scan, not cut out and enlarged: a network for volumes would see
cut-outs that it was never trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.concept_parts import weakened_values
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.feature_masks import features_for
from esegeta_monai.engine.layer_regions import PooledActivations, SummedGradients, regions_of
from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.sweep import sweep
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.concept_cases import objectives_of
from esegeta_monai.explain.concept_vectors import concept_vector
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.tcav import scores
from esegeta_monai.methods.perturbation.sensitivity import jansen, quasi_random
from esegeta_monai.targets.base import Target

__all__ = ["CaseUnits", "ConceptEffects", "FoundConcept", "case_units", "concept_effects", "find_concepts"]

Finder = Literal["ACE", "CRAFT"]

SAME = 0.9
"""Cosine from which a concept counts as the same one in another half of the cases."""
FEWEST_CASES = 4


@dataclass(frozen=True)
class CaseUnits:
    """Parts of one case and their activations at one layer.

    Attributes:
        case, layer: their names.
        labels: number of each voxel's part, −1 for none, (*spatial).
        parts: mean of the positive and of the negative part of the activations over each part (R, 2C), at least 0.
        derivatives: derivative of each target along the channels (C,), by target.
    """

    case: str
    layer: str
    labels: Tensor
    parts: np.ndarray
    derivatives: Mapping[str, np.ndarray]

    @property
    def activations(self) -> np.ndarray:
        """Mean activations (R, C)."""
        channels = self.parts.shape[1] // 2
        result: np.ndarray = self.parts[:, :channels] - self.parts[:, channels:]
        return result


@dataclass(frozen=True)
class FoundConcept:
    """A concept of a layer.

    Attributes:
        number: from 0 on, in the order of ``weight``.
        direction: of the activations (C,), of length 1.
        basis: row of the factorisation (C,) or (2C,), see `weakened_values`; of ACE the centre of the cluster.
        strength: of the concept in each part, by case (R,), at least 0.
        weight: its share of the strength of all concepts over all parts, 0 to 1.
        reappears: smallest cosine between the concept and its counterpart among those of either half of the cases.
        named: True if it reappears with a cosine of at least 0.9 in both halves; others may be chance.
        score, mean: share of the cases in which the target rises along the direction, and mean derivative, by target;
            see `esegeta_monai.explain.tcav.ConceptTest`. There is no p-value: the concept was found on these cases.
            Mark it in other cases and test it there.
    """

    number: int
    direction: np.ndarray
    basis: np.ndarray
    strength: Mapping[str, np.ndarray]
    weight: float
    reappears: float
    named: bool
    score: Mapping[str, float]
    mean: Mapping[str, float]

    def row(self) -> dict[str, Any]:
        """Return number, weight and reappearance, JSON-ready."""
        return {"concept": self.number, "weight": self.weight, "reappears": self.reappears, "named": self.named}


@dataclass(frozen=True)
class ConceptEffects:
    """The effect of concepts on one target of one case, at their layer.

    Attributes:
        case, target: their names.
        removal: ``F − F(without concept j)`` (k,), in units of the target.
        sobol: total Sobol index of each concept (k,): its share of the variance of F when all are weakened at random.
        standard_error: of the index (k,).
        passes: window passes.
    """

    case: str
    target: str
    removal: np.ndarray
    sobol: np.ndarray
    standard_error: np.ndarray
    passes: int


def case_units(
    explainer: Explainer,
    image: Tensor,
    case: str,
    targets: Sequence[Target],
    layer: str | None,
    units: Any = "supervoxels(n_segments=100)",
    **inputs: Any,
) -> CaseUnits:
    """Compute the activations of the parts of one case.

    Args:
        explainer: of the network.
        image: (1, C, *spatial).
        case: its name.
        targets: of the prediction; those without a voxel give no derivative.
        layer: dotted name; None: the default layer.
        units: parts, such as ``"supervoxels(n_segments=100)"`` or ``"grid(size=16)"``, see
            `esegeta_monai.engine.feature_masks.features_for`.
        inputs: further arguments of the explainer.

    Raises:
        EsegetaError: the case, the layer or the parts cannot be used.
    """
    settings = explainer.settings
    objective, names = objectives_of(explainer, image, targets, **inputs)
    features = features_for(units).of(objective)
    if len(features.labels) > 1:
        raise UsageError(f"units={units!r}: give parts of all channels together, such as supervoxels or a grid")
    with evaluating(settings.network, settings.device):
        name = check_layer(objective, layer, several=True)
        pooled = PooledActivations(name, regions_of(features.labels[0], len(features)), parts=True)
        values = sweep(objective, [pooled, *([SummedGradients(name)] if names else [])])
    along = values[1].numpy() if names else []
    return CaseUnits(case, name, features.labels[0].cpu(), values[0].numpy(), dict(zip(names, along)))


def find_concepts(
    cases: Sequence[CaseUnits], finder: Finder = "CRAFT", concepts: int = 8, *, seed: int = 0
) -> list[FoundConcept]:
    """Find concepts in the parts of several cases.

    ``"CRAFT"``: ``A ≈ U W`` with U, W ≥ 0 (scikit-learn's NMF); a layer with negative activations is factorised as
    positive and negative parts side by side. ``"ACE"``: k-means of the activations; the direction is the vector of a
    classifier between the parts of the cluster and all others.

    Args:
        cases: of `case_units`, of one layer.
        finder: ``"ACE"`` or ``"CRAFT"``.
        concepts: number of concepts, k.
        seed: of the fit and of the division into halves.

    Returns:
        The concepts, largest weight first.

    Raises:
        InputError: fewer than four cases, or fewer parts in half of them than concepts.
        UsageError: another finder.
    """
    if finder not in ("ACE", "CRAFT"):
        raise UsageError(f"finder={finder!r}: give ACE or CRAFT")
    if len(cases) < FEWEST_CASES:
        raise InputError(
            f"{len(cases)} case(s): concepts are looked for again in either half of the cases; give at least "
            f"{FEWEST_CASES}"
        )
    order = np.random.default_rng(seed).permutation(len(cases))
    halves = [[cases[i] for i in order[h::2]] for h in (0, 1)]
    if min(sum(len(c.parts) for c in half) for half in halves) < max(2, concepts):
        raise InputError(
            f"half of the cases have fewer parts than {concepts} concepts: give more cases, or fewer concepts"
        )
    signed = any(c.parts[:, c.parts.shape[1] // 2 :].any() for c in cases)
    fit = _factorised if finder == "CRAFT" else _clustered
    strength, basis = fit(_rows(cases, finder, signed), concepts, seed)
    middle = 0.0 if finder == "CRAFT" else _rows(cases, finder, signed).mean(0)
    reappears = np.ones(len(basis))
    for half in halves:
        rows = _rows(half, finder, signed)
        other = fit(rows, concepts, seed)[1] - (0.0 if finder == "CRAFT" else rows.mean(0))
        reappears = np.minimum(reappears, _matched(basis - middle, other))
    weight = strength.sum(0) / max(strength.sum(), np.finfo(float).tiny)
    ends = np.cumsum([len(c.parts) for c in cases])[:-1]
    results = []
    for number, j in enumerate(np.argsort(-weight, kind="stable")):
        direction = _direction(cases, basis[j], strength[:, j], finder, signed)
        share, mean = {}, {}
        for target in dict.fromkeys(t for c in cases for t in c.derivatives):
            gradients = np.stack([c.derivatives[target][None] for c in cases if target in c.derivatives])
            (share[target],), (mean[target],) = (v.tolist() for v in scores(gradients, direction[None]))
        by_case = dict(zip([c.case for c in cases], np.split(strength[:, j], ends)))
        named, same = bool(reappears[j] >= SAME), float(reappears[j])
        results.append(FoundConcept(number, direction, basis[j], by_case, float(weight[j]), same, named, share, mean))
    return results


def _rows(cases: Sequence[CaseUnits], finder: Finder, signed: bool) -> np.ndarray:
    """Return the activations of all parts (n, C), or (n, 2C) for a factorisation of values of both signs."""
    if finder == "ACE":
        return np.concatenate([c.activations for c in cases])
    channels = cases[0].parts.shape[1] // 2
    return np.concatenate([c.parts if signed else c.parts[:, :channels] for c in cases])


def _factorised(rows: np.ndarray, concepts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return U (n, k) and W (k, C) with rows of length 1."""
    from sklearn.decomposition import NMF

    largest = float(rows.max(initial=0)) or 1.0
    model = NMF(concepts, init="nndsvda", max_iter=2000, tol=1e-5, random_state=seed)
    strength = model.fit_transform(rows / largest) * largest
    length = np.linalg.norm(model.components_, axis=1)
    return strength * length, model.components_ / np.where(length > 0, length, 1)[:, None]


def _clustered(rows: np.ndarray, concepts: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the strength of clusters in the rows (n, k), and their centres (k, C).

    The strength is 0 outside the cluster, and inside from 1 at the centre to 1/2 at its farthest member.
    """
    from sklearn.cluster import KMeans

    model = KMeans(concepts, n_init=10, random_state=seed).fit(rows)
    member = model.labels_[:, None] == np.arange(concepts)
    distance = np.linalg.norm(rows[:, None] - model.cluster_centers_[None], axis=2)
    farthest = np.where(member, distance, 0).max(0)
    return np.where(member, 1 - distance / np.where(farthest > 0, 2 * farthest, 1), 0), model.cluster_centers_


def _matched(basis: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the cosine of each row (k, C) with its counterpart, by the assignment of the largest sum."""
    from scipy.optimize import linear_sum_assignment

    lengths = np.outer(np.linalg.norm(basis, axis=1), np.linalg.norm(other, axis=1))
    cosine = basis @ other.T / np.where(lengths > 0, lengths, 1)
    rows, columns = linear_sum_assignment(-cosine)
    result = np.empty(len(basis))
    result[rows] = cosine[rows, columns]
    return result


def _direction(
    cases: Sequence[CaseUnits], basis: np.ndarray, strength: np.ndarray, finder: Finder, signed: bool
) -> np.ndarray:
    """Return the direction of a concept (C,) of length 1; zeros if it has none."""
    if finder == "ACE":
        rows = np.concatenate([c.activations for c in cases])
        return concept_vector(rows[strength > 0], rows[strength <= 0])
    channels = cases[0].parts.shape[1] // 2
    direction = basis[:channels] - basis[channels:] if signed else basis
    length = np.linalg.norm(direction)
    return direction / length if length > 0 else direction


def concept_effects(
    explainer: Explainer,
    image: Tensor,
    case: str,
    targets: Sequence[Target],
    layer: str,
    concepts: Sequence[FoundConcept],
    *,
    n_samples: int = 16,
    **inputs: Any,
) -> list[ConceptEffects]:
    """Measure what concepts of a factorisation do to F: each removed, and all made weaker at random (Sobol indices).

    Args:
        explainer: of the network.
        image: (1, C, *spatial).
        case: its name.
        targets: linear targets (``output="logit"``); those without a voxel are left out.
        layer: of the concepts.
        concepts: of `find_concepts` with ``"CRAFT"``.
        n_samples: N, a power of two from 4 on; ``N (k + 1) + k + 2`` passes.
        inputs: further arguments of the explainer.

    Raises:
        MethodError: see `weakened_values`.
    """
    settings, k = explainer.settings, len(concepts)
    if n_samples < 4 or n_samples & (n_samples - 1):
        raise UsageError(f"n_samples={n_samples}: give a power of two: 4, 8, 16, …")
    objective, names = objectives_of(explainer, image, targets, **inputs)
    if not names:
        return []
    basis = torch.from_numpy(np.stack([c.basis for c in concepts]))
    a, b = quasi_random(n_samples, 2 * k, settings.seed).split(k, 1)
    exchanged = torch.where(torch.eye(k, dtype=torch.bool)[:, None], b, a)
    removed = 1 - torch.eye(k, dtype=torch.float64)
    designs = torch.cat([torch.ones(1, k, dtype=torch.float64), removed, a, exchanged.reshape(-1, k)])
    with evaluating(settings.network, settings.device):
        values = weakened_values(objective, layer, basis, designs)
    at_a, at_b = values[:, 1 + k : 1 + k + n_samples], values[:, 1 + k + n_samples :].reshape(len(names), k, n_samples)
    index, error = jansen(at_a, at_b)
    removal = values[:, :1] - values[:, 1 : 1 + k]
    passes = objective.context.progress.passes
    return [
        ConceptEffects(case, name, removal[i].numpy(), index[i].numpy(), error[i].numpy(), passes)
        for i, name in enumerate(names)
    ]
