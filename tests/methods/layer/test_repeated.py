"""A layer that runs several times in a pass: a map per call, in the frame of the window, against plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import ViT
from torch import Tensor, nn

from esegeta_monai.engine.default_layer import check_layer, default_layer
from esegeta_monai.engine.layer_maps import LayerOutput, spread
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, NetworkError
from esegeta_monai.methods import (
    AblationCam,
    Cam,
    EigenCam,
    FullGrad,
    GradCam,
    GradCamPlusPlus,
    HiResCam,
    InternalInfluence,
    LayerActivation,
    LayerActivationGuidedBackprop,
    LayerCam,
    LayerConductance,
    LayerDeepLift,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LayerLRP,
    Method,
    NeuronConductance,
    ScoreCam,
    XGradCam,
)
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.objectives import explain, objective_of
from tests.support.repeated import Blocks, Encoder, Slices, Views, flip, hooked
from tests.support.tensors import assert_equal, noise

MODE = {2: "bilinear", 3: "trilinear"}


def mirrored(dims: int) -> tuple[Views, Tensor, list[tuple[int, ...]]]:
    """Return a network that averages over the window and two flips of it, an image (1, 1, *roi) and the flips."""
    torch.manual_seed(dims)
    axes = [(), (dims - 1,), (0, dims - 1)]
    network = Views(Encoder(dims), [flip(*a) for a in axes], 1 / 3).double().eval()
    x = noise(1, 1, *(16, 12, 8)[:dims])
    with torch.no_grad():  # both classes are predicted somewhere
        network.n.head.bias -= network(x).transpose(0, 1).flatten(1).mean(1)
    return network, x, axes


def calls_by_hand(o: Objective, network: nn.Module, layer: str, x: Tensor, axes: Any) -> list[tuple[Tensor, Tensor]]:
    """Return activation and gradient of each call (n, C, *positions), flipped back."""
    (score,) = o.scores
    calls = hooked(network, layer, x, lambda out: score.value(score.crop(out[0])))
    return [(a.flip([2 + d for d in f]), g.flip([2 + d for d in f])) for (a, g), f in zip(calls, axes)]


def up(values: Tensor, x: Tensor) -> Tensor:
    return F.interpolate(values, x.shape[2:], mode=MODE[x.ndim - 2])


def channels(values: Tensor) -> Tensor:
    return values.sum([d for d in range(values.ndim) if d != 1], keepdim=True)


@pytest.mark.parametrize("dims", [2, 3])
def test_maps_of_calls_are_those_of_plain_hooks_in_the_frame_of_the_window(dims):
    network, x, axes = mirrored(dims)
    o = objective_of(network, x[0], [MultiClassMask(1)])
    calls = calls_by_hand(o, network, "n.down", x, axes)
    positions = calls[0][0][0, 0].numel()
    expected: dict[Method, Tensor] = {
        GradCam("n.down", relu=False): sum(up((a * channels(g) / positions).sum(1, keepdim=True), x) for a, g in calls),
        XGradCam("n.down", relu=False): sum(
            up((a * torch.nan_to_num(channels(a * g) / channels(a))).sum(1, keepdim=True), x) for a, g in calls
        ),
        HiResCam("n.down", relu=False): sum(spread((a * g).sum(1, keepdim=True), o.plan) for a, g in calls),
        LayerCam("n.down", relu=False): sum(spread((a * g.relu()).sum(1, keepdim=True), o.plan) for a, g in calls),
        LayerGradientXActivation("n.down", reduce="channels"): sum(spread(a * g, o.plan) for a, g in calls),
        LayerActivation("n.down", reduce="channels"): sum(up(a, x) for a, _ in calls) / 3,
        LayerActivation("n.down"): sum(up(a.mean(1, keepdim=True), x) for a, _ in calls) / 3,
    }
    for method, wanted in expected.items():
        assert_equal(explain(method, o).maps, wanted, 1e-10)
    cam = explain(GradCam("n.down"), o).maps  # ReLU last, on the sum
    assert_equal(cam, explain(GradCam("n.down", relu=False), o).maps.relu(), 1e-12)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_network_listed_twice_with_half_the_weight_gives_the_plain_map(dims):
    network, x, _ = mirrored(dims)
    plain = objective_of(network.n, x[0], [MultiClassMask(1)], SlidingWindowInferer((8,) * dims, 2, 0.5))
    twice = objective_of(Views(network.n, [flip(), flip()], 0.5), x[0], [MultiClassMask(1)], plain_inferer(dims))
    for kind in (GradCam, XGradCam, HiResCam, LayerCam, LayerActivation, LayerGradientXActivation):
        assert_equal(explain(kind("n.down"), twice).maps, explain(kind("down"), plain).maps, 1e-10)
    assert_equal(explain(FullGrad(abs=False), twice).maps, explain(FullGrad(abs=False), plain).maps, 1e-10)


def plain_inferer(dims: int) -> SlidingWindowInferer:
    return SlidingWindowInferer((8,) * dims, 2, 0.5)


@pytest.mark.parametrize("dims", [2, 3])
def test_biases_of_full_gradients_lie_where_each_call_sees_them(dims):
    network, x, axes = mirrored(dims)
    o = objective_of(network, x[0], [MultiClassMask(1)])
    total = x * hooked_input(o, network, x)
    for name in ("n.stem.0", "n.down.0", "n.head"):
        bias = network.get_submodule(name).bias.detach().view(1, -1, *[1] * dims)
        for _, g in calls_by_hand(o, network, name, x, axes):
            total = total + spread((g * bias).sum(1, keepdim=True), o.plan)
    result = explain(FullGrad(abs=False), o)
    assert_equal(result.maps, total, 1e-10)
    assert result.note(0)["completeness_gap"] < 1e-10


def hooked_input(o: Objective, network: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    (score,) = o.scores
    return torch.autograd.grad(score.value(score.crop(network(leaf)[0])), leaf)[0]


@pytest.mark.parametrize("loop", [False, True])
def test_slices_in_a_loop_or_in_the_batch_give_a_map_of_the_volume(loop):
    torch.manual_seed(0)
    network, x = Slices(loop).double().eval(), noise(1, 1, 5, 8, 12)
    o = objective_of(network, x[0], [ClassScore(1)])
    calls = hooked(network, "n", x, lambda out: out[0, 1])
    a, g = (torch.cat([c[i] for c in calls]).transpose(0, 1)[None] for i in (0, 1))  # (1, C, slices, h, w)
    weights = channels(g) / g[0, 0].numel()
    assert_equal(explain(GradCam("n", relu=False), o).maps, up((a * weights).sum(1, keepdim=True), x), 1e-10)
    assert_equal(explain(LayerActivation("n", reduce="channels"), o).maps, up(a, x), 1e-10)
    assert_equal(explain(LayerGradientXActivation("n"), o).maps, spread((a * g).sum(1, keepdim=True), o.plan), 1e-10)
    with frozen(network):
        assert default_layer(o) in ("n", "n.1")
    with pytest.raises((MethodError, NetworkError), match=r"n' (runs 5 times|gives)"):
        explain(LayerConductance("n", n_steps=2), o)


ONE_CALL: list[type[Method]] = [
    *(GradCamPlusPlus, EigenCam, ScoreCam, AblationCam, LayerConductance, InternalInfluence, LayerGradientShap),
    *(LayerIntegratedGradients, LayerLRP, LayerDeepLift, LayerActivationGuidedBackprop, NeuronConductance),
]


@pytest.mark.parametrize("kind", ONE_CALL)
@pytest.mark.parametrize("named", [True, False])
def test_methods_that_read_one_call_refuse_by_name(kind, named):
    network, x, _ = mirrored(2)
    o = objective_of(network, x[0], [MultiClassMask(1)])
    with pytest.raises(MethodError, match=r"layer 'n\.down' runs 3 times in a pass.*input method"):
        explain(kind(layer="n.down" if named else None), o)


@pytest.mark.parametrize("kind", [GradCam, HiResCam, LayerActivation, LayerGradientXActivation])
def test_calls_that_are_steps_are_refused(kind):
    """A shared activation: its last call is not the layer, and the calls together are no view of the window."""
    torch.manual_seed(0)
    act = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), act, nn.Conv2d(4, 4, 3, 1, 1), act, nn.Upsample(scale_factor=2))
    network = network.append(nn.Conv2d(4, 2, 1)).double().eval()
    o = objective_of(network, noise(1, 16, 16), [MultiClassMask(1)])
    with pytest.raises(MethodError, match=r"layer '1' runs 2 times in a pass, each call on .* runs once, such as"):
        explain(kind(layer="1"), o)
    with frozen(network):
        assert check_layer(o, None) == "2"


def test_unknown_frames_are_refused():
    def both(x: Tensor) -> Tensor:
        return x[:, :, torch.arange(x.shape[2] - 1, -1, -1)]

    network = Views(Encoder(2), [flip(), (both, both)], 0.5).double().eval()
    o = objective_of(network, noise(1, 8, 8), [MultiClassMask(1)])
    with pytest.raises(MethodError, match="not known where the output of each call lies"):
        explain(GradCam("n.down"), o)
    with frozen(network), pytest.raises(MethodError, match="no layer with a spatial map"):
        default_layer(o)


def test_cam_reads_the_call_that_is_pooled():
    act = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), act, nn.Conv2d(4, 4, 3, 1, 1), act, nn.AdaptiveAvgPool2d(1))
    network = network.append(nn.Flatten()).append(nn.Linear(4, 2)).double().eval()
    x = noise(1, 1, 8, 8)
    with torch.no_grad():
        small = network[:4](x)
    o = objective_of(network, x[0], [ClassScore(1)])
    result = explain(Cam(), o)
    assert result.notes["layer"] == "1"
    assert_equal(
        result.maps, up(torch.einsum("c,nc...->n...", network[6].weight[1].detach(), small)[:, None], x), 1e-10
    )


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [6, 8])
def test_blocks_with_their_channels_last(dims, channels):
    """The class of the blocks is not known, nor is their shape evidence: 8 channels at 8 positions along each axis."""
    torch.manual_seed(0)
    network, x = Blocks(dims, channels).double().eval(), noise(1, 1, *(32,) * dims)
    o = objective_of(network, x[0], [ClassScore(1)])
    ((a, g),) = hooked(network, "block", x, lambda out: out[0, 1])
    a, g = a.movedim(-1, 1), g.movedim(-1, 1)
    expected = up((a * weights_of(g)).sum(1, keepdim=True), x)
    assert_equal(explain(GradCam("block", relu=False), o).maps, expected, 1e-10)
    assert_equal(explain(LayerActivation("block", reduce="channels"), o).maps, up(a, x), 1e-10)
    with torch.no_grad(), frozen(network):
        assert_equal(LayerOutput(network, "block")(x), F.interpolate(a, x.shape[2:], mode="nearest-exact"), 1e-12)


def weights_of(g: Tensor) -> Tensor:
    return channels(g) / g[0, 0].numel()


def test_a_target_of_a_layer_that_runs_several_times_is_refused():
    network, x, _ = mirrored(2)
    with frozen(network), torch.no_grad(), pytest.raises(NetworkError, match=r"'n\.down' runs 3 times in a pass"):
        LayerOutput(network, "n.down")(x)


@pytest.mark.parametrize("size", [((64, 64, 8), (8, 8, 1)), ((96, 48), (16, 4))])
@pytest.mark.parametrize("class_token", [False, True])
def test_cams_of_tokens_of_patches_that_are_no_cubes(size, class_token):
    """Against the row-major order of MONAI's patches."""
    torch.manual_seed(0)
    image, patch = size
    shared = {"hidden_size": 12, "mlp_dim": 8, "num_layers": 2, "num_heads": 2, "num_classes": 2}
    vit = ViT(1, image, patch, spatial_dims=len(image), classification=class_token, **shared).double().eval()

    class Scored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.head = vit, nn.Identity() if class_token else nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.v(x)[0]
            return y if class_token else self.head(y.amax(1))

    network, x = Scored().double().eval(), noise(1, 1, *image)
    o = objective_of(network, x[0], [ClassScore(1)])
    ((a, g),) = hooked(network, "v.blocks.0", x, lambda out: out[0, 1])
    grid = tuple(n // p for n, p in zip(image, patch))
    a, g = (v[:, class_token:].mT.reshape(1, 12, *grid) for v in (a, g))
    expected = up((a * weights_of(g)).sum(1, keepdim=True), x)
    assert_equal(explain(GradCam("v.blocks.0", relu=False), o).maps, expected, 1e-10)
