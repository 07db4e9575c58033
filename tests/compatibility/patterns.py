"""PatternNet and PatternAttribution (Kindermans et al. 2018) by hooks on autograd's graph, through MONAI's inferer.

Nothing of `esegeta_monai.engine.rules` is used: the operations are read off the graph, patterns are estimated tap by
tap from centred inputs and outputs,

    a_r = Σ_r (x − E x)(y − E y) / Σ_r (y − E y)²,   r: the sign of the argument of the rectifier after y = wᵀx,

and replace the weights in the backward pass of the whole inferer, which starts with y · ∂s/∂y.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.compatibility.graph import RECTIFIERS, kind_of, nodes_of, written_out

__all__ = ["Patterned"]

_WEIGHTED = ("Convolution", "Addmm", "Mm")
_SUMS = ("Add", "Sub")
_NORMS = ("NativeBatchNorm", "NativeGroupNorm")
_PRODUCTS = ("Mul", "Div", "Bmm", "Softmax")
# Their derivative is their rule.
_PLAIN = (
    *("View", "Clone", "Cat", "Stack", "Squeeze", "Unsqueeze", "Repeat", "ReplicationPad2D", "ReplicationPad3D"),
    *("AvgPool2D", "AvgPool3D", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "Mean"),
    *("UpsampleBilinear2D", "UpsampleTrilinear3D", "UpsampleNearest2D", "UpsampleNearest3D"),
    "torch::autograd::AccumulateGrad",
)


class _Values(TorchFunctionMode):
    """Mode that keeps the outputs of every node, by node and number of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[tuple[Any, int], Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor) and each.grad_fn is not None:
                self.of[each.grad_fn, each.output_nr] = each.detach().clone()
        return result


@dataclass
class _Call:
    """One call of the network: its graph, and the outputs of its nodes."""

    output: Tensor
    values: dict[tuple[Any, int], Tensor]

    @cached_property
    def nodes(self) -> list[Any]:
        return nodes_of(self.output)

    @property
    def products(self) -> list[str]:
        """Kinds of the nodes that multiply two tensors which depend on the image; softmax is a product with its sum."""
        kinds = ((kind_of(node), len(_inner(node))) for node in self.nodes)
        return [kind for kind, inner in kinds if kind in _PRODUCTS and (inner == 2 or kind == "Softmax")]

    def arguments(self, node: Any) -> list[Tensor]:
        """List the inputs of a node that depend on the image."""
        return [self.values[child] for child in node.next_functions if child[0] is not None]

    def neurons(self) -> list[Any]:
        """List the nodes that have patterns, in the same order in every call."""
        return [n for n in self.nodes if kind_of(n) in _WEIGHTED or (kind_of(n) in _SUMS and len(_inner(n)) == 2)]

    def regimes(self) -> dict[Any, Tensor]:
        """Mark for each neuron where the argument of its rectifier is positive; only norms may be between the two."""
        positive: dict[Any, Tensor] = {}
        for node in self.nodes:
            if kind_of(node) not in RECTIFIERS:
                continue
            (argument,) = self.arguments(node)
            below = _inner(node)[0]
            while kind_of(below) in (*_NORMS, "View") and len(_inner(below)) == 1:
                below = _inner(below)[0]
            if kind_of(below) in _WEIGHTED:
                assert below not in positive, "two rectifiers after one neuron"
                positive[below] = argument > 0
        return positive


def _inner(node: Any) -> list[Any]:
    """List the nodes that a node leads to."""
    return [child for child, _ in node.next_functions if child is not None]


def _check(nodes: list[Any]) -> None:
    """Refuse nodes that have no rule here."""
    for node in nodes:
        kind, inner = kind_of(node), len(_inner(node))
        known = kind in (*_WEIGHTED, *_SUMS, *_NORMS, *_PLAIN, *RECTIFIERS)
        assert known, f"{kind} with {inner} operands has no rule here"


def _silu(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return F.silu(args[0])  # MONAI's Swish, written in one node


class Patterned:
    """Network with patterns in place of weights.

    Args:
        network: of windows (n, C, *roi).
        forward: returns the entry of its output that is explained.
    """

    def __init__(self, network: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self.network, self.forward = network, forward
        self._calls: list[_Call] = []
        self._patterns: list[tuple[Tensor, ...]] = []

    def call(self, x: Tensor) -> _Call:
        """Run one call and keep its graph."""
        with torch.enable_grad(), written_out(self.network, _silu), _Values() as values:
            start = x.clone() if x.requires_grad else x.clone().requires_grad_(True).clone()
            return _Call(self.forward(start), values.of)

    def see(self, x: Tensor) -> Tensor:
        """Keep windows for the fit of the patterns; returns the network's output, to be called by an inferer."""
        self._calls.append(self.call(x))
        return self._calls[-1].output.detach().clone()

    def fit(self) -> Patterned:
        """Fit the patterns of all neurons on the windows seen."""
        _check(self._calls[0].nodes)
        regimes = {node: regime for call in self._calls for node, regime in call.regimes().items()}
        for alike in zip(*(call.neurons() for call in self._calls), strict=True):
            inputs = [call.arguments(node) for call, node in zip(self._calls, alike)]
            joined = [torch.cat(each) for each in zip(*inputs)]
            if kind_of(alike[0]) in _SUMS:
                self._patterns.append(_shares(alike[0], *joined))
                continue
            known = [regimes[node] for node in alike if node in regimes]
            assert len(known) in (0, len(alike))
            self._patterns.append(_estimate(alike[0], joined[0], torch.cat(known) if known else None))
        self._calls.clear()
        return self

    def signal(self, x: Tensor, way: str) -> Tensor:
        """Return the output for windows; its backward pass spreads y · gradient by patterns. An inferer calls it."""
        call = self.call(x)
        regimes, neurons = call.regimes(), call.neurons()
        for node in call.nodes:
            if kind_of(node) in _NORMS:
                node.register_hook(_scaled(node, way))
        for node, pattern in zip(neurons, self._patterns, strict=True):
            hook = _summed(node, pattern[0], way) if kind_of(node) in _SUMS else None
            node.register_hook(hook or _weighted(node, pattern, regimes.get(node), way))
        y = call.output.detach()
        result = call.output.clone()
        result.register_hook(lambda g: g * y)
        return result


# -- estimates ------------------------------------------------------------------------------------------------------


def _estimate(node: Any, x: Tensor, positive: Tensor | None) -> tuple[Tensor, ...]:
    """Estimate the pattern of each regime, shaped like the weights."""
    weight = _weight(node)
    groups, y = _groups(node), _grouped(_run(node, x, weight), _groups(node))
    masks = [torch.ones_like(y)]
    if positive is not None:
        inside = _grouped(positive.reshape(_run(node, x, weight).shape), groups).to(y)
        masks = [inside, 1 - inside]
    patterns = [torch.zeros_like(weight) for _ in masks]
    for places in _neurons_along(node, y.ndim - 3):
        own = y[places]
        around = own - _mean(own)
        for pattern, mask in zip(patterns, masks):
            chosen = around * mask[places]
            power = (chosen * around).movedim((1, 2), (0, 1)).flatten(2).sum(2)  # (groups, outputs)
            for tap, values in _taps(node, x):
                read = _grouped(values, groups)[places]
                cross = torch.einsum("ngi...,ngo...->goi", read - _mean(read), chosen)
                each = torch.where(power[..., None] > 0, cross / power[..., None], 0.0)
                transposed = kind_of(node) == "Convolution" and node._saved_transposed
                pattern[(..., *tap)] += (each.mT if transposed else each).flatten(0, 1)
    return tuple(patterns)


def _weight(node: Any) -> Tensor:
    """Return the weights as in a module: (outputs, inputs, *kernel), transposed (inputs, outputs, *kernel)."""
    return node._saved_weight if kind_of(node) == "Convolution" else node._saved_mat2.t()


def _run(node: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Run the layer without its bias."""
    if kind_of(node) != "Convolution":
        return x @ weight.t()
    return torch.convolution(
        x,
        weight,
        None,
        node._saved_stride,
        node._saved_padding,
        node._saved_dilation,
        node._saved_transposed,
        node._saved_output_padding,
        node._saved_groups,
    )


def _groups(node: Any) -> int:
    return node._saved_groups if kind_of(node) == "Convolution" else 1


def _grouped(x: Tensor, groups: int) -> Tensor:
    return x.reshape(len(x), groups, -1, *x.shape[2:])


def _mean(x: Tensor) -> Tensor:
    """Average over samples and positions, per channel."""
    return x.mean((0, *range(3, x.ndim)), keepdim=True)


def _neurons_along(node: Any, axes: int) -> Iterator[tuple[Any, ...]]:
    """Yield the slices of outputs that share their weights: s per axis for a transposed convolution of stride s."""
    steps = node._saved_stride if kind_of(node) == "Convolution" and node._saved_transposed else [1] * axes
    for start in itertools.product(*(range(s) for s in steps)):
        yield (..., *(slice(i, None, s) for i, s in zip(start, steps)))


def _taps(node: Any, x: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Yield for each tap of the kernel the input that every output reads there; a transposed convolution reads its
    input with zeros in between, flipped."""
    if kind_of(node) != "Convolution":
        yield (), x
        return
    kernel, shape = node._saved_weight.shape[2:], _run(node, x, node._saved_weight).shape[2:]
    geometry = list(zip(node._saved_stride, node._saved_padding, node._saved_dilation, kernel))
    if node._saved_transposed:
        wide = x.new_zeros(*x.shape[:2], *((n - 1) * s + 1 for n, (s, *_) in zip(x.shape[2:], geometry)))
        wide[(..., *(slice(None, None, s) for s, *_ in geometry))] = x
        margins = [(d * (k - 1), max(0, n + p - w)) for n, w, (_, p, d, k) in zip(shape, wide.shape[2:], geometry)]
        x = F.pad(wide, [m for pair in margins[::-1] for m in pair])
    else:
        x = F.pad(x, [p for _, p, *_ in geometry[::-1] for _ in (0, 1)])
    for tap in itertools.product(*(range(k) for k in kernel)):
        places = []
        for i, n, (s, p, d, k) in zip(tap, shape, geometry):
            first, step = (d * (k - 1 - i) + p, 1) if node._saved_transposed else (d * i, s)
            places.append(slice(first, first + step * (n - 1) + 1, step))
        yield tap, x[(..., *places)]


def _shares(node: Any, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Return cov(term, sum) / var(sum) of both terms, (2, channels)."""
    sign = -1 if kind_of(node) == "Sub" else 1
    terms = torch.stack([u, sign * node._saved_alpha * v]).movedim(2, 1).flatten(2)
    around = terms - terms.mean(2, keepdim=True)
    total = around.sum(0)
    power = total.square().sum(1)
    return (torch.where(power > 0, (around * total).sum(2) / power, 0.0),)


# -- hooks ----------------------------------------------------------------------------------------------------------

Gradients = tuple[Any, ...]


def _weighted(node: Any, patterns: tuple[Tensor, ...], positive: Tensor | None, way: str) -> Callable[..., Gradients]:
    """Return the hook that gives aᵀ g, or (w ⊙ a)ᵀ g, with the pattern of each output's regime."""
    factors = [a * _weight(node) if way == "attribution" else a for a in patterns]
    place = 1 if kind_of(node) == "Addmm" else 0

    def hook(inputs: Gradients, outputs: Gradients) -> Gradients:
        g = outputs[0]
        masks = [torch.ones_like(g)]
        if positive is not None:
            inside = positive.reshape(g.shape).to(g)
            masks = [inside, 1 - inside]
        leaf = torch.zeros_like(inputs[place]).requires_grad_(True)
        total = torch.zeros_like(leaf)
        for factor, mask in zip(factors, masks, strict=True):
            with torch.enable_grad():
                (down,) = torch.autograd.grad(_run(node, leaf, factor), leaf, g * mask)
            total = total + down
        return (*inputs[:place], total, *inputs[place + 1 :])

    return hook


def _summed(node: Any, shares: Tensor, way: str) -> Callable[..., Gradients]:
    """Return the hook that gives each term its share of the sum's variance."""
    coefficients = (1, node._saved_alpha * (-1 if kind_of(node) == "Sub" else 1))

    def hook(inputs: Gradients, outputs: Gradients) -> Gradients:
        wide = [share.reshape(-1, *(1,) * (outputs[0].ndim - 2)) for share in shares]
        return tuple(outputs[0] * s / (c if way == "signal" else 1) for s, c in zip(wide, coefficients))

    return hook


def _scaled(node: Any, way: str) -> Callable[..., Gradients]:
    """Return the hook of a norm, z = s · y + b with s = γ / σ."""
    if kind_of(node) == "NativeGroupNorm":  # 1 / σ of each sample and group
        scale = node._saved_result2.repeat_interleave(node._saved_C // node._saved_group, 1)
    elif node._saved_training:  # instance norm: every channel of every sample is a channel
        scale = node._saved_result2[None]
    else:
        scale = (node._saved_running_var + node._saved_eps).rsqrt()[None]
    scale = scale if node._saved_weight is None else scale * node._saved_weight

    def hook(inputs: Gradients, outputs: Gradients) -> Gradients:
        g = outputs[0]
        wide = scale.reshape(*scale.shape, *(1,) * (g.ndim - 2))
        return (g if way == "attribution" else g / wide, *inputs[1:])

    return hook
