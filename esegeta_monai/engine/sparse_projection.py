"""A random projection of very long vectors that keeps their inner products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai.errors import UsageError

__all__ = ["SparseProjection"]

CHUNK = 2**20
"""Entries of a vector whose rows of the matrix are drawn at a time; the matrix is never stored."""


@dataclass(frozen=True)
class SparseProjection:
    """Sparse Johnson-Lindenstrauss projection (Kane & Nelson 2014, arXiv:1012.1577), with eight entries ±1/√8 per row.

    ``⟨Px, Py⟩`` is unbiased for ``⟨x, y⟩``, with a standard deviation of about ``|x||y|/√dimension``.

    Args:
        dimension: length of the results, a multiple of eight.
        seed: of the matrix.

    Raises:
        UsageError: ``dimension`` is no positive multiple of eight.

    >>> SparseProjection(64)(torch.ones(2, 1000)).shape
    torch.Size([2, 64])
    """

    dimension: int
    seed: int = 0

    BLOCKS = 8

    def __post_init__(self) -> None:
        if self.dimension < self.BLOCKS or self.dimension % self.BLOCKS:
            raise UsageError(f"projection of {self.dimension} numbers: give a multiple of {self.BLOCKS}")

    def __call__(self, vectors: Tensor) -> Tensor:
        """Project (n, D) to (n, dimension), float64."""
        result = torch.zeros((len(vectors), self.dimension), dtype=torch.float64, device=vectors.device)
        width = self.dimension // self.BLOCKS
        for number, start in enumerate(range(0, vectors.shape[1], CHUNK)):
            part = vectors[:, start : start + CHUNK].double()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            for block in range(self.BLOCKS):
                at = torch.randint(width, (part.shape[1],), generator=generator) + block * width
                sign = torch.randint(2, (part.shape[1],), generator=generator) * 2 - 1
                result.index_add_(1, at.to(part.device), part * sign.to(part.device))
        return result / self.BLOCKS**0.5
