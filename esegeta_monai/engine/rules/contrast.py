"""Contrast: the evidence for a target minus the evidence for its opposite.

The opposite is the same network with the signs of the last weights changed. Both sides are traced through one graph.
They are returned separately, because the maps of all windows have to be added before the contrast is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.rules.composites import Composite
from esegeta_monai.engine.rules.excitation import Probabilities, Side
from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.lrp import composite_run, relevance_of
from esegeta_monai.engine.rules.mode import Rule
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.run import Compare, Forward, Run
from esegeta_monai.engine.rules.weighted import ZPlus
from esegeta_monai.errors import MethodError

__all__ = ["Sides", "contrastive_excitation", "contrastive_lrp", "layer_contrast"]


@dataclass(frozen=True)
class Sides:
    """A target and its opposite.

    Attributes:
        target, opposite: probability or relevance of the input, (k, n, C, *roi), or of a layer's output, (k, n, …).
        kept: (2, k) for target and opposite, summed over windows, float64. Excitation: the probability that the last
            operations with weights pass on. LRP: the relevance that biases and other constants absorb.
        total: (k,), summed over windows, float64: the start of each side, the prior or Σ y · cotangent.
    """

    target: Tensor
    opposite: Tensor
    kept: Tensor
    total: Tensor


def contrastive_excitation(forward: Forward, x: Tensor, cotangents: Tensor, *, compare: Compare = True) -> Sides:
    """Compute both sides of contrastive excitation backpropagation (Zhang et al. 2018).

    With T, A the maps of the two sides, summed over all windows, and t, a their ``kept``, the contrast is
    Σ prior · (T / t − A / a): Zhang normalises the two at the layer below the last weights and propagates their
    difference by rules that are linear in it.

    The arguments are those of :func:`esegeta_monai.engine.rules.excitation`: windows (n, C, *roi), cotangents
    (k, n, K, …). The sides are exchanged if the cotangents are negative.

    Raises:
        MethodError: a target rises with some outputs and falls with others.

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    >>> contrastive_excitation(net, torch.rand(1, 3), torch.tensor([[[0.0, 1.0]]])).kept.shape
    torch.Size([2, 1])
    """
    side = Side()
    run = Run(forward, x, Probabilities(side), compare=compare)
    _mark_top(run.output.grad_fn)
    falls = _falls(cotangents)
    cotangents = cotangents.abs()
    traced, kept = [], []
    for second in (False, True):
        arriving = []
        for i, cotangent in enumerate(cotangents):
            side.lost, side.opposite = 0.0, second != falls[i]
            arriving += [values for values, _, _ in run.backward(cotangents[i : i + 1])]
            kept.append(cotangent.sum(dtype=torch.float64) - side.lost)
        traced.append(torch.stack(arriving))
    return Sides(
        traced[0], traced[1], torch.stack(kept).reshape(2, -1), cotangents.flatten(1).sum(1, dtype=torch.float64)
    )


def layer_contrast(
    forward: Forward,
    x: Tensor,
    cotangents: Tensor,
    layers: Mapping[str, nn.Module],
    layer: str,
    contrast: str,
    *,
    compare: Compare = True,
) -> Sides:
    """Compute both sides of contrastive excitation backpropagation at the output of a layer.

    The side of the opposite is the part that passes through another layer, the contrast layer: the probability that
    arrives there, traced further down to the layer.

    Args:
        forward, x, compare: as in :func:`contrastive_excitation`, windows (n, C, *roi).
        cotangents: (k, n, K, …), not negative.
        layers: both layers by name.
        layer: name of the layer that is read.
        contrast: name of the contrast layer; it may be the same.

    Returns:
        Both sides at the layer, (k, n, …), see :class:`Sides`.

    Raises:
        MethodError: the contrast layer does not lie between the layer and the output.

    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    >>> c, named = torch.tensor([[[0.0, 1.0]]]), {"0": net[0], "1": net[1]}
    >>> layer_contrast(net, torch.rand(1, 3), c, named, "0", "1").opposite.shape
    torch.Size([1, 1, 4])
    """
    side = Side()
    run = Run(forward, x, Probabilities(side), layers=layers, compare=compare)
    _mark_top(run.output.grad_fn)
    targets, opposites, kept = [], [], []
    for second in (False, True):
        for cotangent in cotangents:
            side.lost, side.opposite = 0.0, second
            (arriving,) = [at for _, at, _ in run.backward(cotangent[None])]
            kept.append(cotangent.sum(dtype=torch.float64) - side.lost)
            if not second:
                targets.append(arriving[layer])
            elif layer == contrast:
                opposites.append(arriving[layer])
            else:
                opposites.append(_traced_down(run, arriving[contrast], contrast, layer))
    total = cotangents.flatten(1).sum(1, dtype=torch.float64)
    return Sides(torch.stack(targets), torch.stack(opposites), torch.stack(kept).reshape(2, -1), total)


def _traced_down(run: Run, arriving: Tensor, above: str, below: str) -> Tensor:
    """Trace a signal (n, …) at the output of one layer down to that of another (n, …)."""
    upper, lower = run.captured[above], run.captured[below]
    traced = None
    if upper.requires_grad and lower.requires_grad:
        with torch.inference_mode(False):
            (traced,) = torch.autograd.grad(upper, [lower], arriving, retain_graph=True, allow_unused=True)
    if traced is None:
        raise MethodError(
            f"the contrast layer {above!r} does not depend on layer {below!r}: name the layer itself, or one between "
            "it and the output"
        )
    return traced


def contrastive_lrp(
    forward: Forward, x: Tensor, cotangents: Tensor, composite: Composite, *, compare: Compare = True
) -> Sides:
    """Compute both sides of contrastive LRP (Gu et al. 2018, CLRP2): relevance R, and R_dual of the opposite.

    Both sides start with the same relevance y · cotangent. The last operations with weights distribute it by z⁺, for
    the opposite under −W and −b; the composite's rules apply below. On each side, input relevance and absorbed
    relevance add up to Σ y · cotangent. The contrast is R − R_dual.

    The arguments are those of :func:`esegeta_monai.engine.rules.lrp`: windows (n, C, *roi), cotangents (k, n, K, …).
    The sides are exchanged if the cotangents are negative.

    Raises:
        MethodError: a target rises with some outputs and falls with others.

    >>> from esegeta_monai.engine.rules.composites import composite_of
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).double().eval()
    >>> x, c = torch.rand(1, 3, dtype=torch.float64), torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    >>> sides = contrastive_lrp(net, x, c, composite_of("DeepTaylor"))
    >>> bool((sides.target.sum() + sides.kept[0] - net(x)[0, 1]).abs() < 1e-9)
    True
    """
    side = Side()
    places = {name: getattr(composite, name) for name in ("convolution", "dense", "first")}
    run = composite_run(
        forward,
        x,
        Composite(**{name: rule and _TopRule(rule, side) for name, rule in places.items()}),
        {},
        compare,
    )
    _mark_top(run.output.grad_fn)
    traced, kept = [], []
    for side.opposite in (False, True):
        results = list(relevance_of(run, cotangents))
        traced.append(torch.stack([relevance[""] for _, _, relevance in results]))
        kept.append(torch.stack([absorbed for absorbed, _, _ in results]).double())
    total = (run.output.detach() * cotangents).flatten(1).sum(1, dtype=torch.float64)
    for k, falls in enumerate(_falls(cotangents)):
        if falls:
            for sides in (traced, kept):
                sides[0][k], sides[1][k] = sides[1][k].clone(), sides[0][k].clone()
    return Sides(traced[0], traced[1], torch.stack(kept), total)


def _falls(cotangents: Tensor) -> list[bool]:
    """Return for each target whether it falls with the outputs that it reads.

    Raises:
        MethodError: a target rises with some outputs and falls with others.
    """
    falls = [bool((c < 0).any()) for c in cotangents]
    if any(f and bool((c > 0).any()) for f, c in zip(falls, cotangents)):
        raise MethodError(
            "the opposite of a target has the last weights with the other sign, and this target rises with some "
            "outputs and falls with others: explain them one by one, or use LRP"
        )
    return falls


@dataclass(frozen=True)
class _TopRule:
    """z⁺ of W or of −W at the last operations with weights, and another rule below them."""

    below: Rule
    side: Side

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        if not operation.is_top:
            return self.below.backward(operation, operands, gradient)
        if not self.side.opposite:
            return ZPlus().backward(operation, operands, gradient)
        # y · m = (−y) · (−m): the relevance stays the same, and the negated weights distribute it
        return ZPlus().backward(_negated(operation), operands, -gradient)


def _negated(operation: Operation) -> Operation:
    bias = operation.argument("bias")
    changed = {"weight": -operation.argument("weight"), "bias": None if bias is None else -bias}
    return replace(operation, args=(), kwargs={**operation.arguments, **changed})


def _mark_top(output: Any) -> None:
    """Mark the operations after which no operation with weights follows, walking the graph from the output."""
    above, first = _reach([output], _has_weights)
    behind, _ = _reach([child for node in first for child, _ in node.next_functions], lambda _: False)
    for node in (above | first) - behind:
        operation = getattr(node, "operation", None)
        if operation is not None:
            operation.is_top = True


def _reach(start: Iterable[Any], stop: Callable[[Any], bool]) -> tuple[set[Any], set[Any]]:
    """Return the nodes reached from ``start`` before one for which ``stop`` is True, and the nodes where it is."""
    passed: set[Any] = set()
    stopped: set[Any] = set()
    waiting = list(start)
    while waiting:
        node = waiting.pop()
        if node is None or node in passed or node in stopped:
            continue
        if stop(node):
            stopped.add(node)
        else:
            passed.add(node)
            waiting.extend(child for child, _ in node.next_functions)
    return passed, stopped


def _has_weights(node: Any) -> bool:
    return getattr(getattr(node, "operation", None), "kind", None) in (Kind.CONVOLUTION, Kind.DENSE)
