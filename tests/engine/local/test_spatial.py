"""Convolution, pooling, interpolation and padding in parts equal plain passes for every position of the box."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.local.support import worst_difference

CONVOLUTIONS = {
    "odd": nn.Conv2d(2, 3, 3, padding=1),
    "no padding": nn.Conv2d(2, 3, 3),
    "even": nn.Conv2d(2, 3, 4, padding=2),
    "strided": nn.Conv2d(2, 3, 3, stride=2, padding=1),
    "stride larger than kernel": nn.Conv2d(2, 3, 2, stride=3),
    "wide padding": nn.Conv2d(2, 3, 3, padding=4, stride=2),
    "dilated": nn.Conv2d(2, 3, 3, padding=3, dilation=3),
    "unequal axes": nn.Conv2d(2, 3, (3, 1), stride=(1, 2), padding=(1, 0)),
    "groups": nn.Conv2d(2, 4, 3, padding=1, groups=2),
    "same": nn.Conv2d(2, 3, 4, padding="same"),
    "same, dilated": nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(2, 3)),
    "valid": nn.Conv2d(2, 3, 3, padding="valid"),
    "reflect": nn.Conv2d(2, 3, 5, padding=2, padding_mode="reflect"),
    "replicate": nn.Conv2d(2, 3, 5, padding=2, padding_mode="replicate"),
    "circular": nn.Conv2d(2, 3, 5, padding=2, padding_mode="circular"),
    "no bias": nn.Conv2d(2, 3, 3, padding=1, bias=False),
}
TRANSPOSED = {
    "two": nn.ConvTranspose2d(2, 3, 2, stride=2),
    "three": nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1),
    "output padding": nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
    "gaps": nn.ConvTranspose2d(2, 3, 1, stride=3, output_padding=2),
    "dilated": nn.ConvTranspose2d(2, 3, 3, stride=2, dilation=2, padding=2, output_padding=1),
    "groups": nn.ConvTranspose2d(2, 4, 3, stride=2, groups=2),
    "stride 1": nn.ConvTranspose2d(2, 3, 4, padding=1),
}
POOLS = {
    "max": nn.MaxPool2d(2),
    "max, overlapping": nn.MaxPool2d(3, stride=2, padding=1),
    "max, ceil": nn.MaxPool2d(3, stride=2, ceil_mode=True),
    "max, ceil and padding": nn.MaxPool2d(2, stride=2, padding=1, ceil_mode=True),
    "max, dilated": nn.MaxPool2d(2, stride=1, dilation=2),
    "average": nn.AvgPool2d(2),
    "average, padded": nn.AvgPool2d(3, stride=2, padding=1),
    "average, padding not counted": nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
    "average, ceil": nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
    "average, ceil, padding not counted": nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    "average, divisor": nn.AvgPool2d(3, stride=2, padding=1, divisor_override=5),
    "adaptive average": nn.AdaptiveAvgPool2d((3, 4)),
    "adaptive average, larger": nn.AdaptiveAvgPool2d((9, 12)),
    "adaptive average, one": nn.AdaptiveAvgPool2d(1),
    "adaptive maximum": nn.AdaptiveMaxPool2d((3, 4)),
}


def up(**options: object) -> nn.Module:
    class Up(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.interpolate(x, **options)  # type: ignore[arg-type]

    return Up()


INTERPOLATIONS = {
    "nearest": up(scale_factor=2),
    "nearest, size": up(size=(10, 5)),
    "nearest-exact": up(size=(10, 5), mode="nearest-exact"),
    "bilinear": up(scale_factor=2, mode="bilinear"),
    "bilinear, corners": up(scale_factor=2, mode="bilinear", align_corners=True),
    "bilinear, size": up(size=(11, 5), mode="bilinear"),
    "bilinear, size, corners": up(size=(11, 5), mode="bilinear", align_corners=True),
    "bilinear, factor": up(scale_factor=1.7, mode="bilinear"),
    "bilinear, factor computed again": up(scale_factor=1.7, mode="bilinear", recompute_scale_factor=True),
    "bilinear, factors": up(scale_factor=(2.0, 0.5), mode="bilinear"),
    "bilinear, antialias": up(size=(4, 5), mode="bilinear", antialias=True),
    "bicubic": up(scale_factor=2, mode="bicubic"),
    "bicubic, corners": up(scale_factor=2, mode="bicubic", align_corners=True),
    "area": up(size=(4, 5), mode="area"),
}
PADS = {
    "constant": nn.ConstantPad2d((1, 2, 3, 0), 1.5),
    "negative": nn.ConstantPad2d((-1, 2, 1, -2), 0.0),
    "reflect": nn.ReflectionPad2d((1, 2, 3, 0)),
    "replicate": nn.ReplicationPad2d((1, 2, 3, 0)),
    "circular": nn.CircularPad2d((1, 2, 3, 0)),
}
ALL = {
    f"{kind}: {name}": module
    for kind, table in (
        ("convolution", CONVOLUTIONS),
        ("transposed", TRANSPOSED),
        ("pool", POOLS),
        ("interpolation", INTERPOLATIONS),
        ("pad", PADS),
    )
    for name, module in table.items()
}


@pytest.mark.parametrize("name", ALL)
def test_every_position_of_the_box_and_of_the_target(name):
    worst, least = worst_difference(ALL[name], (2, 7, 8))
    assert worst < 1e-14
    out = ALL[name](torch.rand(1, 2, 7, 8, dtype=torch.float64)).shape[2:]
    if 1 in out:
        return
    corners = [tuple((0, 2) for _ in out), tuple((n - 1, n) for n in out), tuple((n // 2, n // 2 + 1) for n in out)]
    worst, small = worst_difference(ALL[name], (2, 7, 8), wanted=corners)
    assert worst < 1e-14
    assert least < 0.9
    assert small < 0.5


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv3d(2, 3, 3, stride=2, padding=1),
        nn.ConvTranspose3d(2, 2, 3, stride=2, padding=1, output_padding=1),
        nn.AvgPool3d(3, stride=2, padding=1, count_include_pad=False),
        nn.AdaptiveAvgPool3d((2, 3, 2)),
        nn.MaxPool3d(2, ceil_mode=True),
        nn.Upsample(scale_factor=2, mode="trilinear", align_corners=True),
        nn.ReplicationPad3d(1),
    ],
)
def test_three_axes(module):
    worst, _ = worst_difference(module, (2, 5, 4, 6), size=2, step=2)
    assert worst < 1e-14


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(2, 3, 4, stride=3, padding=2),
        nn.ConvTranspose1d(2, 3, 3, stride=2),
        nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True),
        nn.MaxPool1d(3, stride=2, padding=1),
        nn.Upsample(scale_factor=2, mode="linear", align_corners=True),
    ],
)
def test_one_axis(module):
    worst, _ = worst_difference(module, (2, 9))
    assert worst < 1e-14


def test_a_chain_of_strides_needs_no_aligned_box():
    chain = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.BatchNorm2d(3),
        nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
        nn.Upsample(scale_factor=1.5, mode="bilinear", align_corners=True),
        nn.AvgPool2d(2, ceil_mode=True),
    )
    worst, least = worst_difference(chain, (1, 19, 22), size=3, step=2)
    assert worst < 1e-14
    assert least < 0.7
