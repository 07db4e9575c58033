"""The layout of a layer's output in a window: the axis of the channels, and the grid of tokens.

A shape such as (48, 32, 32) does not show which axis has the channels. The kind of a layer with weights does. A layer
without weights, such as an activation, has the layout of the layer before it, unless its shape contradicts this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from monai.networks.blocks import MLPBlock
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformerBlock
from torch import nn

__all__ = ["channels_last", "grid_of"]

_LAST = (nn.LayerNorm, nn.Linear)
_LAST_INSIDE = (MLPBlock, SwinTransformerBlock, PatchMergingV2)
"""Blocks that keep the channels on the last axis between their layers."""


def grid_of(network: nn.Module, layer: str, shape: tuple[int, ...], roi: Sequence[int]) -> tuple[int, ...] | None:
    """Return (C, *positions) of a layer's output, or None if it is not, or not certainly, a map of the window.

    Args:
        network: the network.
        layer: dotted name.
        shape: shape of the output, without batch.
        roi: shape of a window as the network sees it.
    """
    if len(shape) == len(roi) + 1:
        last = channels_last(network, layer, shape, roi)
        return None if last is None else (shape[-1], *shape[:-1]) if last else shape
    if len(shape) != 2:
        return None
    for patch in range(1, min(roi) + 1):  # tokens: one per patch, optionally after a class token
        grid = tuple(n // patch for n in roi)
        if math.prod(grid) in (shape[0], shape[0] - 1) and math.prod(grid) > 1:
            return (shape[1], *grid)
    return None


def channels_last(network: nn.Module, layer: str, shape: tuple[int, ...], roi: Sequence[int]) -> bool | None:
    """Return True if a layer's output has its channels on the last axis, as inside Swin and ConvNeXt blocks.

    The arguments are those of `grid_of`; the output has as many positional axes as the window.

    Returns:
        None if neither the layer nor its shape decides.
    """
    parts = layer.split(".") if layer else []
    path = [network, *(network.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts)))]
    module = path[-1]
    if isinstance(module, _LAST) or any(isinstance(m, _LAST_INSIDE) for m in path):
        return True
    if len(path) == 1 or _has_weights(module) or not _follows_channels_last(path[-2], parts[-1]):
        return False
    in_front, behind = _fit(shape[1:], roi), _fit(shape[:-1], roi)
    return None if in_front == behind > 0 else behind > in_front


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or any(p.ndim > 1 for p in module.parameters(recurse=False))


def _follows_channels_last(parent: nn.Module, name: str) -> bool:
    """Return True if the last sibling with parameters before a layer has its channels on the last axis."""
    behind = False
    for sibling, module in parent.named_children():
        if sibling == name:
            break
        if _has_weights(module) or isinstance(module, _LAST) or any(True for _ in module.parameters(recurse=False)):
            behind = isinstance(module, _LAST)
    return behind


def _fit(positions: Sequence[int], roi: Sequence[int]) -> int:
    """Rate whether positions are a window divided by one factor for all axes: 2 exactly, 1 after rounding, 0 not."""
    if all(n * positions[0] == p * roi[0] for n, p in zip(roi, positions)):
        return 2
    lowest = max(n / (p + 1) for n, p in zip(roi, positions))
    highest = min(n / (p - 1) if p > 1 else math.inf for n, p in zip(roi, positions))
    return int(lowest < highest)
