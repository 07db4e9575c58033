"""Operations on elements, axes and shapes in parts equal plain passes; norms over space make the box the whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.engine.local.support import randomise, taped, worst_difference

C = 4
PLACE = torch.rand(1, 1, 6, 8, dtype=torch.float64)


class Function(nn.Module):
    """A function of a window; two of its results come from convolutions, so that boxes have a halo."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.conv, self.other = nn.Conv2d(1, C, 3, padding=1), nn.Conv2d(1, C, 5, padding=2)

    def forward(self, x):
        return self.function(self.conv(x), self.other(x))


def written(a, b):
    out = torch.zeros_like(a)
    out[:, 1:] = a[:, :-1]
    return out + b


def added_in_place(a, b):
    a += b
    return a.relu_() * b


LOCAL = {
    "add": lambda a, b: a + 2 * b - 1,
    "quotient": lambda a, b: a / (b.abs() + 1),
    "constant of space": lambda a, b: a * PLACE + b,
    "constant of an axis": lambda a, b: torch.where(PLACE[0, 0] > 0.5, a, b),
    "in place": added_in_place,
    "activations": lambda a, b: nn.functional.gelu(a).clamp(-1, 1) + torch.sigmoid(b) * nn.functional.elu(a),
    "compare": lambda a, b: (a > b).to(a) * b,
    "cat": lambda a, b: torch.cat([a, PLACE.expand(1, 2, 6, 8), b], 1),
    "cat along space": lambda a, b: torch.cat([a, b], 3),
    "chunks": lambda a, b: a.chunk(2, 1)[0] * a.chunk(2, 1)[1],
    "split along space": lambda a, b: a.split([3, 5], 3)[1],
    "unbind": lambda a, b: a.unbind(1)[2][:, None] + b,
    "slices": lambda a, b: a[:, 1:3, ::2, 1:-1] - b[..., :2, ::2, 1:-1],
    "integer": lambda a, b: a[:, 2][:, None] * b,
    "narrow": lambda a, b: a.narrow(2, 1, 4),
    "permute": lambda a, b: nn.functional.softmax(a.permute(0, 2, 3, 1), -1).permute(0, 3, 1, 2) + b,
    "transpose": lambda a, b: a.transpose(2, 3),
    "movedim": lambda a, b: a.movedim(1, -1),
    "flip": lambda a, b: a.flip(2) + b,
    "roll": lambda a, b: torch.roll(a, (1, -2), (2, 3)),
    "squeeze": lambda a, b: a.unsqueeze(2).squeeze(2) + b,
    "split channels": lambda a, b: a.reshape(1, 2, 2, 6, 8).sum(1),
    "split space": lambda a, b: a.reshape(1, C, 3, 2, 8)[:, :, :, 0],
    "pixel shuffle": lambda a, b: nn.functional.pixel_shuffle(a, 2),
    "pixel shuffle by shapes": lambda a, b: a.reshape(1, 1, 2, 2, 6, 8).permute(0, 1, 4, 2, 5, 3).reshape(1, 1, 12, 16),
    "repeat": lambda a, b: a[:, :1].repeat(1, C, 1, 2),
    "expand": lambda a, b: a[:, :1].expand(-1, C, -1, -1) + b,
    "mean over channels": lambda a, b: a.mean(1, keepdim=True) * b,
    "norm over channels": lambda a, b: (a - a.mean(1, True)) / a.var(1, keepdim=True).add(1).sqrt(),
    "softmax over channels": lambda a, b: torch.softmax(a, 1),
    "maximum over channels": lambda a, b: a.amax(1),
    "linear": lambda a, b: nn.functional.linear(a.movedim(1, -1), torch.ones(3, C, dtype=torch.float64)),
    "layer norm over channels": lambda a, b: nn.functional.layer_norm(a.permute(0, 2, 3, 1), (C,)).permute(0, 3, 1, 2),
    "dropout that is off": lambda a, b: nn.functional.dropout(a, training=False),
}


@pytest.mark.parametrize("name", LOCAL)
def test_local_operations(name):
    network = Function(LOCAL[name])
    worst, least = worst_difference(network, (1, 6, 8))
    assert worst < 1e-14
    assert least < 0.8
    assert taped(network, torch.rand(1, 1, 6, 8, dtype=torch.float64)).widened == []


@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(C), nn.InstanceNorm2d(C, affine=True, track_running_stats=True), nn.PReLU(C)]
)
def test_local_modules(module):
    worst, least = worst_difference(nn.Sequential(nn.Conv2d(1, C, 3, padding=1), module), (1, 6, 8))
    assert worst < 1e-14
    assert least < 0.8


class Excite(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


WHOLE = {
    "instance_norm": nn.InstanceNorm2d(C),
    "group_norm": nn.GroupNorm(2, C),
    "layer_norm": nn.LayerNorm((C, 6, 8)),
    "matmul": Function(lambda a, b: a @ b.transpose(2, 3) @ b),
    "scaled_dot_product_attention": Function(lambda a, b: nn.functional.scaled_dot_product_attention(a, b, b)),
    "setitem": Function(written),
    "cumprod": Function(lambda a, b: a.cumprod(2)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_operations_on_the_whole_window(name):
    network = (
        WHOLE[name]
        if isinstance(WHOLE[name], Function)
        else nn.Sequential(nn.Conv2d(1, C, 3), nn.ConstantPad2d(1, 0), WHOLE[name])
    )
    worst, _ = worst_difference(network, (1, 6, 8), step=2)
    assert worst < 1e-14
    assert name in taped(network, torch.rand(1, 1, 6, 8, dtype=torch.float64)).widened


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 2)),
        nn.Sequential(nn.Flatten(), nn.Linear(C * 48, 2)),
        Excite(),
    ],
)
def test_heads_widen_to_all(head):
    worst, _ = worst_difference(nn.Sequential(nn.Conv2d(1, C, 3, padding=1), nn.ReLU(), head), (1, 6, 8))
    assert worst < 1e-14


def test_a_target_of_one_voxel_through_skips():
    from monai.networks.nets import UNet

    network = randomise(UNet(2, 1, 2, (4, 8, 16), (2, 2), num_res_units=1, norm="batch"))
    boxes = [((0, 1), (0, 1)), ((7, 9), (3, 6)), ((15, 16), (15, 16))]
    worst, least = worst_difference(network, (1, 16, 16), size=3, step=3, wanted=boxes)
    assert worst < 1e-13
    assert least < 0.05
