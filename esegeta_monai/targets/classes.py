"""Targets that are a class of the prediction: a class score, the voxels of a class, the voxels above a threshold."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from esegeta_monai.engine.score import Activation, Case, Output, Reduction, Score, WeightedScore
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import Target, masked_score, need_map, resolve_class

__all__ = ["ClassScore", "MultiClassMask", "PredictedClasses", "ThresholdMask"]


class ClassScore(Target):
    """The score of a class of a classification network: ``s(P) = φ(P)(c)``.

    Args:
        class_index: a number, a name of metadata.json, or ``"predicted"``: the class of the greatest output.
        output: ``"logit"``, ``"probability"`` or ``"log_probability"``.
        activation: see `Target`.
        top_k: with ``"predicted"``, one score for each of the k greatest outputs.

    >>> score = ClassScore("predicted").bind(torch.tensor([0.5, 2.0]), Case())[0]
    >>> score.class_index, float(score.value(torch.tensor([2.0])))
    (1, 2.0)
    """

    class_index: int | str = "predicted"
    output: Output = "logit"
    activation: Activation = "auto"
    top_k: int = 1

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """One score per requested class.

        Raises:
            TargetError: the prediction has voxels, or lacks the class.
        """
        if prediction.ndim > 1 and prediction[0].numel() != 1:
            raise TargetError(
                f"ClassScore is for networks that give one number a class, but the prediction has voxels "
                f"{tuple(prediction.shape[1:])}: use MultiClassMask, ThresholdMask or Voxel"
            )
        n_classes = prediction.shape[0]
        if self.class_index == "predicted":
            if not 1 <= self.top_k <= n_classes:
                raise TargetError(f"top_k={self.top_k}: the network has {n_classes} output(s)")
            wanted: list[int | str] = prediction.flatten().topk(self.top_k).indices.tolist()
        else:
            wanted = [self.class_index]
        mask = torch.ones(prediction.shape[1:], dtype=torch.bool, device=prediction.device)
        return [masked_score(self, mask, which, prediction, case) for which in wanted]


class MultiClassMask(Target):
    """The voxels of a predicted class: ``s(P) = Σ_v m(v) φ(P)(c, v)``, ``m(v) = [argmax_k P(k, v) = c]``.

    The mask is frozen from the unperturbed prediction. A network of one channel is cut at probability 0.5 (logit 0)
    instead of by argmax. TorchEsegeta calls this target ``multi_class``.

    Args:
        class_index: a number or a name of metadata.json.
        output, activation, reduction: see `Target`.

    >>> prediction = torch.tensor([[[0.0, 3.0]], [[1.0, 2.0]]])  # 2 classes, a 1x2 image
    >>> MultiClassMask(1).bind(prediction, Case())[0].voxels
    1
    """

    class_index: int | str
    output: Output = "logit"
    activation: Activation = "auto"
    reduction: Reduction = "sum"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """One score.

        Raises:
            TargetError: the network has no such class, or classifies whole images.
        """
        need_map(prediction, self)
        index, _ = resolve_class(self.class_index, prediction.shape[0], case.class_names)
        return [masked_score(self, class_mask(prediction, index, self.activation), index, prediction, case)]


class ThresholdMask(Target):
    """The voxels above (or below) a threshold: ``s(P) = Σ_v m(v) φ(P)(c, v)``, ``m(v) = [value(P)(c, v) > t]``.

    The sum is over outputs under the frozen mask, not a count of voxels, whose gradient would be zero.
    TorchEsegeta calls this target ``threshold_based``.

    Args:
        threshold: a number in the units of ``value``, or ``"otsu"`` (Otsu 1979, on that channel's values).
        channel: the output channel, by number or name.
        above: True for the voxels above the threshold, False for those at or below it.
        value: the compared quantity: ``"sigmoid"``, ``"softmax"`` or ``"raw"`` network output.
        output, activation, reduction: see `Target`; ``activation`` follows ``value`` unless given.

    >>> prediction = torch.tensor([[[-1.0, 3.0, 0.1]]])  # one channel, a 1x3 image
    >>> ThresholdMask(0.5).bind(prediction, Case())[0].voxels
    2
    """

    threshold: float | str = 0.5
    channel: int | str = 0
    above: bool = True
    value: Literal["sigmoid", "softmax", "raw"] = "sigmoid"
    output: Output = "logit"
    activation: Activation = "auto"
    reduction: Reduction = "sum"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """One score.

        Raises:
            TargetError: no such channel, an unknown kind of value or threshold, or no voxels in the prediction.
        """
        need_map(prediction, self)
        index, _ = resolve_class(self.channel, prediction.shape[0], case.class_names, "channel")
        compared = self._values(prediction, index)
        threshold = otsu(compared) if self.threshold == "otsu" else self.threshold
        if isinstance(threshold, str):
            raise TargetError(f"threshold={threshold!r}: give a number or 'otsu'")
        activation = self.activation
        if activation == "auto" and self.value != "raw":
            activation = self.value
        mask = compared > threshold if self.above else compared <= threshold
        return [masked_score(self, mask, index, prediction, case, activation=activation)]

    def _values(self, prediction: Tensor, index: int) -> Tensor:
        if self.value == "sigmoid":
            return torch.sigmoid(prediction[index])
        if self.value == "softmax":
            return torch.softmax(prediction, 0)[index]
        return prediction[index]


class PredictedClasses(Target):
    """Every predicted class except background: one `MultiClassMask` each, or the `ClassScore` of a whole image.

    Args:
        background: the class that is left out, by number or name; ``"auto"``: the class called background, else class 0
            of a softmax network; None: none is left out.
        output, activation, reduction: see `Target`.

    >>> prediction = torch.tensor([[[2.0, 0.0]], [[1.0, 1.0]], [[0.0, 0.5]]])  # 3 classes, a 1x2 image
    >>> [s.label for s in PredictedClasses().bind(prediction, Case())]
    ['MultiClassMask-class1']
    """

    background: int | str | None = "auto"
    output: Output = "logit"
    activation: Activation = "auto"
    reduction: Reduction = "sum"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """One score per predicted class; one empty score if there is none.

        Raises:
            TargetError: the network has no class that ``background`` names.
        """
        if prediction.ndim == 1 or prediction[0].numel() == 1:
            return ClassScore("predicted", self.output, self.activation, name=self.given_name).bind(prediction, case)
        classes = [c for c in range(prediction.shape[0]) if c != self._background(prediction, case)]
        scores: list[Score] = []
        for c in classes:
            name = None if self.given_name is None else f"{self.given_name}-{case.class_names.get(c, f'class{c}')}"
            mask = MultiClassMask(c, self.output, self.activation, self.reduction, name=name)
            scores += [s for s in mask.bind(prediction, case) if not s.empty]
        if scores:
            return scores
        none = torch.zeros(prediction.shape[1:], dtype=torch.bool, device=prediction.device)
        return [WeightedScore(none, 0, prediction.shape[0], label=self.given_name or "no-class")]

    def _background(self, prediction: Tensor, case: Case) -> int | None:
        if self.background is None or prediction.shape[0] == 1:
            return None
        if self.background != "auto":
            return resolve_class(self.background, prediction.shape[0], case.class_names, "background")[0]
        named = [i for i, n in case.class_names.items() if n.strip().lower() in ("background", "bg")]
        if named:
            return named[0]
        return None if self.activation == "sigmoid" else 0


def class_mask(prediction: Tensor, index: int, activation: Activation) -> Tensor:
    """Return the voxels of class ``index`` (*spatial), bool, of a prediction (K, *spatial): argmax, or logit > 0 for
    sigmoid."""
    if prediction.shape[0] == 1 or activation == "sigmoid":
        return prediction[index] > 0
    # The first of the largest wins. torch's argmax over the first axis takes ten times as long as these comparisons.
    own, mask = prediction[index], torch.ones_like(prediction[index], dtype=torch.bool)
    for other in prediction[:index]:
        mask &= other < own
    for other in prediction[index + 1 :]:
        mask &= other <= own
    return mask


def otsu(values: Tensor) -> float:
    """Compute Otsu's threshold of values of any shape: the cut that maximises the variance between the two groups (Otsu
    1979), without bins.

    Raises:
        TargetError: all values are equal.

    >>> otsu(torch.tensor([0.0, 1.0, 9.0, 10.0]))
    5.0
    """
    ordered = values.detach().double().flatten().sort().values
    cuts = torch.nonzero(ordered[1:] > ordered[:-1]).flatten()
    if not len(cuts):
        raise TargetError("threshold='otsu': all values of the channel are equal, so no threshold parts them")
    below, sums = (cuts + 1).double(), ordered.cumsum(0)
    above = len(ordered) - below
    between = below * above * (sums[cuts] / below - (sums[-1] - sums[cuts]) / above) ** 2
    best = cuts[between.argmax()]
    return float((ordered[best] + ordered[best + 1]) / 2)
