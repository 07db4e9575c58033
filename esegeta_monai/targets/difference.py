"""The difference of a target's score between two networks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from esegeta_monai.engine.contrast import ContrastScore
from esegeta_monai.engine.score import Case, Score, WeightedScore
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import TARGETS, Target

__all__ = ["Difference"]


class Difference(Target):
    """The score of a first network minus that of a second one: ``s(P_a) − s(P_b)``, both under the mask that the first
    network's prediction P_a freezes; for an `esegeta_monai.explain.NetworkPair`.

    Raw outputs only, in which s is linear. Maps of methods that are linear in the score are differences of the maps of
    the two networks. Methods of layers and methods that propagate positive signals only are refused.

    Args:
        target: an instance, a config or text, such as ``"MultiClassMask(1)"``. A target with several scores, such as
            `PredictedClasses`, gives one difference for each.

    Raises:
        UsageError: ``target`` is no target.

    >>> import torch
    >>> pair = torch.tensor([[[0.0, 3.0]], [[1.0, 2.0]], [[0.0, 0.0]], [[0.5, 4.0]]])  # (2 networks x 2 classes, 1, 2)
    >>> score = Difference("MultiClassMask(1)").bind(pair, Case(networks=2))[0]  # one voxel: 1.0 and 0.5
    >>> float(score.value(score.crop(pair)))
    0.5
    """

    target: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target: Target = TARGETS.create(self.target)
        if self.target.layer is not None:
            raise TargetError(
                "Difference compares predictions, and a layer belongs to one network: give another target"
            )

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score per score of ``target``; ``prediction`` is (2 K, *spatial), or (2 K,).

        Raises:
            TargetError: the network is no pair, or ``target`` is not the score of a class in the raw output.
        """
        if case.networks != 2:
            raise TargetError(
                "Difference compares two networks, and one is explained: explain "
                "esegeta_monai.explain.NetworkPair(first, second)"
            )
        return [self._difference(s, prediction.shape[0] // 2) for s in self.target.bind(first_of(prediction), case)]

    def _difference(self, score: Score, channels: int) -> Score:
        if score.empty:
            return score
        if not isinstance(score, WeightedScore) or score.output != "logit" or not score.linear:
            raise TargetError(
                f"Difference needs the raw output of one class or channel, and {score.label} is another score: use "
                "output='logit'"
            )
        (channel,) = score.channels
        label = self.given_name or f"{score.label}-difference"
        result = ContrastScore(score, [channel + channels], 2 * channels, weight=1.0, label=label)
        if score.complement:  # the evidence for the class is minus the output
            result.weights = [-1.0, 1.0]
        result.meaning = (*score.meaning, "difference of networks")
        return result


def first_of(prediction: Tensor) -> Tensor:
    """Return the first network's prediction (K, …) of a pair's (2 K, …)."""
    return prediction[: prediction.shape[0] // 2]
