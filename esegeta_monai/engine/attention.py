"""Self-attention of one pass: the matrices of every block, the tokens that they mix, and how stages follow each other.

A block mixes tokens, numbered in the order of their grid. In a Swin transformer it does so in windows, some shifted,
and stages are joined by patch merging. Vectors of weights over tokens are carried through blocks from the last to the
first; a square matrix over all tokens is never built.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.nets.swin_unetr import (
    PatchMergingV2,
    SwinTransformerBlock,
    get_window_size,
    window_partition,
)
from torch import Tensor, nn

from esegeta_monai.errors import MethodError
from esegeta_monai.utils.upstream import without_checkpoints

__all__ = ["Attention", "Merging", "Step", "record_attention"]


@dataclass
class Attention:
    """One self-attention block.

    Attributes:
        name: dotted name of the block.
        matrix: attention (n · windows, heads, N, N), part of the graph; rows sum to 1.
        tokens: number of each window's tokens (windows, N), −1 for padding; None: one window of all tokens in order.
        output: output of the block, tokens (n, T, C) or a grid (n, *grid, C), part of the graph.
    """

    name: str
    matrix: Tensor
    tokens: Tensor | None
    output: Tensor

    def mix(self, weights: Tensor, matrix: Tensor) -> Tensor:
        """Carry weights (n, T) of queries to keys: ``r A``, A the block matrix of the windows.

        Args:
            weights: (n, T).
            matrix: (n · windows, N, N), such as the mean over heads.

        Returns:
            (n, T); what goes to padding is left out.
        """
        n = len(weights)
        if self.tokens is None:
            return torch.bmm(weights[:, None], matrix)[:, 0]
        padded = F.pad(weights, (0, 1))  # −1 picks the zero at the end
        rows = padded[:, self.tokens].reshape(-1, 1, self.tokens.shape[1])
        mixed = torch.bmm(rows, matrix).reshape(n, -1)
        result = torch.zeros_like(padded)
        result.index_add_(1, self.tokens.flatten() % padded.shape[1], mixed)
        return result[:, :-1]


@dataclass
class Merging:
    """Patch merging between two stages: each token of the upper stage is made of 2 per axis of the lower one.

    Attributes:
        grid: grid of the lower stage.
    """

    grid: tuple[int, ...]

    def carry(self, weights: Tensor) -> Tensor:
        """Spread weights (n, T) of the upper stage equally over the tokens of the lower one; padding takes its part."""
        n, upper = len(weights), [-(-g // 2) for g in self.grid]
        wide = weights.reshape(n, *upper) / 2 ** len(upper)
        for axis, length in enumerate(self.grid, 1):
            wide = wide.repeat_interleave(2, axis).narrow(axis, 0, length)
        return wide.reshape(n, -1)


Step = Attention | Merging


@contextmanager
def record_attention(network: nn.Module) -> Iterator[list[Step]]:
    """Record the self-attention blocks of a network while the block runs, in the order in which they finish.

    Flash attention and activation checkpoints are switched off meanwhile: the values are the same up to rounding, and
    the matrices exist.

    Raises:
        MethodError: the network has no self-attention that is known, or blocks with cross-attention.
    """
    steps: list[Step] = []
    blocks = [(n, m) for n, m in network.named_modules() if isinstance(m, (TransformerBlock, SwinTransformerBlock))]
    if not blocks:
        raise MethodError(
            "the network has no self-attention block of MONAI (TransformerBlock, SwinTransformerBlock): use LRP, whose "
            "rules follow any attention, or a gradient or perturbation method"
        )
    with ExitStack() as stack:
        stack.enter_context(without_checkpoints())
        for name, block in blocks:
            if getattr(block, "with_cross_attention", False):
                raise MethodError(f"block {name!r} has cross-attention, which is no mixing of its own tokens: use LRP")
            stack.enter_context(_plain_attention(block.attn))
            stack.enter_context(_recorded(name, block, steps))
        for module in network.modules():
            if isinstance(module, PatchMergingV2):
                handle = module.register_forward_pre_hook(lambda m, args: _merged(steps, args[0]))
                stack.callback(handle.remove)
        yield steps


def _merged(steps: list[Step], x: Tensor) -> None:
    steps.append(Merging(tuple(x.shape[1:-1])))


@contextmanager
def _plain_attention(attention: Any) -> Iterator[None]:
    """Switch flash attention off."""
    flash = getattr(attention, "use_flash_attention", False)
    try:
        if flash:
            attention.use_flash_attention = False
        yield
    finally:
        if flash:
            attention.use_flash_attention = True


@contextmanager
def _recorded(name: str, block: Any, steps: list[Step]) -> Iterator[None]:
    dropout = block.attn.drop_weights if isinstance(block, TransformerBlock) else block.attn.attn_drop
    seen: list[Tensor] = []

    def at_matrix(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0].clone(), *args[1:])

    def at_end(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if len(seen) != 1:
            raise MethodError(f"block {name!r} computes {len(seen)} attention matrices in a call: 1 is expected")
        tokens = None if isinstance(block, TransformerBlock) else _window_tokens(block, args[0].shape[1:-1])
        steps.append(Attention(name, seen.pop(), None if tokens is None else tokens.to(output.device), output))
        return output.clone()

    handles = [dropout.register_forward_pre_hook(at_matrix), block.register_forward_hook(at_end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _window_tokens(block: Any, grid: Sequence[int]) -> Tensor:
    """Return the token number at each place of each window of a Swin block (windows, N), −1 for padding."""
    window, shift = get_window_size(tuple(grid), block.window_size, block.shift_size)
    numbers = torch.arange(math.prod(grid)).reshape(1, *grid, 1) + 1
    pads = [p for g, w in zip(reversed(grid), reversed(window)) for p in (0, (w - g % w) % w)]
    numbers = F.pad(numbers, (0, 0, *pads))
    if any(shift):
        numbers = numbers.roll([-s for s in shift], list(range(1, len(grid) + 1)))
    return window_partition(numbers, window)[..., 0] - 1
