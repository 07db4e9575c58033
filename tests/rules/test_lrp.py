"""Each rule against its formula, written out over the matrix of the operation, in float64."""

from __future__ import annotations

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from captum.attr._utils import lrp_rules
from torch import nn

from esegeta_monai.errors import MethodError, RuleError, UsageError
from esegeta_monai.rules import lrp
from esegeta_monai.rules.composites import COMPOSITES, Composite
from esegeta_monai.rules.weighted import AlphaBeta, Epsilon, Flat, Gamma, WSquare, ZBox, ZPlus
from tests.networks import NAMES, build
from tests.rules.support import assert_same_state, relative, state, weights_matrix

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
    """Input relevance and booked relevance from the matrix: W (out, in), b (out), x (in), R (out)."""
    c = W * x  # contributions c_ji
    z = c.sum(1) + b
    result = torch.zeros_like(x)
    booked = torch.zeros((), dtype=x.dtype)
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
                booked = booked + factor * R[j]
            else:
                result += factor * R[j] * share / total
                booked = booked + factor * R[j] * rest / total
    return result, booked


def _operation(kind: str):
    torch.manual_seed(hash(kind) % 1000)
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
    expected, booked = _by_hand(name, W, b, (reads != 0).to(x), x.flatten(), (y * cotangent).flatten())
    assert relative(result.input.flatten(), expected) < 1e-10
    assert abs(result.booked.item() - booked.item()) < 1e-10 * expected.abs().sum()
    total = (y * cotangent).sum()
    assert abs(result.input.sum() + result.booked.sum() - total) < 1e-10 * expected.abs().sum()


def test_zero_denominators_are_booked():
    """All weights negative: nothing raises the output, so z+ has nobody to give its relevance to."""
    module = nn.Linear(3, 1, bias=False).double()
    module.weight.data.copy_(torch.tensor([[-1.0, -2.0, -3.0]]))
    x = torch.ones(1, 3, dtype=torch.float64)
    result = lrp(module, x, torch.ones(1, 1, 1, dtype=torch.float64), Composite(ZPlus(), ZPlus()))
    assert not result.input.any()
    assert result.booked.item() == -6.0
    half = lrp(module, x, torch.ones(1, 1, 1, dtype=torch.float64), Composite(AlphaBeta(), AlphaBeta()))
    assert torch.allclose(half.input, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    assert half.booked.item() == -12.0


def _explain(function, x, seed=1):
    y = function(x)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    result = lrp(function, x, cotangent[None], "LRP0")
    return result.input[0], result.booked[0, 0], cotangent, y


X = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("function", "at_zero"),
    [(F.relu, 0.0), (F.gelu, 0.0), (torch.sigmoid, 0.5), (torch.tanh, 0.0), (torch.exp, 1.0), (F.elu, 0.0),
     (lambda x: F.leaky_relu(x, 0.2), 0.0), (F.softplus, 0.6931471805599453), (lambda x: x * torch.sigmoid(x), 0.0),
     (torch.square, 0.0), (torch.cos, 1.0)],
)
def test_univariate_gives_all_but_its_value_at_zero(function, at_zero):
    relevance, booked, c, y = _explain(function, X)
    assert relative(relevance, c * (y - at_zero)) < 1e-12
    assert relative(booked, (c * at_zero).sum()) < 1e-12 if at_zero else booked == 0


@pytest.mark.parametrize("function", [torch.reciprocal, torch.log, torch.rsqrt, lambda x: x**-2])
def test_univariate_without_a_value_at_zero_gives_everything(function):
    relevance, booked, c, y = _explain(function, X.abs() + 0.5)
    assert relative(relevance, c * y) < 1e-12
    assert booked == 0


def test_univariate_at_zero_has_a_finite_multiplier():
    x = torch.zeros(1, 3, dtype=torch.float64)
    first = nn.Linear(3, 3).double()
    first.weight.data.copy_(torch.eye(3))
    first.bias.data.zero_()
    layers = {"linear": first}
    result = lrp(lambda z: torch.sigmoid(first(z)), x, torch.ones(1, 1, 3, dtype=x.dtype), "LRP0", layers=layers)
    assert torch.allclose(result.layers["linear"].gradient, torch.full((1, 1, 3), 0.25, dtype=x.dtype))
    assert result.booked.item() == 1.5


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, :2] @ x[:, 2:].transpose(1, 2), lambda x: x[:, :2] * x[:, 2:],
     lambda x: torch.einsum("bij,bkj->bik", x[:, :2], x[:, 2:])],
)
def test_product_gives_half_to_each_factor(function):
    relevance, booked, c, y = _explain(function, X)
    total = (c * y).sum()
    assert booked == 0
    assert relative(relevance[:, :2].sum(), total / 2) < 1e-12
    assert relative(relevance[:, 2:].sum(), total / 2) < 1e-12


def test_softmax_is_its_jacobian_and_the_residual_is_booked():
    relevance, booked, c, y = _explain(lambda x: x.softmax(-1), X)
    jacobian = torch.diag_embed(y) - y[..., :, None] * y[..., None, :]
    expected = X * (jacobian @ c[..., None])[..., 0]
    assert relative(relevance, expected) < 1e-12
    assert relative(booked, (c * y).sum() - expected.sum()) < 1e-12


def test_masked_scores_receive_nothing():
    mask = torch.tensor([True, True, False, True, True, True])
    relevance, booked, c, y = _explain(lambda x: (x.masked_fill(~mask, -torch.inf)).softmax(-1), X)
    assert torch.isfinite(relevance).all()
    assert not relevance[..., 2].any()
    assert relative(relevance.sum() + booked, (c * y).sum()) < 1e-12


NORMS = {
    "instance": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (2,)),
    "layer": (lambda x, w, b: F.layer_norm(x, (6,), None, None) * w[:, None] + b[:, None], (2,)),
    "group": (lambda x, w, b: F.group_norm(x, 1, w, b), (1, 2)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_is_linear_with_a_constant_scale(name):
    function, dims = NORMS[name]
    w, b = torch.arange(1.0, 5, dtype=X.dtype), torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=X.dtype)
    relevance, booked, c, y = _explain(lambda x: function(x, w, b), X)
    scale = (X.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
    arriving = c * w[:, None] / scale
    assert relative(relevance, X * (arriving - arriving.mean(dims, keepdim=True))) < 1e-10
    assert relative(booked, (c * b[:, None]).sum()) < 1e-12
    assert relative(relevance.sum() + booked, (c * y).sum()) < 1e-12


def test_batch_norm_in_eval_mode_books_its_shift():
    w, b = torch.arange(1.0, 5, dtype=X.dtype), torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=X.dtype)
    mean, variance = b.flip(0), w.flip(0)
    relevance, booked, c, _ = _explain(lambda x: F.batch_norm(x, mean, variance, w, b, eps=0), X)
    slope = w / variance.sqrt()
    assert relative(relevance, c * X * slope[:, None]) < 1e-12
    assert relative(booked, (c * (b - slope * mean)[:, None]).sum()) < 1e-12


@pytest.mark.parametrize(
    "function",
    [lambda x: x + 2.0, lambda x: 3 - x, lambda x: F.pad(x, (1, 2), value=0.7), lambda x: x[:, 0] + x[:, 1],
     lambda x: torch.cat([x, torch.ones_like(x)], 1), lambda x: x.masked_fill(torch.arange(6) > 3, 1.0) + 1,
     lambda x: torch.where(torch.arange(6) > 2, x, 5.0), lambda x: torch.stack([x, torch.full_like(x, 2.0)], 1),
     lambda x: F.max_pool1d(x, 2), lambda x: F.avg_pool1d(x, 2), lambda x: x.mean(1), lambda x: x.amax(1),
     lambda x: F.interpolate(x, size=9, mode="linear"), lambda x: torch.maximum(x[:, 0], x[:, 1]),
     lambda x: F.normalize(x, dim=1), lambda x: x.std(1), lambda x: x[:, :2] / (1 + x[:, 2:] ** 2),
     lambda x: F.glu(x, 1), lambda x: F.log_softmax(x, 1), lambda x: torch.addcmul(x, x, x),
     lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), lambda x: F.conv1d(x, x[:, :, :2])],
)
def test_every_kind_of_operation_conserves(function):
    relevance, booked, c, y = _explain(function, X)
    assert relative(relevance.sum() + booked, (c * y).sum()) < 1e-12


def test_flat_reaches_voxels_that_are_zero_and_books_what_falls_on_padding():
    module = nn.Conv1d(1, 1, 3, bias=False).double()
    module.weight.data.fill_(1.0)
    x = torch.tensor([[[0.0, 3.0, 0.0, 0.0]]], dtype=torch.float64)
    composite = Composite(ZPlus(), ZPlus(), Flat())
    result = lrp(lambda z: module(F.pad(z, (1, 1))), x, torch.ones(1, 1, 1, 4, dtype=x.dtype), composite)
    # windows (pad 0 3), (0 3 0), (3 0 0), (0 0 pad) have the relevances 3, 3, 3, 0, a third to each place
    assert torch.allclose(result.input[0, 0, 0], torch.tensor([2.0, 3.0, 2.0, 1.0], dtype=x.dtype))
    assert torch.allclose(result.booked, torch.ones(1, 1, dtype=x.dtype))


def test_first_rule_needs_a_first_layer():
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    network = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(1, 1, 1).double())
    with pytest.raises(MethodError, match="EpsilonPlus"):
        lrp(network, x, torch.ones(1, 1, 1, 3, 3).double(), "EpsilonPlusFlat")


HEAVY = ("UNETR", "SwinUNETR", "BasicUNetPlusPlus", "BasicUNet")
CELLS = [
    pytest.param(name, dims, marks=pytest.mark.slow if (name, dims) in (("UNETR", 3), ("SwinUNETR", 3)) else ())
    for name in NAMES
    for dims in (2, 3)
]


@pytest.mark.parametrize(("name", "dims"), CELLS)
def test_conserves_on_every_network(name, dims):
    """All composites in 2D; in 3D, and on the heavy ones, each network meets one, in turn.

    αβ grows with depth (2 and −1 a layer), so its gap is measured against what it adds up, not against the sum.
    """
    case = build(name, spatial_dims=dims)
    y = case.logits(case.image)
    cotangents = torch.zeros(1, *y.shape, dtype=y.dtype)
    cotangents[0, :, 1] = 1
    expected = (cotangents * y).sum()
    names = list(COMPOSITES)
    before = state(case.network)
    everything = dims == 2 and name not in HEAVY
    for composite in names if everything else [names[(NAMES.index(name) + dims) % len(names)]]:
        result = lrp(case.logits, case.image, cotangents, composite)
        assert torch.isfinite(result.input).all()
        gap = result.input.sum() + result.booked.sum() - expected
        scale = result.input.abs().sum() if composite == "EpsilonAlpha2Beta1" else abs(expected)
        assert abs(gap) <= 1e-9 * scale, composite
    assert_same_state(before, state(case.network))


@pytest.mark.parametrize("name", ["UNet_instance", "SegResNet", "SwinUNETR", "EfficientNet", "DenseNet121", "ViT"])
def test_conserves_in_float32(name):
    case = build(name, spatial_dims=2, dtype=torch.float32)
    y = case.logits(case.image)
    cotangents = torch.zeros(1, *y.shape)
    cotangents[0, :, 1] = 1
    expected = (cotangents * y).sum()
    for composite in ("EpsilonPlus", "EpsilonPlusFlat"):
        result = lrp(case.logits, case.image, cotangents, composite)
        assert abs(result.input.sum() + result.booked.sum() - expected) <= 1e-3 * abs(expected)


def test_windows_keep_their_own_books():
    case = build("UNet_instance", spatial_dims=2)
    x = torch.cat([case.image, case.reference])
    y = case.logits(x)
    cotangents = torch.randn(2, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    result = lrp(case.logits, x, cotangents)
    expected = (cotangents * y).flatten(2).sum(2)
    assert result.booked.shape == (2, 2)
    assert relative(result.input.flatten(2).sum(2) + result.booked, expected) < 1e-9


def test_relevance_at_a_layer_is_conserved():
    """Between the bottleneck's parts of a plain chain nothing is lost but what biases receive."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, bias=False)
    ).double().eval()
    x = torch.randn(1, 1, 10, 10, dtype=torch.float64)
    y = network(x)
    layers = {"conv": network[0], "act": network[1], "pool": network[2]}
    result = lrp(network, x, torch.ones(1, *y.shape, dtype=y.dtype), "LRP0", layers=layers)
    for name in layers:
        assert relative(result.layers[name].relevance.sum(), y.sum()) < 1e-12, name
    assert torch.equal(result.layers["conv"].activation, network[0](x))


@pytest.mark.parametrize("rule", ["epsilon", "alpha1_beta0", "gamma"])
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks")
def test_equals_captum_on_a_plain_relu_network(rule):
    """Captum's rules without biases, where its treatment of them cannot differ, for positive inputs (its gamma)."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(),
        nn.Conv2d(4, 3, 4, bias=False),
    ).double().eval()
    x = torch.rand(1, 1, 14, 14, dtype=torch.float64)
    with torch.no_grad():  # a positive logit: for a negative one Captum's gamma still favours positive contributions
        network[-1].weight[1] *= network(x)[0, 1].sign()
    theirs, ours = {
        "epsilon": (lambda: lrp_rules.EpsilonRule(1e-3), Epsilon(1e-3)),
        "alpha1_beta0": (lambda: lrp_rules.Alpha1_Beta0_Rule(), ZPlus()),
        "gamma": (lambda: lrp_rules.GammaRule(0.25), Gamma(0.25)),
    }[rule]
    cotangents = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).view(1, 1, 3, 1, 1)
    for layer in network:
        if isinstance(layer, nn.Conv2d):
            layer.rule = theirs()
        if isinstance(layer, nn.MaxPool2d):
            layer.rule = lrp_rules.EpsilonRule()
    result = lrp(network, x, cotangents, Composite(ours, ours)).input[0]
    expected = captum.attr.LRP(network).attribute(x, target=(1, 0, 0)).detach()
    assert relative(result, expected) < 1e-6  # Captum's own stabiliser of 1e-9 stands in every denominator


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
    [("Epsilonplus", "EpsilonPlusFlat"), ({"convolution": "ZPlus"}, "'dense'"),
     ({"convolution": "Zpuls", "dense": "Epsilon"}, "Zpuls"), ({"convolution": "Flat", "dense": "Epsilon"}, "first"),
     ({"convolution": {"rule": "Gamma", "gama": 1}, "dense": "Epsilon"}, "gama")],
)
def test_wrong_composites_are_named(spec, text):
    with pytest.raises(UsageError, match=text):
        lrp(nn.Linear(3, 2), torch.ones(1, 3), torch.ones(1, 1, 2), spec)


def test_unknown_operation_is_named():
    with pytest.raises(RuleError, match="'cumprod'"):
        lrp(lambda x: F.relu(x).cumprod(1), torch.ones(1, 3), torch.ones(1, 1, 3))
