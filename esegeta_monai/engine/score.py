"""Scores: scalar functions of a prediction, bound to a fixed mask."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.errors import TargetError
from esegeta_monai.utils.tensors import bounding_box, take, true_positions

__all__ = ["Activation", "Case", "Output", "Reduction", "Score", "WeightedScore"]


Output = Literal["logit", "probability", "log_probability"]


Activation = Literal["auto", "softmax", "sigmoid"]


Reduction = Literal["sum", "mean"]


@dataclass(frozen=True)
class Case:
    """What a target may know of a case besides the prediction.

    Args:
        affine: 4x4 (3x3 in 2D) voxel-to-world matrix of the prediction's grid, RAS mm; None where unknown.
        data: the case's data dictionary (labels, masks), entries (1 or C, *spatial) on the image's grid or files.
        class_names: class index to name, from the bundle's metadata.json.
        channel_names: of the image, from there too; empty where unknown.
    """

    affine: Tensor | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    class_names: Mapping[int, str] = field(default_factory=dict)
    channel_names: Sequence[str] = ()


class Score(ABC):
    """A frozen target ``s``: a differentiable function of the prediction on a box of voxels.

    Attributes:
        label: what files and pictures call it.
        channels: the output channels that ``s`` reads, in order.
        box: the bounding box of the support, one slice a spatial axis of the prediction (empty for class scores).
        mask: (len(box) dims) bool, the support inside the box; windows that miss it are never computed.
        linear: whether ``s`` is linear (affine) in the prediction; only then do per-window scores add up.
        voxels: number of voxels in the support (1 for a class score).
        additive: whether ``s`` is a sum over the mask's voxels, each of which counts by itself (see `terms`): then a
            change of few voxels is scored by looking at these alone.
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

    @abstractmethod
    def value(self, prediction: Tensor) -> Tensor:
        """``s(P)`` for P of shape (..., len(channels), *box): one scalar for each leading index, differentiable, summed
        in float64."""

    def contrast(self, voxels: Tensor) -> Tensor:
        """What an additive ``s`` depends on, from P at the mask's voxels (..., channels, n): fewer channels, linear in
        P, where that can be."""
        return voxels

    def terms(self, contrast: Tensor) -> Tensor:
        """What each voxel of the mask adds to an additive ``s``: (..., n) float64, from `contrast` there."""
        raise NotImplementedError

    def cotangent(self, prediction: Tensor) -> Tensor:
        """``∂s/∂P`` at P of shape (len(channels), *box), by automatic differentiation."""
        with torch.inference_mode(False), torch.enable_grad():
            p = (prediction.clone() if prediction.is_inference() else prediction.detach()).requires_grad_(True)
            (gradient,) = torch.autograd.grad(self.value(p), p)
        return gradient

    def window_cotangent(self, cut: Callable[[Tensor], Tensor]) -> Tensor:
        """``∂s/∂P`` of a linear score in one window: ``cut`` takes a window out of a (…, *box) tensor. A boolean one
        stands for 0 and 1."""
        return cut(self.cotangent(self._zeros()))

    def constant(self) -> float:
        """``s(0)``: what a linear score adds to the sum over windows."""
        return float(self.value(self._zeros()))

    def _zeros(self) -> Tensor:
        shape = (len(self.channels), *(b.stop - b.start for b in self.box))
        return torch.zeros(shape, dtype=torch.float64, device=self.mask.device)

    @property
    def empty(self) -> bool:
        """No voxel of the prediction belongs to the target."""
        return self.voxels == 0

    def crop(self, prediction: Tensor) -> Tensor:
        """What ``s`` reads of a prediction (..., K, *spatial): (..., len(channels), *box), a view if it can be."""
        lead, first, n = prediction.ndim - len(self.box) - 1, self.channels[0], len(self.channels)
        if self.channels == tuple(range(first, first + n)):
            read = prediction.narrow(lead, first, n)
        else:
            read = prediction.index_select(lead, torch.tensor(self.channels, device=prediction.device))
        return read[(slice(None),) * (lead + 1) + self.box]


class WeightedScore(Score):
    """``s(P) = Σ_v m(v) · (φ(P)(c, v) − r)`` over a mask m and one class c, with r a reference value.

    ``φ`` is the identity (``output="logit"``: the network's raw output, linear), a softmax or sigmoid after blending
    (``"probability"``), or its logarithm (``"log_probability"``).

    Args:
        mask: bool (*spatial), already frozen; a 0-d True for a classification output.
        class_index: the class c.
        n_classes: number of channels K of the prediction.
        output, activation, reduction: see `Target`.
        reference: the value r that a regression output is compared with.
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
    ) -> None:
        if output not in ("logit", "probability", "log_probability"):
            raise TargetError(f"output must be logit, probability or log_probability, got {output!r}")
        if reduction not in ("sum", "mean"):
            raise TargetError(f"reduction must be sum or mean, got {reduction!r}")
        if activation not in ("auto", "softmax", "sigmoid"):
            raise TargetError(f"activation must be auto, softmax or sigmoid, got {activation!r}")
        self.activation = ("sigmoid" if n_classes == 1 else "softmax") if activation == "auto" else activation
        self.output, self.reference = output, reference
        self.reduction: Reduction = reduction
        self.class_index, self.class_name, self.label = class_index, class_name, label
        self.linear = output == "logit"
        reads_all = not self.linear and self.activation == "softmax"
        self.channels = tuple(range(n_classes)) if reads_all else (class_index,)
        self._position = class_index if reads_all else 0
        self._take(mask)

    def _take(self, mask: Tensor) -> None:
        self.box = bounding_box(mask)
        self.mask = mask[self.box].clone()
        self.voxels = int(torch.count_nonzero(mask))

    def over(self, mask: Tensor) -> WeightedScore:
        """The same score over another mask (*spatial), which may lie on another grid; its mean over the mask."""
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
        """The same mask with another class, output or reduction.

        Args:
            n_classes: number of channels K of the prediction.
        """
        other = copy.copy(self)
        index = self.channels[self._position] if class_index is None else class_index
        if class_index is not None:
            other.class_index, other.class_name = index, None
        other.output, other.reduction = output or self.output, reduction or self.reduction
        other.linear = other.output == "logit"
        reads_all = not other.linear and other.activation == "softmax"
        other.channels = tuple(range(n_classes)) if reads_all else (index,)
        other._position = index if reads_all else 0
        return other

    def value(self, prediction: Tensor) -> Tensor:
        lead = prediction.ndim - self.mask.ndim - 1
        voxels = prediction.flatten(lead + 1) if self.mask.ndim else prediction.unsqueeze(-1)
        # the mask's voxels only, and only those in float64: a whole box of them would cost many volumes
        seen = take(voxels, true_positions(self.mask).to(voxels.device)).double()
        return self.terms(self.contrast(seen)).sum(-1)

    def contrast(self, voxels: Tensor) -> Tensor:
        """The softmax of two classes is the sigmoid of their difference."""
        if not self._of_two:
            return voxels
        own, other = self._position, 1 - self._position
        return voxels[..., own : own + 1, :] - voxels[..., other : other + 1, :]

    @property
    def _of_two(self) -> bool:
        return self.activation == "softmax" and len(self.channels) == 2

    def terms(self, contrast: Tensor) -> Tensor:
        terms = self._transformed(contrast.double())
        if self.reference or self.output == "logit":  # a logit may be a view of what was given
            terms = terms - self.reference
        return terms / self.voxels if self.reduction == "mean" and self.voxels else terms

    def constant(self) -> float:
        return -self.reference * (1 if self.reduction == "mean" else self.voxels) if self.linear else super().constant()

    def _transformed(self, contrast: Tensor) -> Tensor:
        """``φ(P)(c, ·)`` from `contrast`: (..., n).

        By the log-odds of the class, ``P_c − log Σ_{others} exp P``: the derivative p (1 − p) of a probability that
        rounds to 1 is exact to the last digit, where softmax and sigmoid lose it in 1 − p.
        """
        if self.output == "logit":
            return contrast[..., 0, :]
        if self.activation == "softmax" and not self._of_two:
            c = self._position
            others = torch.cat([contrast[..., :c, :], contrast[..., c + 1 :, :]], -2)
            odds = contrast[..., c, :] - torch.logsumexp(others, -2)
        else:
            odds = contrast[..., 0, :]
        if self.output == "probability" and torch.is_inference_mode_enabled():
            return odds.sigmoid()  # which has no derivative to lose: as exact, in a quarter of the time
        log_probability = torch.nn.functional.logsigmoid(odds)
        return log_probability.exp() if self.output == "probability" else log_probability

    def cotangent(self, prediction: Tensor) -> Tensor:
        if not self.linear:
            return super().cotangent(prediction)
        weights = self.mask.to(prediction.device, prediction.dtype)
        return (weights / self.voxels if self.reduction == "mean" and self.voxels else weights).unsqueeze(0)

    def window_cotangent(self, cut: Callable[[Tensor], Tensor]) -> Tensor:
        weights = cut(self.mask.unsqueeze(0))  # the window alone: no volume of weights is made
        return weights.double() / self.voxels if self.reduction == "mean" and self.voxels else weights
