from __future__ import annotations

import math

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks import MemoryEfficientSwish, Mish, Swish
from torch import nn

from esegeta_monai.engine.rules import deconvolution, guided
from esegeta_monai.errors import MethodError, RuleError
from tests.engine.rules.support import assert_same_state, gradient, relative, state
from tests.networks import NAMES, build
from tests.support.networks import Computed


def _sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def _gelu_slope(x):
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _silu_slope(x, alpha=1.0):
    s = _sigmoid(alpha * x)
    return s + alpha * x * s * (1 - s)


def _mish_slope(x):
    t = torch.tanh(torch.log1p(torch.exp(x)))
    return t + x * (1 - t * t) * _sigmoid(x)


def _above(x, slope):
    """1 where x > 0, the given slope below."""
    return torch.where(x > 0, torch.ones_like(x), slope * torch.ones_like(x))


def _between(x, low, high):
    return ((x > low) & (x < high)).to(x)


def _dropped(x):
    """Writes in place and drops what the call returns."""
    F.leaky_relu_(x, 0.2)
    return x


_PRELU = torch.tensor([0.1, -0.3, 0.5], dtype=torch.float64)


def _prelu():
    module = nn.PReLU(3).double()
    module.weight.data.copy_(_PRELU)
    return module


# name -> (activation, its derivative written out)
ACTIVATIONS = {
    "ReLU": (nn.ReLU(), lambda x: (x > 0).to(x)),
    "ReLU in place": (nn.ReLU(inplace=True), lambda x: (x > 0).to(x)),
    "torch.relu_": (Computed(torch.relu_), lambda x: (x > 0).to(x)),
    "clamp": (Computed(lambda x: x.clamp(min=0)), lambda x: (x > 0).to(x)),
    "maximum": (Computed(lambda x: torch.maximum(x, torch.zeros_like(x))), lambda x: (x > 0).to(x)),
    "LeakyReLU": (nn.LeakyReLU(0.2, inplace=True), lambda x: _above(x, 0.2)),
    "positional inplace": (Computed(lambda x: F.leaky_relu(x, 0.2, True)), lambda x: _above(x, 0.2)),
    "dropped": (Computed(_dropped), lambda x: _above(x, 0.2)),
    "PReLU": (_prelu(), lambda x: _above(x, _PRELU[:, None, None])),
    "ELU": (nn.ELU(0.7, inplace=True), lambda x: _above(x, 0.7 * torch.exp(x))),
    "CELU": (nn.CELU(0.5), lambda x: _above(x, torch.exp(x / 0.5))),  # torch rounds 1/alpha to float32
    "SELU": (
        nn.SELU(),
        lambda x: 1.0507009873554805 * _above(x, 1.6732632423543772 * torch.exp(x)),
    ),
    "GELU": (nn.GELU(), _gelu_slope),
    "GELU by hand": (Computed(lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))), _gelu_slope),
    "SiLU": (nn.SiLU(inplace=True), _silu_slope),
    "Swish": (Swish(alpha=1.5), lambda x: _silu_slope(x, 1.5)),
    "MemoryEfficientSwish": (MemoryEfficientSwish(), _silu_slope),
    "Mish": (Mish(), _mish_slope),
    "Mish by hand": (Computed(lambda x: x * torch.tanh(F.softplus(x))), _mish_slope),
    "Softplus": (nn.Softplus(beta=2), lambda x: _sigmoid(2 * x)),
    "Hardtanh": (nn.Hardtanh(-0.5, 0.8), lambda x: _between(x, -0.5, 0.8)),
    "ReLU6": (nn.ReLU6(inplace=True), lambda x: _between(x, 0, 6)),
    "Hardswish": (
        nn.Hardswish(),
        lambda x: (x >= 3).to(x) + _between(x, -3, 3) * (2 * x + 3) / 6,
    ),
    "Threshold": (nn.Threshold(0.3, 0.1), lambda x: (x > 0.3).to(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("method", [guided, deconvolution])
def test_each_activation_equals_its_jacobian(name, method):
    """Two matrices round one activation: the rule between them, written out."""
    activation, slope = ACTIVATIONS[name]
    generator = torch.Generator().manual_seed(3)
    first, second = (torch.randn(3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    x = 2 * torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    cotangents = torch.randn(2, 2, 3, 4, 5, generator=generator, dtype=torch.float64)

    def mix(matrix, z):
        return torch.einsum("oc,bchw->bohw", matrix, z)

    def network(z):
        return mix(second, activation(mix(first, z)))

    result = method(network, x, cotangents).input
    for k in range(2):
        arriving = mix(second.T, cotangents[k]).clamp(min=0)
        if method is guided:
            arriving = (arriving * slope(mix(first, x))).clamp(min=0)
        assert relative(result[k], mix(first.T, arriving)) < 1e-12


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(
    ("method", "peer"), [(guided, captum.attr.GuidedBackprop), (deconvolution, captum.attr.Deconvolution)]
)
@pytest.mark.filterwarnings("ignore:Setting backward hooks")
def test_equals_captum_on_plain_relu_networks(dims, method, peer):
    torch.manual_seed(dims)
    conv, pool = (nn.Conv2d, nn.MaxPool2d) if dims == 2 else (nn.Conv3d, nn.MaxPool3d)
    network = nn.Sequential(
        conv(2, 4, 3), nn.ReLU(), pool(2), conv(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 2**dims, 3)
    )
    network = network.double().eval()
    x = torch.randn(2, 2, *(10,) * dims, dtype=torch.float64)
    cotangents = torch.zeros(1, 2, 3, dtype=torch.float64)
    cotangents[..., 1] = 1
    result = method(network, x, cotangents).input[0]
    assert relative(result, peer(network).attribute(x, target=1)) < 1e-12


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_acts_on_every_network_and_leaves_it_as_it_was(name, dims):
    case = build(name, spatial_dims=dims)
    logits = case.logits(case.image)
    # both signs, because narrow last layers may have negative weights only, which let nothing through for one class
    cotangent = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(1))
    before = state(case.network)
    plain = gradient(case.logits, case.image, cotangent)
    maps = [method(case.logits, case.image, cotangent[None]).input[0] for method in (guided, deconvolution)]
    assert all(torch.isfinite(m).all() and m.abs().max() > 0 for m in maps)
    assert min(relative(a, b) for a, b in [(maps[0], plain), (maps[1], plain), (maps[0], maps[1])]) > 1e-2
    assert_same_state(before, state(case.network))


def test_window_by_window_is_the_same_as_a_batch():
    case = build("DynUNet", spatial_dims=2)
    x = torch.cat([case.image, case.reference])
    cotangents = torch.randn(2, *case.logits(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    together = guided(case.logits, x, cotangents).input
    for i in range(2):
        alone = guided(case.logits, x[i : i + 1], cotangents[:, i : i + 1]).input
        assert relative(together[:, i : i + 1], alone) < 1e-10


def test_gradient_at_a_layer():
    """At the input of the last convolution no activation lies behind: the plain gradient. Before it, the rule."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.LeakyReLU(inplace=True), nn.Conv2d(3, 2, 3)).double().eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    cotangents = torch.randn(1, 1, 2, 4, 4, dtype=torch.float64)
    layers = {"conv": network[0], "act": network[1]}
    result = guided(network, x, cotangents, layers=layers)
    after = F.conv_transpose2d(cotangents[0], network[2].weight)
    slopes = _above(network[0](x), 0.01)
    assert relative(result.layers["act"].gradient[0], after) < 1e-12
    assert relative(result.layers["conv"].gradient[0], (after.clamp(min=0) * slopes).clamp(min=0)) < 1e-12
    assert torch.equal(result.layers["conv"].activation, network[0](x))
    assert torch.equal(result.layers["act"].activation, F.leaky_relu(network[0](x)))
    assert not network[0]._forward_hooks
    without = guided(network, x, cotangents)
    assert torch.equal(result.input, without.input)


def test_gates_keep_their_derivative():
    """A squeeze-and-excitation gate is a product of two different tensors, not an activation."""
    torch.manual_seed(0)
    squeeze = nn.Conv2d(3, 3, 1).double()
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    cotangents = torch.randn(1, 1, 3, 6, 6, dtype=torch.float64)

    def gated(z):
        return F.relu(z) * torch.sigmoid(squeeze(z.mean((2, 3), keepdim=True)))

    with pytest.raises(MethodError, match="has none"):
        guided(lambda z: z * torch.sigmoid(squeeze(z.mean((2, 3), keepdim=True))), x, cotangents)
    gate = torch.sigmoid(squeeze(x.mean((2, 3), keepdim=True)))
    through_value = ((cotangents[0] * gate).clamp(min=0) * (x > 0)).clamp(min=0)
    slope = (cotangents[0] * F.relu(x)).sum((2, 3), keepdim=True) * gate * (1 - gate)
    through_gate = F.conv_transpose2d(slope, squeeze.weight) / 36
    assert relative(guided(gated, x, cotangents).input[0], through_value + through_gate) < 1e-12


def test_refuses_a_network_without_activations():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).double().eval()
    with pytest.raises(MethodError, match="use Saliency"):
        guided(network, torch.randn(1, 1, 6, 6).double(), torch.ones(1, 1, 2, 4, 4).double())


def test_activations_inside_transformer_layers_are_found():
    """nn.TransformerEncoderLayer has a fused fast path in eval mode, which would hide its GELU."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu", batch_first=False).double().eval()
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    cotangents = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    assert relative(guided(layer, x, cotangents).input[0], gradient(layer, x, cotangents[0])) > 1e-2


def test_unknown_operation_names_itself_and_its_module():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real

    network = nn.Sequential(nn.ReLU(), Odd())
    with pytest.raises(RuleError, match=r"'fft_fft' in Odd \(1\): no rule"):
        guided(network, torch.randn(1, 4), torch.ones(1, 1, 4))
