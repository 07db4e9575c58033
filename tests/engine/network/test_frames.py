"""Where the output of each call of a layer lies in the window, against positions that are written into the window."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.nets import ViT
from torch import Tensor, nn

from esegeta_monai.engine.network.axes import label_of
from esegeta_monai.engine.network.frames import Frame, TracedLayer, assemble, trace_layers
from tests.networks import NAMES, build
from tests.support.repeated import Blocks, Encoder, Slices, Views, flip
from tests.support.tensors import noise


def trace(network: nn.Module, x: Tensor) -> dict[str, TracedLayer]:
    """Trace a network in evaluation mode on windows (n, C, *roi)."""
    return trace_layers(network.eval(), x.shape[2:], lambda: network(x))


class Handed(nn.Module):
    """A function between two layers that return what they get: the second is read."""

    def __init__(self, function, inference: bool = True) -> None:
        super().__init__()
        self.function, self.read, self.inference = function, nn.Identity(), inference

    def forward(self, x):
        with torch.inference_mode(self.inference), torch.no_grad():
            self.read(self.function(x))
        return x


def frame_after(function, x: Tensor, inference: bool = True) -> tuple[Frame | None, Tensor]:
    """Return the frame of a function of the window, in inference mode or outside of it, and its value."""
    return trace(Handed(function, inference), x)["read"].frames[0], function(x)


MOVES = {
    "permuted": lambda x: x.permute(0, 3, 1, 2),
    "channels last": lambda x: x.movedim(1, -1),
    "flipped": lambda x: x.flip(-1),
    "flipped along all": lambda x: x.flip((2, 3)),
    "a quarter turn": lambda x: torch.rot90(x, 1, (2, 3)),
    "three quarter turns": lambda x: torch.rot90(x, -1, (3, 2)),
    "tokens": lambda x: x.flatten(2).transpose(1, 2),
    "tokens before the batch": lambda x: x.flatten(2).permute(2, 0, 1),
    "tokens after a class token": lambda x: torch.cat(
        [torch.zeros(len(x), 1, x.shape[1]), x.flatten(2).transpose(1, 2)], 1
    ),
    "tokens before registers": lambda x: torch.cat([x.flatten(2).mT, torch.zeros(len(x), 3, x.shape[1])], 1),
    "tokens of the turned window": lambda x: x.transpose(2, 3).flip(2).flatten(2).mT,
    "windows in the batch": lambda x: (
        x.unflatten(3, (3, 4)).unflatten(2, (2, 4)).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, x.shape[1])
    ),
    "windows put back": lambda x: (
        x.unflatten(3, (3, 4)).unflatten(2, (2, 4)).transpose(3, 4).transpose(3, 4).reshape(x.shape)
    ),
    "rolled there and back": lambda x: x.roll((2, 1), (2, 3)).roll((-2, -1), (2, 3)),
    "padded and cropped": lambda x: nn.functional.pad(x, (0, 4, 1, 3))[..., 1:-3, :-4],
    "slices put together": lambda x: torch.stack([x[:, :, i] for i in range(x.shape[2])], 1),
    "einsum": lambda x: torch.einsum("nchw,dc->nhwd", x, torch.eye(x.shape[1])),
    "entries set by a mask": lambda x: _masked(x, x < 0, 0.0),
    "entries set by a mask of positions": lambda x: _masked(x, x[0, 0] < 0, 0.0, slice(None), slice(None)),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("inference", [True, False])
def test_moves_are_undone(name, rows, inference):
    x = torch.arange(rows * 3 * 8 * 12.0).reshape(rows, 3, 8, 12)
    frame, value = frame_after(MOVES[name], x, inference)
    assert frame is not None
    assert frame.grid == (3, 8, 12)
    assert frame.fits(value)
    assert torch.equal(frame.to_map(value), x)
    gradients = torch.stack([value, 2 * value])
    assert torch.equal(frame.to_map(gradients, 2), torch.stack([x, 2 * x]))


def _write(x: Tensor, values: Tensor) -> Tensor:
    x[:, :] = values
    return x


def _masked(x: Tensor, mask: Tensor, value: object, *axes: slice) -> Tensor:
    y = x.clone()
    y[(*axes, mask)] = value
    return y


ALL = slice(None)
UNKNOWN = {
    "entries set where the flipped window is small": lambda x: _masked(x, x.flip(3) < 0.5, 0.0),
    "entries set to those of the flipped window": lambda x: _masked(x, x < 0.5, x.flip(3)[x < 0.5]),
    "entries set by a mask of the turned window": lambda x: _masked(x, x.flip(2)[0, 0] < 0.5, 0.0, ALL, ALL),
    "entries set by number": lambda x: _masked(x, torch.tensor([1, 2]), x[:, :, [2, 1]], ALL, ALL),
    "half of the window": lambda x: x[..., :6],
    "rolled": lambda x: x.roll(2, 3),
    "the window beside itself": lambda x: torch.cat([x, x], 3),
    "the window beside its flip": lambda x: torch.cat([x, x.flip(3)], 0),
    "the window plus its flip": lambda x: x + x.flip(3),
    "entries by number": lambda x: x[:, :, [2, 1, 0]],
    "a written buffer": lambda x: x.new_zeros(x.shape).copy_(x).index_copy(2, torch.tensor([0]), x[:, :, :1]),
    "a written part": lambda x: _write(x.clone(), x.flip(3)),
    "a written whole": lambda x: x.flip(3).copy_(x),
    "no positions": lambda x: x.mean(3),
    "all in one": lambda x: x.flatten(1),
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("inference", [True, False])
def test_what_is_not_known_is_no_map(name, inference):
    assert frame_after(UNKNOWN[name], torch.rand(2, 3, 8, 12), inference)[0] is None


class Again(nn.Module):
    """Fails in inference mode, after its first layer; or calls itself on the turned window."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again, self.read, self.alias = again, nn.Conv2d(3, 2, 1), None
        self.alias = self.read

    def forward(self, x, turn: bool = True):
        y = self.read(x)
        if self.again:
            return y + self(x.flip(3), turn=False).flip(3) if turn else y
        if torch.is_inference_mode_enabled():
            raise RuntimeError("no gradient in inference mode")
        return y


def test_a_repeated_pass_is_traced_once_and_a_network_that_calls_itself_twice():
    x, network = torch.rand(1, 3, 8, 12), Again(False)

    def run() -> None:
        with pytest.raises(RuntimeError, match="inference mode"):
            network(x)
        with torch.inference_mode(False), torch.no_grad():
            network(x)

    assert trace_layers(network, (8, 12), run)["read"].calls == 1
    frames = trace(Again(True), x)["read"].frames
    assert [f.flips for f in frames] == [(), (1,)]


def test_a_module_is_found_by_all_of_its_names():
    layers = trace(Again(True), torch.rand(1, 3, 8, 12))
    assert set(layers) == {"", "read"}
    assert layers["alias"] is layers["read"] is layers.get("alias")
    assert "alias" in layers
    assert "other" not in layers
    assert layers.get("other") is None
    with pytest.raises(KeyError):
        layers["other"]


def test_a_frame_made_of_one_window_is_not_used_for_two_where_their_order_is_open():
    frame, value = frame_after(MOVES["windows in the batch"], torch.rand(1, 3, 8, 12))
    assert frame.fits(value)
    assert not frame.fits(torch.cat([value, value]))
    frame, value = frame_after(MOVES["flipped"], torch.rand(1, 3, 8, 12))
    assert frame.fits(torch.cat([value, value]))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("channels", [5, 8])
@pytest.mark.parametrize("swap", [False, True])
def test_channels_of_a_block_of_its_own_class_are_found(dims, channels, swap):
    """Eight channels at 8 positions along each axis: the shape shows nothing."""
    network = Blocks(dims, channels, swap).double()
    x = noise(2, 1, *(32,) * dims)
    layers = trace(network, x)["block"]
    y = network.stem(x).movedim(1, -1)
    raw = network.block(y.transpose(1, 2) if swap else y)
    expected = (raw.transpose(1, 2) if swap else raw).movedim(-1, 1)
    assert torch.equal(layers.frames[0].to_map(raw), expected)


@pytest.mark.parametrize("proj", ["conv", "perceptron"])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize(
    ("size", "patch"),
    [((64, 64, 8), (8, 8, 1)), ((48, 48, 48), (12, 12, 3)), ((96, 48), (16, 4)), ((224, 112), (16, 8))],
)
def test_tokens_lie_in_the_order_of_monais_patches(size, patch, class_token, proj):
    network = ViT(
        *(1, size, patch),
        **dict(hidden_size=12, mlp_dim=8, num_layers=1, num_heads=2, num_classes=2, spatial_dims=len(size)),
        proj_type=proj,
        classification=class_token,
    )
    grid = tuple(n // p for n, p in zip(size, patch))
    x = torch.randn(1, 1, *size)
    frame = trace(network, x)["blocks.0"].frames[0]
    assert frame.grid == (12, *grid)
    embedding = network.patch_embedding
    with torch.no_grad():
        before = embedding(x)
        changed = x.clone()
        place = tuple(g - 1 if i % 2 else g // 2 for i, g in enumerate(grid))
        changed[(0, 0, *(slice(i * p, (i + 1) * p) for i, p in zip(place, patch)))] += 1
        after = embedding(changed)
    moved = (after - before).abs().sum(2, keepdim=True)
    if class_token:
        moved = nn.functional.pad(moved, (0, 0, 1, 0))
    on_grid = frame.to_map(moved.expand(-1, -1, 12))[0, 0]
    assert [tuple(i) for i in on_grid.nonzero().tolist()] == [place]


@pytest.mark.parametrize("dims", [2, 3])
def test_flips_and_turns_of_a_repeated_module(dims):
    axes = [a for n in range(dims + 1) for a in itertools.combinations(range(dims), n)]
    network = Views(Encoder(dims), [flip(*a) for a in axes], 1 / len(axes))
    layers = trace(network, torch.rand(2, 1, *(8,) * dims))["n.down"]
    assert [f.flips for f in layers.frames] == axes
    assert not layers.sequential


def test_calls_on_the_result_of_an_earlier_call_are_steps():
    act = nn.ReLU()
    network = nn.Sequential(nn.Conv2d(1, 2, 3), act, nn.Conv2d(2, 2, 3), act)
    layers = trace(network, torch.rand(2, 1, 8, 8))["1"]
    assert (layers.calls, layers.sequential) == (2, True)


@pytest.mark.parametrize("loop", [False, True])
def test_slices_are_put_together(loop):
    x = torch.rand(2, 1, 5, 8, 8)
    network = Slices(loop)
    with torch.no_grad():
        expected = torch.stack([network.n(x[:, :, i]) for i in range(5)], 2)
        raw = [network.n(x[:, :, i]) for i in range(5)] if loop else [network.n(x.transpose(1, 2).flatten(0, 1))]
    frames = trace(network, x)["n"].frames
    assert len(frames) == (5 if loop else 1)
    (whole,) = assemble(frames, [f.to_map(v) for f, v in zip(frames, raw)])
    assert torch.allclose(whole, expected, atol=1e-6)
    if loop:  # a missing slice
        assert assemble(frames[1:], [f.to_map(v) for f, v in zip(frames[1:], raw[1:])]) is None


def test_a_trace_leaves_nothing_behind():
    network = Encoder(2).eval()
    x = torch.rand(1, 1, 8, 8)
    trace(network, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(label_of(t) is None for t in [x, *network.parameters(), *network.buffers()])


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_of_a_convolutional_network_is_known(name):
    """In these networks, an output (n, C, *positions) of a convolution has its axes in this order."""
    case = build(name, 2, dtype=torch.float32)
    layers = trace(case.network, case.image)
    assert layers[case.cam_layer].frames[-1] is not None
    for layer in layers.values():
        if layer.kind == "Conv2d" and case.network.get_submodule(layer.name).weight.shape[2:].numel() > 1:
            assert all(f is not None for f in layer.frames), layer.name
            assert layer.frames[-1].grid == layer.shape


ACTIVATIONS = """ReLU LeakyReLU ELU CELU SELU GELU SiLU Mish Softplus Hardtanh Hardswish Hardsigmoid Sigmoid Tanh ReLU6
    PReLU LogSigmoid Softshrink Hardshrink Tanhshrink Softsign Softmax2d Dropout Dropout2d AlphaDropout RReLU"""
MODES = ("nearest", "bilinear", "bicubic", "nearest-exact")
IN_PLACE = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.ReLU6, nn.Hardswish, nn.Mish, nn.SiLU, nn.RReLU)

ALIKE = {
    **{name: getattr(nn, name)() for name in ACTIVATIONS.split()},
    "Threshold": nn.Threshold(0.1, 0.0),
    "InstanceNorm2d": nn.InstanceNorm2d(4),
    "BatchNorm2d": nn.BatchNorm2d(4),
    "GroupNorm": nn.GroupNorm(2, 4),
    "LayerNorm": nn.LayerNorm((4, 8, 12)),
    "LocalResponseNorm": nn.LocalResponseNorm(2),
    "MaxPool2d": nn.MaxPool2d(2),
    "AvgPool2d": nn.AvgPool2d(2),
    "LPPool2d": nn.LPPool2d(2, 2),
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d((4, 6)),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d((4, 6)),
    "Conv2d": nn.Conv2d(4, 4, 3, 2, 1, groups=2),
    "ConvTranspose2d": nn.ConvTranspose2d(4, 4, 2, 2),
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "ChannelShuffle": nn.ChannelShuffle(2),
    "ReflectionPad2d": nn.ReflectionPad2d(1),
    "ZeroPad2d": nn.ZeroPad2d(1),
    **{
        f"Upsample {m}": nn.Upsample(scale_factor=2, mode=m)
        for m in ("nearest", "bilinear", "bicubic", "nearest-exact")
    },
    **{
        f"{kind.__name__} in place": kind(inplace=True)
        for kind in (
            nn.ReLU,
            nn.LeakyReLU,
            nn.ELU,
            nn.CELU,
            nn.SELU,
            nn.ReLU6,
            nn.Hardswish,
            nn.Mish,
            nn.SiLU,
            nn.RReLU,
        )
    },
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3)),
    "scripted": torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())),
}


@pytest.mark.parametrize("name", ALIKE)
def test_modules_of_torch_keep_the_order_of_axes(name):
    frame, value = frame_after(ALIKE[name].eval(), torch.rand(2, 4, 8, 12))
    assert frame is not None
    assert torch.equal(frame.to_map(value), value)


class FromOnePosition(nn.Module):
    """An encoder that ends in tokens of one position, and a decoder with or without a skip connection."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.encoder, self.bottom = nn.Conv2d(1, 4, 4, 4), nn.Conv2d(4, 4, 2, 2)
        self.up, self.decoder = nn.ConvTranspose2d(4, 4, 2, 2), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.encoder(x)
        tokens = self.bottom(seen).flatten(2).transpose(1, 2)  # (B, 1, 4)
        up = self.up(tokens.transpose(1, 2).reshape(len(x), 4, 1, 1))
        return self.decoder(up + seen if self.skip else up)


def test_a_skip_connection_tells_where_a_decoder_of_one_position_lies():
    x = torch.randn(2, 1, 8, 8)
    layers = trace(FromOnePosition(skip=True), x)
    assert layers["decoder"].frames == layers["encoder"].frames != [None]
    assert trace(FromOnePosition(skip=False), x)["decoder"].frames == [None], "nothing tells the order of its axes"
