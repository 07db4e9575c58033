"""Concept activation vectors (Kim et al. 2018): a linear classifier between activations with and without a concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from esegeta_monai.errors import InputError

__all__ = ["ConceptExamples", "concept_vector", "held_out_accuracy", "stability"]

FOLDS, RESAMPLINGS = 5, 10
FEWEST_CASES = 4
"""Fewest cases with a concept: two for each half, so that the accuracy on held-out cases means anything at all."""


@dataclass(frozen=True)
class ConceptExamples:
    """Pooled activations of a layer with a concept and without it, and the same for random concepts.

    Attributes:
        name: name of the concept.
        layer: dotted name.
        positives: (n, C).
        negatives: (m, C).
        positive_cases, negative_cases: name of the case of each row.
        random_positives: (K, n, C): those of K random concepts.
        random_negatives: (K, m, C); None: ``negatives`` for all.
    """

    name: str
    layer: str
    positives: np.ndarray
    negatives: np.ndarray
    positive_cases: Sequence[str]
    negative_cases: Sequence[str]
    random_positives: np.ndarray
    random_negatives: np.ndarray | None = None

    def __post_init__(self) -> None:
        cases = len(set(self.positive_cases))
        if cases < FEWEST_CASES or len(set(self.negative_cases)) < FEWEST_CASES:
            raise InputError(
                f"concept {self.name!r} is in {cases} case(s), and {len(set(self.negative_cases))} have examples "
                f"without it: give at least {FEWEST_CASES} of each, since its classifier is evaluated on held-out cases"
            )

    def random_vectors(self) -> np.ndarray:
        """Return the vectors of the random concepts, (K, C)."""
        without = self.negatives if self.random_negatives is None else self.random_negatives
        return concept_vector(self.random_positives, without)


def concept_vector(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """Return the concept activation vector: the unit normal of a linear classifier, towards the concept.

    Ridge classifier (penalty 1) on activations divided by one common scale, both classes with equal weight. The common
    scale leaves directions as they are; the vector does not change when the layer is multiplied by a number.

    Args:
        positives: activations with the concept (n, C), or (K, n, C) for K concepts.
        negatives: activations without it (m, C), or (K, m, C).

    Returns:
        (C,) or (K, C), of length 1; zeros if all activations are equal.

    >>> concept_vector(np.array([[2.0, 0.0], [3.0, 1.0]]), np.array([[0.0, 0.0], [1.0, 1.0]])).round(3).tolist()
    [0.937, -0.349]
    """
    weights = _classifier(positives, negatives)[0]
    length = np.linalg.norm(weights, axis=-1, keepdims=True)
    return weights / np.where(length > 0, length, 1)


def _classifier(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return weights (…, C) and intercept (…) of the classifier, in units of the activations.

    It is `sklearn.linear_model.RidgeClassifier(class_weight="balanced")`, whose input checks take far longer than its
    solution for the few rows and hundreds of random concepts here.
    """
    negatives = np.broadcast_to(negatives, (*positives.shape[:-2], *negatives.shape[-2:]))
    both = np.concatenate([positives, negatives], -2)
    n, m, channels = positives.shape[-2], negatives.shape[-2], both.shape[-1]
    centre = both.mean(-2, keepdims=True)
    scale = np.sqrt(((both - centre) ** 2).mean((-2, -1), keepdims=True))
    alike = scale <= 1e-12 * np.abs(both).max((-2, -1), keepdims=True, initial=0)
    scaled = np.where(alike, 0, (both - centre) / np.where(alike, 1, scale))
    weight = np.concatenate([np.full(n, (n + m) / (2 * n)), np.full(m, (n + m) / (2 * m))])[:, None]
    middle = (weight * scaled).mean(-2, keepdims=True)
    scaled, sign = scaled - middle, np.where(np.arange(n + m) < n, 1.0, -1.0)[:, None]
    transposed = np.swapaxes(weight * scaled, -1, -2)
    weights = np.linalg.solve(transposed @ scaled + np.eye(channels), transposed @ sign)[..., 0]
    weights = weights / np.where(alike, 1, scale)[..., 0]
    at = (centre + middle * np.where(alike, 1, scale))[..., 0, :]
    return weights, -(weights * at).sum(-1)


def held_out_accuracy(examples: ConceptExamples, seed: int) -> float:
    """Return the balanced accuracy of the concept's classifier on cases that it was not fitted on.

    All rows of a case are in the same fold; five folds, or one for each two cases.

    Args:
        examples: of the concept.
        seed: of the division into folds.

    Returns:
        Mean of the share of correct positives and of correct negatives, 0 to 1; 0.5 is chance.
    """
    rng = np.random.default_rng(seed)
    with_it = rng.permutation(sorted(set(examples.positive_cases)))
    others = rng.permutation(sorted(set(examples.negative_cases) - set(examples.positive_cases)))
    folds = min(FOLDS, len(with_it) // 2)
    fold_of = {str(case): i % folds for i, case in enumerate([*with_it, *others])}
    of_positives = np.array([fold_of[c] for c in examples.positive_cases])
    of_negatives = np.array([fold_of[c] for c in examples.negative_cases])
    right_positives, right_negatives = [], []
    for fold in range(folds):
        train = examples.positives[of_positives != fold], examples.negatives[of_negatives != fold]
        weights, intercept = _classifier(*train)
        right_positives += (examples.positives[of_positives == fold] @ weights + intercept > 0).tolist()
        right_negatives += (examples.negatives[of_negatives == fold] @ weights + intercept <= 0).tolist()
    return float((np.mean(right_positives) + np.mean(right_negatives)) / 2)


def stability(examples: ConceptExamples, seed: int) -> float:
    """Return the mean cosine between the vectors of 10 resamplings of the cases (with replacement), −1 to 1.

    Args:
        examples: of the concept.
        seed: of the resamplings.
    """
    rng = np.random.default_rng(seed)
    vectors = []
    for _ in range(RESAMPLINGS):
        rows = [_resampled(cases, rng) for cases in (examples.positive_cases, examples.negative_cases)]
        vectors.append(concept_vector(examples.positives[rows[0]], examples.negatives[rows[1]]))
    cosines = np.stack(vectors) @ np.stack(vectors).T
    return float(cosines[np.triu_indices(RESAMPLINGS, 1)].mean())


def _resampled(cases: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Draw as many cases as there are, with replacement; return the rows of all of them."""
    names = np.array(cases)
    drawn = rng.choice(np.unique(names), len(np.unique(names)))
    return np.concatenate([np.flatnonzero(names == case) for case in drawn])
