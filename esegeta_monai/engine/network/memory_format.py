"""The order of values in memory: contiguous, or channels-last, which many convolutions of a CPU compute faster."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["MEMORY_FORMATS", "FormatChoice", "MemoryFormat", "as_format", "faster", "format_by_rule", "same_numbers"]

MemoryFormat = Literal["contiguous", "channels_last"]

MEMORY_FORMATS = ("contiguous", "channels_last", "auto")
"""The values of the setting; None is the rule (`format_by_rule`)."""

ENOUGH = 1e-6
"""Errors below this one are those of float32, whatever the order."""

GAIN = 0.95
"""Share of the time of contiguous tensors that channels-last must stay below, where it is measured."""

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SLOWER = (nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LayerNorm, nn.MultiheadAttention)


@dataclass(frozen=True)
class FormatChoice:
    """The memory format of a case, with its reason.

    Attributes:
        used: ``"contiguous"`` or ``"channels_last"``.
        by: ``"rule"``, ``"request"`` or ``"measurement"``.
        reason: in words.
    """

    used: MemoryFormat
    by: str
    reason: str

    def entry(self) -> dict[str, str]:
        """Return the entry of a record."""
        return {"used": self.used, "by": self.by, "reason": self.reason}


def as_format(x: Tensor, memory_format: MemoryFormat) -> Tensor:
    """Return images (n, C, *roi), 2D or 3D, or weights of a convolution, in a memory format; others unchanged.

    >>> as_format(torch.zeros(1, 2, 4, 4), "channels_last").stride()
    (32, 1, 8, 2)
    """
    if memory_format == "contiguous" or x.ndim not in (4, 5):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def convolution_weights(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a network's convolutions, each once."""
    weights = {id(m.weight): m.weight for m in network.modules() if isinstance(m, _CONVOLUTIONS)}
    return [weight for weight in weights.values() if isinstance(weight, nn.Parameter)]


def format_by_rule(network: nn.Module, device: torch.device, dtype: torch.dtype, half: bool) -> FormatChoice:
    """Return the format by a fixed rule, so that a map does not depend on the load of the machine.

    Channels-last on a CPU in float32 for convolutions of edge 3 with at least 16 channels, under batch or group norm:
    these operations gain, while convolutions of edge 1, instance norm, layer norm and attention lose
    (benchmarks/memory_format.py).

    Args:
        network: the network.
        device: of the window passes.
        dtype: of the weights.
        half: the windows run under autocast.

    >>> format_by_rule(nn.Conv3d(1, 32, 3), torch.device("cpu"), torch.float32, False).used
    'channels_last'
    >>> format_by_rule(nn.Conv3d(1, 32, 1), torch.device("cpu"), torch.float32, False).reason
    'fewer than three quarters of the convolutions have edge 3'
    """
    modules = list(network.modules())
    convolutions = [m for m in modules if isinstance(m, _CONVOLUTIONS)]
    threes = [m for m in convolutions if max(m.kernel_size) == 3]
    slower = sorted({type(m).__name__ for m in modules if isinstance(m, _SLOWER)})
    reason = ""
    if device.type != "cpu":
        reason = f"no gain is measured on {device.type}"
    elif dtype != torch.float32 or half:
        reason = "no gain is measured outside of float32"
    elif not convolutions or max(m.out_channels for m in convolutions) < 16:
        reason = "no convolution has 16 channels"
    elif slower:
        reason = f"{', '.join(slower)} is slower in channels-last"
    elif 4 * len(threes) < 3 * len(convolutions):
        reason = "fewer than three quarters of the convolutions have edge 3"
    if reason:
        return FormatChoice("contiguous", "rule", reason)
    return FormatChoice("channels_last", "rule", "convolutions of edge 3 on a CPU")


Evaluate = Callable[[MemoryFormat], "list[Tensor]"]


def same_numbers(evaluate: Evaluate, exact: Callable[[], list[Tensor]]) -> str | None:
    """Return why channels-last does not give the numbers of contiguous tensors; None: it does.

    Its error of F and of the gradient against float64 must be at most twice that of contiguous tensors, or below
    `ENOUGH`. Errors are relative: of F to the sum of its absolute terms, of the gradient to its largest voxel.

    Args:
        evaluate: returns the terms of F and the gradient, of any shape, in a format.
        exact: returns both in float64.
    """
    try:
        plain, ours, truth = evaluate("contiguous"), evaluate("channels_last"), exact()
    except Exception as error:  # a network may raise anything, such as for a view of channels-last tensors
        return f"the comparison fails: {' '.join(str(error).split())[:200] or type(error).__name__}"
    for what, a, b, c in zip(("F", "the gradient"), plain, ours, truth):
        before, after = _error(a, c), _error(b, c)
        if not after <= max(2 * before, ENOUGH):
            return f"the error of {what} grows from {before:.1e} to {after:.1e}"
    return None


def _error(a: Tensor, truth: Tensor) -> float:
    """Return the relative error of one value, the sum of terms (n, …), or of a gradient (1, n, …)."""
    a, truth = a.double(), truth.double()
    if a.ndim == 1:
        return abs(float(a.sum() - truth.sum())) / (float(truth.abs().sum()) or 1.0)
    return float((a - truth).abs().max()) / (float(truth.abs().max()) or 1.0)


def faster(evaluate: Evaluate, synchronise: Callable[[], Any] = lambda: None, rounds: int = 3) -> tuple[bool, str]:
    """Measure both formats in turn; return whether channels-last needs less than `GAIN` of the time, and the figure.

    Args:
        evaluate: makes the passes in a format.
        synchronise: waits for the device.
        rounds: number of measurements; the least time counts.
    """
    best: dict[MemoryFormat, float] = {}
    kinds: tuple[MemoryFormat, ...] = ("contiguous", "channels_last")
    for _ in range(rounds + 1):
        for kind in kinds:
            synchronise()
            began = time.perf_counter()
            evaluate(kind)
            synchronise()
            took = time.perf_counter() - began
            best[kind] = min(best.get(kind, float("inf")), took)
    ratio = best["channels_last"] / best["contiguous"]
    return ratio < GAIN, f"channels-last takes {ratio:.2f} of the time of contiguous windows"
