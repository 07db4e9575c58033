from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from esegeta_monai.engine.rules import lrp
from esegeta_monai.engine.rules.composites import COMPOSITES, Composite, composite_of
from esegeta_monai.engine.rules.weighted import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from esegeta_monai.errors import UsageError


def test_composites_from_a_mapping():
    module = nn.Linear(3, 2).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    ones = torch.ones(1, 1, 2, dtype=torch.float64)
    spec = {"convolution": {"rule": "Gamma", "gamma": 0.1}, "dense": {"rule": "Gamma", "gamma": 0.4}}
    assert torch.equal(lrp(module, x, ones, spec).input, lrp(module, x, ones, Composite(ZPlus(), Gamma(0.4))).input)
    parameters = lrp(module, x, ones, {"convolution": "ZPlus", "dense": "Epsilon"}, epsilon=0.5)
    assert torch.equal(parameters.input, lrp(module, x, ones, Composite(ZPlus(), Epsilon(0.5))).input)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("Epsilonplus", "EpsilonPlusFlat"),
        ({"convolution": "ZPlus"}, "'dense'"),
        ({"convolution": "Zpuls", "dense": "Epsilon"}, "Zpuls"),
        ({"convolution": "Flat", "dense": "Epsilon"}, "first"),
        ({"convolution": {"rule": "Gamma", "gama": 1}, "dense": "Epsilon"}, "gama"),
        ({"convolution": {"rule": "Gamma", "gamma": -0.1}, "dense": "Epsilon"}, "gamma=-0.1"),
        ({"convolution": {"rule": "AlphaBeta", "alpha": 2, "beta": 2}, "dense": "Epsilon"}, "alpha - beta must be 1"),
        ({"convolution": {"rule": "AlphaBeta", "alpha": 0, "beta": -1}, "dense": "Epsilon"}, "beta not negative"),
        ({"convolution": {"rule": "Epsilon", "epsilon": -1e-3}, "dense": "Epsilon"}, "epsilon=-0.001"),
    ],
)
def test_wrong_composites_are_named(spec, text):
    with pytest.raises(UsageError, match=text):
        lrp(nn.Linear(3, 2), torch.ones(1, 3), torch.ones(1, 1, 2), spec)


def test_named_composites_are_those_of_the_literature():
    table = {name: composite_of(name, epsilon=0.1, gamma=0.3, low=-1.0, high=2.0) for name in COMPOSITES}
    assert table["EpsilonPlus"] == Composite(ZPlus(), Epsilon(0.1))
    assert table["EpsilonPlusFlat"] == Composite(ZPlus(), Epsilon(0.1), Flat())
    assert table["EpsilonGammaBox"] == Composite(Gamma(0.3), Epsilon(0.1), ZBox(-1.0, 2.0))
    assert table["EpsilonAlpha2Beta1"] == Composite(AlphaBeta(2.0, 1.0), Epsilon(0.1))
    assert table["DeepTaylor"] == Composite(ZPlus(), ZPlus(), WSquare())
    assert table["LRP0"] == Composite(Epsilon(0.0), Epsilon(0.0))


def test_composites_are_data_that_json_can_hold():
    assert json.loads(json.dumps(dict(COMPOSITES))) == COMPOSITES
