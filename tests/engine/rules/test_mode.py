"""The engine's promises: nothing passes unseen, nothing is left behind, the values do not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from monai.data import MetaTensor
from monai.networks.blocks.activation import SwishImplementation
from monai.networks.nets import SwinUNETR
from torch import nn
from torch.utils.checkpoint import checkpoint as imported_checkpoint

from esegeta_monai.engine.rules import deep_lift, guided, lrp
from esegeta_monai.errors import InputError, MethodError, NetworkError, RuleError
from tests.engine.rules.support import assert_same_state, relative, state
from tests.networks import build

X = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ONES = torch.ones(1, 2, 3, 4, 4, dtype=torch.float64)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x) * 2


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, g):
        return 3 * g


def _no_grad(x):
    with torch.no_grad():
        y = F.relu(x)
    return y + x


@torch.inference_mode()
def _inference_mode(x):
    return F.relu(x) + x


def _saved_on_cpu(x):
    with torch.autograd.graph.save_on_cpu():
        return F.gelu(x)


def _vmap_under_no_grad(x):
    with torch.no_grad():
        y = torch.func.vmap(torch.sigmoid)(x)
    return F.relu(x) * y


def _gradient(x):
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_(True)
        return torch.autograd.grad(F.softplus(y).sum(), y, create_graph=True)[0]


def _backward(x):
    with torch.enable_grad():
        y = x.detach().requires_grad_(True)
        F.softplus(y).sum().backward()
    return F.relu(x) * y.grad


def _out(x):
    y = torch.empty_like(x)
    torch.mul(F.relu(x), 2, out=y)
    return y


REFUSED = {
    "script function inside": (lambda x: F.relu(scripted(x)), RuleError, "cannot see"),
    "script function last": (lambda x: scripted(F.relu(x)), NetworkError, "cannot see"),
    "autograd function": (lambda x: F.relu(_Double.apply(x)), RuleError, "custom autograd.Function"),
    "SwishImplementation": (lambda x: F.relu(SwishImplementation.apply(x)), RuleError, "custom autograd.Function"),
    "no_grad": (_no_grad, RuleError, "no_grad"),
    "inference_mode": (_inference_mode, RuleError, "inference_mode"),
    "detach": (lambda x: F.relu(x) + x.detach(), RuleError, "detach"),
    "data": (lambda x: F.relu(x) + x.data, RuleError, "detach"),
    "comparison": (lambda x: torch.where(x > 0, F.relu(x), x), RuleError, "comparison"),
    "item": (lambda x: F.relu(x) * x.sum().item(), RuleError, "'item'"),
    "numpy": (lambda x: F.relu(x) + torch.tensor(x.detach().numpy()), RuleError, "'numpy'"),
    "float": (lambda x: F.relu(x) * float(x.sum()), RuleError, "__float__"),
    "out": (_out, RuleError, "out="),
    "sort": (lambda x: F.relu(x).sort()[0], RuleError, "'sort'"),
    "product of all": (lambda x: F.relu(x).prod(1, keepdim=True).expand_as(x), RuleError, "'prod'"),
    "dropout": (lambda x: F.dropout(F.relu(x), 0.5, True), RuleError, "training=True"),
    "batch statistics": (lambda x: F.batch_norm(F.relu(x), None, None, training=True), RuleError, "training=True"),
    "half inside": (lambda x: F.relu(x).half().double(), NetworkError, "float16"),
    "random": (lambda x: F.relu(x) + torch.randn_like(x), MethodError, "random"),
    "saved on the CPU": (_saved_on_cpu, NetworkError, "save_on_cpu"),
    "vmap": (lambda x: torch.func.vmap(F.relu)(x), RuleError, r"'relu'.*torch.func.vmap"),
    "vmap of an index": (
        lambda x: F.relu(x) + torch.func.vmap(lambda i: x.roll(1, 3) * i)(ONES[0, 0, 0, 0, :2]).sum(0),
        RuleError,
        "torch.func.vmap",
    ),
    "vmap under no_grad": (_vmap_under_no_grad, RuleError, "torch.func.vmap"),
    "functional gradient": (lambda x: torch.func.grad(lambda y: F.softplus(y).sum())(x), RuleError, "torch.func.grad"),
    "gradient inside": (_gradient, RuleError, "'grad'"),
    "gradient inside, detached": (lambda x: F.relu(x) + _gradient(x).detach(), RuleError, "detach|'grad'"),
    "backward inside": (_backward, RuleError, "'backward'"),
    "shape in place": (lambda x: F.relu(x).clone().unsqueeze_(0)[0], RuleError, "in-place change of shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_seen_is_refused(name):
    function, error, text = REFUSED[name]
    plain = function(X.clone().requires_grad_()) if name != "out" else X  # each runs in an ordinary forward pass
    assert plain.shape == X.shape
    with pytest.raises(error, match=text):
        guided(function, X, ONES)
    assert not torch.overrides._get_current_function_mode_stack()


class _Keeps(nn.Module):
    """A convolution network that keeps something of its input beside the path to the output."""

    def __init__(self, keep=lambda self, x: None, use=lambda self, y: y):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.register_buffer("seen", torch.zeros(3))
        self.keep, self.use = keep, use

    def forward(self, x):
        self.keep(self, x)
        return self.use(self, self.b(F.relu(self.a(x))))


def _assign(self, x):
    self.seen = 0.9 * self.seen + 0.1 * x.detach().mean((0, 2, 3))


def _write(self, x):
    self.seen.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))


def _write_under_no_grad(self, x):
    with torch.no_grad():
        self.seen.mul_(0.9).add_(0.1 * x.mean((0, 2, 3)))


def _write_data(self, x):
    self.seen.data.copy_(x.detach().mean((0, 2, 3)))


def _write_view(self, x):
    self.seen[:2].copy_(x.detach().mean((0, 2, 3))[:2])


def _write_item(self, x):
    self.seen[0] = x.detach().mean() * 2


def _without_rule(self, x):
    self.seen = x.sort()[0][0, 0, 0, :3]


def _flags(self, x):
    grid = torch.linspace(0, 1, 3).to(x)
    grid.requires_grad = False


KEEPS = [_assign, _write, _write_under_no_grad, _write_data, _write_view, _write_item, _without_rule, _flags]


def _attributed(network):
    """The maps of three families, in float64."""
    first = guided(network, X, ONES).input
    return first, lrp(network, X, ONES, "EpsilonPlus").input, deep_lift(network, X, 0.5 * X.flip(-1), ONES).input


@pytest.mark.parametrize("keep", KEEPS)
def test_what_a_network_keeps_beside_its_output_changes_no_map(keep):
    torch.manual_seed(0)
    network = _Keeps(keep).double().eval()
    plain = _Keeps().double().eval()
    plain.load_state_dict(network.state_dict())
    for kept, expected in zip(_attributed(network), _attributed(plain)):
        assert float(expected.abs().max()) > 0
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("keep", KEEPS[:-1])
def test_what_a_network_keeps_is_refused_where_its_output_uses_it(keep):
    network = _Keeps(keep, lambda self, y: y + self.seen.reshape(1, 3, 1, 1)).double().eval()
    for call in (
        lambda: guided(network, X, ONES),
        lambda: lrp(network, X, ONES, "EpsilonPlus"),
        lambda: deep_lift(network, X, 0.5 * X, ONES),
    ):
        network.seen = torch.zeros(3).double()
        with pytest.raises(RuleError, match=r"detach|no_grad|'sort'"):
            call()


def test_a_constant_moved_to_the_device_of_the_image_is_a_constant():
    """``grid.to(x)`` reads no value of x: x·grid is linear in x, and all relevance stays with x."""
    grid = torch.linspace(0.5, 1, 4).double()
    network = nn.Conv2d(3, 1, 1, bias=False).double().eval()
    plain = lrp(lambda x: network(x * grid), X, ONES[:, :, :1], "EpsilonPlus")
    for like in (lambda x: grid.to(x), lambda x: grid.float().type_as(x), lambda x: grid.expand_as(x)):
        moved = lrp(lambda x, like=like: network(x * like(x)), X, ONES[:, :, :1], "EpsilonPlus")
        assert relative(moved.input, plain.input) <= 1e-6
        assert float((moved.absorbed - plain.absorbed).abs().max()) <= 1e-6


def test_scripted_and_compiled_networks_are_refused():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).double().eval()
    with pytest.raises(NetworkError, match="TorchScript"):
        guided(torch.jit.trace(network, X), X, ONES)
    with pytest.raises(NetworkError, match="TorchScript"):
        guided(nn.Sequential(torch.jit.script(network), nn.ReLU()), X, ONES)
    with pytest.raises(NetworkError, match="compiled"):
        guided(torch.compile(network, backend="eager"), X, ONES)


def test_a_compiled_part_that_is_not_a_module_of_the_network_runs_eagerly():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)).double().eval()
    compiled = torch.compile(network, backend="eager")
    assert torch.equal(guided(lambda x: compiled(x), X, ONES).input, guided(network, X, ONES).input)


def test_a_meta_tensor_enters_as_a_plain_tensor():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)).double().eval()
    result = guided(network, MetaTensor(X), MetaTensor(ONES)).input
    assert type(result) is torch.Tensor
    assert torch.equal(result, guided(network, X, ONES).input)


def test_half_precision_is_refused():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()).eval()
    with pytest.raises(NetworkError, match="float32 or float64"):
        guided(network.to(torch.bfloat16), X.to(torch.bfloat16), ONES)
    with pytest.raises(NetworkError, match=r"parameter 0\.weight"):
        guided(network, X, ONES)


def test_autocast_is_switched_off():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)).eval()
    x, ones = X.float(), ONES.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = guided(network, x, ones).input
    assert inside.dtype == torch.float32
    assert torch.equal(inside, guided(network, x, ones).input)


def test_works_under_inference_mode_and_no_grad():
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)).double().eval()
    with torch.inference_mode():
        x = X.clone()
        inside = guided(network, x, ONES).input
    with torch.no_grad():
        again = guided(network, X, ONES).input
    assert torch.equal(inside, again)
    assert torch.equal(inside, guided(network, X, ONES).input)


def test_activation_checkpointing_is_switched_off():
    torch.manual_seed(0)
    options = {"in_channels": 1, "out_channels": 1, "feature_size": 12, "depths": (1, 1, 1, 1), "spatial_dims": 2}
    network = SwinUNETR(**options).double().eval()
    checkpointed = SwinUNETR(**options, use_checkpoint=True).double().eval()
    checkpointed.load_state_dict(network.state_dict())
    x = torch.randn(1, 1, 64, 64, dtype=torch.float64)
    cotangents = torch.ones(1, 1, 1, 64, 64, dtype=torch.float64)
    original = torch.utils.checkpoint.CheckpointFunction
    assert torch.equal(guided(checkpointed, x, cotangents).input, guided(network, x, cotangents).input)
    assert torch.utils.checkpoint.CheckpointFunction is original


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_by_an_imported_name_are_switched_off(reentrant):
    def checkpointed(x):
        return imported_checkpoint(F.gelu, x, use_reentrant=reentrant)

    assert torch.equal(lrp(checkpointed, X, ONES).input, lrp(F.gelu, X, ONES).input)


def test_network_is_the_same_after_an_exception():
    case = build("UNet_instance", spatial_dims=2)

    def fails(x):
        y = case.network(x)
        return torch.fft.fft(y).real

    before = state(case.network)
    with pytest.raises(RuleError, match="fft"):
        guided(fails, case.image, torch.ones(1, 1, 3, *case.roi), layers={"deep": case.network.model[1]})
    assert_same_state(before, state(case.network))
    assert not torch.overrides._get_current_function_mode_stack()


def test_shape_of_cotangents_is_checked():
    with pytest.raises(InputError, match="cotangents"):
        guided(F.relu, X, ONES[:, :1])


def test_layers_are_checked():
    act = nn.ReLU()
    twice = nn.Sequential(act, nn.Conv2d(3, 3, 1).double(), act)
    unused = nn.ReLU()
    with pytest.raises(MethodError, match="runs several times"):
        guided(twice, X, ONES, layers={"act": act})
    with pytest.raises(MethodError, match="did not run"):
        guided(twice, X, ONES, layers={"unused": unused})
    assert not act._forward_hooks
    assert not unused._forward_hooks


def test_in_place_writes_take_effect_where_the_network_drops_the_result():
    def network(x):
        y = x * 1.0
        y[:, 0] = 2 * y[:, 1]
        part = y[:, 1:]
        part.mul_(3)
        part += 1
        torch.relu_(y)
        buffer = torch.zeros_like(x)
        buffer[:, :2] = y[:, 1:]
        buffer[:, 2].add_(y[:, 0])
        return buffer

    result = guided(network, X, ONES).input[0]
    expected = torch.zeros_like(X)  # channels of the result: 3x1 + 1, 3x2 + 1, 2x1, each through the activation
    expected[:, 1] = 3.0 * (3 * X[:, 1] + 1 > 0) + 2.0 * (X[:, 1] > 0)
    expected[:, 2] = 3.0 * (3 * X[:, 2] + 1 > 0)
    assert relative(result, expected) < 1e-12


def test_overwriting_what_a_rule_needs_is_an_error_not_a_wrong_map():
    def network(x):
        y = x * 1.0
        z = F.gelu(y)
        y.add_(1)  # the rule of gelu needs y as it was
        return z + y

    with pytest.raises(MethodError, match="overwrites in place"):
        guided(network, X, ONES)
