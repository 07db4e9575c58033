"""Estimation of patterns from running sums of the inputs and outputs of one operation."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.rules.mode import local_gradient
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.weighted import apply_weights, ratio

__all__ = ["Pattern", "PatternSums"]


@dataclass(frozen=True)
class Pattern:
    """The patterns of one operation.

    Attributes:
        name: the operation (``"conv"``, ``"conv_transpose"``, ``"linear"``, or ``"add"`` and ``"sub"``).
        positive, negative: patterns in the two regimes of the following rectifier, shaped like the weights; equal if no
            rectifier follows. For a sum: the share of each operand in the variance of the sum, (2, channels).
    """

    name: str
    positive: Tensor
    negative: Tensor


class PatternSums:
    """Sums of x y, x, y and 1 over one batch, in each regime of the rectifier after an operation, in float64.

    A sum of x y over positions is the derivative of Σ y q with respect to the weights, for convolutions of every kind.
    y is measured from a pivot, its mean in the batch: if the mean is large relative to the spread, float32 would lose
    the digits that determine the covariance with x.

    Args:
        operation: a convolution or linear layer, or a sum of two tensors.
        operands: its operands.
        regime: True where the argument of the rectifier is positive, with as many elements as the output; None: no
            rectifier.
    """

    def __init__(self, operation: Operation, operands: tuple[Tensor, ...], regime: Tensor | None) -> None:
        self.operation = operation
        self.key = (operation.name, regime is not None)
        self.eps = torch.finfo(operands[0].dtype).eps
        self.xy: list[Tensor] = []
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []
        self.count: list[Tensor] = []
        if operation.name not in _WEIGHTED:
            self._take_terms(operands)
            return
        (x,) = operands
        weight = operation.argument("weight")
        y = apply_weights(operation, x, weight)
        everywhere = torch.ones_like(y)
        self.pivot = _by_neuron(operation, y) / _by_neuron(operation, everywhere).clamp(min=1)
        y = _subtract_pivot(operation, y, self.pivot)
        inside = None if regime is None else regime.reshape(y.shape)
        for mask in [everywhere] if inside is None else [inside.to(y), (~inside).to(y)]:
            self.xy.append(_weight_gradient(operation, x, weight, mask * y).double())
            self.x.append(_weight_gradient(operation, x, weight, mask).double())
            self.y.append(_by_neuron(operation, mask * y))
            self.count.append(_by_neuron(operation, mask))

    def add(self, other: PatternSums) -> None:
        """Add the sums of another batch, shifted to the pivot of this one."""
        shift = other.pivot - self.pivot
        for r, (xy, x, y, count) in enumerate(zip(other.xy, other.x, other.y, other.count)):
            if self.operation.name in _WEIGHTED:
                xy, y = xy + _spread_phases(self.operation, shift) * x, y + shift * count
            else:
                total = shift.sum(0)
                xy = xy + shift * y + total * x + count * shift * total
                x, y = x + count * shift, y + count * total
            self.xy[r] += xy
            self.x[r] += x
            self.y[r] += y
            self.count[r] += count

    def pattern(self) -> Pattern:
        """Return the pattern estimated from all batches added so far."""
        if self.operation.name not in _WEIGHTED:
            shares = self._shares()
            return Pattern(self.operation.name, shares, shares)
        weight, count = self.operation.argument("weight"), torch.stack(self.count).sum(0)
        mean_y = torch.stack(self.y).sum(0) / count.clamp(min=1)
        mean_x = torch.stack(self.x).sum(0) / _spread_phases(self.operation, count).clamp(min=1)
        taps = _sum_of_neuron(self.operation, torch.ones_like(mean_x))
        rounding = self.eps * taps.sqrt() * _sum_of_neuron(self.operation, weight.abs() * mean_x.abs())
        patterns = []
        for xy, x, y, n in zip(self.xy, self.x, self.y, self.count):
            by_x = xy - _spread_phases(self.operation, mean_y) * x
            numerator = by_x - mean_x * _spread_phases(self.operation, y - mean_y * n)
            power = _sum_of_neuron(self.operation, weight * numerator)
            constant = power <= _spread_phases(self.operation, n) * rounding.square()
            patterns.append(torch.where(constant, 0.0, ratio(numerator, power)).to(weight.dtype))
        return Pattern(self.operation.name, patterns[0], patterns[-1])

    def _take_terms(self, operands: tuple[Tensor, ...]) -> None:
        if operands[0].shape != operands[1].shape:
            raise self.operation.error("a sum of operands of different shapes is no neuron with two inputs")
        zero = torch.zeros_like(operands[0])
        terms = [self.operation.function(operands[0], zero), self.operation.function(zero, operands[1])]
        flat = torch.stack([_channels_first(term).double() for term in terms])  # (2, channels, positions)
        self.pivot = flat.mean(2)
        flat = flat - self.pivot[..., None]
        total = flat.sum(0)
        self.xy, self.x, self.y = [(flat * total).sum(2)], [flat.sum(2)], [total.sum(1)]
        self.count = [torch.full_like(self.y[0], total.shape[1])]

    def _shares(self) -> Tensor:
        covariance = self.xy[0] - self.x[0] * self.y[0] / self.count[0]
        variance = covariance.sum(0)
        rounding = self.eps * (self.pivot + self.x[0] / self.count[0]).abs().sum(0)
        shares = ratio(covariance, variance.expand_as(covariance))
        return torch.where(variance <= self.count[0] * rounding.square(), 0.0, shares)


_WEIGHTED = ("conv", "conv_transpose", "linear")


def _channels_first(x: Tensor) -> Tensor:
    """Flatten maps (n, C, …) or tokens (n, …, C) to (channels, positions)."""
    return (x.movedim(1, 0) if x.ndim > 3 else x.movedim(-1, 0)).flatten(1)


def _weight_gradient(operation: Operation, x: Tensor, weight: Tensor, cotangent: Tensor) -> Tensor:
    (gradient,) = local_gradient(lambda w: apply_weights(operation, x, w), (weight,), cotangent)
    assert gradient is not None
    return gradient


def _by_neuron(operation: Operation, y: Tensor) -> Tensor:
    """Sum over the outputs of each neuron: (phases, channels)."""
    axis = -1 if operation.name == "linear" else 1
    return torch.stack([part.movedim(axis, 0).flatten(1).double().sum(1) for part in _phases(operation, y)])


def _subtract_pivot(operation: Operation, y: Tensor, pivot: Tensor) -> Tensor:
    """Subtract from the outputs of each neuron its pivot (phases, channels)."""
    y = y.clone()
    for part, value in zip(_phases(operation, y), pivot):
        part -= value.to(y).reshape(-1, *(1,) * (0 if operation.name == "linear" else y.ndim - 2))
    return y


def _steps(operation: Operation, name: str) -> tuple[int, ...]:
    """Return a parameter of a transposed convolution, one number per axis."""
    value, axes = operation.argument(name), operation.argument("weight").ndim - 2
    return (value,) * axes if isinstance(value, int) else tuple(value) * (axes // len(tuple(value)))


def _grid(operation: Operation) -> list[tuple[int, ...]]:
    """List the phases: the outputs of a transposed convolution of stride s are sᵈ neurons that read different taps."""
    if operation.name != "conv_transpose":
        return [()]
    return list(itertools.product(*(range(s) for s in _steps(operation, "stride"))))


def _phases(operation: Operation, y: Tensor) -> list[Tensor]:
    """Return a view of the outputs of each phase."""
    if operation.name != "conv_transpose":
        return [y]
    stride, padding = _steps(operation, "stride"), _steps(operation, "padding")
    places: list[tuple[Any, ...]] = [
        (..., *(slice((phase - pad) % step, None, step) for phase, pad, step in zip(each, padding, stride)))
        for each in _grid(operation)
    ]
    return [y[place] for place in places]


def _taps(operation: Operation) -> list[Tensor]:
    """Return the mask of the taps of each phase in the kernel (*kernel); all ones if there is one phase."""
    weight = operation.argument("weight")
    kernel = weight.shape[2:]
    if operation.name != "conv_transpose":
        return [torch.ones(kernel, dtype=torch.float64, device=weight.device)]
    stride, dilation = _steps(operation, "stride"), _steps(operation, "dilation")
    masks = []
    for each in _grid(operation):
        mask = torch.ones(kernel, dtype=torch.float64, device=weight.device)
        for axis, (phase, step, apart) in enumerate(zip(each, stride, dilation)):
            hit = (torch.arange(kernel[axis], device=weight.device) * apart) % step == phase
            mask = mask * hit.reshape(-1, *(1,) * (len(kernel) - 1 - axis))
        masks.append(mask)
    return masks


def _spread_phases(operation: Operation, values: Tensor) -> Tensor:
    """Expand values (phases, output channels) to the weights of each neuron, shaped like the weight tensor."""
    weight = operation.argument("weight")
    total = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
    for value, taps in zip(values, _taps(operation)):
        if operation.name == "conv_transpose":
            groups = operation.argument("groups")
            wide = value.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
        else:
            wide = value[:, None]
        total = total + wide.reshape(*wide.shape, *(1,) * taps.ndim) * taps
    return total


def _sum_of_neuron(operation: Operation, values: Tensor) -> Tensor:
    """Sum values over the weights of each neuron; the sum appears at each of its weights."""
    sums = []
    for taps in _taps(operation):
        own = (values * taps).flatten(2).sum(2) if taps.ndim else values
        if operation.name == "conv_transpose":
            sums.append(own.reshape(operation.argument("groups"), -1, own.shape[1]).sum(1).flatten())
        else:
            sums.append(own.sum(1))
    return _spread_phases(operation, torch.stack(sums))
