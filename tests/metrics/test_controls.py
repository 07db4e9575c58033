"""Control maps: the same for every target, seeded, and the Sobel filter against its written-out kernel in 2D and 3D."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from esegeta_monai.methods import METHODS, run
from esegeta_monai.metrics import controls
from esegeta_monai.metrics.controls import random_map, sobel_map
from esegeta_monai.targets import Box, MultiClassMask
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import noise


@pytest.mark.parametrize("shape", [(2, 9, 7), (2, 6, 7, 8)])
def test_sobel_is_the_separable_kernel(shape):
    image, dims = noise(*shape), len(shape) - 1
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]).double(), torch.tensor([-1.0, 0.0, 1.0]).double()
    pad, conv = {2: (1,) * 4, 3: (1,) * 6}[dims], {2: F.conv2d, 3: F.conv3d}[dims]
    padded = F.pad(image[:, None], pad, mode="replicate")
    total = torch.zeros_like(image)
    for axis in range(dims):
        kernel = torch.ones((1,) * dims, dtype=torch.float64)
        for a in range(dims):
            line = slope if a == axis else smooth
            kernel = kernel * line.reshape([-1 if b == a else 1 for b in range(dims)])
        total += conv(padded, kernel[None, None])[:, 0] ** 2
    assert torch.allclose(sobel_map(image), total.sqrt(), rtol=1e-12, atol=1e-12)


def test_controls_are_methods_that_ask_no_network_and_are_in_no_registry():
    case = Naive(small(), noise(1, 8, 12), [MultiClassMask(1), Box(2, (1, 1), (3, 3))])
    for control in controls():
        case.objective.context.progress.start()
        maps = run(control, case.objective).maps
        assert maps.shape == (2, 1, 8, 12)
        assert torch.equal(maps[0], maps[1])
        assert bool(maps.any())
        assert case.objective.context.progress.passes == control.passes(case.objective) == 0
        assert type(control) not in set(METHODS)


def test_the_random_map_depends_on_the_seed_only():
    image = torch.zeros(1, 8, 8)
    assert torch.equal(random_map(image, 1), random_map(image, 1))
    assert not torch.equal(random_map(image, 1), random_map(image, 2))
