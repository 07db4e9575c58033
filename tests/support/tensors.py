"""Random images and comparisons of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

DOUBLE = torch.float64
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw a float64 tensor of this shape from a normal distribution, the same for the same seed."""
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def assert_equal(values: Tensor, reference: Tensor, tolerance: float | None = None) -> None:
    """Compare relative to the largest reference value; shapes broadcast."""
    scale = reference.abs().max()
    assert scale > 0
    assert float((values - reference).abs().max() / scale) <= (tolerance or TOLERANCE[reference.dtype])


def close(values: Tensor, reference: Tensor, tolerance: float = 1e-10) -> None:
    """Compare as `assert_equal` does; the shapes have to be equal too."""
    assert values.shape == reference.shape
    assert_equal(values, reference, tolerance)


def inner(a: Tensor, b: Tensor) -> float:
    """Return the inner product of two tensors of one shape."""
    return float((a * b).sum())
