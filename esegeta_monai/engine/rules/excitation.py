"""Excitation backpropagation: the probability that a winner drawn at the output is traced to each voxel.

The backward pass carries probabilities instead of gradients. An operation distributes the probability of each output
over its inputs in proportion to their excitatory contributions; a single parent receives all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from esegeta_monai.engine.rules.guided import layer_relevance
from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import PARTS, PLAIN, Treatment, local_gradient
from esegeta_monai.engine.rules.operations import Operation, map_tensors
from esegeta_monai.engine.rules.run import Compare, Forward, Relevance, Run
from esegeta_monai.engine.rules.weighted import Part, distribute_shares, ratio
from esegeta_monai.errors import UsageError

__all__ = ["ContributionsRule", "ParentRule", "Probabilities", "Side", "SumRule", "WinnerRule", "excitation"]

_ELEMENTWISE = frozenset({"mul", "div", "neg", "add", "sub", "rsub", "batch_norm", "instance_norm"})
_MATRIX = frozenset({"matmul", "rmatmul", "mm", "bmm", "mv", "dot", "inner", "outer", "einsum"})


@dataclass(eq=False)
class Side:
    """The side of a contrast: the target or its opposite, for which the last weights change their sign.

    Attributes:
        opposite: True for the opposite.
        lost: probability that reached the last operations with weights and that they could give to no input.
    """

    opposite: bool = False
    lost: Tensor | float = 0.0

    def sign(self, operation: Operation) -> int:
        """Return −1 for the last operations with weights on the side of the opposite, else 1."""
        return -1 if self.opposite and operation.is_top else 1


@dataclass(frozen=True)
class WinnerRule:
    """Rule P_i = Σ_j c_ij⁺ / Σ_i c_ij⁺ P_j with c_ij = x_i w_ij: inputs that raise an output share its probability.

    For x ≥ 0 these are the excitatory weights w⁺ of Zhang et al. 2018; a negative input excites through a negative
    weight.
    """

    side: Side = field(default_factory=Side)

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = operands
        weight = self.side.sign(operation) * operation.argument("weight")
        parts = [Part(x.clamp(min=0), weight.clamp(min=0)), Part(x.clamp(max=0), weight.clamp(max=0))]
        shares = distribute_shares(operation, parts, gradient, None)
        traced = parts[0].value * shares[0] + parts[1].value * shares[1]
        if operation.is_top:
            per_target = (gradient.sum(dtype=torch.float64), traced.sum(dtype=torch.float64))
            self.side.lost = self.side.lost + per_target[0] - per_target[1]
        return (traced,)


class ParentRule:
    """Rule for elementwise operations: each output has one parent per operand, and the parents share equally."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        return tuple((gradient / len(operands)).sum_to_size(operand.shape) for operand in operands)


@dataclass(frozen=True)
class SumRule:
    """Rule for a sum of operands (a skip connection).

    The positive terms share P in proportion to their values; if none is positive, all terms share it in proportion to
    their magnitudes.
    """

    side: Side = field(default_factory=Side)

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        zeros = [torch.zeros_like(operand) for operand in operands]
        terms = [operation.function(*zeros[:i], operand, *zeros[i + 1 :]) for i, operand in enumerate(operands)]
        terms = [self.side.sign(operation) * term for term in terms]
        positive = [term.clamp(min=0) for term in terms]
        none = torch.stack(positive).sum(0) == 0
        shares = [torch.where(none, term.abs(), raised) for term, raised in zip(terms, positive)]
        per_unit = ratio(gradient, torch.stack(shares).sum(0))
        return tuple((per_unit * share).sum_to_size(operand.shape) for share, operand in zip(shares, operands))


@dataclass(frozen=True)
class ContributionsRule:
    """Rule for a linear operation with known coefficients (pooling, interpolation, a product of matrices).

    P_i = Σ_j c_ij⁺ / Σ_i c_ij⁺ P_j; if no contribution is positive, in proportion to |c_ij|. If both factors of a
    product of matrices depend on the input, each receives half.
    """

    side: Side = field(default_factory=Side)

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        operands = (self.side.sign(operation) * operands[0], *operands[1:])
        first = _signed_constants(operation) if operation.name in _MATRIX else [operation.function]
        if len(first) == 2:  # x⁺ through W⁺ and x⁻ through W⁻
            pairs = [(first[0], [x.clamp(min=0) for x in operands]), (first[1], [x.clamp(max=0) for x in operands])]
            across = [(first[1], pairs[0][1]), (first[0], pairs[1][1])]
        elif len(operands) == 2:
            up, down = [x.clamp(min=0) for x in operands], [x.clamp(max=0) for x in operands]
            pairs = [(first[0], up), (first[0], down)]
            across = [(first[0], [up[0], down[1]]), (first[0], [down[0], up[1]])]
        else:
            pairs = [(first[0], [x.clamp(min=0) for x in operands])]
            across = [(first[0], [x.clamp(max=0) for x in operands])]
        raised = torch.stack([function(*values) for function, values in pairs]).sum(0)
        lowered = torch.stack([function(*values) for function, values in across]).sum(0)
        result = [torch.zeros_like(x) for x in operands]
        for chosen, total, outputs in ((pairs, raised, raised > 0), (across, lowered, raised <= 0)):
            share = ratio(torch.where(outputs, gradient, 0.0), total) / len(operands)
            for function, values in chosen:
                for i, arriving in enumerate(local_gradient(function, values, share)):
                    assert arriving is not None
                    result[i] = result[i] + values[i] * arriving
        return tuple(result)


def _signed_constants(operation: Operation) -> list[Callable[..., Tensor]]:
    """Return the operation with only the positive, then only the negative entries of its constant matrix.

    An operation without a constant is returned alone.
    """
    constants: list[Tensor] = []
    map_tensors(constants.append, (operation.args, operation.kwargs))
    if not constants:
        return [operation.function]

    def with_constants(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        args, kwargs = map_tensors(change, operation.args), map_tensors(change, operation.kwargs)
        changed = Operation(operation.name, operation.func, args, kwargs, operation.in_place)
        return changed.function

    return [with_constants(lambda c: c.clamp(min=0)), with_constants(lambda c: c.clamp(max=0))]


@dataclass(frozen=True)
class Probabilities:
    """The rules of excitation backpropagation, for one side of a contrast or for the target alone."""

    side: Side = field(default_factory=Side)
    family: str = "excitation"

    def treatment(self, operation: Operation) -> Treatment:
        kind, name = operation.kind, operation.name
        if kind in (Kind.CONVOLUTION, Kind.DENSE):
            return WinnerRule(self.side)
        if kind in (Kind.MOVE, Kind.MAXIMUM):
            return PLAIN  # the adjoint of a move reverses it; the winner of a maximum receives all
        if kind is Kind.COMPOSITE:
            return PARTS
        if kind in (Kind.ACTIVATION, Kind.UNIVARIATE, Kind.NORM) or (kind is Kind.SOFTMAX and name != "logsumexp"):
            return ParentRule()
        operands = len(list(operation.slots()))
        if name == "mul" or (name in _ELEMENTWISE and operands == 1):
            return ParentRule()
        if name in ("add", "sub", "rsub"):
            return SumRule(self.side)
        known = name in _MATRIX or (kind is Kind.LINEAR and operands == 1 and not name.startswith("add"))
        if not known or operation.argument("mode") == "bicubic" or name in ("conv", "conv_transpose", "lerp"):
            raise operation.error("excitation has no rule for it")
        return ContributionsRule(self.side)


def excitation(
    forward: Forward,
    x: Tensor,
    cotangents: Tensor,
    *,
    layers: Mapping[str, nn.Module] | None = None,
    compare: Compare = True,
) -> Relevance:
    """Compute excitation backpropagation: marginal winning probabilities (Zhang et al. 2018).

    Activations, norms and gates pass their probability on unchanged; convolutions and linear layers share it among the
    inputs that raise the output; each factor of a product receives half. Biases receive nothing.

    Args:
        forward: maps windows (n, C, *roi) to outputs (n, K, …).
        x: windows (n, C, *roi), float32 or float64.
        cotangents: prior over outputs, (k, n, K, …): ∂s/∂y of a linear s; a prior of 1 at one class gives
            probabilities.
        layers: modules whose outputs receive probabilities as well.
        compare: check of the output, see `esegeta_monai.engine.rules.run.Compare`.

    Returns:
        ``input`` (k, n, C, *roi): share of the prior that is traced to each voxel; ``absorbed`` (k, n): share that no
        input receives (a winner that only its bias raises, a constant).

    Raises:
        UsageError: cotangents for another number of windows.
        RuleError: an operation has no rule.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    >>> result = excitation(net, torch.rand(1, 3), torch.tensor([[[0.0, 1.0]]]))
    >>> bool((result.input.sum() + result.absorbed - 1).abs() < 1e-5)
    True
    """
    if cotangents.shape[1] != len(x):
        raise UsageError(f"cotangents for {cotangents.shape[1]} windows, {len(x)} windows given")
    run = Run(forward, x, Probabilities(), layers=layers, compare=compare)
    traced = [(arriving, at_layers) for arriving, at_layers, _ in run.backward(cotangents, ends=True)]
    result = torch.stack([arriving for arriving, _ in traced])
    values = [at_layers for _, at_layers in traced]
    probabilities = {name: torch.stack([value[name] for value in values]) for name in run.captured}
    sums = (each.reshape(*each.shape[:2], -1).sum(2) for each in (cotangents, result))
    absorbed = next(sums) - next(sums)
    at = layer_relevance(run.captured, values, probabilities)
    return Relevance(result, absorbed.to(result.dtype), run.output.detach(), at)
