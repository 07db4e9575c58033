"""Extremes and hashes of tensors."""

from __future__ import annotations

import hashlib
import math

import numpy as np
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
    channel (`esegeta_monai.baselines.per_channel`) is not gone through."""
    found = hashlib.sha256()
    for whole in tensors:
        t = whole[tuple(slice(0, 1) if step == 0 else slice(None) for step in whole.stride())]
        found.update(f"{tuple(whole.shape)}{tuple(t.shape)}".encode())
        found.update(np.ascontiguousarray(t.detach().cpu().numpy()).data)
    return found.digest()
