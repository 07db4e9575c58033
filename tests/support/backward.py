"""Functions whose backward pass is not the derivative of the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Half", "Reverse"]


class Reverse(torch.autograd.Function):
    """The identity with a negative gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Half(Reverse):
    """The identity with half of its gradient."""

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient / 2
