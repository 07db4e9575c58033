from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esegeta_monai.engine.rules import excitation
from esegeta_monai.errors import RuleError, UsageError
from tests.engine.rules.support import assert_same_state, relative, state, weights_matrix
from tests.networks import NAMES, build


def _trace(W, x, P):
    """Zhang's marginal winning probability over a matrix: P_i = Σ_j c_ij⁺ / Σ_i c_ij⁺ P_j."""
    result = torch.zeros_like(x)
    for j in range(len(P)):
        excites = (W[j] * x).clamp(min=0)
        if excites.sum() > 0:
            result += P[j] * excites / excites.sum()
    return result


OPERATIONS = {
    "linear": (lambda: nn.Linear(7, 5), (1, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=2), (1, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (1, 2, 4, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 1, 3, 4, 2)),
    "transpose2d": (lambda: nn.ConvTranspose2d(2, 2, 3, stride=2), (1, 2, 3, 3)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 1, 2, stride=2), (1, 2, 2, 2, 2)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_weights_share_by_excitatory_contribution(name):
    torch.manual_seed(1)
    module, shape = OPERATIONS[name][0]().double(), OPERATIONS[name][1]
    x = torch.randn(shape, dtype=torch.float64)
    W, _ = weights_matrix(module, shape)
    prior = torch.rand(module(x).shape, dtype=torch.float64)
    result = excitation(module, x, prior[None])
    expected = _trace(W, x.flatten(), prior.flatten())
    assert relative(result.input.flatten(), expected) < 1e-12
    assert torch.allclose(result.absorbed, prior.sum() - expected.sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: F.avg_pool2d(x, 2), (1, 2, 4, 4)),
        (lambda x: F.adaptive_avg_pool3d(x, 2), (1, 1, 3, 3, 3)),
        (lambda x: F.interpolate(x, size=5, mode="linear"), (1, 2, 3)),
        (lambda x: x.mean(1), (1, 3, 4)),
        (lambda x: x @ torch.linspace(-1, 1, 20, dtype=torch.float64).view(4, 5), (1, 3, 4)),
        (lambda x: torch.einsum("bij,jk->bki", x, torch.linspace(-1, 1, 20).double().view(4, 5)), (1, 3, 4)),
    ],
)
def test_known_coefficients_share_likewise(function, shape):
    torch.manual_seed(1)
    x = torch.randn(shape, dtype=torch.float64)
    W, _ = weights_matrix(function, shape)
    prior = torch.rand(function(x).shape, dtype=torch.float64)
    expected = torch.zeros(x.numel(), dtype=x.dtype)
    for j, row in enumerate(W):
        contributions = row * x.flatten()
        shares = contributions.clamp(min=0) if (contributions > 0).any() else contributions.abs()
        expected += prior.flatten()[j] * shares / shares.sum()
    result = excitation(function, x, prior[None]).input
    assert relative(result.flatten(), expected) < 1e-12
    assert relative(result.sum(), prior.sum()) < 1e-12


X = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
PRIOR = torch.rand(1, 2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        F.gelu,
        torch.sigmoid,
        lambda x: F.leaky_relu_(x * 2),
        lambda x: F.instance_norm(x),
        lambda x: 1 - x,
        lambda x: F.layer_norm(x, (6,)),
        lambda x: x.softmax(1),
        lambda x: F.normalize(x, dim=1),
        lambda x: x + 3,
        lambda x: F.batch_norm(x, torch.ones(4).double(), torch.ones(4).double()),
        lambda x: x / 2,
    ],
)
def test_one_parent_receives_all(function):
    assert relative(excitation(function, X, PRIOR).input, PRIOR) < 1e-12


def test_moves_move_back_and_constants_keep_what_they_win():
    def function(x):
        return torch.cat([torch.zeros_like(x[:, :1]), x.flip(1)[:, 1:]], 1)

    result = excitation(function, X, PRIOR)
    assert torch.equal(result.input[:, :, :3], PRIOR[:, :, 1:].flip(2))
    assert torch.allclose(result.absorbed, PRIOR[:, :, 0].sum(2))


def test_a_maximum_gives_all_to_its_winner():
    result = excitation(lambda x: x.amax(2), X, PRIOR[..., 0]).input[0]
    expected = F.one_hot(X.argmax(2), 6) * PRIOR[0, :, :, :1]
    assert torch.equal(result, expected)


def test_a_skip_connection_shares_by_its_positive_terms():
    x = torch.tensor([[2.0, 6.0], [2.0, -6.0], [-2.0, -6.0]], dtype=torch.float64)
    result = excitation(lambda z: z[:, 0] + z[:, 1], x, torch.ones(1, 3, dtype=torch.float64)).input[0]
    assert torch.allclose(result, torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.25, 0.75]], dtype=torch.float64))
    result = excitation(lambda z: z[:, 0] - z[:, 1], x, torch.ones(1, 3, dtype=torch.float64)).input[0]
    assert torch.allclose(result, torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]], dtype=torch.float64))


def test_products_give_half_to_each_factor():
    half = excitation(lambda x: x[:, :2] * x[:, 2:].sigmoid(), X, PRIOR[:, :, :2]).input
    assert torch.allclose(half, torch.cat([PRIOR[:, :, :2], PRIOR[:, :, :2]], 2) / 2)
    attention, values = X[:, :2].softmax(-1), X[:, 2:].transpose(1, 2)
    prior = PRIOR[:, :, :2, :2]
    result = excitation(
        lambda x: x[:, :, :6] @ x[:, :, 6:].transpose(1, 2), torch.cat([attention, X[:, 2:]], 2), prior
    ).input[0]
    contributions = attention[:, :, :, None] * values[:, None]  # (window, output row, inner, output column)
    positive = contributions.clamp(min=0)
    shares = prior[0, :, :, None] * positive / positive.sum(2, keepdim=True)
    assert relative(result[:, :, :6], shares.sum(3) / 2) < 1e-12
    assert relative(result[:, :, 6:], shares.sum(1).transpose(1, 2) / 2) < 1e-12


def _mlp(bias=True):
    torch.manual_seed(2)
    layers = [nn.Linear(6, 8, bias), nn.ReLU(), nn.Linear(8, 7, bias), nn.ReLU(), nn.Linear(7, 3, bias)]
    return nn.Sequential(*layers).double()


def _by_hand(network, x, prior):
    hidden = [x]
    for layer in network:
        hidden.append(layer(hidden[-1]))
    traced = _trace(network[4].weight, hidden[4], prior)
    traced = _trace(network[2].weight, hidden[2], traced)
    return _trace(network[0].weight, hidden[0], traced)


def test_a_network_by_hand():
    network, x = _mlp(), torch.rand(1, 6, dtype=torch.float64)
    prior = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    result = excitation(network, x, prior[None, None])
    assert relative(result.input[0, 0], _by_hand(network, x[0], prior)) < 1e-12
    assert result.input.min() >= 0


def test_probability_is_conserved_where_every_winner_was_excited():
    network = _mlp(bias=False)
    x = torch.rand(5, 6, dtype=torch.float64)
    logits = network(x)
    prior = F.one_hot(logits.argmax(1), 3).double()
    assert (logits.amax(1) > 0).all()
    result = excitation(network, x, prior[None])
    assert torch.allclose(result.input.sum(2), torch.ones(1, 5, dtype=torch.float64), rtol=1e-12)
    assert result.absorbed.abs().max() < 1e-12


CELLS = [
    pytest.param(name, dims, marks=pytest.mark.slow if (name, dims) in (("UNETR", 3), ("SwinUNETR", 3)) else ())
    for name in NAMES
    for dims in (2, 3)
]


@pytest.mark.parametrize(("name", "dims"), CELLS)
def test_probabilities_on_every_network(name, dims):
    case = build(name, spatial_dims=dims)
    y = case.logits(case.image)
    prior = torch.zeros_like(y)
    prior[:, 1] = 1
    prior = prior / prior.sum()
    before = state(case.network)
    result = excitation(case.logits, case.image, prior[None])
    assert result.input.min() >= 0
    assert 0.2 < result.input.sum() <= 1 + 1e-9
    assert_same_state(before, state(case.network))


def test_refusals():
    with pytest.raises(RuleError, match="logsumexp"):
        excitation(lambda x: x.logsumexp(1), X, PRIOR[:, :, 0])
    with pytest.raises(UsageError, match="windows"):
        excitation(F.relu, X, PRIOR[:, :1])
