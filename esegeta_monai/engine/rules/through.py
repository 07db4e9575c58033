"""Relevance that flows through channels of one layer, and relevance that flows around the layer (Achtibat et al. 2023).

The backward pass of LRP carries the multiplier m, with relevance R = A · m at an output A. From the layer, m of the
chosen channels alone is propagated to the input. Paths around the layer never meet it, so they are left out; zennit-crp
does the same with ``exclude_parallel=True``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esegeta_monai.engine.rules.composites import Composite
from esegeta_monai.engine.rules.lrp import composite_run, relevance_of, relevance_with_direct
from esegeta_monai.engine.rules.run import Compare, Forward, Run
from esegeta_monai.errors import UsageError

__all__ = ["Through", "lrp_through"]


@dataclass(frozen=True)
class Through:
    """Relevance of k targets for n windows through channels of a layer, in units of the target.

    Attributes:
        input: relevance of the input through the chosen channels, (k, n, C, *roi).
        absorbed: relevance through them that biases below the layer absorb, (k, n).
        at_channels: relevance of the chosen channels at the layer, (k, n): Σ input + absorbed.
        at_layer: relevance of all channels at the layer, (k, n).
        around: relevance of the input on paths around the layer, (k, n).
        output: output of the network, (n, K, …).
    """

    input: Tensor
    absorbed: Tensor
    at_channels: Tensor
    at_layer: Tensor
    around: Tensor
    output: Tensor


def lrp_through(
    forwards: Sequence[Forward],
    x: Tensor,
    cotangents: Tensor,
    composite: Composite,
    layer: Mapping[str, nn.Module],
    channels: Sequence[int] | None,
    axis: int,
    *,
    compares: Sequence[Compare],
) -> Through:
    """Compute the relevance of the input that flows through channels of a layer.

    Args:
        forwards: one function per window, which maps it (1, C, *roi) to its output (1, K, …).
        x: windows (n, C, *roi), float32 or float64.
        cotangents: ∂s/∂y of a **linear** s, (k, n, K, …).
        composite: rules for operations with weights.
        layer: name and module of the layer, which runs once in a pass.
        channels: numbers of the channels; None: all.
        axis: axis of the channels in the layer's output.
        compares: see `esegeta_monai.engine.rules.run.Compare`; one per window.

    Raises:
        UsageError: no such channel.
        RuleError: an operation has no rule.

    >>> from esegeta_monai.engine.rules.composites import composite_of
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double().eval()
    >>> x, c = torch.rand(1, 3, dtype=torch.float64), torch.tensor([[[0.0, 1.0]]], dtype=torch.float64)
    >>> parts = [lrp_through([net], x, c, composite_of("EpsilonPlus"), {"1": net[1]}, [j], 1, compares=[True])
    ...          for j in range(4)]
    >>> every = lrp_through([net], x, c, composite_of("EpsilonPlus"), {"1": net[1]}, None, 1, compares=[True])
    >>> bool((sum(p.input for p in parts) - every.input).abs().max() < 1e-12), float(every.around)
    (True, 0.0)
    """
    rows = [
        _one_window(composite_run(f, x[i : i + 1], composite, layer, compare), cotangents[:, i : i + 1], channels, axis)
        for i, (f, compare) in enumerate(zip(forwards, compares))
    ]
    inputs, absorbed, at_channels, at_layer, around = (torch.cat([row[j] for row in rows], 1) for j in range(5))
    return Through(inputs, absorbed, at_channels, at_layer, around, torch.cat([row[5] for row in rows]))


def _one_window(run: Run, cotangents: Tensor, channels: Sequence[int] | None, axis: int) -> tuple[Tensor, ...]:
    ((name, activation),) = run.captured.items()
    selected = _selection(activation, channels, axis, name)
    columns: list[list[Tensor]] = [[], [], [], [], []]
    for _, at_layers, relevance in relevance_of(run, cotangents):
        multiplier, at_layer = at_layers[name], relevance[name]
        # relevance without a multiplier, of a rule for the first operation, where the layer only moves the input
        direct = at_layer - multiplier * activation.detach()
        every, lost = _down(run, activation, multiplier, direct)
        chosen = (every, lost) if channels is None else _down(run, activation, multiplier * selected, direct * selected)
        values = (*chosen, (at_layer * selected).sum(), at_layer.sum(), relevance[""].sum() - every.sum())
        for column, value in zip(columns, values):
            column.append(value)
    inputs, *sums = columns
    return torch.stack(inputs), *(torch.stack(column)[:, None] for column in sums), run.output.detach()


def _down(run: Run, activation: Tensor, multiplier: Tensor, direct: Tensor) -> tuple[Tensor, Tensor]:
    """Propagate a multiplier, and relevance that has none, from the layer to the input.

    Returns:
        The relevance of the input (1, C, *roi), and what biases and padding below the layer absorb, a scalar.
    """
    ledger = run.mode.ledger
    ledger.clear()
    if not activation.requires_grad:  # the layer does not depend on the input
        return torch.zeros_like(run.leaf), (multiplier * activation + direct).sum().detach()
    (arriving,) = torch.autograd.grad(activation, run.leaf, multiplier, retain_graph=True, allow_unused=True)
    if bool(direct.any()):
        ledger.direct.append((activation, direct))
    relevance, kept = relevance_with_direct(
        {"": run.leaf}, {"": torch.zeros_like(run.leaf) if arriving is None else arriving}, ledger
    )
    return relevance[""], torch.as_tensor(kept, dtype=run.leaf.dtype, device=run.leaf.device).detach()


def _selection(activation: Tensor, channels: Sequence[int] | None, axis: int, name: str) -> Tensor:
    """Return 1 for the chosen channels and 0 for the others, to multiply with the layer's output (1, …)."""
    count = activation.shape[axis]
    selected = torch.ones(count, dtype=activation.dtype, device=activation.device)
    if channels is not None:
        wrong = [c for c in channels if not 0 <= c < count]
        if wrong:
            raise UsageError(f"channels={list(channels)}: layer {name!r} has the channels 0 to {count - 1}")
        selected = torch.zeros_like(selected).index_fill(0, torch.tensor(list(channels), device=activation.device), 1.0)
    return selected.reshape([-1 if a == axis % activation.ndim else 1 for a in range(activation.ndim)])
