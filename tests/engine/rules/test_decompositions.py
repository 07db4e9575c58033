"""Decomposed operations compute what the operation computes: each is run both ways on the same numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from esegeta_monai.engine.rules.decompositions import _PARTS
from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.mode import PARTS, PLAIN, RuleMode
from esegeta_monai.errors import RuleError
from tests.engine.rules.support import relative


class _TakeApart:
    """Rules that take apart all they can, and note what."""

    def __init__(self):
        self.names = set()

    family = "none"

    def treatment(self, operation):
        self.names.add(operation.name)
        return PARTS if operation.kind in (Kind.COMPOSITE, Kind.NORM) else PLAIN


X = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
W, B = torch.arange(1.0, 5, dtype=X.dtype), torch.tensor([0.3, -0.2, 0.5, 1.0], dtype=X.dtype)
ROW = torch.linspace(0.5, 2, 6, dtype=X.dtype)
KEEP = torch.tensor([True, False, True, True])

CASES = {
    "instance_norm": [lambda x: F.instance_norm(x), lambda x: F.instance_norm(x, weight=W, bias=B, eps=0.1)],
    "group_norm": [lambda x: F.group_norm(x, 2, W, B, 0.1), lambda x: torch.group_norm(x, 4), nn.GroupNorm(1, 4)],
    "layer_norm": [lambda x: F.layer_norm(x, (6,), ROW, ROW), lambda x: F.layer_norm(x, (4, 6)), nn.LayerNorm(6)],
    "rms_norm": [lambda x: F.rms_norm(x, (6,), ROW, 0.1), lambda x: F.rms_norm(x, (4, 6))],
    "normalize": [lambda x: F.normalize(x), lambda x: F.normalize(x, dim=-1, eps=3.0)],
    "norm": [lambda x: x.norm(), lambda x: x.norm(dim=1, keepdim=True), lambda x: torch.norm(x, dim=(1, 2))],
    "vector_norm": [lambda x: torch.linalg.vector_norm(x, dim=1), lambda x: torch.linalg.vector_norm(x, 1, dim=2)],
    "var": [
        lambda x: x.var(),
        lambda x: x.var(1),
        lambda x: x.var(dim=(1, 2), correction=0, keepdim=True),
        lambda x: torch.var(x, 2, False),
    ],
    "std": [lambda x: x.std(dim=2), lambda x: torch.std(x, dim=1, unbiased=False)],
    "var_mean": [lambda x: torch.var_mean(x, dim=1), lambda x: torch.var_mean(x, dim=1, keepdim=True)],
    "std_mean": [lambda x: torch.std_mean(x, dim=(1, 2))],
    "scaled_dot_product_attention": [
        lambda x: F.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=KEEP.expand(4, 4)),
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=W.expand(4, 4)),
        lambda x: F.scaled_dot_product_attention(
            x.view(1, 4, 2, 6), x[:, :2].reshape(1, 2, 2, 6), x[:, :2].reshape(1, 2, 2, 6), enable_gqa=True
        ),
    ],
    "div": [lambda x: x / x.exp(), lambda x: W[:, None] / (1 + x * x), lambda x: torch.div(x[:, 0], x[:, 1])],
    "rdiv": [lambda x: 2 / x],
    "addcmul": [lambda x: torch.addcmul(x, x, x, value=0.3)],
    "addcdiv": [lambda x: torch.addcdiv(x, x, x.exp())],
    "addmm": [lambda x: torch.addmm(x[0, :, :4], x[0], x[1].T, beta=0.3, alpha=2)],
    "addbmm": [lambda x: torch.addbmm(x[0, :, :4], x, x.transpose(1, 2))],
    "baddbmm": [lambda x: torch.baddbmm(x[:, :, :4], x, x.transpose(1, 2), beta=2)],
    "addmv": [lambda x: torch.addmv(x[0, :, 0], x[0], x[1, 0])],
    "lerp": [lambda x: torch.lerp(x[:, 0], x[:, 1], 0.3), lambda x: torch.lerp(x, x * x, x)],
    "glu": [lambda x: F.glu(x), lambda x: F.glu(x, dim=1)],
    "softmin": [lambda x: F.softmin(x, dim=1)],
    "cosine_similarity": [lambda x: F.cosine_similarity(x[:, :2], x[:, 2:], dim=2)],
    "max": [lambda x: x.max(), lambda x: x.max(1), lambda x: x.max(-1, True), lambda x: torch.max(x, x.flip(-1))],
    "min": [lambda x: x.min(), lambda x: x.min(dim=2), lambda x: torch.min(x[:, 0], x[:, 1])],
    "amin": [lambda x: x.amin(), lambda x: x.amin((1, 2), keepdim=True)],
    "maximum": [lambda x: torch.maximum(x, x * x)],
    "minimum": [lambda x: torch.minimum(x, x.flip(-1))],
}


def _apart(function, x=X):
    rules = _TakeApart()
    mode = RuleMode(rules)
    start = mode.enter_input(x.clone().requires_grad_().clone())
    with mode:
        return function(start), rules.names


@pytest.mark.parametrize("name", CASES)
def test_parts_make_the_whole(name):
    for function in CASES[name]:
        function = function.double() if isinstance(function, nn.Module) else function
        apart, names = _apart(function)
        whole = function(X)
        assert name in names
        pairs = [(apart, whole)] if isinstance(whole, torch.Tensor) else list(zip(apart, whole))
        for a, b in pairs:
            assert a.shape == b.shape
            assert relative(a.detach().double(), b.detach().double()) < 1e-12


def test_every_part_has_a_case():
    assert set(_PARTS) == set(CASES) | {"multi_head_attention_forward"}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 6, "vdim": 6}, {"bias": False}])
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": torch.eye(5, dtype=torch.bool)},
        {"attn_mask": torch.randn(5, 5).double()},
        {"attn_mask": torch.randn(6, 5, 5).double()},
        {"key_padding_mask": torch.tensor([[False, True, False, False, True]] * 3)},
    ],
)
def test_multi_head_attention(batch_first, options, call):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **options).double().eval()
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    x = torch.randn((3, 5, 6) if batch_first else (5, 3, 6), dtype=torch.float64)

    def function(z):
        return attention(z, 0.5 * z, z + 1, **call)

    (output, weights), names = _apart(function, x)
    expected, expected_weights = function(x)
    assert "multi_head_attention_forward" in names
    assert relative(output.detach(), expected.detach()) < 1e-12
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        assert relative(weights.detach(), expected_weights.detach()) < 1e-12


def test_unbatched_attention():
    attention = nn.MultiheadAttention(6, 2).double().eval()
    (output, weights), _ = _apart(lambda z: attention(z, z, z), X[0])
    expected, expected_weights = attention(X[0], X[0], X[0])
    assert relative(output.detach(), expected.detach()) < 1e-12
    assert relative(weights.detach(), expected_weights.detach()) < 1e-12


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: F.normalize(x, p=1), "p = 2"),
        (lambda x: x.norm(p=3), "order 3"),
        (lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1), "dropout"),
        (lambda x: nn.MultiheadAttention(6, 2, add_bias_kv=True).double().eval()(x, x, x)[0], "bias_k"),
        (lambda x: nn.MultiheadAttention(6, 2, add_zero_attn=True).double().eval()(x, x, x)[0], "add_zero_attn"),
    ],
)
def test_what_cannot_be_taken_apart_is_named(function, text):
    with pytest.raises(RuleError, match=text):
        _apart(function)
