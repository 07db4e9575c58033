"""Patterns against their formulas, neuron by neuron, and the paper's toy."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esegeta_monai.engine.rules import PatternFit, back_project
from esegeta_monai.errors import MethodError, RuleError
from tests.engine.rules.support import assert_same_state, relative, state, weights_matrix
from tests.networks import build

DOUBLE = torch.float64


def fitted(network, *batches):
    fit = PatternFit()
    for batch in batches:
        fit.add(network, batch)
    return fit.patterns()


def test_the_signal_is_found_where_the_filter_is_turned_away():
    """x = y s + d with a distractor: w has to be orthogonal to d, the pattern is s (Kindermans 2018, section 3)."""
    generator = torch.Generator().manual_seed(0)
    y, noise = torch.randn(2, 100_000, 1, dtype=DOUBLE, generator=generator)
    signal, distractor = torch.tensor([1.0, 0.0], dtype=DOUBLE), torch.tensor([1.0, 1.0], dtype=DOUBLE)
    x = y * signal + noise * distractor
    network = nn.Linear(2, 1, bias=False).double().requires_grad_(False)
    network.weight.copy_(torch.tensor([[1.0, -1.0]]))  # the only w with wᵀs = 1 and wᵀd = 0
    assert torch.allclose(network(x), y, atol=1e-12)
    patterns = fitted(network, x[:60_000], x[60_000:])
    assert torch.allclose(patterns[0].positive[0], signal, atol=0.01)  # five standard errors of 1e5 samples
    one = torch.ones(1, 1, 1, dtype=DOUBLE)
    projected = back_project(network, x[:1], one, patterns, "signal")[0, 0]
    assert torch.allclose(projected, y[0] * signal, atol=0.05)
    share = back_project(network, x[:1], one, patterns, "attribution")[0, 0]
    assert relative(share.sum(), y[0, 0]) < 1e-12


OPERATIONS = {
    "linear": (lambda: nn.Linear(5, 4), (300, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, stride=2, padding=1, groups=2), (90, 4, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, dilation=2, padding=2), (60, 2, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (80, 1, 3, 4, 2)),
    "transpose1d": (lambda: nn.ConvTranspose1d(4, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (90, 4, 4)),
    "transpose2d": (lambda: nn.ConvTranspose2d(2, 2, 3, stride=2), (80, 2, 3, 3)),
    "transpose3d": (lambda: nn.ConvTranspose3d(2, 1, 2, stride=2), (60, 2, 2, 2, 2)),
}


def _neurons(operation, shape):
    """For each output: the weight that each of its inputs goes through (an index into the flat weights, or −1)."""
    numbered = nn.Module.__new__(type(operation))
    numbered.__dict__.update(operation.__dict__)
    numbered._parameters = {
        "weight": nn.Parameter(
            torch.arange(1.0, operation.weight.numel() + 1, dtype=DOUBLE).reshape(operation.weight.shape)
        ),
        "bias": None,
    }
    matrix, _ = weights_matrix(numbered, (1, *shape[1:]))
    return matrix.detach().round().long() - 1


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("rectified", [True, False])
def test_every_neuron_by_its_formula(name, rectified):
    """a_r = E_r[(x − E x)(y − E y)] / E_r[(y − E y)²], over the samples and the places that share the weights."""
    torch.manual_seed(1)
    operation, shape = OPERATIONS[name][0]().double().requires_grad_(False), OPERATIONS[name][1]
    x = torch.rand(shape, dtype=DOUBLE) + 0.5
    network = nn.Sequential(operation, nn.LeakyReLU()) if rectified else operation
    (pattern,) = fitted(network, x[:40], x[40:])
    index = _neurons(operation, shape)
    z = operation(x).flatten(1)
    weights = operation.weight.flatten()
    alike: dict[tuple[int, ...], list[int]] = {}
    for j, row in enumerate(index):
        taps = tuple(sorted(row[row >= 0].tolist()))
        alike.setdefault(taps, []).append(j)
    groups = _merge_edges(alike)
    assert sorted(tap for taps in groups for tap in taps) == list(range(weights.numel()))  # every weight is checked
    for taps, outputs in groups.items():
        seen, y, regime = [], [], []
        for j in outputs:
            columns = torch.stack([(x.flatten(1) * (index[j] == tap)).sum(1) for tap in taps], 1)
            seen.append(columns)
            y.append(columns @ weights[list(taps)])
            regime.append(z[:, j] > 0)
        inputs, y, positive = torch.cat(seen), torch.cat(y), torch.cat(regime)
        inputs, y = inputs - inputs.mean(0), y - y.mean()
        for estimate, inside in ((pattern.positive, positive), (pattern.negative, ~positive)):
            inside = inside if rectified else torch.ones_like(inside)
            if not inside.any():
                assert (estimate.flatten()[list(taps)] == 0).all()
                continue
            expected = (inputs[inside] * y[inside, None]).mean(0) / y[inside].square().mean()
            assert relative(estimate.flatten()[list(taps)], expected) < 1e-10
            assert relative((expected * weights[list(taps)]).sum(), torch.ones(())) < 1e-10


def _merge_edges(alike):
    """Outputs at the border read a part of a neuron's taps: they belong to the neuron that has these taps."""
    largest = [taps for taps in alike if not any(set(taps) < set(other) for other in alike)]
    return {
        taps: [j for part, outputs in alike.items() if set(part) <= set(taps) and part for j in outputs]
        for taps in largest
    }


@pytest.mark.parametrize("way", ["signal", "attribution"])
def test_a_network_by_hand(way):
    """Filters exchanged for patterns of the regime that each neuron is in; scales, pooling and sums by their rules."""
    torch.manual_seed(0)
    first, second = nn.Linear(4, 5).double(), nn.Linear(5, 5).double()
    last = nn.Linear(5, 2).double()
    for module in (first, second, last):
        module.requires_grad_(False)
    norm = nn.BatchNorm1d(5).double().eval().requires_grad_(False)
    norm.running_mean.normal_()
    norm.weight.uniform_(0.5, 2)

    def network(z):
        hidden = torch.nn.functional.leaky_relu(norm(first(z)), 0.1)
        return last(hidden + torch.relu(second(hidden)))

    x = torch.randn(500, 4, dtype=DOUBLE)
    patterns = fitted(network, x)
    assert [p.name for p in patterns] == ["linear", "linear", "add", "linear"]
    z = x[:1]
    inner = norm(first(z))
    hidden = torch.nn.functional.leaky_relu(inner, 0.1)
    gate = second(hidden)
    all_hidden = torch.nn.functional.leaky_relu(norm(first(x)), 0.1)
    terms = torch.stack([all_hidden, torch.relu(second(all_hidden))])
    centred = terms - terms.mean(1, keepdim=True)
    shares = (centred * centred.sum(0)).sum(1) / centred.sum(0).square().sum(0)
    assert relative(patterns[2].positive, shares) < 1e-10

    def down(g, module, pattern, positive):
        regime = torch.where(positive[0, :, None], pattern.positive, pattern.negative)
        return g @ (regime * module.weight if way == "attribution" else regime)

    cotangent = torch.tensor([[[0.0, 1.0]]], dtype=DOUBLE)
    g = down(cotangent[0] * network(z), last, patterns[3], torch.ones(1, 2, dtype=torch.bool))
    through = down(g * shares[1] * (gate > 0), second, patterns[1], gate > 0)
    g = (g * shares[0] + through) * torch.where(inner > 0, 1.0, 0.1)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    g = g if way == "attribution" else g / scale
    expected = down(g, first, patterns[0], inner > 0)
    assert relative(back_project(network, z, cotangent, patterns, way)[0], expected) < 1e-10


def test_instance_norm_scales_each_window_by_its_own_deviation():
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(3, affine=True).double().requires_grad_(False)
    norm.weight.uniform_(0.5, 2)
    network = nn.Sequential(norm)
    x = torch.randn(2, 3, 5, 5, dtype=DOUBLE) * torch.tensor([1.0, 4.0], dtype=DOUBLE)[:, None, None, None]
    cotangents = torch.ones(1, 2, 3, 5, 5, dtype=DOUBLE)
    scale = norm.weight[:, None, None] / (x.var((2, 3), unbiased=False, keepdim=True) + norm.eps).sqrt()
    y = network(x)
    assert relative(back_project(network, x, cotangents, [], "signal")[0], y / scale) < 1e-10
    assert relative(back_project(network, x, cotangents, [], "attribution")[0], y) < 1e-10


NETWORKS = ["UNet_batch", "UNet_instance", "BasicUNet", "DynUNet", "SegResNet", "ResNet18", "DenseNet121", "MeshNet"]
NETWORKS += ["VNet", "HighResNet", "TwoHeads", "SharedNet"]
SLOW = (("BasicUNet", 3), ("VNet", 3))


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        pytest.param(name, dims, marks=pytest.mark.slow if (name, dims) in SLOW else ())
        for name in NETWORKS
        for dims in (2, 3)
    ],
)
def test_networks_without_products(name, dims):
    case = build(name, spatial_dims=dims)
    before = state(case.network)
    patterns = fitted(case.logits, case.image, case.reference)
    cotangents = torch.zeros_like(case.logits(case.image))[None].detach()
    cotangents[:, :, 1] = 1
    for way in ("signal", "attribution"):
        projected = back_project(case.logits, case.image, cotangents, patterns, way)
        assert projected.isfinite().all()
        assert projected.abs().max() > 0
    assert_same_state(before, state(case.network))


@pytest.mark.parametrize("name", ["ViT", "UNETR", "AttentionUnet", "SEResNet50"])
def test_products_are_no_linear_neurons(name):
    case = build(name, spatial_dims=2)
    with pytest.raises(RuleError, match="no linear neuron"):
        PatternFit().add(case.logits, case.image)


class Between(nn.Module):
    """An operation between a layer and its rectifier, and its inverse after it."""

    def __init__(self, layer, there, back):
        super().__init__()
        self.layer, self.there, self.back = layer, there, back

    def forward(self, x):
        return self.back(torch.relu(self.there(self.layer(x))))


def same(x):
    return x


MOVED = {
    "permute": (lambda y: y.permute(0, 2, 3, 1), lambda y: y.permute(0, 3, 1, 2)),
    "transpose and flatten": (lambda y: y.transpose(1, 3).flatten(1), lambda y: y.view(20, 4, 6, 3).transpose(1, 3)),
    "scale": (lambda y: (2 * y).unsqueeze(1), lambda y: y[:, 0] / 2),
}


@pytest.mark.parametrize("name", MOVED)
def test_the_rectifier_is_found_after_moves(name):
    """Channels last: each neuron keeps its own regimes."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 1).double().requires_grad_(False)
    x, one = torch.randn(20, 2, 6, 4, dtype=DOUBLE), torch.ones(1, 20, 3, 6, 4, dtype=DOUBLE)
    plain, moved = Between(layer, same, same), Between(layer, *MOVED[name])
    patterns = fitted(moved, x)
    assert relative(patterns[0].positive, patterns[0].negative) > 0.01
    (expected,) = fitted(plain, x)
    assert relative(patterns[0].positive, expected.positive) < 1e-12
    assert relative(patterns[0].negative, expected.negative) < 1e-12
    projected = back_project(moved, x, one, patterns, "signal")
    assert relative(projected, back_project(plain, x, one, patterns, "signal")) < 1e-12


def test_a_rectifier_after_a_pooling_is_not_that_of_the_neuron():
    torch.manual_seed(0)
    pool = nn.AvgPool2d(3, stride=1, padding=1)  # of the same shape
    layer = nn.Conv2d(2, 3, 1).double().requires_grad_(False)
    (pattern,) = fitted(Between(layer, pool, same), torch.randn(20, 2, 6, 4, dtype=DOUBLE))
    assert torch.equal(pattern.positive, pattern.negative)


@pytest.mark.parametrize("rectified", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("empty", [0, 2])
def test_intensities_far_from_zero(empty, kind, rectified):
    """Float32 in the units of a scanner (1000 ± 1), empty windows before or not, against the fit in float64."""
    torch.manual_seed(0)
    layer = kind(1, 2, 3, stride=2).requires_grad_(False)
    x = 1000 + torch.randn(4, 1, 32, 32)
    layer.bias -= layer(x)[..., 2, 2].mean(0)  # what the rectifier sees has both signs
    network = nn.Sequential(layer, nn.ReLU()) if rectified else layer
    x[:empty] = 0
    (estimate,) = fitted(network, x[:2], x[2:])
    network.double()
    (expected,) = fitted(network, x[:2].double(), x[2:].double())
    for regime in ("positive", "negative"):
        assert relative(getattr(estimate, regime), getattr(expected, regime)) < 1e-3  # a float32 is 1000 ± 6e-5
    (alone,) = fitted(network, x.double())
    assert relative(alone.positive, expected.positive) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_neurons_that_never_varied_have_no_pattern(dtype):
    """A channel of 0.1 beside one that varies: rounding is no variance."""
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 2, 1, groups=2).to(dtype).requires_grad_(False)
    x = torch.rand(3, 2, 5, 5, dtype=dtype)
    x[:, 0] = 0.1
    (pattern,) = fitted(layer, x, x / 2 + torch.tensor([0.05, 0], dtype=dtype)[:, None, None])
    assert pattern.positive[0] == 0
    assert relative(pattern.positive[1], 1 / layer.weight[1]) < 1e-5
    (shares,) = fitted(lambda z: 0.1 * z + 0.7 * z, x)
    assert (shares.positive[:, 0] == 0).all()
    assert relative(shares.positive[:, 1], torch.tensor([1 / 8, 7 / 8], dtype=dtype)) < 1e-5


def test_patterns_of_another_network_are_refused():
    torch.manual_seed(0)
    one, other = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    x, c = torch.rand(9, 3, dtype=DOUBLE), torch.ones(1, 9, 2, dtype=DOUBLE)
    patterns = fitted(one, x)
    with pytest.raises(MethodError, match="1 were fitted"):
        back_project(nn.Sequential(one, nn.ReLU(), other), x, c, patterns, "signal")
    with pytest.raises(RuleError, match="fit the patterns again"):
        back_project(other, x[:, :2], c, patterns, "signal")
