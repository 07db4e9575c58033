"""The rules of operations without weights against their formulas, and conservation on every network."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esegeta_monai.engine.rules import lrp
from esegeta_monai.engine.rules.composites import COMPOSITES
from esegeta_monai.errors import MethodError, RuleError
from tests.engine.rules.support import assert_same_state, relative, state
from tests.networks import NAMES, build


def _explain(function, x, seed=1):
    y = function(x)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    result = lrp(function, x, cotangent[None], "LRP0")
    return result.input[0], result.absorbed[0, 0], cotangent, y


X = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("function", "at_zero"),
    [
        (F.relu, 0.0),
        (F.gelu, 0.0),
        (torch.sigmoid, 0.5),
        (torch.tanh, 0.0),
        (torch.exp, 1.0),
        (F.elu, 0.0),
        (lambda x: F.leaky_relu(x, 0.2), 0.0),
        (F.softplus, 0.6931471805599453),
        (lambda x: x * torch.sigmoid(x), 0.0),
        (torch.square, 0.0),
        (torch.cos, 1.0),
    ],
)
def test_univariate_gives_all_but_its_value_at_zero(function, at_zero):
    relevance, absorbed, c, y = _explain(function, X)
    assert relative(relevance, c * (y - at_zero)) < 1e-12
    assert relative(absorbed, (c * at_zero).sum()) < 1e-12 if at_zero else absorbed == 0


@pytest.mark.parametrize("function", [torch.reciprocal, torch.log, torch.rsqrt, lambda x: x**-2])
def test_univariate_without_a_value_at_zero_gives_everything(function):
    relevance, absorbed, c, y = _explain(function, X.abs() + 0.5)
    assert relative(relevance, c * y) < 1e-12
    assert absorbed == 0


def test_univariate_at_zero_has_a_finite_multiplier():
    x = torch.zeros(1, 3, dtype=torch.float64)
    first = nn.Linear(3, 3).double()
    first.weight.data.copy_(torch.eye(3))
    first.bias.data.zero_()
    layers = {"linear": first}
    result = lrp(lambda z: torch.sigmoid(first(z)), x, torch.ones(1, 1, 3, dtype=x.dtype), "LRP0", layers=layers)
    assert torch.allclose(result.layers["linear"].gradient, torch.full((1, 1, 3), 0.25, dtype=x.dtype))
    assert result.absorbed.item() == 1.5


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :2] @ x[:, 2:].transpose(1, 2),
        lambda x: x[:, :2] * x[:, 2:],
        lambda x: torch.einsum("bij,bkj->bik", x[:, :2], x[:, 2:]),
    ],
)
def test_product_gives_half_to_each_factor(function):
    relevance, absorbed, c, y = _explain(function, X)
    total = (c * y).sum()
    assert absorbed == 0
    assert relative(relevance[:, :2].sum(), total / 2) < 1e-12
    assert relative(relevance[:, 2:].sum(), total / 2) < 1e-12


def test_softmax_is_its_jacobian_and_the_residual_is_absorbed():
    relevance, absorbed, c, y = _explain(lambda x: x.softmax(-1), X)
    jacobian = torch.diag_embed(y) - y[..., :, None] * y[..., None, :]
    expected = X * (jacobian @ c[..., None])[..., 0]
    assert relative(relevance, expected) < 1e-12
    assert relative(absorbed, (c * y).sum() - expected.sum()) < 1e-12


def test_masked_scores_receive_nothing():
    mask = torch.tensor([True, True, False, True, True, True])
    relevance, absorbed, c, y = _explain(lambda x: (x.masked_fill(~mask, -torch.inf)).softmax(-1), X)
    assert torch.isfinite(relevance).all()
    assert not relevance[..., 2].any()
    assert relative(relevance.sum() + absorbed, (c * y).sum()) < 1e-12


NORMS = {
    "instance": (lambda x, w, b: F.instance_norm(x, weight=w, bias=b), (2,)),
    "layer": (lambda x, w, b: F.layer_norm(x, (6,), None, None) * w[:, None] + b[:, None], (2,)),
    "group": (lambda x, w, b: F.group_norm(x, 1, w, b), (1, 2)),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_is_linear_with_a_constant_scale(name):
    function, dims = NORMS[name]
    w, b = torch.arange(1.0, 5, dtype=X.dtype), torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=X.dtype)
    relevance, absorbed, c, y = _explain(lambda x: function(x, w, b), X)
    scale = (X.var(dims, unbiased=False, keepdim=True) + 1e-5).sqrt()
    arriving = c * w[:, None] / scale
    assert relative(relevance, X * (arriving - arriving.mean(dims, keepdim=True))) < 1e-10
    assert relative(absorbed, (c * b[:, None]).sum()) < 1e-12
    assert relative(relevance.sum() + absorbed, (c * y).sum()) < 1e-12


def test_batch_norm_in_eval_mode_absorbs_its_shift():
    w, b = torch.arange(1.0, 5, dtype=X.dtype), torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=X.dtype)
    mean, variance = b.flip(0), w.flip(0)
    relevance, absorbed, c, _ = _explain(lambda x: F.batch_norm(x, mean, variance, w, b, eps=0), X)
    slope = w / variance.sqrt()
    assert relative(relevance, c * X * slope[:, None]) < 1e-12
    assert relative(absorbed, (c * (b - slope * mean)[:, None]).sum()) < 1e-12


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + 2.0,
        lambda x: 3 - x,
        lambda x: F.pad(x, (1, 2), value=0.7),
        lambda x: x[:, 0] + x[:, 1],
        lambda x: torch.cat([x, torch.ones_like(x)], 1),
        lambda x: x.masked_fill(torch.arange(6) > 3, 1.0) + 1,
        lambda x: torch.where(torch.arange(6) > 2, x, 5.0),
        lambda x: torch.stack([x, torch.full_like(x, 2.0)], 1),
        lambda x: F.max_pool1d(x, 2),
        lambda x: F.avg_pool1d(x, 2),
        lambda x: x.mean(1),
        lambda x: x.amax(1),
        lambda x: F.interpolate(x, size=9, mode="linear"),
        lambda x: torch.maximum(x[:, 0], x[:, 1]),
        lambda x: F.normalize(x, dim=1),
        lambda x: x.std(1),
        lambda x: x[:, :2] / (1 + x[:, 2:] ** 2),
        lambda x: F.glu(x, 1),
        lambda x: F.log_softmax(x, 1),
        lambda x: torch.addcmul(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: F.conv1d(x, x[:, :, :2]),
    ],
)
def test_every_kind_of_operation_conserves(function):
    relevance, absorbed, c, y = _explain(function, X)
    assert relative(relevance.sum() + absorbed, (c * y).sum()) < 1e-12


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

    αβ grows with depth (2 and −1 per layer), so its gap is measured against the sum of magnitudes, not the sum.
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
        gap = result.input.sum() + result.absorbed.sum() - expected
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
        assert abs(result.input.sum() + result.absorbed.sum() - expected) <= 1e-3 * abs(expected)


def test_windows_have_their_own_ledger():
    case = build("UNet_instance", spatial_dims=2)
    x = torch.cat([case.image, case.reference])
    y = case.logits(x)
    cotangents = torch.randn(2, *y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    result = lrp(case.logits, x, cotangents)
    expected = (cotangents * y).flatten(2).sum(2)
    assert result.absorbed.shape == (2, 2)
    assert relative(result.input.flatten(2).sum(2) + result.absorbed, expected) < 1e-9


def test_relevance_at_a_layer_is_conserved():
    """Between the bottleneck's parts of a plain chain nothing is lost but what biases receive."""
    torch.manual_seed(0)
    network = (
        nn.Sequential(
            nn.Conv2d(1, 3, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(3, 2, 3, bias=False)
        )
        .double()
        .eval()
    )
    x = torch.randn(1, 1, 10, 10, dtype=torch.float64)
    y = network(x)
    layers = {"conv": network[0], "act": network[1], "pool": network[2]}
    result = lrp(network, x, torch.ones(1, *y.shape, dtype=y.dtype), "LRP0", layers=layers)
    for name in layers:
        assert relative(result.layers[name].relevance.sum(), y.sum()) < 1e-12, name
    assert torch.equal(result.layers["conv"].activation, network[0](x))


def test_unknown_operation_is_named():
    with pytest.raises(RuleError, match="'cumprod'"):
        lrp(lambda x: F.relu(x).cumprod(1), torch.ones(1, 3), torch.ones(1, 1, 3))
