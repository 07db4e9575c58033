"""The base class of targets: a target turns a prediction into a scalar score with a frozen mask.

The user chooses a `Target`. Bound to one unperturbed prediction, it becomes one or more `Score` objects ``s(P)``, in
which everything that depends on that prediction is frozen (argmax maps, components, thresholds).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from esegeta_monai.engine.score import Case, Score
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

    layer: str | None = None

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
        raise TargetError(f"{where}={class_index}: the network has {n_classes} output channel(s): {listed}")
    return int(class_index), names.get(int(class_index), f"class{class_index}")


def need_map(prediction: Tensor, target: Target) -> None:
    """Check that a prediction (K, *spatial) has voxels.

    Raises:
        TargetError: the network classifies whole images.
    """
    if prediction.ndim < 3:
        raise TargetError(
            f"{type(target).__name__} needs a prediction with voxels, but the network gives {prediction.shape[0]} "
            "numbers per case: use ClassScore or OutputValue"
        )
