"""The target of a class in contrast to other classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from esegeta_monai.engine.contrast import ContrastScore
from esegeta_monai.engine.score import Case, Score, WeightedScore
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import TARGETS, Target, resolve_class

__all__ = ["Contrast"]


class Contrast(Target):
    """A class in contrast to others: ``s(P) = s_c(P) − γ · mean_d s_d(P)``, all under the frozen mask of c.

    It answers questions such as "why tumour rather than oedema?". With logits it is linear, so every method for linear
    targets applies. Maps of methods that are linear in the score (gradients, path methods, DeepLIFT, LRP, perturbation)
    are differences of maps: that of c minus γ times the mean of those of the classes d. Methods that propagate positive
    signals only, such as guided backpropagation, are refused.

    Args:
        target: the target of class c: an instance, a config or text, such as ``"MultiClassMask(1)"``. A target with
            several scores, such as `PredictedClasses`, gives one contrast for each.
        others: number or name of another class d, or several; None: all other classes.
        weight: γ.

    Raises:
        UsageError: ``target`` is no target.

    >>> prediction = torch.tensor([[[0.0, 3.0]], [[1.0, 2.0]]])  # 2 classes, a 1x2 image
    >>> score = Contrast("MultiClassMask(1)").bind(prediction, Case())[0]  # one voxel, logits 0 and 1
    >>> float(score.value(score.crop(prediction)))
    1.0
    """

    target: Any
    others: int | str | Sequence[int | str] | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target: Target = TARGETS.create(self.target)
        if self.target.layer is not None:
            raise TargetError("Contrast compares classes of the prediction, and a layer has none: give another target")

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score per score of ``target``; ``prediction`` is (K, *spatial), or (K,).

        Raises:
            TargetError: the network has one output channel or no such class, a class is compared with itself, or
                ``target`` is not the score of a class.
        """
        return [self._contrast(score, prediction.shape[0], case) for score in self.target.bind(prediction, case)]

    def _contrast(self, score: Score, channels: int, case: Case) -> Score:
        if score.empty:
            return score
        if channels < 2:
            raise TargetError(f"Contrast needs several output channels, but the network has one: explain {score.label}")
        if not isinstance(score, WeightedScore) or score.class_index is None:
            raise TargetError(f"Contrast needs the score of one class, and {score.label} is none: use MultiClassMask")
        own = score.class_index
        if self.others is None:
            others = [c for c in range(channels) if c != own]
        else:
            given = [self.others] if isinstance(self.others, (int, str)) else list(self.others)
            others = [resolve_class(c, channels, case.class_names, "others")[0] for c in given]
        if own in others or len(set(others)) < len(others):
            raise TargetError(f"others={self.others!r}: give each class once, and not class {own}, which is explained")
        names = "+".join(case.class_names.get(c, f"class{c}") for c in others)
        label = self.given_name or f"{score.label}-against-{'others' if self.others is None else names}"
        return ContrastScore(score, others, channels, weight=self.weight, label=label)
