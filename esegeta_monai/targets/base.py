"""The base class of targets: a target turns a prediction into a scalar score with a frozen mask.

The user chooses a `Target`. Bound to one unperturbed prediction, it becomes one or more `Score` objects ``s(P)``, in
which everything that depends on that prediction is frozen (argmax maps, components, thresholds).
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from esegeta_monai.engine.resampled import ResampledScore, Resampling
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
      or ``"auto"``: that of the network's head (`esegeta_monai.engine.head.Head`), else sigmoid for one channel and
      softmax for several. Where the network's own output consists of probabilities, it applies nothing again; it then
      only states whether the classes exclude each other.
    * ``reduction``: ``"sum"`` or ``"mean"`` over the mask.

    A network of one channel and two class names, such as {0: "benign", 1: "malignant"}, gives the evidence for the
    second class. The first class has minus the logit, and 1 minus the probability.

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


def _advise(name: str) -> str:
    """Return what to write where the name or number of a class was given as a target."""
    shown = name.strip("'\"")
    quoted = shown if shown.isdigit() else f"'{shown}'"
    return (
        f'If {shown} is a class, write "MultiClassMask({quoted})" for the voxels of a segmentation, or '
        f'"ClassScore({quoted})" for a classification'
    )


TARGETS: Registry[Target] = Registry("target", Target, "esegeta_monai.targets", advice=_advise)


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
            spelled = {plain(n): n for i, n in names.items() if 0 <= i < n_classes}
            near = [spelled[key] for key in difflib.get_close_matches(plain(class_index), spelled, n=3)]
            meant = f"did you mean {', '.join(map(repr, near))}? " if near else ""
            raise TargetError(
                f"{where}={class_index!r}: the network has no class of that name; {meant}it has: {listed}"
            )
        class_index = matches[0]
    if isinstance(class_index, bool) or not 0 <= class_index < n_classes:
        raise TargetError(
            f"{where}={class_index}: no such class; the network has {n_classes} output channel(s): {listed}"
        )
    return int(class_index), names.get(int(class_index), f"class{class_index}")


@dataclass(frozen=True)
class ClassOutput:
    """Where a class is in a prediction.

    Attributes:
        index, name: number and name of the class.
        channel: the output channel that is the evidence for it.
        complement: True: the evidence against it, class 0 of a network with two classes and one channel.
    """

    index: int
    name: str
    channel: int
    complement: bool = False


def is_binary(n_channels: int, case: Case) -> bool:
    """Return True if one output channel is the evidence for the second of two classes, as their names show."""
    return n_channels == 1 and case.head.kind != "raw" and max(case.class_names, default=0) == 1


def class_output(
    class_index: int | str, n_channels: int, case: Case, where: str = "class_index", by_channel: bool = False
) -> ClassOutput:
    """Return where the class of a number or name is.

    Args:
        class_index: number or name.
        n_channels: number K of output channels.
        case: has the names of classes.
        where: the target's parameter that holds the class, for errors.
        by_channel: True: a number is that of a channel, not of a class.

    Raises:
        TargetError: the network has no such class; the message lists its classes.
    """
    names = case.class_names
    if not is_binary(n_channels, case):
        index, name = resolve_class(class_index, n_channels, names, where)
        return ClassOutput(index, name, index)
    if by_channel and not isinstance(class_index, str):
        resolve_class(class_index, 1, {}, where)
        class_index = 1
    index, name = resolve_class(class_index, 2, names, where)
    if by_channel and index == 0:
        raise TargetError(
            f"{where}={class_index!r}: the network's only output is the evidence for {names[1]}, not for {name}: give "
            f"{where}=0, or a target of a class, such as ClassScore or MultiClassMask"
        )
    return ClassOutput(index, name, 0, index == 0)


def masked_score(
    target: Any,
    mask: Tensor,
    class_index: int | str,
    prediction: Tensor,
    case: Case,
    where: str = "class_index",
    *,
    by_channel: bool = False,
    resampling: Resampling | None = None,
    **settings: Any,
) -> WeightedScore:
    """Return a target's score of one class over a mask, with the target's output, activation and reduction.

    Args:
        target: the target, which names the score.
        mask: bool (*spatial), already frozen; a 0-d True for a prediction (K,).
        class_index: number or name of the class.
        prediction: (K, *spatial) or (K,).
        case: has the names of classes, and the head.
        where, by_channel: see `class_output`.
        resampling: from the prediction's grid to that of the mask; None: the mask is on the prediction's grid.
        settings: further arguments of `WeightedScore`, or others than the target's.

    Raises:
        TargetError: the network has no such class, or its output has no probabilities.
    """
    head, channels = case.head, prediction.shape[0]
    which = class_output(class_index, channels, case, where, by_channel)
    own = {k: getattr(target, k) for k in ("output", "activation", "reduction") if hasattr(target, k)} | settings
    if head.kind == "raw" and own.get("output", "logit") != "logit":
        raise TargetError(
            f"output={own['output']!r}: the network's output consists of no scores of classes (head='raw'), so it has "
            "no probabilities: use output='logit'"
        )
    own["activation"] = head.activation(own.get("activation", "auto"), channels)
    label = target.given_name or f"{type(target).__name__}-{which.name}"
    more: dict[str, Any] = {"values": head.values, "complement": which.complement}
    own |= more | {"label": label, "class_name": which.name}
    if resampling is not None:
        return ResampledScore(mask, which.index, channels, resampling, **own)
    return WeightedScore(mask, which.index, channels, **own)


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


def need_class_axis(prediction: Tensor, axes: int, target: Target) -> None:
    """Refuse a prediction whose first axis is not that of the classes.

    Args:
        prediction: (K, *spatial), or (K,); stacked heads (heads, K, *spatial) and vectors (steps, K) are refused.
        axes: number of axes of the image (C, *spatial).
        target: named in the error.

    Raises:
        TargetError: the message has the shape and the remedy.
    """
    shape = tuple(prediction.shape)
    stacked, steps = len(shape) > axes, len(shape) == 2 and shape[1] > 1
    if not (stacked or steps):
        return
    what = "stacked heads (heads, K, *spatial)" if stacked else "several vectors (steps, K)"
    raise TargetError(
        f"{type(target).__name__}: the network gives shape {shape} for an image with {axes - 1} spatial axes, such as "
        f"{what}, so its first axis is not that of the classes: choose one by output=INDEX, 0 to {shape[0] - 1} "
        "(--network-output), or wrap the network so that it returns (B, K) or (B, K, *spatial)"
    )


def need_classes(target: Target, case: Case) -> None:
    """Refuse a target that needs predicted classes where the output consists of no scores of classes.

    Raises:
        TargetError: the head is ``"raw"``.
    """
    if case.head.kind == "raw":
        raise TargetError(
            f"{type(target).__name__} needs classes, but the network's output consists of no scores of classes "
            f"({'; '.join(case.head.evidence)}): use OutputValue, Voxel, or ThresholdMask(value='raw'), or state "
            "another head=KIND"
        )
