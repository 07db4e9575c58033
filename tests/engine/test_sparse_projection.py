"""The projection keeps inner products: without bias, with the stated deviation, and by its own matrix."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai.engine import sparse_projection
from esegeta_monai.engine.sparse_projection import SparseProjection
from esegeta_monai.errors import UsageError


def test_inner_products_without_bias() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 3000, generator=generator, dtype=torch.float64)
    y = y + 0.5 * x
    truth, spread = float(x @ y), float(x.norm() * y.norm()) / 64**0.5
    values = torch.tensor(
        [float((p := SparseProjection(64, seed)(torch.stack([x, y])))[0] @ p[1]) for seed in range(200)]
    )
    assert abs(float(values.mean()) - truth) < 4 * spread / 200**0.5
    assert 0.7 < float(values.std()) / spread < 1.5


def test_it_is_one_linear_map_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_projection, "CHUNK", 7)
    projection = SparseProjection(16, 3)
    matrix = projection(torch.eye(20, dtype=torch.float64))  # (D, p)
    assert torch.equal((matrix != 0).sum(1), torch.full((20,), 8))
    torch.testing.assert_close(matrix.square().sum(1), torch.ones(20, dtype=torch.float64))
    vectors = torch.randn(3, 20, dtype=torch.float64)
    torch.testing.assert_close(projection(vectors), vectors @ matrix)
    assert not torch.equal(matrix[:7], matrix[7:14])


def test_a_wrong_dimension_is_refused() -> None:
    with pytest.raises(UsageError, match="multiple of 8"):
        SparseProjection(12)
