"""Guided backpropagation and deconvolution: activations propagate positive gradients only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import PARTS, PLAIN, Rule, Treatment, local_gradient
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.run import Compare, Forward, LayerRelevance, Relevance, Run
from esegeta_monai.errors import MethodError

__all__ = ["DeconvolutionRule", "GuidedRule", "deconvolution", "guided"]


class GuidedRule:
    """g_in = max(max(g_out, 0) · a′(x), 0) for every activation a (Springenberg 2014, generalised)."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        (arriving,) = local_gradient(operation.function, operands, gradient.clamp(min=0))
        assert arriving is not None
        return (arriving.clamp(min=0),)


class DeconvolutionRule:
    """g_in = max(g_out, 0): the rectifier is applied to the backward signal (Zeiler 2014)."""

    def backward(
        self, operation: Operation, operands: tuple[Tensor, ...], gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        return (gradient.clamp(min=0),)


@dataclass(frozen=True)
class _AtActivations:
    """One rule at every activation and the plain gradient elsewhere; composites are decomposed to reach activations."""

    rule: Rule
    family: str

    def treatment(self, operation: Operation) -> Treatment:
        if operation.kind is Kind.ACTIVATION:
            return self.rule
        return PARTS if operation.kind is Kind.COMPOSITE else PLAIN


def guided(
    forward: Forward,
    x: Tensor,
    cotangents: Tensor,
    *,
    layers: Mapping[str, nn.Module] | None = None,
    compare: Compare = True,
) -> Relevance:
    """Compute guided backpropagation (Springenberg et al. 2014) through every kind of activation.

    At each activation a: g_in = max(max(g_out, 0) · a′(x), 0); everywhere else the plain gradient. Activations are the
    rectifiers (ReLU, LeakyReLU, PReLU, ELU, CELU, SELU, GELU, SiLU, Mish, Softplus, hardtanh, ReLU6, hardswish, clamp),
    as modules or calls, in place or not; gates (sigmoid, tanh, softmax) keep their derivative.

    Args:
        forward: maps windows (n, C, *roi) to outputs (n, K, …).
        x: windows (n, C, *roi), float32 or float64.
        cotangents: ∂s/∂y, (k, n, K, …), for k targets.
        layers: modules whose outputs receive the modified gradient as well.
        compare: check of the output, see `esegeta_monai.engine.rules.run.Compare`.

    Returns:
        ``input`` (k, n, C, *roi) in units of s per unit of x; per layer, gradient and gradient x activation.

    Raises:
        MethodError: the network has no activation.
        RuleError: an operation has no known kind.

    >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.PReLU(), nn.Conv2d(2, 1, 3)).eval()
    >>> guided(net, torch.ones(1, 1, 8, 8), torch.ones(1, 1, 1, 4, 4)).input.shape
    torch.Size([1, 1, 1, 8, 8])
    """
    return _run(forward, x, cotangents, GuidedRule(), "guided", "guided backpropagation", layers, compare)


def deconvolution(
    forward: Forward,
    x: Tensor,
    cotangents: Tensor,
    *,
    layers: Mapping[str, nn.Module] | None = None,
    compare: Compare = True,
) -> Relevance:
    """Compute deconvolution (Zeiler & Fergus 2014): g_in = max(g_out, 0) at activations, elsewhere the plain gradient.

    Arguments, shapes, result and errors are those of :func:`guided`: windows (n, C, *roi) to ``input`` (k, n, C, *roi).
    """
    return _run(forward, x, cotangents, DeconvolutionRule(), "deconvolution", "deconvolution", layers, compare)


def _run(
    forward: Forward,
    x: Tensor,
    cotangents: Tensor,
    rule: Rule,
    family: str,
    name: str,
    layers: Mapping[str, nn.Module] | None,
    compare: Compare,
) -> Relevance:
    run = Run(forward, x, _AtActivations(rule, family), layers=layers, compare=compare)
    if not run.mode.operation_counts.get(Kind.ACTIVATION):
        raise MethodError(
            f"{name} acts on activations (ReLU and its relatives), but this network has none: the result would be the "
            "plain gradient; use Saliency or InputXGradient"
        )
    inputs, at_layers = [], []
    for arriving, layer_gradients, _ in run.backward(cotangents, ends=True):
        inputs.append(arriving)
        at_layers.append(layer_gradients)
    none, at = x.new_zeros(cotangents.shape[:2]), layer_relevance(run.captured, at_layers)
    return Relevance(torch.stack(inputs), none, run.output.detach(), at)


def layer_relevance(
    activations: Mapping[str, Tensor],
    gradients: list[dict[str, Tensor]],
    relevance: Mapping[str, Tensor] | None = None,
) -> dict[str, LayerRelevance]:
    """Stack the gradients of all targets per layer; without ``relevance``, use gradient x activation.

    Args:
        activations: outputs (n, …) by layer.
        gradients: gradients (n, …) by layer, one mapping per target.
        relevance: relevance (k, n, …) by layer.
    """
    results = {}
    for name, activation in activations.items():
        stacked = torch.stack([gradient[name] for gradient in gradients])
        value = activation.detach()
        results[name] = LayerRelevance(value, stacked, stacked * value if relevance is None else relevance[name])
    return results
