"""Targets of a class: its score, its voxels, or the voxels above a threshold."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.resampled import OUTPUT_GRID, OutputMasks
from esegeta_monai.engine.score import Activation, Case, Output, Reduction, Score, WeightedScore
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import (
    ClassOutput,
    Target,
    class_output,
    is_binary,
    masked_score,
    need_classes,
    need_map,
    resolve_class,
)

__all__ = ["ClassScore", "MultiClassMask", "PredictedClasses", "ThresholdMask"]


class ClassScore(Target):
    """The score of a class of a classification network: ``s(P) = φ(P)(c)``.

    Args:
        class_index: number of the class, its name in metadata.json, or ``"predicted"``: that of the largest output.
        output: ``"logit"``, ``"probability"`` or ``"log_probability"``.
        activation: see `Target`.
        top_k: with ``"predicted"``: one score for each of the k largest outputs.

    >>> score = ClassScore("predicted").bind(torch.tensor([0.5, 2.0]), Case())[0]
    >>> score.class_index, float(score.value(torch.tensor([2.0])))
    (1, 2.0)
    """

    class_index: int | str = "predicted"
    output: Output = "logit"
    activation: Activation = "auto"
    top_k: int = 1

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score per requested class; ``prediction`` is (K,), or (K, 1, …).

        Raises:
            TargetError: the prediction has voxels or no such class.
        """
        if prediction.ndim > 1 and prediction[0].numel() != 1:
            raise TargetError(
                f"ClassScore is for networks that give one number per class, but the prediction has voxels "
                f"{tuple(prediction.shape[1:])}: use MultiClassMask, ThresholdMask or Voxel"
            )
        if self.class_index == "predicted":
            ranked = ranked_classes(prediction, case)
            if not 1 <= self.top_k <= len(ranked):
                raise TargetError(f"top_k={self.top_k}: the network has {len(ranked)} output(s)")
            wanted: list[int | str] = [*ranked[: self.top_k]]
        else:
            wanted = [self.class_index]
        mask = torch.ones(prediction.shape[1:], dtype=torch.bool, device=prediction.device)
        return [masked_score(self, mask, which, prediction, case) for which in wanted]


class MultiClassMask(Target):
    """The voxels of a predicted class: ``s(P) = Σ_v m(v) φ(P)(c, v)``, ``m(v) = [argmax_k P(k, v) = c]``.

    The mask is frozen from the unperturbed prediction. For a network of one channel, and for channels that do not
    exclude each other (sigmoid), the mask is probability > 0.5 instead of the argmax, or the threshold of a bundle's
    postprocessing. TorchEsegeta calls this target ``multi_class``.

    Where a model writes its own segmentation on another grid, as nnU-Net does on that of the scan, m is the mask of
    that segmentation, and the resampling R to it is part of the score: ``s(P) = Σ_v m(v) φ((R P)(c, v))``
    (`esegeta_monai.engine.resampled`).

    Args:
        class_index: number of the class, or its name in metadata.json.
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
        """Return one score; ``prediction`` is (K, *spatial).

        Raises:
            TargetError: the network has no such class, classifies whole images, or has no classes.
        """
        need_map(prediction, self)
        need_classes(self, case)
        which = class_output(self.class_index, prediction.shape[0], case)
        own: OutputMasks | None = case.data.get(OUTPUT_GRID)
        if own is None or own.resampling is None:
            mask = class_mask(prediction, which, self.activation, case)
            return [masked_score(self, mask, which.index, prediction, case)]
        if own.exclusive != case.head.exclusive(self.activation, prediction.shape[0]):
            raise TargetError(
                f"activation={self.activation!r} contradicts the model's own segmentation, which gives the mask: "
                "leave it out"
            )
        mask = own.masks(which.channel).to(prediction.device)
        mask = ~mask if which.complement else mask
        return [masked_score(self, mask, which.index, prediction, case, resampling=own.resampling)]


class ThresholdMask(Target):
    """The voxels above (or below) a threshold: ``s(P) = Σ_v m(v) φ(P)(c, v)``, ``m(v) = [value(P)(c, v) > t]``.

    The sum is over the output under the frozen mask, not over voxels counted, whose gradient would be zero.
    TorchEsegeta calls this target ``threshold_based``.

    Args:
        threshold: a number in the units of ``value``, or ``"otsu"`` (Otsu 1979, on the values of that channel).
        channel: number or name of the output channel.
        above: True: the voxels above the threshold; False: those at or below it.
        value: the compared value: ``"sigmoid"``, ``"softmax"`` or ``"raw"`` network output. Where the network's own
            output consists of probabilities, the first two are these probabilities.
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
        """Return one score; ``prediction`` is (K, *spatial).

        Raises:
            TargetError: no such channel, an invalid threshold, or no voxels in the prediction.
        """
        need_map(prediction, self)
        which = class_output(self.channel, prediction.shape[0], case, "channel", by_channel=True)
        compared = self._values(prediction, which.channel, case)
        threshold = otsu(compared) if self.threshold == "otsu" else self.threshold
        if isinstance(threshold, str):
            raise TargetError(f"threshold={threshold!r}: give a number or 'otsu'")
        activation = self.activation
        if activation == "auto" and self.value != "raw":
            activation = self.value
        mask = compared > threshold if self.above else compared <= threshold
        more: dict[str, Any] = {"activation": activation}
        return [masked_score(self, mask, self.channel, prediction, case, "channel", by_channel=True, **more)]

    def _values(self, prediction: Tensor, index: int, case: Case) -> Tensor:
        if self.value != "raw" and case.head.inside:
            return prediction[index] if case.head.values == "probability" else prediction[index].exp()
        if self.value == "sigmoid":
            return torch.sigmoid(prediction[index])
        if self.value == "softmax":
            return torch.softmax(prediction, 0)[index]
        return prediction[index]


class PredictedClasses(Target):
    """All predicted classes except the background: one `MultiClassMask` per class, or a `ClassScore` of whole images.

    If the labels of a whole image do not exclude each other (sigmoid), every label above 0.5, or above the threshold of
    a bundle's postprocessing, is predicted; if none is, the target is empty.

    Args:
        background: number or name of the excluded class; ``"auto"``: the class called background, else class 0 of
            classes that exclude each other; None: no class is excluded.
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
        """Return one score per predicted class, or one empty score; ``prediction`` is (K, *spatial), or (K,).

        Raises:
            TargetError: the network has no class called ``background``.
        """
        need_classes(self, case)
        if prediction.ndim == 1 or prediction[0].numel() == 1:
            return self._of_images(prediction, case)
        count = 2 if is_binary(prediction.shape[0], case) else prediction.shape[0]
        classes = [c for c in range(count) if c != self._background(prediction, case)]
        scores: list[Score] = []
        for c in classes:
            mask = MultiClassMask(c, self.output, self.activation, self.reduction, name=self._name_of(c, case))
            scores += [s for s in mask.bind(prediction, case) if not s.empty]
        return scores or self._none(prediction)

    def _of_images(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return the scores of the predicted classes of a prediction (K,) or (K, 1, …)."""
        k, head = prediction.shape[0], case.head
        if k == 1 or head.exclusive(self.activation, k):
            return ClassScore("predicted", self.output, self.activation, name=self.given_name).bind(prediction, case)
        labels = [c for c in range(k) if bool(head.above(prediction, c).all())]
        scores: list[Score] = []
        for c in labels:
            name = self._name_of(c, case)
            scores += ClassScore(c, self.output, self.activation, name=name).bind(prediction, case)
        return scores or self._none(prediction)

    def _name_of(self, c: int, case: Case) -> str | None:
        return None if self.given_name is None else f"{self.given_name}-{case.class_names.get(c, f'class{c}')}"

    def _none(self, prediction: Tensor) -> list[Score]:
        none = torch.zeros(prediction.shape[1:], dtype=torch.bool, device=prediction.device)
        return [WeightedScore(none, 0, prediction.shape[0], label=self.given_name or "no-class")]

    def _background(self, prediction: Tensor, case: Case) -> int | None:
        k, binary = prediction.shape[0], is_binary(prediction.shape[0], case)
        if self.background is None or (k == 1 and not binary):
            return None
        if self.background != "auto":
            return resolve_class(self.background, 2 if binary else k, case.class_names, "background")[0]
        named = [i for i, n in case.class_names.items() if n.strip().lower() in ("background", "bg")]
        if named:
            return named[0]
        return 0 if binary or case.head.exclusive(self.activation, k) else None


def ranked_classes(prediction: Tensor, case: Case) -> list[int]:
    """Return the classes of a prediction (K,) or (K, 1, …), those with the largest output first."""
    if not is_binary(prediction.shape[0], case):
        return [int(c) for c in prediction.flatten().argsort(descending=True, stable=True)]
    return [1, 0] if bool(case.head.above(prediction, 0).all()) else [0, 1]


def class_mask(prediction: Tensor, which: ClassOutput, activation: Activation, case: Case) -> Tensor:
    """Return the mask (*spatial) of a class from a prediction (K, *spatial).

    It is the argmax over channels; for one channel, or channels that do not exclude each other, it is where the
    channel is predicted (`esegeta_monai.engine.head.Head.above`). A softmax inside a network that does not return all
    its channels leaves a rest, 1 - Σ p, that counts as one more class.
    """
    if not case.head.exclusive(activation, prediction.shape[0]):
        above = case.head.above(prediction, which.channel)
        return ~above if which.complement else above
    # Ties go to the first class, as in argmax. torch's argmax over the first axis takes ten times as long.
    index = which.channel
    output, mask = prediction[index], torch.ones_like(prediction[index], dtype=torch.bool)
    for other in prediction[:index]:
        mask &= other < output
    for other in prediction[index + 1 :]:
        mask &= other <= output
    if case.head.kind == "softmax inside":
        mask &= output > 1 - prediction.sum(0)
    return mask


def otsu(values: Tensor) -> float:
    """Compute Otsu's threshold of values of any shape, without bins.

    It maximises the variance between the two groups (Otsu 1979).

    Raises:
        TargetError: all values are equal.

    >>> otsu(torch.tensor([0.0, 1.0, 9.0, 10.0]))
    5.0
    """
    ordered = values.detach().double().flatten().sort().values
    cuts = torch.nonzero(ordered[1:] > ordered[:-1]).flatten()
    if not len(cuts):
        raise TargetError("threshold='otsu': all values of the channel are equal, so no threshold separates them")
    below, sums = (cuts + 1).double(), ordered.cumsum(0)
    above = len(ordered) - below
    between = below * above * (sums[cuts] / below - (sums[-1] - sums[cuts]) / above) ** 2
    best = cuts[between.argmax()]
    return float((ordered[best] + ordered[best + 1]) / 2)
