"""Layer-wise relevance propagation: one small class per rule, in multiplier form.

The backward pass carries the multiplier m with R = x · m instead of the relevance R. This avoids unnecessary divisions:
a linear operation without a special rule propagates m by its plain gradient. Biases and other constants *absorb* the
relevance that they receive. Input relevance and absorbed relevance add up to Σ y · cotangent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esegeta_monai.engine.rules.composites import Composite, composite_of
from esegeta_monai.engine.rules.decompositions import standardised
from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import PARTS, PLAIN, RelevanceLedger, Treatment, local_gradient
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.run import Compare, Forward, LayerRelevance, Relevance, Run
from esegeta_monai.errors import MethodError, UsageError

__all__ = [
    "AffineRule",
    "FrozenNormRule",
    "HalvesRule",
    "RootRule",
    "TaylorRule",
    "composite_run",
    "lrp",
    "relevance_of",
    "relevance_with_direct",
]

# Linear operations and moves that can add a constant, which absorbs relevance.
_WITH_CONSTANT = frozenset(
    [
        *("add", "sub", "rsub", "batch_norm", "instance_norm", "addmm", "addbmm", "baddbmm", "addmv", "lerp"),
        *("index_add", "scatter_add", "cat", "stack", "hstack", "vstack", "dstack", "column_stack"),
        *("masked_fill", "where", "pad", "constant_pad_nd", "setitem", "index_copy", "index_fill", "slice_scatter"),
        *("select_scatter", "index_put", "fill", "masked_scatter", "scatter", "copy"),
    ]
)


def _product(relevance: Tensor, value: Tensor) -> Tensor:
    """Multiply elementwise; a zero multiplier gives zero relevance even where the value is −∞ (a masked score)."""
    return torch.where(relevance == 0, 0.0, relevance * value)


class AffineRule:
    """Rule for y = A x + b: m_in = Aᵀ m_out (LRP-0); the constant absorbs Σ b · m_out."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        constant = operation.function(*(torch.zeros_like(operand) for operand in operands))
        operation.ledger.absorb(_product(gradient, constant))
        return local_gradient(operation.function, operands, gradient)


class RootRule:
    """Rule for elementwise y = g(x): m_in = m_out (g(x) − g(0)) / x; the constant g(0) absorbs Σ g(0) · m_out.

    If g has no finite value at 0 (a reciprocal, a logarithm), x receives all relevance: m_in = m_out g(x) / x.
    """

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = operands
        zero = torch.zeros_like(x)
        at_zero = operation.function(zero)
        if not at_zero.isfinite().all():
            return (gradient * operation.function(x) / x,)
        operation.ledger.absorb(gradient * at_zero)
        quotient = (operation.function(x) - at_zero) / x
        if bool((x == 0).any()):
            (slope,) = local_gradient(operation.function, (zero,), torch.ones_like(gradient))
            assert slope is not None
            quotient = torch.where(x == 0, slope, quotient)
        return (gradient * quotient,)


class HalvesRule:
    """Rule for bilinear y = f(a, b): each factor receives half of the relevance (AttnLRP, Achtibat et al. 2024)."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        return local_gradient(operation.function, operands, gradient / 2)


class TaylorRule:
    """Rule for softmax and its logarithm: m_in = Jᵀ m_out; the residual Σ y · m_out − Σ x · m_in is absorbed (AttnLRP).

    J is the Jacobian at x.
    """

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,) = operands
        (arriving,) = local_gradient(operation.function, operands, gradient)
        assert arriving is not None
        operation.ledger.absorb(_product(gradient, operation.function(x)).sum() - _product(arriving, x).sum())
        return (arriving,)


class FrozenNormRule:
    """Rule for y = (x − μ) / σ · w + b with constant σ, a linear map (AttnLRP's LayerNorm rule, generalised).

    The bias b absorbs Σ b · m_out.
    """

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        bias = operation.argument("bias")
        if isinstance(bias, Tensor):
            per_channel = (1, -1) + (1,) * (gradient.ndim - 2)
            operation.ledger.absorb(gradient * (bias if operation.name == "layer_norm" else bias.reshape(per_channel)))
        return local_gradient(
            lambda x: standardised(operation, operation.filled((x,)), frozen=True), operands, gradient
        )


_TREATMENTS: Mapping[Kind, Treatment] = {
    Kind.ACTIVATION: RootRule(),
    Kind.UNIVARIATE: RootRule(),
    Kind.PRODUCT: HalvesRule(),
    Kind.MAXIMUM: PLAIN,  # winner takes all: the maximum is the winner's own value
    Kind.SOFTMAX: TaylorRule(),
    Kind.NORM: FrozenNormRule(),
    Kind.COMPOSITE: PARTS,
}


@dataclass
class _Relevance:
    """The rules of a composite for operations with weights, and the rules above for all other operations."""

    composite: Composite
    affine: AffineRule
    first_used: bool = False
    family: str = "lrp"

    def treatment(self, operation: Operation) -> Treatment:
        if operation.kind in (Kind.CONVOLUTION, Kind.DENSE):
            self.first_used = self.first_used or operation.reads_input
            return self.composite.rule(operation)
        if operation.kind in (Kind.MOVE, Kind.LINEAR):
            return self.affine if operation.name in _WITH_CONSTANT else PLAIN
        return _TREATMENTS[operation.kind]


def lrp(
    forward: Forward | Sequence[Forward],
    x: Tensor,
    cotangents: Tensor,
    composite: str | Mapping[str, object] | Composite = "EpsilonPlus",
    *,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    low: float | Tensor | None = None,
    high: float | Tensor | None = None,
    layers: Mapping[str, nn.Module] | None = None,
    compare: Compare | Sequence[Compare] = True,
) -> Relevance:
    """Compute layer-wise relevance propagation.

    Bach et al. 2015; composites of Kohlbrenner et al. 2020; attention rule of Achtibat et al. 2024. For every target k
    and window i, Σ input[k, i] + absorbed[k, i] = Σ cotangents[k, i] · f(x)[i].

    Args:
        forward: maps windows (1, C, *roi) to outputs (1, K, …); or one such function per window. Windows run one by
            one, because absorbed relevance is counted per window.
        x: windows (n, C, *roi), float32 or float64.
        cotangents: ∂s/∂y of a **linear** s, (k, n, K, …).
        composite: rules for operations with weights: a name of :data:`COMPOSITES`, or a mapping such as
            ``{"convolution": {"rule": "Gamma", "gamma": 0.1}, "dense": "Epsilon", "first": "Flat"}``.
        epsilon: default ε of the Epsilon rules.
        gamma: default γ of the Gamma rules.
        low: smallest possible input value, for ZBox; None: the smallest value of x.
        high: largest possible input value, for ZBox; None: the largest value of x.
        layers: modules whose outputs receive relevance as well.
        compare: check of the output, see `esegeta_monai.engine.rules.run.Compare`; or one per window.

    Returns:
        ``input`` (k, n, C, *roi) in units of s, ``absorbed`` (k, n), and the relevance of the layers.

    Raises:
        UsageError: unknown composite or rule, or cotangents for another number of windows.
        MethodError: the composite has a rule for the first layer, but no layer with weights reads the input.
        RuleError: an operation has no rule.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.GELU()).double().eval()
    >>> x, c = torch.randn(1, 1, 6, 6, dtype=torch.float64), torch.ones(1, 1, 2, 4, 4, dtype=torch.float64)
    >>> result = lrp(net, x, c)
    >>> bool((result.input.sum() + result.absorbed.sum() - net(x).sum()).abs() < 1e-9)
    True
    """
    low, high = (x.detach().min() if low is None else low), (x.detach().max() if high is None else high)
    chosen = composite_of(composite, epsilon=epsilon, gamma=gamma, low=low, high=high)
    if cotangents.shape[1] != len(x):
        raise UsageError(f"cotangents for {cotangents.shape[1]} windows, {len(x)} windows given")
    forwards = [forward] * len(x) if callable(forward) else forward
    compares = [compare] * len(x) if isinstance(compare, bool) or callable(compare) else compare
    windows = [
        _one_window(forwards[i], x[i : i + 1], cotangents[:, i : i + 1], chosen, layers or {}, compares[i])
        for i in range(len(x))
    ]
    at_layers = {
        name: LayerRelevance(
            torch.cat([window.layers[name].activation for window in windows]),
            torch.cat([window.layers[name].gradient for window in windows], 1),
            torch.cat([window.layers[name].relevance for window in windows], 1),
        )
        for name in (layers or {})
    }
    inputs, absorbed = ([getattr(window, name) for window in windows] for name in ("input", "absorbed"))
    output = torch.cat([window.output for window in windows])
    return Relevance(torch.cat(inputs, 1), torch.cat(absorbed, 1), output, at_layers)


def _one_window(
    forward: Forward,
    x: Tensor,
    cotangents: Tensor,
    composite: Composite,
    layers: Mapping[str, nn.Module],
    compare: Compare,
) -> Relevance:
    run = composite_run(forward, x, composite, layers, compare)
    inputs, absorbed, multipliers, relevances = [], [], [], []
    for kept, at_layers, relevance in relevance_of(run, cotangents):
        inputs.append(relevance.pop(""))
        absorbed.append(kept.reshape(1))
        multipliers.append(at_layers)
        relevances.append(relevance)
    results = {
        name: LayerRelevance(
            activation.detach(),
            torch.stack([each[name] for each in multipliers]),
            torch.stack([each[name] for each in relevances]),
        )
        for name, activation in run.captured.items()
    }
    return Relevance(torch.stack(inputs), torch.stack(absorbed), run.output.detach(), results)


def composite_run(
    forward: Forward, x: Tensor, composite: Composite, layers: Mapping[str, nn.Module], compare: Compare
) -> Run:
    """Run the forward pass on windows ``x`` (n, C, *roi) under the rules of a composite.

    Raises:
        MethodError: the composite has a rule for the first layer, but no layer with weights reads the input.
    """
    rules = _Relevance(composite, AffineRule())
    run = Run(forward, x, rules, layers=layers, compare=compare)
    if composite.first is not None and not rules.first_used:
        raise MethodError(
            "this composite has a rule for the first layer, but no convolution or linear layer reads the input here; "
            "use a composite without one, such as EpsilonPlus"
        )
    return run


def relevance_of(run: Run, cotangents: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
    """Yield per target: absorbed relevance of all windows, multipliers by layer, relevance by layer ("" is the input).

    Args:
        run: the forward pass under LRP rules.
        cotangents: (k, n, K, …).
    """
    for multiplier, at_layers, ledger in run.backward(cotangents):
        values = {"": run.leaf, **run.captured}
        relevance, kept = relevance_with_direct(values, {"": multiplier, **at_layers}, ledger)
        yield torch.as_tensor(kept, dtype=run.leaf.dtype, device=run.leaf.device), at_layers, relevance


def relevance_with_direct(
    values: Mapping[str, Tensor], multipliers: Mapping[str, Tensor], ledger: RelevanceLedger
) -> tuple[dict[str, Tensor], Tensor | float]:
    """Return the relevance of tensors, and the absorbed relevance, from one backward pass.

    Args:
        values: the tensors (n, …) by name, "" the input, which moves to those of ``ledger.direct``.
        multipliers: m of each tensor, of its shape.
        ledger: of the pass.
    """
    relevance = {name: m * values[name].detach() for name, m in multipliers.items()}
    kept = ledger.absorbed
    for tensor, direct in list(ledger.direct):
        arriving = torch.autograd.grad(tensor, list(values.values()), direct, retain_graph=True, allow_unused=True)
        for name, share in zip(values, arriving):
            relevance[name] = relevance[name] if share is None else relevance[name] + share
        assert arriving[0] is not None
        kept = kept + direct.sum() - arriving[0].sum()  # constant padding absorbs the difference
    return relevance, kept
