"""Scores of a prediction that is resampled to another grid first, such as that of the scan."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.score import WeightedScore
from esegeta_monai.utils.tensors import bounding_box, digest

__all__ = ["OUTPUT_GRID", "OutputMasks", "ResampledScore", "Resampling"]

OUTPUT_GRID = "output_grid"
"""Key of the `OutputMasks` of a case in its data dictionary."""


@dataclass(frozen=True)
class Resampling:
    """A linear resampling R that is separable: ``(R P)(v) = Σ_u A₀(v₀, u₀) A₁(v₁, u₁) … P(u)``.

    Args:
        matrices: A_i (out_i, in_i) float64, one per spatial axis.

    >>> halves = Resampling((torch.tensor([[0.5, 0.5]]).double(), torch.eye(2).double()))
    >>> halves(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    tensor([[2., 4.]])
    >>> halves.adjoint(torch.tensor([[2.0, 4.0]]))
    tensor([[1., 2.],
            [1., 2.]])
    """

    matrices: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the grid that R gives."""
        return tuple(len(matrix) for matrix in self.matrices)

    def __call__(self, values: Tensor) -> Tensor:
        """Resample values (..., *in) to (..., *out), in their dtype; differentiable."""
        return _along_axes(values, self.matrices)

    def adjoint(self, values: Tensor) -> Tensor:
        """Apply the transpose: (..., *out) to (..., *in), in their dtype. ``⟨R p, m⟩ = ⟨p, Rᵀ m⟩``."""
        return _along_axes(values, [matrix.T for matrix in self.matrices])

    def inside(self, box: Sequence[slice]) -> tuple[Resampling, tuple[slice, ...]]:
        """Return R to a box of its output, from the smallest box of its input, and that box."""
        rows = [matrix[part] for matrix, part in zip(self.matrices, box)]
        boxes = tuple(bounding_box((matrix != 0).any(0))[0] for matrix in rows)
        return Resampling(tuple(m[:, part].contiguous() for m, part in zip(rows, boxes))), boxes


def _along_axes(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    first = values.ndim - len(matrices)
    for axis, matrix in enumerate(matrices, first):
        if matrix.shape[0] != matrix.shape[1] or not torch.equal(matrix, torch.eye(len(matrix)).to(matrix)):
            values = (values.movedim(axis, -1) @ matrix.to(values).T).movedim(-1, axis)
    return values


@dataclass(frozen=True)
class OutputMasks:
    """Masks of classes on the grid of a predictor's own segmentation, which it resamples its logits to.

    Args:
        masks: returns the bool mask (*out) of an output channel.
        exclusive: True: the classes exclude each other (argmax), False: each has a threshold of its own.
        resampling: R, from the network's grid to that of the masks; None: it is not linear, so that masks are taken
            on the network's grid.
        record: entries of the records of all maps of the case.
    """

    masks: Callable[[int], Tensor]
    exclusive: bool
    resampling: Resampling | None
    record: Mapping[str, Any] = field(default_factory=dict)


class ResampledScore(WeightedScore):
    """``s(P) = Σ_v m(v) φ((R P)(c, v))`` with a mask m on another grid and a linear resampling R to it.

    For the raw output it is linear: ``s(P) = Σ_u (Rᵀ m)(u) P(c, u)``.

    Args:
        mask: bool (*out), frozen.
        class_index, n_classes: see `WeightedScore`.
        resampling: R.
        settings: further arguments of `WeightedScore`.

    Attributes:
        mask: the voxels of the network's grid that R reads for m (in the box); ``voxels`` counts those of m.
        shown: the voxels that belong to m by at least half: ``Rᵀ m ≥ ½ Rᵀ 1``.

    >>> resampling = Resampling((torch.full((2, 4), 0.25).double(), torch.eye(3).double()))
    >>> score = ResampledScore(torch.tensor([[True, False, False], [True, False, False]]), 1, 2, resampling)
    >>> float(score.value(score.crop(torch.ones(2, 4, 3)))), score.voxels, score.box
    (2.0, 2, (slice(0, 4, None), slice(0, 1, None)))
    """

    additive = False

    def __init__(self, mask: Tensor, class_index: int, n_classes: int, resampling: Resampling, **settings: Any) -> None:
        super().__init__(mask, class_index, n_classes, **settings)
        self._inner = WeightedScore(mask, class_index, n_classes, **settings)
        self._resampling = Resampling(tuple(matrix.to(mask.device) for matrix in resampling.matrices))
        if self.empty:
            return
        columns = [matrix.sum(0) for matrix in self._resampling.matrices]
        self._resampling, self.box = self._resampling.inside(self.box)
        share = self._resampling.adjoint(self._inner.mask.double())
        self.mask = share != 0
        whole = torch.ones((), dtype=share.dtype, device=share.device)
        for column, part in zip(columns, self.box):
            whole = whole[..., None] * column[part]
        self._shown = share >= 0.5 * whole

    @property
    def shown(self) -> Tensor:
        return self.mask if self.empty else self._shown

    def contrast(self, voxels: Tensor) -> Tensor:
        return voxels

    @property
    def meaning(self) -> tuple[str, ...]:  # type: ignore[override]  # the base class has a plain attribute
        """Properties that distinguish the score from others of the same mask and parameters."""
        return (*super().meaning, "resampled", digest(self._inner.mask, *self._resampling.matrices).hex())

    def over(self, mask: Tensor) -> WeightedScore:
        """Return the mean of the output over a mask (*spatial) of the network's grid, see `WeightedScore.over`."""
        other = copy.copy(self._inner)
        other.reduction = "mean"
        other._take(mask)
        return other

    def altered(self, n_classes: int, **changes: Any) -> WeightedScore:
        """Return a score of the same mask with another class, output or reduction, see `WeightedScore.altered`."""
        other = super().altered(n_classes, **changes)
        assert isinstance(other, ResampledScore)
        other._inner = self._inner.altered(n_classes, **changes)
        return other

    def value(self, prediction: Tensor) -> Tensor:
        if not self.linear:
            return self._inner.value(self._resampling(prediction.double()))
        product = prediction.double() * self._linear_cotangent().to(prediction.device)
        return product.flatten(prediction.ndim - self.mask.ndim - 1).sum(-1) + self._inner.constant()

    def cotangent(self, prediction: Tensor) -> Tensor:
        if not self.linear:
            return super(WeightedScore, self).cotangent(prediction)
        return self._linear_cotangent().to(prediction)

    def window_cotangent(self, cut: Callable[[Tensor], Tensor]) -> Tensor:
        return cut(self._linear_cotangent())

    def constant(self) -> float:
        return self._inner.constant()

    def _linear_cotangent(self) -> Tensor:
        """``Rᵀ ∂s/∂(R P)``, (1, *box) float64; it is kept, because each window cuts its part from it."""
        known = self.__dict__.get("_cotangent")
        if known is None or known[0] is not self._inner:
            inner = self._inner
            at = torch.zeros((1, *inner.mask.shape), dtype=torch.float64, device=self.mask.device)
            known = self._cotangent = inner, self._resampling.adjoint(inner.cotangent(at))
        result: Tensor = known[1]
        return result
