"""Sobol and HSIC indices on functions whose indices are known, through masks and images."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import Hsic, Lime, Sobol, run
from esegeta_monai.methods.perturbation.sensitivity import _likeness, hsic, jansen, quasi_random
from esegeta_monai.targets import ClassScore, MultiClassMask, Voxel
from tests.support.networks import Computed, small
from tests.support.objectives import Naive
from tests.support.tensors import assert_equal, noise


def case_of(function, cells: int) -> Naive:
    """A function of the mask: the image is 1 and its baseline 0, so that a cell's middle voxel is the mask there.

    Cell i is the 3 x 3 block i of an image of shape (1, 3 · cells, 3).
    """
    ones = torch.ones(1, 3 * cells, 3, dtype=torch.float64)
    case = Naive(
        Computed(lambda x: function(x.reshape(len(x), cells, -1)[:, :, 4])[:, None]),
        ones,
        [ClassScore(0)],
        SimpleInferer(),
    )
    case.objective.context.window_batch = 256
    return case


def ishigami(u: Tensor) -> Tensor:
    a, b, c = (2 * math.pi * u - math.pi).unbind(1)
    return torch.sin(a) + 7 * torch.sin(b) ** 2 + 0.1 * c**4 * torch.sin(a)


COEFFICIENTS = torch.tensor([0.0, 1.0, 4.5, 9.0, 99.0], dtype=torch.float64)


def g_function(u: Tensor) -> Tensor:
    return ((abs(4 * u - 2) + COEFFICIENTS) / (1 + COEFFICIENTS)).prod(1)


def g_total() -> Tensor:
    """Saltelli & Sobol 1995: V_i = 1/(3 (1 + a_i)²), V_Ti = V_i Π_{j≠i} (1 + V_j), V = Π (1 + V_j) − 1."""
    v = 1 / (3 * (1 + COEFFICIENTS) ** 2)
    return v * (1 + v).prod() / (1 + v) / ((1 + v).prod() - 1)


@pytest.mark.parametrize(
    ("function", "known"),
    [(ishigami, torch.tensor([0.5576, 0.4424, 0.2437], dtype=torch.float64)), (g_function, g_total())],
)
def test_sobol_on_functions_of_known_indices(function, known):
    cells = len(known)
    for n, tolerance in ((4096, 0.01), (256, 0.1)):
        method = Sobol(n_samples=n, grid=(cells, 1), baseline="zero")
        case = case_of(function, cells)
        scores = function(method.design(case.objective))
        index, error = jansen(scores[None, :n], scores[n:].reshape(1, cells, n))
        assert float((index[0] - known).abs().max()) < tolerance
        assert bool(((index[0] - known).abs() < 4 * error[0]).all())
    result = run(method, case.objective)  # the same through masks, images and the network
    assert_equal(result.maps[0, 0].reshape(cells, 3, 3)[:, 1, 1], index[0])
    assert result.note(0)["standard_error"] == pytest.approx(float(error.max()), rel=1e-9)
    assert result.note(0)["convergence"] > 0.9
    assert result.note(0)["cells"] == [cells, 1]


def test_jansen_by_hand():
    at_a = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    exchanged = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]]])
    index, error = jansen(at_a, exchanged)
    assert index[0].tolist() == pytest.approx([0, (9 + 1 + 1 + 9) / 2 / 4 / (5 / 3)])
    assert error[0, 0] == 0
    assert jansen(torch.ones(1, 4), torch.ones(1, 1, 4))[0].item() == 0


def population_hsic(function, d: int) -> Tensor:
    """``E[k l] + E[k] E[l] − 2 E[E'[k] E'[l]]`` over all binary inputs, by its definition (Gretton et al. 2005)."""
    points = torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)), dtype=torch.float64)
    y = function(points)
    squares = (y[:, None] - y) ** 2
    l = torch.exp(-squares / (2 * squares[squares > 0].median()))  # noqa: E741 - the paper's name
    result = []
    for i in range(d):
        k = (points[:, i, None] == points[:, i]).double()
        result.append((k * l).mean() + k.mean() * l.mean() - 2 * (k.mean(1) * l.mean(1)).mean())
    return torch.stack(result)


def product_and_sum(u: Tensor) -> Tensor:
    return 3 * u[:, 0] * u[:, 1] + u[:, 2]


def test_hsic_is_the_trace():
    cells = (torch.rand(50, 4, generator=torch.Generator().manual_seed(0)) > 0.5).double()
    y = product_and_sum(cells)[None]
    n = len(cells)
    squares = (y[0][:, None] - y[0]) ** 2
    l = torch.exp(-squares / (2 * squares[squares > 0].median()))  # noqa: E741
    h = torch.eye(n, dtype=torch.float64) - 1 / n
    for i, actual in enumerate(hsic(cells, y)[0]):
        k = (cells[:, i, None] == cells[:, i]).double()
        assert float(actual) == pytest.approx(float(torch.trace(k @ h @ l @ h)) / (n - 1) ** 2, rel=1e-10)


def test_hsic_on_a_function_of_known_dependence():
    case = case_of(product_and_sum, 4)
    result = run(Hsic(n_samples=1024, grid=(4, 1), baseline="zero"), case.objective)
    actual = result.maps[0, 0].reshape(4, 3, 3)[:, 1, 1]
    known = population_hsic(product_and_sum, 4)
    assert float((actual - known).abs().max() / known.max()) < 0.02
    assert float(actual[3]) < 0.01 * float(actual[0])  # the cell that the function ignores
    assert result.note(0)["convergence"] > 0.99


def test_hsic_of_a_constant_is_zero():
    assert hsic(torch.tensor([[0.0], [1.0], [1.0]]), torch.ones(1, 3)).tolist() == [[0.0]]


@pytest.mark.parametrize(("n", "d"), [(32, 128), (1024, 686), (64, 4)])
def test_no_two_cells_are_alike_by_the_design(n, d):
    """Sobol points agree in the first bit of two of many dimensions: cells could not be separated."""
    for binary in (False, True):
        points = quasi_random(n, d, 0, binary=binary)
        assert points.shape == (n, d)
        assert _likeness(points) < 0.8
        assert torch.equal(points, quasi_random(n, d, 0, binary=binary))
        assert not torch.equal(points, quasi_random(n, d, 1, binary=binary))


def test_only_windows_that_hold_the_exchanged_cell_are_computed_again():
    case = Naive(small(), noise(1, 8, 32), [MultiClassMask(1)])
    method = Sobol(n_samples=4, grid=(1, 8), baseline="zero")
    expected = method.passes(case.objective)
    with frozen(case.net):
        run(method, case.objective)
    windows = len(case.objective.windows)
    masks = 4 * 9
    assert case.objective.context.progress.passes == expected
    assert case.objective.context.progress.passes < 0.6 * (masks * windows)


def test_both_find_the_place_that_a_voxel_looks_at():
    case = Naive(small(), noise(1, 24, 24), [Voxel(1, index=(5, 17))])
    for method in (Sobol(n_samples=32, grid=6), Hsic(n_samples=256, grid=6)):
        with frozen(case.net):
            result = run(method, case.objective).maps[0, 0]
        row, column = divmod(int(result.argmax()), 24)
        assert abs(row - 5) <= 3
        assert abs(column - 17) <= 3


def test_what_is_refused():
    for n in (0, 3, 100):
        with pytest.raises(UsageError, match="powers of two"):
            Sobol(n_samples=n)
    case = Naive(small(), noise(1, 128, 128))
    with frozen(case.net), pytest.raises(MethodError, match="coarser grid"):
        run(Sobol(n_samples=32, grid=128), case.objective)
    with pytest.raises(UsageError, match="axes"):
        run(Hsic(n_samples=8, grid=(3, 3, 3)), case.objective)


@pytest.mark.parametrize("method", [Sobol(4, 2, "zero"), Hsic(16, 2, "zero"), Lime(20, "grid(2)", "zero")])
def test_scores_that_are_not_finite_are_an_error(method):
    """HSIC of them was zero, "the target does not react here", and the regression of LIME a traceback."""

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 16).double())

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) @ self.weight.T + torch.log(x.flatten(1).amin(1, keepdim=True) - 0.9)

    case = Naive(Breaks(), noise(1, 4, 4).abs() + 1, [ClassScore(1)], SimpleInferer())
    with frozen(case.net), pytest.raises(MethodError, match=r"not finite at .* perturbed images"):
        run(method, case.objective)
