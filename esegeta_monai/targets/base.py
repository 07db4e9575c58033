"""The base class of targets: a target turns a prediction into a scalar score with a frozen mask.

The user chooses a `Target`. Bound to one unperturbed prediction, it becomes one or more `Score` objects ``s(P)``, in
which everything that depends on that prediction is frozen (argmax maps, components, thresholds).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from esegeta_monai.engine.score import Case, Score, WeightedScore
from esegeta_monai.errors import TargetError
from esegeta_monai.utils.registry import Configurable, Registry

__all__ = [
    "TARGETS",
    "Target",
]


class Target(Configurable, ABC):
    """The base class of targets. Subclasses are dataclasses that share these parameters where applicable.

    * ``output``: ``"logit"`` (the raw output of the network; linear, so that methods are exact and fast),
      ``"probability"`` or ``"log_probability"`` (after blending).
    * ``activation``: function from raw output to probabilities: ``"softmax"`` over channels, ``"sigmoid"`` per channel,
      or ``"auto"``: sigmoid for one channel, else softmax.
    * ``reduction``: ``"sum"`` or ``"mean"`` over the mask.

    A target with a ``layer`` (a dotted name) is bound to the output of this layer in place of the prediction.
    """

    layer: ClassVar[str | None] = None

    @abstractmethod
    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Freeze the target on an unperturbed prediction.

        Args:
            prediction: raw output (K, *spatial), or (K,) for classification.
            case: further information on the case.

        Returns:
            One score, or several for targets such as ``ClassScore(top_k=3)``.
        """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("esegeta_monai."):
            TARGETS.register(cls)


TARGETS: Registry[Target] = Registry("target", Target, "esegeta_monai.targets")


def resolve_class(
    class_index: int | str, n_classes: int, names: Mapping[int, str], where: str = "class_index"
) -> tuple[int, str]:
    """Return the number and the name of a class given by either.

    Names are compared without case, spaces, ``-`` and ``_``.

    Raises:
        TargetError: the network has no such class; the message lists its classes.
    """

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    listed = ", ".join(f"{i} ({names[i]})" if i in names else str(i) for i in range(n_classes)[:30])
    if isinstance(class_index, str):
        matches = [i for i, n in names.items() if plain(n) == plain(class_index) and 0 <= i < n_classes]
        if not matches and class_index.strip().lstrip("-").isdigit():
            return resolve_class(int(class_index), n_classes, names, where)
        if not matches:
            raise TargetError(f"{where}={class_index!r}: the network has no class of that name; it has: {listed}")
        class_index = matches[0]
    if isinstance(class_index, bool) or not 0 <= class_index < n_classes:
        raise TargetError(
            f"{where}={class_index}: no such class; the network has {n_classes} output channel(s): {listed}"
        )
    return int(class_index), names.get(int(class_index), f"class{class_index}")


def _some(values: Sequence[int], limit: int = 30) -> list[int]:
    return list(values)[:limit]


def masked_score(
    target: Any,
    mask: Tensor,
    class_index: int | str,
    prediction: Tensor,
    case: Case,
    where: str = "class_index",
    **settings: Any,
) -> WeightedScore:
    """Return a target's score of one class over a mask, with the target's output, activation and reduction.

    Args:
        target: the target, which names the score.
        mask: bool (*spatial), already frozen; a 0-d True for a prediction (K,).
        class_index: number or name of the class.
        prediction: (K, *spatial) or (K,).
        case: has the names of classes.
        where: the target's parameter that holds the class, for errors.
        settings: further arguments of `WeightedScore`, or others than the target's.

    Raises:
        TargetError: the network has no such class.
    """
    index, class_name = resolve_class(class_index, prediction.shape[0], case.class_names, where)
    own = {k: getattr(target, k) for k in ("output", "activation", "reduction") if hasattr(target, k)}
    label = target.given_name or f"{type(target).__name__}-{class_name}"
    return WeightedScore(mask, index, prediction.shape[0], label=label, class_name=class_name, **(own | settings))


def need_map(prediction: Tensor, target: Target) -> None:
    """Refuse a prediction without voxels.

    Args:
        prediction: (K, *spatial), or (K,) of a network that classifies whole images.
        target: named in the error.

    Raises:
        TargetError: the prediction is (K,).
    """
    if prediction.ndim < 3:
        raise TargetError(
            f"{type(target).__name__} needs a prediction with voxels, but the network gives {prediction.shape[0]} "
            "numbers per case: use ClassScore or OutputValue"
        )
