"""An activation that a network writes out by hand is recognised; a product of two different tensors is not."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from esegeta_monai.engine.rules import deep_lift, guided
from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import PLAIN, RuleMode
from esegeta_monai.errors import MethodError
from tests.engine.rules.support import relative


class _Count:
    def __init__(self):
        self.kinds = []

    family = "none"

    def treatment(self, operation):
        self.kinds.append(operation.kind)
        return PLAIN


def _kinds(function, x):
    rules = _Count()
    mode = RuleMode(rules)
    start = mode.enter_input(x.clone().requires_grad_().clone())
    with mode:
        result = function(start)
    return rules.kinds, result.detach()


X = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

JOINED = {
    "silu": (lambda x: x * torch.sigmoid(x), F.silu),
    "silu, other order": (lambda x: torch.sigmoid(x) * x, F.silu),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), F.mish),
    "gelu": (lambda x: 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0))), F.gelu),
    "gelu, tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        lambda x: F.gelu(x, approximate="tanh"),
    ),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, F.hardswish),
    "leaky relu, the larger": (lambda x: torch.maximum(x, 0.1 * x), lambda x: F.leaky_relu(x, 0.1)),
    "leaky relu, the larger, other order": (lambda x: torch.max(0.1 * x, x), lambda x: F.leaky_relu(x, 0.1)),
    "leaky relu, the smaller": (lambda x: torch.minimum(x, 3 * x), lambda x: F.leaky_relu(x, 3.0)),
}


@pytest.mark.parametrize("name", [name for name in JOINED if name != "gelu, tanh"])
def test_written_out_activations_are_one_operation(name):
    by_hand, whole = JOINED[name]
    kinds, result = _kinds(by_hand, X)
    assert Kind.PRODUCT not in kinds
    assert relative(result, whole(X)) < 1e-12
    ones = torch.ones(1, 3, 4, dtype=X.dtype)
    assert relative(guided(by_hand, X, ones).input, guided(whole, X, ones).input) < 1e-12
    assert relative(deep_lift(by_hand, X, X.flip(0), ones).input, deep_lift(whole, X, X.flip(0), ones).input) < 1e-12


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * x,
        lambda x: x * torch.sigmoid(x.flip(0)),
        lambda x: x * torch.sigmoid(x.mean()),
        lambda x: (x * 2).mul_(x.sigmoid()),
    ],
)
def test_other_products_stay_products(function):
    assert Kind.PRODUCT in _kinds(function, X)[0]


def test_the_larger_of_two_tensors_is_no_activation():
    for function in (lambda x: torch.maximum(x, x.flip(0)), lambda x: torch.max(x, x.mean(0, keepdim=True))):
        assert Kind.ACTIVATION not in _kinds(function, X)[0]
        with pytest.raises(MethodError, match="has none"):
            guided(function, X, torch.ones(1, 3, 4, dtype=X.dtype))


def test_a_start_that_was_overwritten_is_not_joined():
    def function(x):
        y = x + 1
        gate = torch.sigmoid(y)
        y.mul_(2)
        return y * gate

    kinds, result = _kinds(function, X)
    assert Kind.PRODUCT in kinds
    assert relative(result, function(X)) < 1e-12
