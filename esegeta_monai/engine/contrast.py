"""The difference of the scores of several classes under one mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from esegeta_monai.engine.score import Score, WeightedScore
from esegeta_monai.errors import TargetError

__all__ = ["ContrastScore"]


class ContrastScore(Score):
    """``s(P) = s_c(P) − γ · mean_d s_d(P)``: the score of a class minus that of other classes under the same mask.

    It is linear if the scores are. Maps that are linear in the score are therefore differences of maps: the map of c
    minus γ times the mean of the maps of the classes d.

    Args:
        score: the score ``s_c``.
        others: the classes d, by channel.
        n_classes: number of channels K of the prediction.
        weight: γ.
        label: name of the target in files and pictures.

    Raises:
        TargetError: no other class.
    """

    def __init__(
        self, score: WeightedScore, others: Sequence[int], n_classes: int, *, weight: float, label: str
    ) -> None:
        if not others:
            raise TargetError(f"{label}: there is no other class to compare with")
        self.parts = [score, *(score.altered(n_classes, class_index=d) for d in others)]
        self.weights = [1.0, *[-weight / len(others)] * len(others)]
        self.channels = tuple(sorted({c for part in self.parts for c in part.channels}))
        self._positions = [[self.channels.index(c) for c in part.channels] for part in self.parts]
        self.box, self.mask, self.voxels = score.box, score.mask, score.voxels
        self.linear = all(part.linear for part in self.parts)
        self.additive = all(part.additive for part in self.parts)
        self.label, self.class_index, self.class_name = label, score.class_index, score.class_name
        self.units = f"difference of {score.units}"
        self.meaning = (*score.meaning, "contrast", str(weight), *map(str, others))

    @property
    def shown(self) -> Tensor:
        return self.parts[0].shown

    def value(self, prediction: Tensor) -> Tensor:
        if not self.additive:
            lead = prediction.ndim - self.mask.ndim - 1
            read = (prediction.index_select(lead, torch.tensor(at).to(prediction.device)) for at in self._positions)
            each = [w * part.value(p) for w, part, p in zip(self.weights, self.parts, read)]
            return torch.stack(each).sum(0)
        return self._sum_of_terms(prediction)

    def contrast(self, voxels: Tensor) -> Tensor:
        """Reduce the channels (..., channels, n) of a linear score to their weighted sum (..., 1, n)."""
        if not (self.linear and self.additive):
            return voxels
        weights = voxels.new_tensor(self._channel_weights())
        return torch.einsum("c,...cn->...n", weights, voxels).unsqueeze(-2)

    def terms(self, contrast: Tensor) -> Tensor:
        first = self.parts[0]
        if self.linear:
            terms = contrast.double()[..., 0, :] - first.reference * sum(self.weights)
            return terms / self.voxels if first.reduction == "mean" and self.voxels else terms
        each = [part.terms(part.contrast(contrast[..., at, :])) for part, at in zip(self.parts, self._positions)]
        return sum((w * e for w, e in zip(self.weights, each)), torch.zeros_like(each[0]))

    def cotangent(self, prediction: Tensor) -> Tensor:
        if not self.linear:
            return super().cotangent(prediction)
        if not self.additive:
            total = torch.zeros_like(prediction)
            for w, part, at in zip(self.weights, self.parts, self._positions):
                total[at] += w * part.cotangent(prediction[at])
            return total
        mask = self.mask.to(prediction.device, prediction.dtype)
        weights = prediction.new_tensor(self._channel_weights()).reshape(-1, *[1] * mask.ndim)
        return weights * (mask / self.voxels if self.parts[0].reduction == "mean" and self.voxels else mask)

    def _channel_weights(self) -> list[float]:
        weights = [0.0] * len(self.channels)
        for weight, (position,) in zip(self.weights, self._positions):
            weights[position] += weight
        return weights
