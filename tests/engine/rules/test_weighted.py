"""Each rule against its formula, written out over the matrix of the operation, in float64."""

from __future__ import annotations

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from captum.attr._utils import lrp_rules
from torch import nn

from esegeta_monai.engine.rules import lrp
from esegeta_monai.engine.rules.composites import Composite
from esegeta_monai.engine.rules.weighted import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from esegeta_monai.errors import MethodError
from tests.engine.rules.support import relative, weights_matrix

RULES = {
    "LRP-0": Epsilon(0.0),
    "Epsilon": Epsilon(0.3),
    "Gamma": Gamma(0.4),
    "ZPlus": ZPlus(),
    "AlphaBeta": AlphaBeta(2.0, 1.0),
    "Flat": Flat(),
    "WSquare": WSquare(),
    "ZBox": ZBox(-4.0, 4.0),
}


def _by_hand(name: str, W: torch.Tensor, b: torch.Tensor, reads: torch.Tensor, x: torch.Tensor, R: torch.Tensor):
    """Input relevance and absorbed relevance from the matrix: W (out, in), b (out), x (in), R (out)."""
    c = W * x  # contributions c_ji
    z = c.sum(1) + b
    result = torch.zeros_like(x)
    absorbed = torch.zeros((), dtype=x.dtype)
    for j in range(len(R)):
        if name in ("LRP-0", "Epsilon"):
            stabiliser = 0.0 if name == "LRP-0" else (0.3 if z[j] >= 0 else -0.3)
            shares = [(1.0, c[j], b[j] + stabiliser)]
        elif name == "Gamma":
            sign = 1 if z[j] > 0 else -1
            shares = [(1.0, c[j] + 0.4 * sign * (sign * c[j]).clamp(min=0), b[j] + 0.4 * sign * (sign * b[j]).clamp(0))]
        elif name == "ZPlus":
            shares = [(1.0, c[j].clamp(min=0), b[j].clamp(min=0))]
        elif name == "AlphaBeta":
            shares = [(2.0, c[j].clamp(min=0), b[j].clamp(min=0)), (-1.0, c[j].clamp(max=0), b[j].clamp(max=0))]
        elif name == "Flat":
            shares = [(1.0, reads[j], torch.zeros(()))]
        elif name == "WSquare":
            shares = [(1.0, W[j] ** 2, torch.zeros(()))]
        else:
            shares = [(1.0, c[j] + 4 * W[j].clamp(min=0) - 4 * W[j].clamp(max=0), torch.zeros(()))]
        for factor, share, rest in shares:
            total = share.sum() + rest
            if total == 0:
                absorbed = absorbed + factor * R[j]
            else:
                result += factor * R[j] * share / total
                absorbed = absorbed + factor * R[j] * rest / total
    return result, absorbed


def _operation(kind: str):
    torch.manual_seed(KINDS.index(kind))
    modules = {
        "linear": (nn.Linear(7, 5), (1, 7)),
        "linear tokens": (nn.Linear(4, 3), (1, 3, 4)),
        "conv1d": (nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=2), (1, 4, 6)),
        "conv2d": (nn.Conv2d(2, 3, 3, padding=1, dilation=2), (1, 2, 4, 3)),
        "conv3d": (nn.Conv3d(1, 2, 2, stride=(1, 2, 1), bias=False), (1, 1, 3, 4, 2)),
        "transpose1d": (nn.ConvTranspose1d(2, 3, 3, stride=2, output_padding=1), (1, 2, 4)),
        "transpose2d": (nn.ConvTranspose2d(4, 2, 3, padding=1, groups=2), (1, 4, 3, 3)),
        "transpose3d": (nn.ConvTranspose3d(2, 1, 2, stride=2), (1, 2, 2, 2, 2)),
        "same padding": (nn.Conv2d(1, 2, 3, padding="same"), (1, 1, 4, 4)),
    }
    module, shape = modules[kind]
    return module.double().eval(), shape


KINDS = ["linear", "linear tokens", "conv1d", "conv2d", "conv3d", "same padding"]
KINDS += ["transpose1d", "transpose2d", "transpose3d"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RULES)
def test_each_rule_equals_its_formula(name, kind):
    module, shape = _operation(kind)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x.flatten()[1] = 0.0
    W, b = weights_matrix(module, shape)
    ones = _operation(kind)[0]  # which inputs an output reads: the same geometry with weights of one
    ones.weight.data.fill_(1.0)
    reads, _ = weights_matrix(ones, shape)
    y = module(x).detach()
    cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    rule = RULES[name]
    first = rule if name in ("Flat", "WSquare", "ZBox") else None
    inner = Epsilon() if first else rule
    result = lrp(module, x, cotangent[None], Composite(inner, inner, first))
    expected, absorbed = _by_hand(name, W, b, (reads != 0).to(x), x.flatten(), (y * cotangent).flatten())
    assert relative(result.input.flatten(), expected) < 1e-10
    assert abs(result.absorbed.item() - absorbed.item()) < 1e-10 * expected.abs().sum()
    total = (y * cotangent).sum()
    assert abs(result.input.sum() + result.absorbed.sum() - total) < 1e-10 * expected.abs().sum()


def test_zero_denominators_are_absorbed():
    """All weights negative: nothing raises the output, so z+ has nobody to give its relevance to."""
    module = nn.Linear(3, 1, bias=False).double()
    module.weight.data.copy_(torch.tensor([[-1.0, -2.0, -3.0]]))
    x = torch.ones(1, 3, dtype=torch.float64)
    result = lrp(module, x, torch.ones(1, 1, 1, dtype=torch.float64), Composite(ZPlus(), ZPlus()))
    assert not result.input.any()
    assert result.absorbed.item() == -6.0
    half = lrp(module, x, torch.ones(1, 1, 1, dtype=torch.float64), Composite(AlphaBeta(), AlphaBeta()))
    assert torch.allclose(half.input, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert half.absorbed.item() == -12.0


def test_flat_reaches_voxels_that_are_zero_and_records_the_share_of_padding():
    module = nn.Conv1d(1, 1, 3, bias=False).double()
    module.weight.data.fill_(1.0)
    x = torch.tensor([[[0.0, 3.0, 0.0, 0.0]]], dtype=torch.float64)
    composite = Composite(ZPlus(), ZPlus(), Flat())
    result = lrp(lambda z: module(F.pad(z, (1, 1))), x, torch.ones(1, 1, 1, 4, dtype=x.dtype), composite)
    # windows (pad 0 3), (0 3 0), (3 0 0), (0 0 pad) have the relevances 3, 3, 3, 0, a third to each place
    assert torch.allclose(result.input[0, 0, 0], torch.tensor([2.0, 3.0, 2.0, 1.0], dtype=x.dtype))
    assert torch.allclose(result.absorbed, torch.ones(1, 1, dtype=x.dtype))


@pytest.mark.parametrize("rule", ["epsilon", "alpha1_beta0", "gamma"])
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_equals_captum_on_a_plain_relu_network(rule):
    """Captum's rules without biases, where its treatment of them cannot differ, for positive inputs (its gamma)."""
    torch.manual_seed(0)
    network = (
        nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, bias=False),
            nn.ReLU(),
            nn.Conv2d(4, 3, 4, bias=False),
        )
        .double()
        .eval()
    )
    x = torch.rand(1, 1, 14, 14, dtype=torch.float64)
    with torch.no_grad():  # a positive logit: for a negative one Captum's gamma still favours positive contributions
        network[-1].weight[1] *= network(x)[0, 1].sign()
    peer_rule, rule_under_test = {
        "epsilon": (lambda: lrp_rules.EpsilonRule(1e-3), Epsilon(1e-3)),
        "alpha1_beta0": (lambda: lrp_rules.Alpha1_Beta0_Rule(), ZPlus()),
        "gamma": (lambda: lrp_rules.GammaRule(0.25), Gamma(0.25)),
    }[rule]
    cotangents = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(1, 1, 3, 1, 1)
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            layer.rule = peer_rule()
        if isinstance(layer, nn.MaxPool2d):
            layer.rule = lrp_rules.EpsilonRule()
    result = lrp(network, x, cotangents, Composite(rule_under_test, rule_under_test)).input[0]
    expected = captum.attr.LRP(network).attribute(x, target=(1, 0, 0)).detach()
    assert relative(result, expected) < 1e-6  # Captum's own stabiliser of 1e-9 is in every denominator


def test_a_box_that_does_not_hold_the_input_is_refused():
    """Shares would be divided by sums that meet zero."""
    module, ones = nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 2, 2)
    spec = {"convolution": "ZPlus", "dense": "Epsilon", "first": {"rule": "ZBox", "low": 0.0, "high": 1.0}}
    lrp(module, torch.rand(1, 1, 2, 2), ones, spec)
    for outside in (-0.1, 1.1):
        x = torch.full((1, 1, 2, 2), 0.5)
        x[0, 0, 1, 1] = outside
        with pytest.raises(MethodError, match="outside of its box"):
            lrp(module, x, ones, spec)
