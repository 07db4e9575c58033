"""Testing with concept activation vectors (TCAV, Kim et al. 2018) over cases, against random concepts.

The unit is the case. A concept's vector v comes from activations pooled over its masks; the derivative of F along v,
summed over the mask, is taken at each explained case. The null hypothesis is that the concept's place means nothing:
random concepts are masks of the same size and shape at random places of the body, in the same cases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from esegeta_monai.errors import UsageError
from esegeta_monai.explain.concept_cases import CaseActivations
from esegeta_monai.explain.concept_vectors import ConceptExamples, concept_vector, held_out_accuracy, stability
from esegeta_monai.utils.multiple_tests import holm_adjusted, permutation_p

__all__ = [
    "ConceptTest",
    "Statistic",
    "Where",
    "examples_of_cases",
    "examples_of_masks",
    "needed_random_concepts",
    "tcav",
]

Statistic = Literal["share", "mean"]
Where = Literal["mask", "everywhere"]

ACCURACY = 0.7
"""Accuracy on held-out cases below which a concept's score is not interpreted."""
FEWEST_RANDOM = 100
ROUNDING = 1e-6
"""Derivatives below this share of the lengths of gradient and vector count as 0: rounding of float32."""


@dataclass(frozen=True)
class ConceptTest:
    """The test of one concept at one layer for one target.

    Attributes:
        concept, layer, target: their names.
        concept_cases: number of cases with the concept.
        explained_cases: number of cases with the target, and the concept if ``where`` is ``"mask"``.
        score: share of the explained cases in which F rises along the concept's vector, 0 to 1; a derivative of 0
            counts one half.
        mean: mean derivative of F along the vector of length 1, in units of the target per unit of activation.
        p_share: ``(1 + #{|score_r − ½| ≥ |score − ½|})/(K + 1)`` over the K random concepts.
        p_mean: ``(1 + #{|mean_r| ≥ |mean|})/(K + 1)``.
        p_holm: the p-value of the chosen statistic, adjusted by Holm over all tests of the run.
        statistic: the chosen one, ``"share"`` or ``"mean"``.
        where: positions at which the vector is added: ``"mask"``, the concept's, or ``"everywhere"``.
        random_concepts: K.
        random_extreme: share of the random concepts with a score of 0 or 1; above α, no score can be significant.
        accuracy: of the concept's classifier on held-out cases, balanced, 0 to 1.
        stability: mean cosine of the vectors of 10 resamplings.
        verdict: ``"significant"``, ``"not significant"``, or ``"not interpreted"`` (accuracy below 0.7).
        vector: the concept's vector (C,).
    """

    concept: str
    layer: str
    target: str
    concept_cases: int
    explained_cases: int
    score: float
    mean: float
    p_share: float
    p_mean: float
    p_holm: float
    statistic: Statistic
    where: Where
    random_concepts: int
    random_extreme: float
    accuracy: float
    stability: float
    verdict: str
    vector: np.ndarray

    def row(self) -> dict[str, Any]:
        """Return all entries but the vector, JSON-ready."""
        return {key: value for key, value in vars(self).items() if key != "vector"}


def examples_of_masks(cases: Sequence[CaseActivations], concept: str, random_concepts: int) -> ConceptExamples:
    """Collect the examples of a concept that is given by masks, all of one layer.

    Args:
        cases: of `case_activations`.
        concept: its name.
        random_concepts: K; further random masks of each case are the examples without the concept.

    Raises:
        InputError: fewer than four cases have the concept.
    """
    shown = [c for c in cases if concept in c.pooled]
    width = len(cases[0].whole) if cases else 0
    empty = np.zeros((0, width))
    without = [c.random[concept][random_concepts:] for c in shown]
    return ConceptExamples(
        concept,
        cases[0].layer if cases else "",
        np.stack([c.pooled[concept] for c in shown]) if shown else empty,
        np.concatenate(without) if shown else empty,
        [c.case for c in shown],
        [c.case for c, rows in zip(shown, without) for _ in rows],
        np.stack([c.random[concept][:random_concepts] for c in shown], 1) if shown else np.zeros((0, 0, width)),
    )


def examples_of_cases(
    cases: Sequence[CaseActivations], concept: str, with_it: Sequence[str], random_concepts: int, seed: int
) -> ConceptExamples:
    """Collect the examples of a concept that whole cases show, all of one layer: activations over the body.

    A random concept is as many cases, drawn from all of them.

    Args:
        cases: of `case_activations`, with the concept and without it.
        concept: its name.
        with_it: names of the cases with the concept.
        random_concepts: K.
        seed: of the draws.

    Raises:
        InputError: fewer than four cases have the concept, or fewer than four do not.
    """
    ordered = [c for c in cases if c.case in with_it] + [c for c in cases if c.case not in with_it]
    n = sum(c.case in with_it for c in cases)
    rows = np.stack([c.whole for c in ordered])
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.permutation(len(rows)) for _ in range(random_concepts)])
    names = [c.case for c in ordered]
    positives, negatives = rows[drawn[:, :n]], rows[drawn[:, n:]]
    return ConceptExamples(concept, cases[0].layer, rows[:n], rows[n:], names[:n], names[n:], positives, negatives)


def needed_random_concepts(tests: int, alpha: float) -> int:
    """Return the least number of random concepts: K + 1 ≥ tests/α, and at least 100.

    >>> needed_random_concepts(12, 0.05), needed_random_concepts(1, 0.05)
    (239, 100)
    """
    return max(FEWEST_RANDOM, math.ceil(tests / alpha * (1 - 1e-9)) - 1)


def tcav(
    concepts: Sequence[ConceptExamples],
    cases: Sequence[CaseActivations],
    *,
    alpha: float = 0.05,
    statistic: Statistic = "share",
    where: Where = "mask",
    seed: int = 0,
) -> list[ConceptTest]:
    """Test concepts at their layers for all targets of the cases.

    The derivative is that of F when the concept's vector is added to the layer's output within the concept's mask
    (random concepts: within theirs), or everywhere, as in the publication. Concepts given by whole cases have no mask:
    theirs is always taken everywhere.

    The two statistics answer different questions: ``"share"`` (Kim et al. 2018), whether F rises in more, or fewer,
    cases than along a random concept's vector; ``"mean"``, whether it changes more. Where the gradient is nearly the
    same in all cases, as at the last layers of a classifier, random concepts have scores of 0 and 1 too: then
    only ``"mean"`` can find anything (see `ConceptTest.random_extreme`). Choose before looking.

    Args:
        concepts: of `examples_of_masks` or `examples_of_cases`, one for each concept and layer.
        cases: explained cases, of all layers.
        alpha: level of the family of all tests, by Holm.
        statistic: ``"share"`` or ``"mean"``.
        where: ``"mask"`` or ``"everywhere"``.
        seed: of folds and resamplings.

    Raises:
        UsageError: no case has a target, or there are too few random concepts for this number of tests.
    """
    rows: list[dict[str, Any]] = []
    for examples in concepts:
        here = [c for c in cases if c.layer == examples.layer]
        targets = list(dict.fromkeys(name for c in here for name in c.derivatives))
        vector, random = concept_vector(examples.positives, examples.negatives), examples.random_vectors()
        quality = held_out_accuracy(examples, seed), stability(examples, seed)
        for target in targets:
            vectors = np.concatenate([vector[None], random])
            local = [c.local[examples.name] for c in here if examples.name in c.local]
            at_mask = where == "mask" and bool(local)
            if at_mask:
                gradients = [g[target][: len(vectors)] for g in local if target in g]
            else:
                gradients = [c.derivatives[target][None] for c in here if target in c.derivatives]
            if gradients:
                row = _tested(examples, target, np.stack(gradients), vectors, quality)
                rows.append({**row, "where": "mask" if at_mask else "everywhere"})
    if not rows:
        raise UsageError("no case has a voxel of the target, so there is no derivative: give other cases or targets")
    counts = {row["random_concepts"] for row in rows}
    needed = needed_random_concepts(len(rows), alpha)
    if min(counts) < needed:
        raise UsageError(
            f"{len(rows)} tests at the level {alpha:g} need {needed} random concepts, and there are {min(counts)}: "
            "give more of them, or fewer concepts, layers and targets"
        )
    adjusted = holm_adjusted(np.array([row[f"p_{statistic}"] for row in rows]))
    results = []
    for row, p in zip(rows, adjusted):
        verdict = "significant" if p <= alpha * (1 + 1e-9) else "not significant"
        verdict = verdict if row["accuracy"] >= ACCURACY else "not interpreted"
        results.append(ConceptTest(p_holm=float(p), statistic=statistic, verdict=verdict, **row))
    return results


def _tested(
    examples: ConceptExamples,
    target: str,
    gradients: np.ndarray,
    vectors: np.ndarray,
    quality: tuple[float, float],
) -> dict[str, Any]:
    """Return the row of one test from gradients (cases, 1 or 1 + K, C) and vectors (1 + K, C): the concept's first."""
    shares, means = scores(gradients, vectors)
    far = np.abs(shares - 0.5)
    k = len(vectors) - 1
    extreme = int((far[1:] >= far[0] - 1e-12).sum())
    larger = int((np.abs(means[1:]) >= abs(means[0]) * (1 - 1e-9)).sum())
    p_share, p_mean = permutation_p(np.array([extreme, larger]), k).tolist()
    return {
        "concept": examples.name,
        "layer": examples.layer,
        "target": target,
        "concept_cases": len(set(examples.positive_cases)),
        "explained_cases": len(gradients),
        "score": float(shares[0]),
        "mean": float(means[0]),
        "p_share": p_share,
        "p_mean": p_mean,
        "random_concepts": k,
        "random_extreme": float((far[1:] >= 0.5 - 1e-12).mean()),
        "accuracy": quality[0],
        "stability": quality[1],
        "vector": vectors[0],
    }


def scores(gradients: np.ndarray, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each vector the share of cases with a positive derivative, and the mean derivative.

    Args:
        gradients: derivative of F along each channel (cases, n, C), or (cases, 1, C) for the same at all vectors.
        vectors: (n, C).

    Returns:
        (n,) and (n,); a derivative that is 0 to rounding counts one half of a case.

    >>> scores(np.array([[[1.0, 0.0]], [[2.0, 0.0]]]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    (array([1. , 0.5]), array([1.5, 0. ]))
    """
    along = (gradients * vectors).sum(-1)
    lengths = np.linalg.norm(gradients, axis=-1) * np.linalg.norm(vectors, axis=-1)
    zero = np.abs(along) <= ROUNDING * lengths
    return np.where(zero, 0.5, along > 0).mean(0), np.where(zero, 0, along).mean(0)


def table_rows(tests: Sequence[ConceptTest]) -> list[Mapping[str, Any]]:
    """Return the rows of a table, most significant first."""
    return [t.row() for t in sorted(tests, key=lambda t: (t.p_holm, -abs(t.score - 0.5), -abs(t.mean)))]
