"""Scans with oblique and permuted axes, and the sums of a map on both grids."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms.utils import create_rotate

SIZE = (7, 6, 5)


AFFINE = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))


SUMS = ("sum_network_grid", "sum_scan_grid", "sum_in_padding")


def scan(size=SIZE, affine=AFFINE, channels=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return MetaTensor(torch.rand(channels, *size, generator=generator, dtype=torch.float64).to(dtype), affine=affine)


def random_map(image, seed=0, dtype=torch.float64):
    values = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return MetaTensor(values.to(dtype), meta=image.meta, applied_operations=image.applied_operations)


def balance(result):
    """|sum_network_grid − sum_scan_grid − sum_in_padding|"""
    network, on_scan, padding = (result.meta[key] for key in SUMS)
    return abs(network - on_scan - padding)


AXES = [
    np.array(signs)[:, None] * np.eye(3)[list(order)]
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def oriented_affine(axes, spacing=(1.2, 1.7, 2.6), oblique=True):
    """Voxel axes along ``axes`` (a signed permutation), tilted by some 15 degrees, with anisotropic voxels."""
    tilt = create_rotate(3, (0.26, -0.17, 0.21))[:3, :3] if oblique else np.eye(3)
    affine = np.eye(4)
    affine[:3, :3] = tilt @ axes @ np.diag(spacing)
    affine[:3, 3] = (-31.5, 17.25, 4.0)
    return torch.as_tensor(affine)
