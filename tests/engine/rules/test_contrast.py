"""Both sides of a contrast: by hand, on every network, and what the two have in common."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esegeta_monai.engine.rules import composite_of, contrastive_excitation, contrastive_lrp, excitation, lrp
from tests.engine.rules.support import assert_same_state, relative, state
from tests.networks import NAMES, build

DOUBLE = torch.float64
ZPLUS = composite_of({"convolution": "ZPlus", "dense": "ZPlus"})


def _shares(W, x):
    """c_ij⁺ / Σ_i c_ij⁺, (j, i)."""
    excites = (W * x).clamp(min=0)
    total = excites.sum(1, keepdim=True)
    return torch.where(total > 0, excites / total, 0.0)


def _mlp():
    torch.manual_seed(2)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)]
    return nn.Sequential(*layers).double().requires_grad_(False), torch.rand(2, 6, dtype=DOUBLE)


PRIOR = torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)


def test_excitation_by_hand():
    network, x = _mlp()
    result = contrastive_excitation(network, x, PRIOR.expand(1, 2, 3))
    for side, sign in ((result.target, 1), (result.opposite, -1)):
        for i in range(2):
            hidden = [x[i], network[:2](x[i]), network[:4](x[i])]
            traced = PRIOR
            for layer, below in zip((4, 2, 0), reversed(hidden)):
                traced = traced @ _shares((sign if layer == 4 else 1) * network[layer].weight, below)
            assert relative(side[0, i], traced) < 1e-12
    assert torch.allclose(result.kept, torch.full((2, 1), 2.0, dtype=DOUBLE), rtol=1e-12)
    assert float(result.total) == 2


def test_lrp_by_hand():
    """R_i = Σ_j c_ij⁺ / (Σ_i c_ij⁺ + b_j⁺) R_j, under −W and −b in the last layer for the opposite."""
    network, x = _mlp()
    result = contrastive_lrp(network, x, PRIOR.expand(1, 2, 3), ZPLUS)
    for side, sign in ((result.target, 1), (result.opposite, -1)):
        for i in range(2):
            hidden = [x[i], network[:2](x[i]), network[:4](x[i])]
            relevance = PRIOR * network(x[i])
            for layer, below in zip((4, 2, 0), reversed(hidden)):
                top = sign if layer == 4 else 1
                excites = (top * network[layer].weight * below).clamp(min=0)
                total = excites.sum(1) + (top * network[layer].bias).clamp(min=0)
                relevance = torch.where(total > 0, relevance / total, 0.0) @ excites
            assert relative(side[0, i], relevance) < 1e-12


SLOW = {(name, 3) for name in ("UNETR", "SwinUNETR", "VNet", "BasicUNet", "BasicUNetPlusPlus")}
CELLS = [
    pytest.param(name, dims, marks=pytest.mark.slow if (name, dims) in SLOW else ())
    for name in NAMES
    for dims in (2, 3)
]


@pytest.mark.parametrize(("name", "dims"), CELLS)
def test_every_network(name, dims):
    case = build(name, spatial_dims=dims)
    y = case.logits(case.image).detach()
    prior = torch.zeros_like(y)
    prior[:, 1] = 1
    prior = (prior / prior.sum())[None]
    before = state(case.network)
    excited = contrastive_excitation(case.logits, case.image, prior)
    relevance = contrastive_lrp(case.logits, case.image, prior, ZPLUS)
    assert_same_state(before, state(case.network))
    # the target's side is plain excitation backpropagation
    assert relative(excited.target, excitation(case.logits, case.image, prior).input) < 1e-12
    for side, kept in ((excited.target, excited.kept[0]), (excited.opposite, excited.kept[1])):
        assert side.min() >= 0
        assert 0 < float(side.sum()) <= float(kept) * (1 + 1e-9)
        assert float(kept) <= 1 + 1e-9
    # relevance and what constants keep add up to the score, on either side
    score = float((y * prior).sum())
    for side, kept in ((relevance.target, relevance.kept[0]), (relevance.opposite, relevance.kept[1])):
        assert abs(float(side.sum() + kept) - score) <= 1e-9 * abs(score)
    # Both sides differ by more than a factor and rounding (1e-13). Not by much: a deep random network mixes channels
    # so well that what differs at the top arrives nearly alike (1e-5 in EfficientNet).
    for a, b in ((excited.target, excited.opposite), (relevance.target, relevance.opposite)):
        assert relative(a / a.sum(), b / b.sum()) > 1e-8


def test_a_single_layer_is_its_own_top():
    network = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 2.0, -3.0, -1.0]]))
    x, one = torch.ones(1, 4, dtype=DOUBLE), torch.ones(1, 1, 1, dtype=DOUBLE)
    result = contrastive_excitation(network, x, one)
    assert torch.allclose(result.target.flatten(), torch.tensor([1 / 3, 2 / 3, 0, 0], dtype=DOUBLE))
    assert torch.allclose(result.opposite.flatten(), torch.tensor([0, 0, 3 / 4, 1 / 4], dtype=DOUBLE))
    result = contrastive_lrp(network, x, one, ZPLUS)  # the score is −1: both sides share out −1
    assert torch.allclose(result.target.flatten(), -torch.tensor([1 / 3, 2 / 3, 0, 0], dtype=DOUBLE))
    assert torch.allclose(result.opposite.flatten(), -torch.tensor([0, 0, 3 / 4, 1 / 4], dtype=DOUBLE))


def test_relevance_above_the_last_weights_changes_its_sign_too():
    """mean(W x) and W x + skip: the opposite of the sum, not of one term."""
    torch.manual_seed(0)
    dense = nn.Linear(5, 4, bias=False).double().requires_grad_(False)
    x, one = torch.rand(1, 5, dtype=DOUBLE), torch.ones(1, 1, dtype=DOUBLE)
    y = dense(x)[0].detach()
    opposite = contrastive_excitation(lambda z: dense(z).mean(1), x, one).opposite
    low = (-y).clamp(min=0) / (-y).clamp(min=0).sum()
    assert (y < 0).any()
    assert relative(opposite.flatten(), low @ _shares(-dense.weight, x[0])) < 1e-12
    square = nn.Linear(5, 5, bias=False).double().requires_grad_(False)
    prior = torch.full((1, 1, 5), 0.2, dtype=DOUBLE)
    traced = contrastive_excitation(lambda z: square(z) + z, x, prior).opposite.flatten()
    terms = torch.stack([-square(x)[0], -x[0]])
    raised = terms.clamp(min=0)
    raised = torch.where(raised.sum(0) == 0, terms.abs(), raised)
    by_weights, by_skip = 0.2 * raised / raised.sum(0)
    assert relative(traced, by_weights @ _shares(-square.weight, x[0]) + by_skip) < 1e-12


def test_epsilon_below_the_top_is_the_composites_own():
    network, x = _mlp()
    result = contrastive_lrp(network, x, PRIOR.expand(1, 2, 3), composite_of("LRP0"))
    top = {"convolution": "ZPlus", "dense": "ZPlus"}
    hidden = network[:4](x).detach()
    first = lrp(network[4], hidden, PRIOR.expand(1, 2, 3), top)
    below = lrp(network[:4], x, (first.input / torch.where(hidden == 0, 1.0, hidden)), "LRP0")
    assert relative(result.target, below.input) < 1e-10
