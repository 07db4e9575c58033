"""Extremes and hashes of tensors."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["all_finite", "digest", "largest"]


def largest(values: Tensor) -> float:
    """max |v|; NaN where one is.

    >>> import torch
    >>> largest(torch.tensor([1.0, -3.0]))
    3.0
    """
    low, high = (float(v) for v in values.aminmax())
    return max(-low, high)


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite.

    >>> import torch
    >>> all_finite(torch.tensor([1.0, float("nan")]))
    False
    """
    return all(math.isfinite(float(v)) for v in values.detach().aminmax())


def digest(*tensors: Tensor) -> bytes:
    """SHA-256 over shapes and bytes; what a view repeats along an axis counts once, so that a volume of one value a
    channel (`esegeta_monai.engine.baselines.per_channel`) is not gone through."""
    found = hashlib.sha256()
    for whole in tensors:
        t = whole[tuple(slice(0, 1) if step == 0 else slice(None) for step in whole.stride())]
        found.update(f"{tuple(whole.shape)}{tuple(t.shape)}".encode())
        found.update(np.ascontiguousarray(t.detach().cpu().numpy()).data)
    return found.digest()


def true_positions(mask: Tensor) -> Tensor:
    """Where a mask is True, as positions in its flattened form (n,), int64."""
    if mask.device.type == "cpu":  # in a sixth of the time of torch.nonzero
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask.flatten()).flatten()


def take(values: Tensor, positions: Tensor) -> Tensor:
    """Values (..., m) at positions (n,) of their last axis: (..., n), much faster than by indexing; differentiable."""
    return values.gather(-1, positions.expand(*values.shape[:-1], -1))


def bounding_box(mask: Tensor) -> tuple[slice, ...]:
    """The smallest box that holds every True voxel of ``mask``; an empty mask gives an empty box at the origin.

    >>> bounding_box(torch.tensor([[False, True, True]]))
    (slice(0, 1, None), slice(1, 3, None))
    """
    box, rest = [], mask.view(torch.uint8)  # torch looks through bytes many times as fast as through booleans
    while rest.ndim:
        line = torch.nonzero(rest if rest.ndim == 1 else rest.flatten(1).amax(1)).flatten()
        box.append(slice(int(line[0]), int(line[-1]) + 1) if len(line) else slice(0, 0))
        rest = rest.amax(0)
    return tuple(box)
