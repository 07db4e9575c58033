"""What a volume's extremes tell, without a second volume for it."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["all_finite", "largest"]


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
