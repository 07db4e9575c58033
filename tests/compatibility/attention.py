"""Maps of attention by the definitions, from hooks on MONAI's blocks in one pass of its own inferer with autograd.

Weights of tokens are carried back one matrix at a time; Swin windows are found from the coordinates of each token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from monai.networks.blocks.transformerblock import TransformerBlock
from monai.networks.nets.swin_unetr import SwinTransformerBlock
from torch import Tensor, nn

from tests.compatibility.sight import Sight

__all__ = ["attention_blocks", "attention_map"]


def attention_blocks(network: nn.Module) -> list[nn.Module]:
    """Blocks of self-attention, in the order of the module tree, which is that of the pass."""
    return [m for m in network.modules() if isinstance(m, (TransformerBlock, SwinTransformerBlock))]


@contextmanager
def _recorded(blocks: list[nn.Module]) -> Iterator[tuple[list[list[Tensor]], list[list[Tensor]]]]:
    """Collect the matrices and the output of each block, a tensor for each call of the network."""
    matrices: list[list[Tensor]] = [[] for _ in blocks]
    outputs: list[list[Tensor]] = [[] for _ in blocks]

    def keep(where: list[Tensor]):
        def hook(module: nn.Module, given: object, output: Tensor) -> Tensor:
            where.append(output.clone())
            return where[-1]

        return hook

    handles, flash = [], []
    for block, of_matrix, of_output in zip(blocks, matrices, outputs):
        swin = isinstance(block, SwinTransformerBlock)
        if not swin:
            flash.append((block.attn, block.attn.use_flash_attention))
            block.attn.use_flash_attention = False
        handles.append(
            (block.attn.attn_drop if swin else block.attn.drop_weights).register_forward_hook(keep(of_matrix))
        )
        handles.append(block.register_forward_hook(keep(of_output)))
    try:
        yield matrices, outputs
    finally:
        for handle in handles:
            handle.remove()
        for attention, value in flash:
            attention.use_flash_attention = value


def _windows(block: SwinTransformerBlock, grid: tuple[int, ...]) -> Tensor:
    """Number of the token at each place of each window (windows, N); -1: padding."""
    size = [min(g, w) for g, w in zip(grid, block.window_size)]
    shift = [0 if g <= w else s for g, w, s in zip(grid, block.window_size, block.shift_size)]
    padded = [math.ceil(g / w) * w for g, w in zip(grid, size)]
    counts = [p // w for p, w in zip(padded, size)]
    tokens = np.full((math.prod(counts), math.prod(size)), -1)
    for at in np.ndindex(*padded):
        if any(a >= g for a, g in zip(at, grid)):
            continue
        moved = [(a - s) % p for a, s, p in zip(at, shift, padded)]
        window = np.ravel_multi_index([m // w for m, w in zip(moved, size)], counts)
        within = np.ravel_multi_index([m % w for m, w in zip(moved, size)], size)
        tokens[window, within] = np.ravel_multi_index(at, grid)
    return torch.from_numpy(tokens)


def _mixed(block: nn.Module, row: Tensor, matrix: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return ``row · matrix`` (T,) for a row over all tokens and a matrix (T, T), or one for each window."""
    if isinstance(block, TransformerBlock):
        return row @ matrix[0]
    tokens = _windows(block, grid)
    there = tokens >= 0
    parts = torch.where(there, row[tokens.clamp(min=0)], 0.0)
    mixed = torch.einsum("wq,wqk->wk", parts, matrix)
    return torch.zeros_like(row).index_add_(0, tokens[there], mixed[there])


def _unmerged(row: Tensor, coarse: tuple[int, ...], fine: tuple[int, ...]) -> Tensor:
    """Share the weight of each merged token among the tokens that it is the mean of."""
    values = row.reshape(coarse)
    for axis, n in enumerate(fine):
        values = values.repeat_interleave(n // coarse[axis], axis) / (n // coarse[axis])
    return values.flatten()


def attention_map(kind: str, sight: Sight) -> Tensor:
    """The map (1, *spatial) of ``AttentionRollout``, ``AttentionRelevance`` or ``LeGrad``."""
    blocks = attention_blocks(sight.network)
    with _recorded(blocks) as (matrices, outputs):
        score = sight.F(sight.image.clone().requires_grad_(True))
    flat = [m for of_block in matrices for m in of_block]
    gradients = iter(torch.autograd.grad(score, [*flat, *outputs[-1]], allow_unused=True))
    of_matrices = [[next(gradients) for _ in of_block] for of_block in matrices]
    of_last = list(gradients)
    grids = [tuple(o[0].shape[1:-1]) for o in outputs]  # of ViT: (tokens,)
    rows, starts = [], []
    for call, last in enumerate(outputs[-1]):
        weights = (last.detach() * (torch.zeros_like(last) if of_last[call] is None else of_last[call])).abs().sum(-1)
        for n in range(len(last)):
            row = weights[n].flatten()
            starts.append(float(row.sum()))
            total = torch.zeros_like(row)
            for i in reversed(range(len(blocks))):
                many = len(matrices[i][call]) // len(last)
                part = slice(n * many, (n + 1) * many)
                a = matrices[i][call][part].detach()
                g = of_matrices[i][call]
                g = torch.zeros_like(a) if g is None else g[part]
                if kind == "LeGrad":
                    positive = g.clamp(min=0).mean(1)
                    ones = torch.ones(math.prod(grids[i]), dtype=a.dtype)
                    total = total + _mixed(blocks[i], ones, positive, grids[i]) / positive.shape[-1]
                elif kind == "AttentionRollout":
                    row = (row + _mixed(blocks[i], row, a.mean(1), grids[i])) / 2
                else:
                    row = row + _mixed(blocks[i], row, (a * g).clamp(min=0).mean(1), grids[i])
                if i and grids[i - 1] != grids[i]:
                    row = _unmerged(row, grids[i], grids[i - 1]) if kind != "LeGrad" else row
                    total = _unmerged(total, grids[i], grids[i - 1]) if kind == "LeGrad" else total
            rows.append(total if kind == "LeGrad" else row)
    whole = 1.0 if kind == "LeGrad" else sum(starts)
    grid = grids[0] if len(grids[0]) == sight.dims else _grid_of_tokens(len(rows[0]), sight)
    values = torch.stack([row[-math.prod(grid) :].reshape(1, *grid) for row in rows]) / whole
    return sight.s.scatter(values)


def _grid_of_tokens(count: int, sight: Sight) -> tuple[int, ...]:
    """The grid of patches of a window, equally many along each axis; a class token comes first."""
    roi = sight.s.roi
    for patch in range(1, max(roi) + 1):
        grid = tuple(n // patch for n in roi)
        if math.prod(grid) in (count, count - 1):
            return grid
    raise AssertionError(f"{count} tokens in a window of {roi}")
