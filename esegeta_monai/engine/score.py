"""Scores: scalar functions of a prediction, bound to a fixed mask."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.head import Head, Values
from esegeta_monai.errors import TargetError
from esegeta_monai.utils.tensors import bounding_box, take, true_positions

__all__ = ["Activation", "Case", "Output", "Reduction", "Score", "WeightedScore"]


Output = Literal["logit", "probability", "log_probability"]


Activation = Literal["auto", "softmax", "sigmoid"]


Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Case:
    """Information on a case that a target may use besides the prediction.

    Args:
        affine: 4x4 (3x3 in 2D) voxel-to-world matrix of the prediction's grid, RAS mm; None if unknown.
        data: data dictionary of the case (labels, masks): entries (1 or C, *spatial) on the image's grid, or files.
        class_names: class index to name, from the bundle's metadata.json.
        channel_names: names of the image channels, from metadata.json; empty if unknown.
        head: what the prediction is: raw output, probabilities or log-probabilities.
        networks: number of networks whose predictions are stacked along the channels: 2 for a `NetworkPair`.
    """

    affine: Tensor | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    class_names: Mapping[int, str] = field(default_factory=dict)
    channel_names: Sequence[str] = ()
    head: Head = field(default_factory=Head)
    networks: int = 1


class Score(ABC):
    """A frozen target ``s``: a differentiable function of the prediction on a box of voxels.

    Attributes:
        label: name of the target in files and pictures.
        channels: the output channels that ``s`` reads, in order.
        box: bounding box of the support, one slice per spatial axis of the prediction (empty for class scores).
        mask: (*box) bool, the support inside the box; windows outside of it are never computed.
        linear: True if ``s`` is linear (affine) in the prediction; only then do scores of windows add up.
        voxels: number of voxels in the support (1 for a class score).
        additive: True if ``s`` is a sum of independent terms over the mask's voxels (see `terms`); a change of few
            voxels then requires only their terms.
        class_index: the class that ``s`` reads, or None.
        class_name: its name, or None.
        units: units of ``s``, in words.
        meaning: properties that distinguish the score from others of the same mask and parameters; usually none.
        notes: entries of the record.
    """

    label: str = "target"
    channels: tuple[int, ...]
    box: tuple[slice, ...]
    mask: Tensor
    linear: bool
    voxels: int
    additive: bool = False
    class_index: int | None = None
    class_name: str | None = None
    units: str | None = None
    meaning: tuple[str, ...] = ()
    notes: Mapping[str, Any] = {}

    @abstractmethod
    def value(self, prediction: Tensor) -> Tensor:
        """Compute ``s(P)`` for P of shape (..., len(channels), *box), differentiable.

        Returns:
            One scalar per leading index (...), summed in float64.
        """

    def contrast(self, voxels: Tensor) -> Tensor:
        """Reduce P at the mask's voxels, (..., channels, n), to the values that an additive ``s`` depends on.

        The result is linear in P and may have fewer channels.
        """
        return voxels

    def terms(self, contrast: Tensor) -> Tensor:
        """Compute the terms of an additive ``s``, (..., n) float64, from `contrast` (..., channels, n)."""
        raise NotImplementedError

    def _sum_of_terms(self, prediction: Tensor) -> Tensor:
        """Compute the value of an additive ``s`` from its terms at the mask's voxels, see `value`."""
        lead = prediction.ndim - self.mask.ndim - 1
        voxels = prediction.flatten(lead + 1) if self.mask.ndim else prediction.unsqueeze(-1)
        # convert only the mask's voxels to float64: a whole box would need the memory of many volumes
        selected = take(voxels, true_positions(self.mask).to(voxels.device)).double()
        return self.terms(self.contrast(selected)).sum(-1)

    def cotangent(self, prediction: Tensor) -> Tensor:
        """Compute ``∂s/∂P``, (len(channels), *box), at P of the same shape by automatic differentiation."""
        with torch.inference_mode(False), torch.enable_grad():
            p = (prediction.clone() if prediction.is_inference() else prediction.detach()).requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.value(p), p)
        return gradient

    def window_cotangent(self, cut: Callable[[Tensor], Tensor]) -> Tensor:
        """Compute ``∂s/∂P`` of a linear score in a window; ``cut`` takes the window out of a tensor (…, *box).

        A boolean result represents 0 and 1.
        """
        return cut(self.cotangent(self._zeros()))

    def constant(self) -> float:
        """Return ``s(0)``, the constant that a linear score adds to the sum over windows."""
        return float(self.value(self._zeros()))

    def _zeros(self) -> Tensor:
        shape = (len(self.channels), *(b.stop - b.start for b in self.box))
        return torch.zeros(shape, dtype=torch.float64, device=self.mask.device)

    @property
    def shown(self) -> Tensor:
        """(*box) bool, the voxels that stand for the target in pictures and in metrics of place."""
        return self.mask

    @property
    def empty(self) -> bool:
        """True if no voxel of the prediction belongs to the target."""
        return self.voxels == 0

    @property
    def falls(self) -> bool:
        """True if the score is linear and falls with an output that it reads, as the negative of a logit does."""
        return self.linear and bool((self.cotangent(self._zeros()) < 0).any())

    def crop(self, prediction: Tensor) -> Tensor:
        """Crop a prediction (..., K, *spatial) to what ``s`` reads, (..., len(channels), *box); a view if possible."""
        lead, first, n = prediction.ndim - len(self.box) - 1, self.channels[0], len(self.channels)
        if self.channels == tuple(range(first, first + n)):
            read = prediction.narrow(lead, first, n)
        else:
            read = prediction.index_select(lead, torch.tensor(self.channels, device=prediction.device))
        return read[(slice(None),) * (lead + 1) + self.box]


class WeightedScore(Score):
    """``s(P) = Σ_v m(v) · (φ(P)(c, v) − r)`` over a mask m and one class c, with r a reference value.

    ``φ`` is the identity (``output="logit"``: the network's raw output, linear), a softmax or sigmoid after blending
    (``"probability"``), or its logarithm (``"log_probability"``). If the raw output consists of probabilities or
    log-probabilities (``values``), ``φ`` does not apply softmax or sigmoid again, and the raw output is linear.

    Args:
        mask: bool (*spatial), frozen; a 0-d True for a classification output.
        class_index: the class c.
        n_classes: number of channels K of the prediction.
        output, activation, reduction: see `Target`.
        reference: the value r that is subtracted from a regression output.
        label: name of the target in files and pictures.
        class_name: name of the class, or None.
        values: what the raw output is: ``"logit"``, ``"probability"`` or ``"log_probability"``.
        complement: True: class 0 of a network with two classes and one channel, which is the evidence for class 1:
            minus the logit, 1 minus the probability.

    Raises:
        TargetError: unknown output, activation or reduction.
    """

    additive = True

    def __init__(
        self,
        mask: Tensor,
        class_index: int,
        n_classes: int,
        *,
        output: Output = "logit",
        activation: Activation = "auto",
        reduction: Reduction = "sum",
        reference: float = 0.0,
        label: str = "target",
        class_name: str | None = None,
        values: Values = "logit",
        complement: bool = False,
    ) -> None:
        if output not in ("logit", "probability", "log_probability"):
            raise TargetError(f"output must be logit, probability or log_probability, got {output!r}")
        if reduction not in ("sum", "mean"):
            raise TargetError(f"reduction must be sum or mean, got {reduction!r}")
        if activation not in ("auto", "softmax", "sigmoid"):
            raise TargetError(f"activation must be auto, softmax or sigmoid, got {activation!r}")
        if complement and values == "log_probability":
            raise TargetError("the network gives the log-probability of one class only: choose that class")
        self.activation = ("sigmoid" if n_classes == 1 else "softmax") if activation == "auto" else activation
        self.output, self.reference = output, reference
        self.values, self.complement = values, complement
        self.reduction: Reduction = reduction
        self.class_index, self.class_name, self.label = class_index, class_name, label
        self._read(min(class_index, n_classes - 1), n_classes)
        self._take(mask)

    def _read(self, channel: int, n_channels: int) -> None:
        """Set the channels that the score reads for the class of one channel, and whether it is linear in them."""
        self.linear = self.output in ("logit", self.values)
        reads_all = not self.linear and self.activation == "softmax" and self.values == "logit"
        self.channels = tuple(range(n_channels)) if reads_all else (channel,)
        self._position = channel if reads_all else 0

    @property
    def units(self) -> str:  # type: ignore[override]  # the base class has a plain attribute
        """Units of ``s``, in words."""
        names = {"logit": "raw output", "probability": "probability", "log_probability": "log-probability"}
        if self.output == "logit" and self.values != "logit":
            return f"{names[self.values]} (the network's raw output)"
        return names[self.output]

    @property
    def meaning(self) -> tuple[str, ...]:  # type: ignore[override]  # the base class has a plain attribute
        """Properties that distinguish the score from others of the same mask and parameters; usually none."""
        usual = self.values == "logit" and not self.complement
        return () if usual else (self.values, self.activation, str(self.complement))

    def _take(self, mask: Tensor) -> None:
        self.box = bounding_box(mask)
        self.mask = mask[self.box].clone()
        self.voxels = int(torch.count_nonzero(mask))

    def over(self, mask: Tensor) -> WeightedScore:
        """Return the mean of the same score over another mask (*spatial), which may be on another grid."""
        other = copy.copy(self)
        other.reduction = "mean"
        other._take(mask)
        return other

    def altered(
        self,
        n_classes: int,
        *,
        class_index: int | None = None,
        output: Output | None = None,
        reduction: Reduction | None = None,
    ) -> WeightedScore:
        """Return a score of the same mask with another class, output or reduction; None keeps the present one.

        Args:
            n_classes: number of channels K of the prediction.
            class_index: the class.
            output, reduction: see `Target`.
        """
        other = copy.copy(self)
        index = self.channels[self._position] if class_index is None else class_index
        if class_index is not None:
            other.class_index, other.class_name = index, None
        other.output, other.reduction = output or self.output, reduction or self.reduction
        other._read(index, n_classes)
        return other

    def value(self, prediction: Tensor) -> Tensor:
        return self._sum_of_terms(prediction)

    def contrast(self, voxels: Tensor) -> Tensor:
        """Reduce the channels (..., 2, n) of a softmax of two classes to their difference (..., 1, n).

        The softmax is the sigmoid of this difference. Other scores read the channels unchanged.
        """
        if not self._is_two_class:
            return voxels
        own, other = self._position, 1 - self._position
        return voxels[..., own : own + 1, :] - voxels[..., other : other + 1, :]

    @property
    def _is_two_class(self) -> bool:
        return self.values == "logit" and self.activation == "softmax" and len(self.channels) == 2

    def terms(self, contrast: Tensor) -> Tensor:
        terms = self._transformed(contrast.double())
        if self.reference or self.linear:  # a raw output may be a view of the argument
            terms = terms - self.reference
        return terms / self.voxels if self.reduction == "mean" and self.voxels else terms

    def constant(self) -> float:
        if not self.linear:
            return super().constant()
        each = float(self.complement and self.values == "probability") - self.reference
        return each * (1 if self.reduction == "mean" else self.voxels)

    def _transformed(self, contrast: Tensor) -> Tensor:
        """Compute ``φ(P)(c, ·)`` (..., n) from `contrast` (..., channels, n).

        It uses the log-odds of the class, ``P_c − log Σ_{others} exp P``: the derivative p (1 − p) of a probability
        that rounds to 1 is exact to the last digit, whereas softmax and sigmoid lose it in 1 − p.
        """
        if self.values != "logit":
            return self._of_probability(contrast[..., 0, :])
        if self.output == "logit":
            return -contrast[..., 0, :] if self.complement else contrast[..., 0, :]
        if self.activation == "softmax" and not self._is_two_class:
            c = self._position
            others = torch.cat([contrast[..., :c, :], contrast[..., c + 1 :, :]], -2)
            odds = contrast[..., c, :] - torch.logsumexp(others, -2)
        else:
            odds = -contrast[..., 0, :] if self.complement else contrast[..., 0, :]
        if self.output == "probability" and torch.is_inference_mode_enabled():
            return odds.sigmoid()  # without a derivative equally exact, in a quarter of the time
        log_probability = torch.nn.functional.logsigmoid(odds)
        return log_probability.exp() if self.output == "probability" else log_probability

    def _of_probability(self, values: Tensor) -> Tensor:
        """Compute ``φ`` (..., n) from probabilities or log-probabilities (..., n) of the class.

        The logarithm of a probability of 0 is that of the smallest positive number.
        """
        if self.values == "log_probability":
            return values.exp() if self.output == "probability" else values
        p = 1 - values if self.complement else values
        return p.clamp_min(torch.finfo(p.dtype).tiny).log() if self.output == "log_probability" else p

    def cotangent(self, prediction: Tensor) -> Tensor:
        if not self.linear:
            return super().cotangent(prediction)
        weights = self.mask.to(prediction.device, prediction.dtype)
        weights = -weights if self.complement else weights
        return (weights / self.voxels if self.reduction == "mean" and self.voxels else weights).unsqueeze(0)

    def window_cotangent(self, cut: Callable[[Tensor], Tensor]) -> Tensor:
        weights = cut(self.mask.unsqueeze(0))  # only the window, not a volume of weights
        weights = -weights.double() if self.complement else weights
        return weights.double() / self.voxels if self.reduction == "mean" and self.voxels else weights
