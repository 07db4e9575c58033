from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.engine.rules.kinds import CUTS, INERT, KINDS, Kind
from esegeta_monai.engine.rules.mode import PLAIN, RuleMode
from esegeta_monai.engine.rules.operations import (
    Operation,
    Slot,
    canonical_name,
    kind_of,
    map_tensors,
    where_in_network,
)
from esegeta_monai.errors import RuleError


class _Watch:
    """Rules that only note what passes."""

    def __init__(self):
        self.operations = []

    family = "none"

    def treatment(self, operation):
        self.operations.append((operation.name, operation.kind, operation.in_place))
        return PLAIN


def _watch(function, x):
    rules = _Watch()
    mode = RuleMode(rules)
    start = mode.enter_input(x.clone().requires_grad_().clone())
    with mode:
        result = function(start)
    if (reason := mode.reason(result)) is not None:
        raise reason
    assert mode.depends_on_input(result)
    return result.detach(), rules.operations


X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
ONE = torch.ones(4, 1)

SPELLINGS = {
    "add": [
        lambda x: x + 1,
        lambda x: 1 + x,
        lambda x: x.add(1),
        lambda x: torch.add(x, 1),
        lambda x: x.add_(1),
        lambda x: torch.add(input=x, other=1),
    ],
    "sub": [lambda x: x - 1, lambda x: x.sub_(1), lambda x: torch.subtract(x, 1)],
    "mul": [lambda x: x * 2, lambda x: 2 * x, lambda x: x.mul_(2), lambda x: torch.multiply(x, 2)],
    "div": [lambda x: x / 2, lambda x: x.div_(2), lambda x: torch.true_divide(x, 2)],
    "rdiv": [lambda x: 2 / x],
    "pow": [lambda x: x**2, lambda x: torch.pow(x, 2), lambda x: x.pow_(2)],
    "rpow": [lambda x: 2**x],
    "relu": [F.relu, torch.relu, torch.relu_, lambda x: x.relu(), nn.ReLU(inplace=True), lambda x: F.relu(x, True)],
    "leaky_relu": [F.leaky_relu, F.leaky_relu_, nn.LeakyReLU(inplace=True), lambda x: F.leaky_relu(x, 0.1, True)],
    "hardtanh": [F.hardtanh, F.hardtanh_, nn.Hardtanh(inplace=True)],
    "threshold": [lambda x: F.threshold(x, 0.1, 0.0), nn.Threshold(0.1, 0.0, inplace=True)],
    "elu": [F.elu, F.elu_, nn.ELU(inplace=True)],
    "silu": [F.silu, nn.SiLU(inplace=True)],
    "gelu": [F.gelu, nn.GELU(approximate="tanh")],
    "max_pool": [lambda x: F.max_pool1d(x, 2), lambda x: F.max_pool1d(x, 2, return_indices=True)[0], nn.MaxPool1d(2)],
    "conv": [lambda x: F.conv1d(x, torch.ones(1, 4, 2)), nn.Conv1d(4, 2, 3)],
    "clamp": [lambda x: x.clamp(0), lambda x: torch.clip(x, 0, 1), lambda x: x.clamp_(min=0)],
    "softmax": [lambda x: x.softmax(1), lambda x: F.softmax(x, dim=1), lambda x: torch.softmax(x, 1), nn.Softmax(1)],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_one_operation(name):
    for spelling in SPELLINGS[name]:
        result, seen = _watch(spelling, X)
        assert [entry[0] for entry in seen if entry[0] not in ("getitem", "squeeze", "unsqueeze")] == [name]
        assert torch.equal(result, spelling(X.clone()).detach())


def _kind(function, x=X):
    return _watch(function, x)[1][-1][1]


def test_the_kind_depends_on_what_sees_the_input():
    assert _kind(lambda x: x * ONE) is Kind.LINEAR
    assert _kind(lambda x: x * x.mean()) is Kind.PRODUCT
    assert _kind(lambda x: F.conv1d(x, torch.ones(1, 4, 2))) is Kind.CONVOLUTION
    assert _kind(lambda x: F.conv1d(torch.ones(1, 4, 9), x)) is Kind.LINEAR
    assert _kind(lambda x: F.conv1d(x, x[:, :, :2])) is Kind.PRODUCT
    assert _kind(lambda x: F.linear(x, torch.ones(3, 6))) is Kind.DENSE
    assert _kind(lambda x: x / ONE) is Kind.LINEAR
    assert _kind(lambda x: ONE / x) is Kind.COMPOSITE
    assert _kind(lambda x: torch.maximum(x, ONE)) is Kind.ACTIVATION
    assert _kind(lambda x: torch.maximum(x, x.flip(-1))) is Kind.COMPOSITE
    assert _kind(lambda x: torch.maximum(x, -x)) is Kind.ACTIVATION  # of one tensor
    assert _kind(lambda x: F.instance_norm(x)) is Kind.NORM
    assert _kind(lambda x: F.instance_norm(x, ONE[:, 0], ONE[:, 0], use_input_stats=False)) is Kind.LINEAR
    assert _kind(lambda x: F.dropout(x, 0.5, False)) is Kind.MOVE


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: torch.fft.rfft(x).real, "fft"),
        (lambda x: x.cumprod(1), "cumprod"),
        (lambda x: x.sort()[0], "sort"),
        (lambda x: torch.erfinv(x), "erfinv"),
        (lambda x: torch.einsum("abc,abd,abe->cde", x, x, x), "more than two"),
        (lambda x: F.grid_sample(x[None], x[:1, :3, :2].reshape(1, 1, 3, 2)), "grid"),
        (lambda x: x**x, "parameters"),
        (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounding"),
        (lambda x: x % 1, "remainder"),
        (lambda x: F.conv1d(x, ONE.view(1, 4, 1), x[0, :1, 0]), "bias"),
        (lambda x: x.median(), "median"),
        (lambda x: nn.LSTM(6, 3)(x)[0], "lstm"),
        (lambda x: torch.bucketize(x, X[0, 0]), "bucketize"),
        (lambda x: x.apply_(lambda v: v), "apply"),
        (lambda x: F.rrelu(x, training=True), "training=True"),
    ],
)
def test_what_has_no_kind_raises_with_its_name(function, text):
    with pytest.raises(RuleError, match=text):
        _watch(function, X)


def test_every_elementwise_and_linear_name_of_torch_is_decided():
    """Every name in a table exists in torch, and no name is in two tables."""
    homes = (torch, Tensor, F, torch.linalg, torch.nn.functional)
    special = {"getitem", "setitem", "iter", "reversed", "rmatmul", "rpow", "rdiv", "unfold_copy", "log_sigmoid"}
    for name in set(KINDS) - special:
        names = (name, f"{name}2d", f"{name}_", f"{name}3d", f"_{name}")
        assert any(hasattr(home, n) for home in homes for n in names), name
    assert not CUTS & INERT
    assert not (CUTS | INERT) & set(KINDS)


def test_canonical_names_of_properties_and_numbers():
    assert canonical_name(Tensor.shape.__get__) == ("shape", False)
    assert canonical_name(Tensor.T.__get__) == ("T", False)
    assert canonical_name(Tensor.__float__) == ("__float__", False)
    assert canonical_name(Tensor.__iadd__) == ("add", True)


def test_function_is_pure_and_arguments_are_bound():
    operation = Operation("leaky_relu", F.leaky_relu, (Slot(0), 0.2, True), {}, in_place=True)
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(operation.function(x), torch.tensor([-0.2, 2.0]))
    assert torch.equal(x, torch.tensor([-1.0, 2.0]))
    assert operation.argument("negative_slope") == 0.2
    pool = Operation("max_pool", F.max_pool2d, (Slot(0), 2), {"padding": 1})
    assert (pool.argument("stride"), pool.argument("padding"), pool.argument("ceil_mode")) == (2, 1, False)
    assert kind_of(pool) is Kind.MAXIMUM


def test_map_tensors_keeps_named_tuples():
    result = map_tensors(lambda t: t + 1, torch.ones(2, 2).max(1))
    assert type(result) is torch.return_types.max
    assert torch.equal(result.values, torch.full((2,), 2.0))


def test_the_place_in_the_network_is_its_dotted_name():
    class Inner(nn.Module):
        def forward(self, x):
            return where_in_network()

    assert nn.Sequential(nn.Identity(), nn.Sequential(Inner()))(1) == " in Inner (1.0)"
    assert where_in_network() == ""
