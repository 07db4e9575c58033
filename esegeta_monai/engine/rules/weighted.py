"""The relevance rules of operations with weights (convolutions and linear layers): one small class per rule.

With z = Wx + b, the relevance R = z · m of an output is distributed over its inputs in proportion to their
contributions under modified weights; if the denominator is zero, R is absorbed. The docstring of each rule states the
share of input i in the relevance of output j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.errors import MethodError, UsageError

__all__ = [
    "AlphaBeta",
    "Epsilon",
    "Flat",
    "Gamma",
    "Part",
    "WSquare",
    "ZBox",
    "ZPlus",
    "apply_weights",
    "distribute_shares",
    "ratio",
]


def apply_weights(operation: Operation, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the operation with other weights: W ∗ x + b with the stride, padding, … of the original call.

    Args:
        operation: a convolution or linear layer.
        x: input, of the same shape as that of the operation.
        weight, bias: of the same shape as those of the operation.
    """
    result: Tensor = operation.func(**{**operation.arguments, "input": x, "weight": weight, "bias": bias})
    return result


@dataclass(frozen=True)
class Part:
    """A part of the input values and a part of the weights that it passes through."""

    value: Tensor
    weight: Tensor

    def contributions(self, operation: Operation) -> tuple[Tensor, Tensor]:
        """Return the value as a leaf and its contributions, of the shape of the output, connected by a graph."""
        with torch.enable_grad():
            leaf = self.value.detach().requires_grad_()
            return leaf, apply_weights(operation, leaf, self.weight)


def ratio(relevance: Tensor, total: Tensor) -> Tensor:
    """Divide ``relevance`` by ``total``, of the same shape, elementwise; 0 where the total is (almost) zero."""
    info = torch.finfo(total.dtype)
    small = total.abs() <= info.tiny / info.eps
    return torch.where(small, 0.0, relevance / torch.where(small, 1.0, total))


def distribute_shares(operation: Operation, parts: list[Part], relevance: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Return Wᵀ(R / Z) for each part, with Z the sum of all contributions and the bias.

    The ledger of the operation receives the share that the bias absorbs.

    Args:
        operation: a convolution or linear layer.
        parts: the parts of input and weights.
        relevance: R, of the shape of the output.
        bias: (output channels,), or None.

    Returns:
        One tensor per part, of the shape of the input; the relevance is its product with ``part.value``.
    """
    pairs = {i: part.contributions(operation) for i, part in enumerate(parts) if i == 0 or bool(part.value.any())}
    total = torch.stack([contribution.detach() for _, contribution in pairs.values()]).sum(0)
    offset = 0.0 if bias is None else _along_channels(operation, bias, total)
    total = total + offset
    share = ratio(relevance, total)
    operation.ledger.absorb(torch.where(share == 0, relevance, share * offset))
    arriving = {i: torch.autograd.grad(contribution, leaf, share)[0] for i, (leaf, contribution) in pairs.items()}
    return [arriving.get(i, torch.zeros_like(part.value)) for i, part in enumerate(parts)]  # a zero part adds nothing


def _along_channels(operation: Operation, bias: Tensor, like: Tensor) -> Tensor:
    if operation.name == "linear":
        return bias
    spatial = operation.argument("weight").ndim - 2
    return bias.reshape(-1, *(1,) * spatial).expand_as(like)


def _weights(operation: Operation) -> tuple[Tensor, Tensor | None]:
    return operation.argument("weight"), operation.argument("bias")


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def _negative(x: Tensor) -> Tensor:
    return x.clamp(max=0)


@dataclass(frozen=True)
class Epsilon:
    """R_i = Σ_j x_i w_ij / (z_j + ε sign z_j) R_j (Bach 2015); ε = 0 is LRP-0. ε and b absorb the rest."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise UsageError(f"epsilon={self.epsilon}: it cannot be negative, or the denominator would meet zero")

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, bias = _weights(operation)
        leaf, z = Part(operands[0], weight).contributions(operation)
        offset = torch.zeros_like(z) if bias is None else _along_channels(operation, bias, z)
        total = z.detach() + offset
        stabiliser = self.epsilon * torch.where(total < 0, -1.0, 1.0).to(total.dtype)
        kept = gradient if self.epsilon == 0 else gradient * (total / (total + stabiliser))
        operation.ledger.absorb(kept * offset + (gradient - kept) * total)
        return torch.autograd.grad(z, leaf, kept)


@dataclass(frozen=True)
class Gamma:
    """R_i = Σ_j (c_ij + γ c_ij⁺) / Σ_i (…) R_j with c_ij = x_i w_ij; the favoured sign is that of z_j.

    This is the rule of Montavon 2019 for x ≥ 0. For inputs of both signs, a positive output favours its positive
    contributions and a negative output its negative ones.
    """

    gamma: float = 0.25

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise UsageError(f"gamma={self.gamma}: it cannot be negative, since it favours a sign")

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = operands
        weight, bias = _weights(operation)
        z = apply_weights(operation, x, weight, bias)
        result = torch.zeros_like(x)
        for favoured, other, outputs in ((_positive, _negative, z > 0), (_negative, _positive, z < 0)):
            raised = [weight + self.gamma * favoured(weight), weight + self.gamma * other(weight)]
            parts = [Part(x.clamp(min=0), raised[0]), Part(x.clamp(max=0), raised[1])]
            raised_bias = None if bias is None else bias + self.gamma * favoured(bias)
            relevance = torch.where(outputs, z * gradient, 0.0)
            positive, negative = distribute_shares(operation, parts, relevance, raised_bias)
            result = result + torch.where(x > 0, positive, 0.0) + torch.where(x < 0, negative, 0.0)
        return (result,)


@dataclass(frozen=True)
class AlphaBeta:
    """R_i = Σ_j (α c_ij⁺ / Σ_i c_ij⁺ − β c_ij⁻ / Σ_i c_ij⁻) R_j with c_ij = x_i w_ij and α − β = 1 (Bach 2015)."""

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise UsageError(f"alpha={self.alpha}, beta={self.beta}: alpha - beta must be 1, and beta not negative")

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = operands
        weight, bias = _weights(operation)
        relevance = apply_weights(operation, x, weight, bias) * gradient
        result = torch.zeros_like(x)
        for factor, same, other in ((self.alpha, _positive, _negative), (-self.beta, _negative, _positive)):
            if factor == 0:
                continue
            parts = [Part(x.clamp(min=0), same(weight)), Part(x.clamp(max=0), other(weight))]
            positive, negative = distribute_shares(
                operation, parts, factor * relevance, None if bias is None else same(bias)
            )
            result = result + torch.where(x > 0, positive, 0.0) + torch.where(x < 0, negative, 0.0)
        return (result,)


@dataclass(frozen=True)
class ZPlus(AlphaBeta):
    """R_i = Σ_j c_ij⁺ / Σ_i c_ij⁺ R_j: only inputs that raise an output share its relevance (α = 1, β = 0)."""

    alpha: float = 1.0
    beta: float = 0.0


class _Direct:
    """Base of rules that return relevance instead of a multiplier: x · m cannot express relevance where x = 0."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = operands
        weight, bias = _weights(operation)
        relevance = apply_weights(operation, x, weight, bias) * gradient
        operation.ledger.direct.append((x, self.distribute(operation, x.detach(), weight, relevance)))
        return (None,)

    def distribute(self, operation: Operation, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
        """Return the relevance of each input, of the shape of x."""
        raise NotImplementedError


@dataclass(frozen=True)
class Flat(_Direct):
    """R_i = Σ_j 1 / n_j R_j: equal shares for the n_j inputs that output j reads. For the first layer."""

    def distribute(self, operation: Operation, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
        (result,) = distribute_shares(operation, [Part(torch.ones_like(x), torch.ones_like(weight))], relevance, None)
        return result


@dataclass(frozen=True)
class WSquare(_Direct):
    """R_i = Σ_j w_ij² / Σ_i w_ij² R_j (Montavon 2017), for a first layer that reads unbounded real values."""

    def distribute(self, operation: Operation, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
        (result,) = distribute_shares(operation, [Part(torch.ones_like(x), weight.square())], relevance, None)
        return result


@dataclass(frozen=True)
class ZBox(_Direct):
    """R_i = Σ_j (x_i w_ij − l w_ij⁺ − h w_ij⁻) / Σ_i (…) R_j for l ≤ x_i ≤ h (Montavon 2017). For the first layer."""

    low: float | Tensor
    high: float | Tensor

    def distribute(self, operation: Operation, x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
        low, high = (torch.ones_like(x) * bound for bound in (self.low, self.high))
        if bool((x < low).any() | (x > high).any()):
            raise MethodError(
                f"ZBox: the input values from {float(x.min()):.4g} to {float(x.max()):.4g} are outside of its box: "
                "give low and high that include them, or neither, which takes the range of the image"
            )
        parts = [Part(x, weight), Part(low, -weight.clamp(min=0)), Part(high, -weight.clamp(max=0))]
        return sum(
            part.value * multiplier
            for part, multiplier in zip(parts, distribute_shares(operation, parts, relevance, None))
        )  # type: ignore[return-value]
