"""DeepLIFT as a calculus of finite differences: multipliers m with Σ m · (x − x₀) = s(f(x)) − s(f(x₀)), exactly.

A network consists of three kinds of operation, and each has an exact difference formula:

* linear:      Δ(Wx) = W Δx                          the multiplier is Wᵀ, the plain gradient
* univariate:  Δg = (Δg / Δx) Δx                     DeepLIFT's rescale rule (Shrikumar et al. 2017)
* bilinear:    Δf(a, b) = f(Δa, b̄) + f(ā, Δb)        bars are averages over input and reference

A norm consists of centring, square, mean, reciprocal root and product; attention of a softmax between two products. No
step is approximate, so completeness holds up to rounding. The forward pass runs twice: on the reference, where it
records the operands of every non-linear operation, and on the input, where each operation uses the recorded operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import PARTS, PLAIN, Treatment, local_gradient
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.run import Compare, Forward, LayerRelevance, Relevance, Run, record
from esegeta_monai.errors import InputError

__all__ = ["BilinearRule", "MaximumRule", "QuotientRule", "SoftmaxRule", "deep_lift", "deep_lift_multiplier"]


def _exponential(x: Tensor, r: Tensor) -> Tensor:
    """Compute (eˣ − eʳ) / (x − r), the logarithmic mean of eˣ and eʳ, without overflow or cancellation."""
    distance = (x - r).abs().nan_to_num(nan=0.0, posinf=float("inf"))  # both −∞ where attention is masked
    ratio = torch.where(distance == 0, 1.0, -torch.expm1(-distance) / distance)
    return torch.maximum(x, r).exp() * ratio


def _root(x: Tensor, r: Tensor) -> Tensor:
    total = x.sqrt() + r.sqrt()
    return torch.where(total == 0, 0.0, 1 / total)  # if both are zero, there is no change to distribute


def _reciprocal_root(x: Tensor, r: Tensor) -> Tensor:
    return -1 / (x.sqrt() * r.sqrt() * (x.sqrt() + r.sqrt()))


# Closed forms of quotients Δg / Δx that would lose digits by cancellation.
_CLOSED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "square": lambda x, r: x + r,
    "reciprocal": lambda x, r: -1 / (x * r),
    "exp": _exponential,
    "expm1": _exponential,
    "sqrt": _root,
    "rsqrt": _reciprocal_root,
}
_POWERS = {2: "square", -1: "reciprocal", 0.5: "sqrt", -0.5: "rsqrt"}


class QuotientRule:
    """m = (g(x) − g(x₀)) / (x − x₀) for an elementwise g; m = g′(x) exactly where x = x₀."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,), (reference,) = operands, operation.reference
        name = operation.name
        if name == "pow":
            exponent = operation.argument("exponent")
            name = _POWERS.get(exponent, name) if isinstance(exponent, (int, float)) else name
        closed = _CLOSED.get(name)
        if closed is not None:
            return (gradient * closed(x, reference),)
        change = x - reference
        quotient = (operation.function(x) - operation.function(reference)) / change
        (slope,) = local_gradient(operation.function, (x,), torch.ones_like(gradient))
        assert slope is not None
        return (gradient * torch.where((change == 0) | ~change.isfinite(), slope, quotient),)


class BilinearRule:
    """Δf(a, b) = f(Δa, b̄) + f(ā, Δb): the derivative of f at the averages of input and reference."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        averages = tuple((now + then) / 2 for now, then in zip(operands, operation.reference))
        return local_gradient(operation.function, averages, gradient)


class MaximumRule:
    """Rule that gives the change of a maximum to the element with the larger of the two maxima (of x and of x₀).

    The change of this element is never smaller than that of the maximum, so the multiplier is in [0, 1].
    """

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,), (reference,) = operands, operation.reference
        now, then = (_values(operation.function(z)) for z in (x, reference))
        holds = (now >= then).to(x.dtype)

        def route(arriving: Tensor) -> Tensor:
            there, past = (
                local_gradient(operation.function, (z,), arriving * share)[0]
                for z, share in ((x, holds), (reference, 1 - holds))
            )
            assert there is not None
            assert past is not None
            return there + past

        change = x - reference
        shares = route(gradient * (now - then))
        return (torch.where(change == 0, route(gradient), shares / change),)


class SoftmaxRule:
    """Rule for softmax as exp(u) with u = x − log Σ exp(x), an elementwise function of a difference.

    Δ log Σ exp(x) = Σ w Δx with w = L(eˣ, eˣ⁰) / L(Σeˣ, Σeˣ⁰), L the logarithmic mean: w ≥ 0 and Σ w ≤ 1, so that the
    multipliers stay bounded for any distance between the scores of reference and input (the form e · (1 / Σe) with one
    shift for both loses a digit for each factor of ten between Σe and Σe₀).
    """

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (x,), (reference,) = operands, operation.reference
        dim = operation.argument("dim")
        if dim is None:  # torch's default for `nn.Softmax()`
            dim = 0 if x.ndim in (0, 1, 3) else 1
        total, total_then = (torch.logsumexp(z, dim, keepdim=True) for z in (x, reference))
        shift = torch.maximum(total, total_then)
        weights = _exponential(x - shift, reference - shift) / _exponential(total - shift, total_then - shift)
        if operation.name == "logsumexp":
            return (weights * (gradient if operation.argument("keepdim") else gradient.reshape(total.shape)),)
        if operation.name == "softmax":
            gradient = gradient * _exponential(x - total, reference - total_then)
        return (gradient - weights * gradient.sum(dim, keepdim=True),)


def _values(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


class _FiniteDifferences:
    """The treatment of every kind: linear operations plain, norms and composites decomposed, others by a rule."""

    family = "deep_lift"
    _TREATMENTS: Mapping[Kind, Treatment] = {
        Kind.MOVE: PLAIN,
        Kind.LINEAR: PLAIN,
        Kind.CONVOLUTION: PLAIN,
        Kind.DENSE: PLAIN,
        Kind.ACTIVATION: QuotientRule(),
        Kind.UNIVARIATE: QuotientRule(),
        Kind.PRODUCT: BilinearRule(),
        Kind.MAXIMUM: MaximumRule(),
        Kind.SOFTMAX: SoftmaxRule(),
        Kind.NORM: PARTS,
        Kind.COMPOSITE: PARTS,
    }

    def treatment(self, operation: Operation) -> Treatment:
        return self._TREATMENTS[operation.kind]


def deep_lift(
    forward: Forward,
    x: Tensor,
    baseline: Tensor,
    cotangents: Tensor,
    *,
    layers: Mapping[str, nn.Module] | None = None,
    compare: Compare = True,
) -> Relevance:
    """Compute DeepLIFT with the rescale rule (Shrikumar et al. 2017), exact through norms, attention and products.

    Σ input[k, i] = Σ cotangents[k, i] · (f(x) − f(baseline))[i] for every target k and window i, up to rounding.

    Args:
        forward: maps windows (n, C, *roi) to outputs (n, K, …).
        x: windows (n, C, *roi), float32 or float64.
        baseline: the reference windows, of the same shape.
        cotangents: ∂s/∂y of a linear s, or :func:`deep_lift_multiplier` of any other, (k, n, K, …).
        layers: modules whose outputs are attributed as well: gradient is the multiplier, relevance is
            multiplier x (activation − activation of the baseline).
        compare: check of the output, see `esegeta_monai.engine.rules.run.Compare`.

    Returns:
        ``input`` = multiplier x (x − baseline), (k, n, C, *roi), in units of s.

    Raises:
        InputError: the baseline has another shape.
        RuleError: an operation has no rule, or the network takes another path for the baseline.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.GELU()).double().eval()
    >>> x, x0 = torch.randn(2, 1, 1, 6, 6, dtype=torch.float64)
    >>> gap = deep_lift(net, x, x0, torch.ones(1, 1, 2, 4, 4)).input.sum() - (net(x) - net(x0)).sum()
    >>> bool(gap.abs() < 1e-9)
    True
    """
    if baseline.shape != x.shape:
        raise InputError(f"the baseline has shape {tuple(baseline.shape)}, the windows {tuple(x.shape)}")
    x = x.detach().as_subclass(Tensor)
    baseline = baseline.detach().as_subclass(Tensor).to(x)
    rules = _FiniteDifferences()
    past, past_layers, at_baseline = record(forward, baseline, rules, layers or {})
    run = Run(forward, x, rules, reference=past, layers=layers, compare=compare)
    multipliers, at_layers = [], []
    for multiplier, layer_multipliers, _ in run.backward(cotangents, ends=True):
        multipliers.append(multiplier)
        at_layers.append(layer_multipliers)
    results = {}
    for name, activation in run.captured.items():
        multiplier, value = torch.stack([each[name] for each in at_layers]), activation.detach()
        results[name] = LayerRelevance(value, multiplier, multiplier * (value - past_layers[name]))
    differences, none = torch.stack(multipliers) * (x - baseline), x.new_zeros(cotangents.shape[:2])
    return Relevance(differences, none, run.output.detach(), results, at_baseline)


def deep_lift_multiplier(function: Callable[[Tensor], Tensor], p: Tensor, p0: Tensor) -> Tensor:
    """Compute the finite-difference cotangent m of a scalar function: Σ m · (p − p0) = s(p) − s(p0), exactly.

    Non-linear targets (softmax, sigmoid, log-probability, soft Dice) use m in place of ∂s/∂p in :func:`deep_lift`.

    Args:
        function: s, maps a prediction to one number, or to one number per target, (k,).
        p: the prediction, of any shape.
        p0: the prediction for the baseline, of the same shape.

    Returns:
        m, of the shape of p for a scalar s, (k, *p.shape) otherwise.

    Raises:
        InputError: the predictions have different shapes.
        RuleError: an operation of s has no rule.

    >>> p, p0 = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5])
    >>> m = deep_lift_multiplier(lambda z: z.softmax(0)[1], p, p0)
    >>> bool(torch.isclose((m * (p - p0)).sum(), p.softmax(0)[1] - p0.softmax(0)[1]))
    True
    """
    if p.shape != p0.shape:
        raise InputError(f"the two predictions have shapes {tuple(p.shape)} and {tuple(p0.shape)}")
    rules = _FiniteDifferences()
    past, _, _ = record(function, p0.to(p), rules, {})
    run = Run(function, p, rules, reference=past)
    value = run.output
    chosen = torch.eye(value.numel(), dtype=value.dtype, device=value.device).reshape(-1, *value.shape)
    multipliers = torch.stack([multiplier for multiplier, _, _ in run.backward(chosen, ends=True)])
    return multipliers if value.ndim else multipliers[0]
