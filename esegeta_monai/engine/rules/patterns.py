"""Patterns: the direction of the signal in the input of a linear neuron, estimated from data (Kindermans et al. 2018).

A filter w shows how a neuron cancels distractors, not the direction of its signal. For y = wᵀx the signal in x is a·y
with the pattern a = cov(x, y) / var(y), the direction in which the data vary with y; wᵀa = 1. If a rectifier follows,
each regime r of its argument has its own pattern (the estimator S_{a+-}):

    a_r = E_r[(x − E[x]) (y − E[y])] / E_r[(y − E[y])²]

For inputs of zero mean this equals the paper's (E_r[x y] − E_r[x] E[y]) / wᵀ(…). For other inputs, the paper's
denominator is E_r[y (y − E[y])], which is negative for many neurons of networks with biases and batch norms (in the
positive regime for 31 of 176 filters of a small trained network). In both forms, the numerators of the two regimes add
up to cov(x, y).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import PARTS, PLAIN, Treatment, local_gradient
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.pattern_sums import Pattern, PatternSums
from esegeta_monai.engine.rules.run import Compare, Forward, Run
from esegeta_monai.engine.rules.weighted import apply_weights, ratio
from esegeta_monai.errors import MethodError

__all__ = ["Pattern", "PatternFit", "Way", "back_project"]

Way = Literal["signal", "attribution"]


def back_project(
    forward: Forward,
    x: Tensor,
    cotangents: Tensor,
    patterns: list[Pattern | None],
    way: Way,
    *,
    compare: Compare = True,
) -> Tensor:
    """Propagate y · cotangent to the input, (k, n, C, *roi), with patterns in place of weights.

    Args:
        forward: maps windows (n, C, *roi) to outputs (n, K, …).
        x: windows (n, C, *roi), float32 or float64.
        cotangents: ∂s/∂y of a linear s, (k, n, K, …).
        patterns: patterns of the operations in the order in which they run, from `PatternFit.patterns`.
        way: ``"signal"`` propagates a · g (PatternNet), ``"attribution"`` w ⊙ a · g (PatternAttribution).
        compare: check of the output, see `esegeta_monai.engine.rules.run.Compare`.

    Raises:
        MethodError: the patterns belong to another network or output.
        RuleError: an operation is no linear neuron, such as a product of two tensors (attention).
    """
    rules = _Patterns(way, patterns)
    run = Run(forward, x, rules, compare=compare)
    if len(rules.neurons) != len(patterns):
        raise MethodError(f"the network has {len(rules.neurons)} operations with patterns, {len(patterns)} were fitted")
    for neuron, pattern in zip(_linked(run, rules.neurons), patterns):
        if neuron is not None and pattern is None:
            raise MethodError("the patterns were fitted for another output of the network: fit them for this target")
        if neuron is not None:
            neuron.rule.regime = neuron.regime
    start = cotangents * run.output.detach()
    return torch.stack([arriving for arriving, _, _ in run.backward(start, ends=True)])


class PatternFit:
    """Estimator of patterns from batches of windows.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU(), torch.nn.Conv2d(2, 1, 3)).eval()
    >>> fit = PatternFit()
    >>> fit.add(net, torch.rand(4, 1, 8, 8))
    >>> [tuple(pattern.positive.shape) for pattern in fit.patterns()]
    [(2, 1, 3, 3), (1, 2, 3, 3)]
    """

    def __init__(self) -> None:
        self._sums: list[PatternSums | None] = []

    def add(self, forward: Forward, x: Tensor, *, compare: Compare = True) -> None:
        """Add one batch of windows; if memory runs out, the sums stay as they were.

        Args:
            forward: maps windows (n, C, *roi) to outputs (n, K, …).
            x: windows (n, C, *roi).
            compare: check of the output, see `esegeta_monai.engine.rules.run.Compare`.

        Raises:
            MethodError: the network runs other operations than for earlier batches.
        """
        rules = _Patterns("signal", None)
        run = Run(forward, x, rules, compare=compare)
        batch_sums: list[PatternSums | None] = []
        for neuron in _linked(run, rules.neurons):
            batch_sums.append(None if neuron is None else PatternSums(neuron.operation, neuron.operands, neuron.regime))
        if not self._sums:
            self._sums = batch_sums
            return
        if [s and s.key for s in batch_sums] != [s and s.key for s in self._sums]:
            raise MethodError("the network runs other operations on this window than on the first: no patterns for it")
        for total, new in zip(self._sums, batch_sums):
            if total is not None and new is not None:
                total.add(new)

    def patterns(self) -> list[Pattern | None]:
        """Return the patterns of all operations in the order in which they run; None for those unused by the output.

        A neuron whose output varies by no more than rounding has a pattern of zeros.
        """
        return [None if sums is None else sums.pattern() for sums in self._sums]


# -- the backward pass ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _NeuronRule:
    """Rule for a linear neuron: g_in = Aᵀ g, or (W ⊙ A)ᵀ g, with the pattern A of the regime of each output."""

    way: Way
    pattern: Pattern | None
    regime: Tensor | None = None

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert self.pattern is not None
        (x,) = operands
        weight = operation.argument("weight")
        if self.pattern.positive.shape != weight.shape or self.pattern.name != operation.name:
            raise operation.error(
                f"its pattern is of shape {tuple(self.pattern.positive.shape)}: fit the patterns again"
            )
        parts = [(self.pattern.positive, gradient)]
        if self.regime is not None:
            inside = self.regime.reshape(gradient.shape)
            parts = [(self.pattern.positive, gradient * inside), (self.pattern.negative, gradient * ~inside)]
        total = torch.zeros_like(x)
        for pattern, part in parts:
            factors = pattern.to(weight) * (weight if self.way == "attribution" else 1)
            if bool(part.any()):
                (arriving,) = local_gradient(lambda z, f=factors: apply_weights(operation, z, f), (x,), part)
                assert arriving is not None
                total = total + arriving
        return (total,)


@dataclass(eq=False)
class _SumRule(_NeuronRule):
    """Rule for u + v, a neuron with two inputs: each receives its share of the variance of the sum."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert self.pattern is not None
        coefficients = local_gradient(operation.function, operands, torch.ones_like(gradient))
        result = []
        for share, coefficient in zip(self.pattern.positive, coefficients):
            assert coefficient is not None
            part = gradient * _align_channels(share.to(gradient), gradient)
            result.append(part / coefficient if self.way == "signal" else part)
        return tuple(result)


@dataclass(frozen=True)
class _ScaleRule:
    """Rule for elementwise z = s · y + b: the only pattern with s · a = 1 is 1 / s."""

    way: Way

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        if self.way == "attribution":
            return (gradient,)
        return (ratio(gradient, _scale(operation, operands[0]).expand_as(gradient)),)


class _DerivativeRule:
    """The plain derivative as a node of its own, so that `_linked` recognises rectifiers in the graph."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        return local_gradient(operation.function, operands, gradient)


@dataclass
class _Patterns:
    way: Way
    patterns: list[Pattern | None] | None
    neurons: list[tuple[Operation, _NeuronRule]] = field(default_factory=list)
    family: str = "patterns"

    def treatment(self, operation: Operation) -> Treatment:
        kind, name = operation.kind, operation.name
        operands = len(list(operation.slots()))
        summed = kind is Kind.LINEAR and name in ("add", "sub", "rsub") and operands == 2
        if summed or kind in (Kind.CONVOLUTION, Kind.DENSE):
            i = len(self.neurons)
            pattern = self.patterns[i] if self.patterns is not None and i < len(self.patterns) else None
            rule = (_SumRule if summed else _NeuronRule)(self.way, pattern)
            self.neurons.append((operation, rule))
            return rule
        if name == "batch_norm" or name in ("instance_norm", "group_norm"):
            return _ScaleRule(self.way)
        if kind in (Kind.PRODUCT, Kind.SOFTMAX, Kind.NORM):
            why = "each factor scales the other" if kind is Kind.PRODUCT else "it divides by what it is computed from"
            raise operation.error(f"it is no linear neuron ({why}), so it has no pattern")
        if kind is Kind.ACTIVATION:
            return _DerivativeRule()
        return PARTS if kind is Kind.COMPOSITE else PLAIN


def _scale(operation: Operation, x: Tensor) -> Tensor:
    """Return γ / σ of a batch, instance or group norm per window and channel, (n or 1, C, 1, …)."""
    weight, eps = operation.argument("weight"), operation.argument("eps", 1e-5)
    variance = operation.argument("running_var")
    if operation.name == "batch_norm" or operation.argument("use_input_stats") is False:
        scale = (variance + eps).rsqrt()[None]
    else:
        groups = operation.argument("num_groups", x.shape[1])
        scale = (x.reshape(len(x), groups, -1).var(2, unbiased=False) + eps).rsqrt()
        scale = scale.repeat_interleave(x.shape[1] // groups, 1)
    scale = scale if weight is None else scale * weight
    return scale.reshape(*scale.shape, *(1,) * (x.ndim - 2))


def _align_channels(per_channel: Tensor, like: Tensor) -> Tensor:
    """Align values per channel (C,) with axis 1 of maps, or with the last axis of vectors and tokens."""
    return per_channel if like.ndim < 4 else per_channel.reshape(-1, *(1,) * (like.ndim - 2))


# -- the rectifier that follows a neuron -----------------------------------------------------------------------------

#: Nodes of autograd's graph that move elements, and nodes that scale or shift each element.
_MOVES = ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Permute", "Transpose", "T")
_SCALINGS = ("Mul", "Div", "Add", "Sub", "Rsub", "Neg", "Clone", "Alias", "ToCopy")


@dataclass(frozen=True)
class _Neuron:
    operation: Operation
    rule: _NeuronRule
    operands: tuple[Tensor, ...]
    regime: Tensor | None


def _linked(run: Run, neurons: list[tuple[Operation, _NeuronRule]]) -> Iterator[_Neuron | None]:
    """Yield each neuron with its operands and regime, or None if the output does not depend on it.

    The regime is True where the argument of the following rectifier is positive. Only norms, scalings by constants and
    moves of all elements may come between the neuron and the rectifier.
    """
    by_operation: dict[int, Any] = {}
    activations: list[Any] = []
    waiting, seen = [run.output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting.extend(child for child, _ in node.next_functions)
        operation = getattr(node, "operation", None)
        if operation is not None:
            by_operation[id(operation)] = node
            if operation.kind is Kind.ACTIVATION:
                activations.append(node)
    behind: dict[int, Tensor] = {}
    for node in activations:
        below: Any = node
        regime = node.saved_tensors[0] > 0
        while True:
            children = [child for child, _ in below.next_functions if child is not None]
            if len(children) != 1:
                break
            below = children[0]
            operation = getattr(below, "operation", None)
            if operation is None:
                kind = below.name().rstrip("0123456789").removesuffix("Backward")
                if kind in _MOVES:
                    regime = below(regime.to(run.output.dtype)) > 0  # undo the move
                elif kind not in _SCALINGS:
                    break
                continue
            if operation.kind in (Kind.CONVOLUTION, Kind.DENSE):
                behind[id(operation)] = regime
            if operation.kind is not Kind.NORM and operation.name != "batch_norm":
                break
    for operation, rule in neurons:
        node = by_operation.get(id(operation))
        if node is None:
            yield None
            continue
        operands = tuple(operand.detach() for operand in node.saved_tensors)
        regime = behind.get(id(operation))
        if regime is not None and regime.shape != operation.function(*operands).shape:
            regime = None  # a scaling by a larger tensor
        yield _Neuron(operation, rule, operands, regime)
