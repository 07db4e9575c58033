"""Scores of the mean probability of an ensemble, which are not linear in the predictions of its members."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.score import Score

__all__ = ["MembersScore", "mean_probability"]


def mean_probability(
    predictions: Tensor,
    members: int,
    weights: Sequence[float],
    activation: Literal["softmax", "sigmoid"],
    axis: int = 0,
) -> Tensor:
    """Compute ``Σ_k a_k φ(P_k)`` of the members' raw predictions.

    Args:
        predictions: (…, M·K, …), the members one after the other along ``axis``.
        members: M.
        weights: a_k, one per member.
        activation: φ, over the K channels of each member.
        axis: axis of the channels.

    Returns:
        (…, K, …), 0 to 1 for weights that sum to 1.

    >>> mean_probability(torch.zeros(4), 2, [0.5, 0.5], "softmax")
    tensor([0.5000, 0.5000])
    """
    apart = predictions.unflatten(axis, (members, -1))
    probabilities = apart.softmax(axis + 1) if activation == "softmax" else apart.sigmoid()
    share = torch.tensor(list(weights), dtype=predictions.dtype, device=predictions.device)
    return (probabilities * share.reshape(members, *(1,) * (predictions.ndim - axis))).sum(axis)


class MembersScore(Score):
    """``s(Σ_k a_k φ(P_k))``: a score of the mean probability, as a function of the members' predictions.

    The prediction that it reads is (M·K, *spatial): that of each member, one after the other along the channels.

    Args:
        score: s, bound to the mean probability (K, *spatial).
        weights: weight a_k of each member.
        activation: φ.
        n_classes: K.
    """

    linear = False

    def __init__(
        self, score: Score, weights: Sequence[float], activation: Literal["softmax", "sigmoid"], n_classes: int
    ) -> None:
        self.score, self.weights, self.activation = score, list(weights), activation
        self.n_classes = n_classes
        reads = range(n_classes) if activation == "softmax" else score.channels
        self.channels = tuple(m * n_classes + c for m in range(len(self.weights)) for c in reads)
        self._position = list(score.channels) if activation == "softmax" else list(range(len(score.channels)))
        self.label, self.box, self.mask, self.voxels = score.label, score.box, score.mask, score.voxels
        self.additive, self.units = score.additive, score.units
        self.class_index, self.class_name = score.class_index, score.class_name

    @property
    def meaning(self) -> tuple[str, ...]:  # type: ignore[override]  # the base class has a plain attribute
        """Properties that distinguish the score from others of the same mask."""
        return (*getattr(self.score, "meaning", ()), self.activation, *map(str, self.weights))

    def _mean(self, prediction: Tensor, axis: int) -> Tensor:
        """Return the mean probability of the classes that s reads, (…, classes, …), float64.

        As `WeightedScore` does, it uses the log-odds of a class, whose derivative stays exact near 1.
        """
        apart = prediction.double().unflatten(axis, (len(self.weights), -1))
        odds = []
        for c in self._position:
            own = apart.select(axis + 1, c)
            if self.activation == "softmax":
                others = [i for i in range(apart.shape[axis + 1]) if i != c]
                own = own - apart.index_select(axis + 1, torch.tensor(others, device=apart.device)).logsumexp(axis + 1)
            odds.append(own)
        probabilities = torch.nn.functional.logsigmoid(torch.stack(odds, axis + 1)).exp()
        share = torch.tensor(self.weights, dtype=torch.float64, device=apart.device)
        return (probabilities * share.reshape(-1, *(1,) * (prediction.ndim - axis))).sum(axis)

    def value(self, prediction: Tensor) -> Tensor:
        if not self.additive:
            return self.score.value(self._mean(prediction, prediction.ndim - self.mask.ndim - 1))
        return self._sum_of_terms(prediction)

    def terms(self, contrast: Tensor) -> Tensor:
        mean = self._mean(contrast, contrast.ndim - 2)
        return self.score.terms(self.score.contrast(mean))

    def alone(self) -> MembersScore:
        """Return the same score of one member's probability, read from its prediction (K, *spatial)."""
        return MembersScore(self.score, [1.0], self.activation, self.n_classes)

    def __getattr__(self, name: str) -> Any:
        if name in ("output", "reduction", "reference"):  # parameters that records and metrics read
            return getattr(self.__dict__["score"], name)
        raise AttributeError(name)
