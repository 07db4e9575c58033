"""The Fourier basis against its formula, and random views against rotations and shifts done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.methods.synthesis.parametrisation import Fourier, Phase, RandomView, hartley, squash

DOUBLE = torch.float64
SHAPES = [(8, 8), (7, 10), (6, 5, 4), (9, 1, 6)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_is_a_bijection_and_keeps_the_norm(shape):
    basis, numbers = Fourier(shape, dtype=DOUBLE), random(2, *shape)
    image = basis.image(numbers)
    assert torch.allclose(basis.numbers(image), numbers, rtol=0, atol=1e-11)
    other = random(2, *shape, seed=1)
    assert torch.allclose(basis.image(basis.numbers(other)), other, rtol=0, atol=1e-12)
    assert float(image.square().sum()) == pytest.approx(float((basis.scale * numbers).square().sum()), rel=1e-12)
    assert torch.allclose(hartley(hartley(other)), other, rtol=0, atol=1e-12)


def test_one_number_is_one_wave():
    shape, u = (6, 5), (2, 3)
    numbers = torch.zeros(1, *shape, dtype=DOUBLE)
    numbers[(0, *u)] = 1
    i, j = torch.meshgrid(torch.arange(6, dtype=DOUBLE), torch.arange(5, dtype=DOUBLE), indexing="ij")
    phase = 2 * math.pi * (u[0] * i / 6 + u[1] * j / 5)
    basis = Fourier(shape, dtype=DOUBLE)
    wave = basis.scale[u] * (phase.cos() + phase.sin()) / math.sqrt(30)
    assert torch.allclose(basis.image(numbers)[0], wave, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("shape", "decay"), [((32, 32), 1.0), ((16, 12, 16), 1.5)])
def test_the_spectrum_falls_with_the_frequency_and_has_variance_one(shape, decay):
    scale = Fourier(shape, dtype=DOUBLE).scale
    along = [scale[(k, *(0,) * (len(shape) - 1))] for k in range(shape[0] // 2)]
    assert float(along[0]) == float(along[1])  # a constant moves no more than the slowest wave
    for k in range(2, len(along)):
        assert float(along[1] / along[k]) == pytest.approx(k**decay, rel=1e-12)
    assert float(scale.square().mean()) == pytest.approx(1, rel=1e-12)
    assert Fourier(shape, decay=0.0).scale.unique().tolist() == [1]


def test_intensities_stay_within_each_channels_range():
    intensity = torch.tensor([[-2.0, 1.0], [0.0, 10.0]], dtype=DOUBLE)
    image = squash(1e3 * random(2, 9, 9), intensity)
    assert [float(c.min()) for c in image] == [-2, 0]
    assert [float(c.max()) for c in image] == [1, 10]
    assert squash(torch.zeros(2, 1, 1, dtype=DOUBLE), intensity).flatten().tolist() == [-0.5, 5]


def way(matrix: list[list[float]], shift: list[float]) -> Tensor:
    return torch.cat([torch.tensor(matrix, dtype=DOUBLE), torch.tensor(shift, dtype=DOUBLE)[:, None]], 1)


VIEW = RandomView(0, (1.0, 1.0), 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_identity_shows_the_image_as_it_is(shape):
    image = random(2, *shape)
    assert VIEW.idle
    drawn = VIEW.draw(shape, torch.Generator())
    assert torch.equal(drawn, torch.eye(len(shape), len(shape) + 1, dtype=DOUBLE))
    assert torch.allclose(VIEW.show(image, drawn), image, rtol=0, atol=1e-12)


def test_turns_and_shifts_by_hand():
    """A view reads at (−j, i) what it shows at (i, j), both from the middle: a quarter turn backwards."""
    image = random(1, 8, 8)
    assert torch.allclose(VIEW.show(image, way([[0, -1], [1, 0]], [0, 0])), image.rot90(-1, (1, 2)), atol=1e-12)
    moved = VIEW.show(image, way([[1, 0], [0, 1]], [2, -1]))
    assert torch.allclose(moved[0, :6, 1:], image[0, 2:, :-1], atol=1e-12)
    volume = random(1, 6, 6, 6)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        matrix = torch.eye(3).tolist()
        matrix[a][a] = matrix[b][b] = 0
        matrix[a][b], matrix[b][a] = -1, 1
        turned = VIEW.show(volume, way(matrix, [0, 0, 0]))
        assert torch.allclose(turned, volume.rot90(-1, (a + 1, b + 1)), atol=1e-12)


def test_scaling_by_two_doubles_distances_from_the_middle():
    ramp = torch.arange(9.0, dtype=DOUBLE)[None, :, None].expand(1, 9, 9)
    view = RandomView(0, (2.0, 2.0), 0.0)
    shown = view.show(ramp, view.draw((9, 9), torch.Generator()))
    assert torch.allclose(shown, 4 + (ramp - 4) / 2, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 4), (4, 3, 3)])
def test_the_gradient_is_the_adjoint(shape):
    """The dense matrix of a view, column by column, transposed, against autograd."""
    view, d = RandomView(2, (0.8, 1.2), 20.0), len(shape)
    drawn = view.draw(shape, torch.Generator().manual_seed(4))
    n = math.prod(shape)
    dense = torch.stack([view.show(e.reshape(1, *shape), drawn).flatten() for e in torch.eye(n, dtype=DOUBLE)], 1)
    image = random(1, *shape).requires_grad_(True)
    shown = view.show(image, drawn)
    assert torch.allclose(shown.flatten(), dense @ image.flatten(), atol=1e-12)
    cotangent = random(1, *shape, seed=2)
    (gradient,) = torch.autograd.grad(shown, image, cotangent)
    assert torch.allclose(gradient.flatten(), dense.T @ cotangent.flatten(), atol=1e-12)
    assert torch.allclose(dense.sum(1), torch.ones(n, dtype=DOUBLE), atol=1e-12)  # a constant stays one
    assert d == len(drawn)


def test_turns_are_rigid_in_millimetres_and_stay_within_their_bounds():
    spacing = (1.0, 4.0, 0.5)
    view = RandomView(3, (0.9, 1.1), 10.0, spacing)
    generator, voxel = torch.Generator().manual_seed(0), torch.tensor(spacing, dtype=DOUBLE)
    shifts = []
    for _ in range(50):
        drawn = view.draw((8, 8, 8), generator)
        world = drawn[:, :3] * voxel[:, None] / voxel
        factors = torch.linalg.svdvals(world)
        assert float(factors.max() - factors.min()) < 1e-12
        assert 1 / 1.1 <= float(factors[0]) <= 1 / 0.9
        shifts.append(drawn[:, 3])
    assert torch.stack(shifts).unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    flat = RandomView(3, (0.9, 1.1), 10.0).draw((8, 1, 8), generator)
    assert flat[1].tolist() == [0, 1, 0, 0]  # an axis of one voxel is left alone


def test_what_is_refused():
    for wrong in ((-1, (1.0, 1.0), 0.0), (0, (1.0, 0.5), 0.0), (0, (0.0, 1.0), 0.0), (0, (1.0, 1.0), -1.0)):
        with pytest.raises(UsageError, match="jitter"):
            RandomView(*wrong)


@pytest.mark.parametrize("shape", SHAPES)
def test_phases_leave_the_magnitudes_of_the_data(shape):
    data, numbers = random(2, *shape), 3 * random(2, *shape, seed=1)
    axes = tuple(range(1, data.ndim))
    basis = Phase(data)
    image = basis.image(numbers)
    expected = torch.fft.fftn(data, dim=axes)
    actual = torch.fft.fftn(image, dim=axes)
    assert float((actual.abs() - expected.abs()).abs().max()) <= 1e-10 * float(expected.abs().max())
    assert float((image - data).abs().max()) > 0.1
    assert torch.allclose(image.mean(axes), data.mean(axes), rtol=0, atol=1e-12)
