"""The channel axis of a layer follows from its kind, the layers before it and its shape, or is unknown."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from esegeta_monai.engine.network.layout import channels_last, grid_of
from esegeta_monai.engine.network.state import frozen
from tests.networks import build


class ConvNeXt(nn.Module):
    """A block whose inner layers have their channels last, put back in front for the last one."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen, self.act, self.drop = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Dropout(0.1)
        self.narrow, self.drop_path = nn.Linear(4 * channels, channels), nn.Dropout(0.1)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.drop_path(self.narrow(self.drop(self.act(self.widen(y)))).permute(0, 3, 1, 2))


class Network(nn.Module):
    """A stem of half the resolution, a block, and a head like that of a classification network."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(1, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.PReLU()
        self.block, self.pool, self.head = ConvNeXt(channels), nn.AdaptiveAvgPool2d(1), nn.Linear(channels, 2)

    def forward(self, x):
        return self.head(self.pool(self.block(self.act(self.norm(self.stem(x))))).flatten(1))


def test_layers_without_weights_have_the_layout_of_their_input():
    network = Network().eval()
    shapes = {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    network(torch.rand(1, 1, 16, 24))
    for name in ("block.norm", "block.widen", "block.act", "block.drop", "block.narrow"):
        assert channels_last(network, name, shapes[name], (16, 24)), name
        assert grid_of(network, name, shapes[name], (16, 24))[1:] == (8, 12)
    for name in ("stem", "norm", "act", "block", "block.depthwise", "block.drop_path"):
        assert not channels_last(network, name, shapes[name], (16, 24)), name
        assert grid_of(network, name, shapes[name], (16, 24)) == (6, 8, 12)


def test_an_ambiguous_layout_is_no_map():
    """Sixteen channels on 16 x 16 positions after a linear layer: the channel axis is ambiguous."""
    network = Network(16).eval()
    assert channels_last(network, "block.drop_path", (16, 16, 16), (32, 32)) is None
    assert grid_of(network, "block.drop_path", (16, 16, 16), (32, 32)) is None
    assert grid_of(network, "act", (16, 16, 16), (32, 32)) == (16, 16, 16)  # after a batch norm


def test_strides_that_differ_between_axes_turn_nothing_round():
    network = nn.Sequential(nn.Conv3d(1, 16, 3, (1, 2, 2), 1), nn.LeakyReLU(), nn.Flatten(), nn.Linear(8, 2))
    assert channels_last(network, "1", (16, 32, 32, 32), (32, 64, 64)) is False


@pytest.mark.parametrize("dims", [2, 3])
def test_what_is_inside_a_swin_block_has_its_channels_last(dims):
    case = build("SwinUNETR", dims)
    shapes, handles = {}, []
    for name, module in case.network.named_modules():
        handles.append(
            module.register_forward_hook(
                lambda m, a, out, name=name: (
                    shapes.update({name: tuple(out.shape[1:])}) if isinstance(out, torch.Tensor) else None
                )
            )
        )
    with frozen(case.network), torch.no_grad():
        case.network(case.image)
    for handle in handles:
        handle.remove()
    half = tuple(n // 2 for n in case.image.shape[2:])
    for layer in ("drop_path", "mlp.fn", "mlp.drop1", "mlp.linear2", "norm1"):
        name = f"swinViT.layers1.0.blocks.0.{layer}"
        if name in shapes:
            assert grid_of(case.network, name, shapes[name], case.image.shape[2:])[1:] == half, name
    assert "swinViT.layers1.0.blocks.0.mlp.fn" in shapes
