"""Interpolation by matrices is that of torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esegeta_monai.engine.windows.resize import area_matrix, interpolate, line_matrix
from tests.support.tensors import assert_equal

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


@pytest.mark.parametrize(
    ("cells", "voxels"), [((3,), (7,)), ((4, 1), (9, 5)), ((2, 5, 3), (8, 5, 7)), ((9, 8), (4, 3))]
)
def test_the_interpolation_is_that_of_torch(cells, voxels):
    values = torch.randn(2, 3, *cells, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lines = [line_matrix(0, n, p, n, torch.float64) for p, n in zip(cells, voxels)]
    reference = F.interpolate(values, voxels, mode=MODES[len(cells)], align_corners=False)
    assert_equal(interpolate(values, lines), reference)
    areas = [area_matrix(n, p, torch.float64) for p, n in zip(cells, voxels)]
    assert_equal(interpolate(values, areas), F.interpolate(values, voxels, mode="area"))


def test_a_part_of_a_line_and_no_leading_axis():
    values = torch.arange(4.0)
    whole = interpolate(values, [line_matrix(0, 8, 4, 8, torch.float32)])
    assert whole.tolist() == [0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0]
    assert interpolate(values, [line_matrix(2, 5, 4, 8, torch.float32)]).tolist() == whole[2:5].tolist()
