"""Maps between the grids of network and scan."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor

from esegeta_monai.files.grids.resample import to_network_grid


def test_a_map_on_the_scans_grid_keeps_its_sum_on_the_networks():
    """A smooth additive map at 1 mm, brought to 2 mm."""
    axes = [torch.linspace(-2, 2, n, dtype=torch.float64) for n in (32, 24, 28)]
    smooth = torch.exp(-4 * sum(a**2 for a in torch.meshgrid(*axes, indexing="ij")))[None]
    values = MetaTensor(smooth, affine=torch.eye(4, dtype=torch.float64))
    there = torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0], dtype=torch.float64))
    there[:3, 3] = 0.5
    image = MetaTensor(torch.zeros(1, 16, 12, 14), affine=there)
    moved = to_network_grid(values, image, additive=True)
    assert moved.shape == image.shape
    assert float(moved.sum()) == pytest.approx(float(smooth.sum()), rel=1e-2)
    same = to_network_grid(values, MetaTensor(torch.zeros(1, 32, 24, 28)), additive=True)
    assert torch.equal(same, smooth)
