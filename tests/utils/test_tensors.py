"""Digests and bounding boxes of tensors."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai.utils.tensors import bounding_box, digest


def test_a_digest_distinguishes_tensors_and_reads_repeated_values_once():
    column, row = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, 2.0]])
    different = [
        column.expand(2, 2),
        row.expand(2, 2),
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.tensor([1.0, 2.0, 2.0, 1.0]),
        torch.tensor([[1, 2], [2, 1]]),
        torch.tensor(1.0),
        torch.tensor(1.0).expand(2, 2),
        torch.zeros(0),
    ]
    assert len({digest(t) for t in different}) == len(different)
    assert digest(column.expand(2, 2)) == digest(column.clone().expand(2, 2))
    huge = torch.tensor(1.0).expand(2**20, 2**20)  # 4 TiB where it were gone through
    assert digest(huge) != digest(torch.tensor(2.0).expand(2**20, 2**20))


def test_bounding_box_in_three_dimensions():
    mask = torch.zeros(5, 6, 7, dtype=torch.bool)
    mask[1, 2, 3] = mask[3, 2, 6] = True
    assert bounding_box(mask) == (slice(1, 4), slice(2, 3), slice(3, 7))
    assert bounding_box(torch.tensor(True)) == ()


@pytest.mark.parametrize("shape", [(9,), (7, 8), (5, 6, 7)])
def test_bounding_box_is_that_of_the_places_of_true_voxels(shape):
    generator = torch.Generator().manual_seed(len(shape))
    for share in (0.0, 0.02, 0.2, 1.0):
        mask = (torch.rand(shape, generator=generator) < share).mT if len(shape) > 1 else torch.ones(shape) < share
        places = torch.nonzero(mask)
        expected = [slice(int(p.min()), int(p.max()) + 1) if len(p) else slice(0, 0) for p in places.T]
        assert bounding_box(mask) == tuple(expected)
