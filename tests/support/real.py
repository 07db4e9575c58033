"""Real scans and real trained networks for tests: found through ``ESEGETA_SHARED_DATA`` or beside the project."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(os.environ.get("ESEGETA_SHARED_DATA") or Path(__file__).parents[3] / "shared" / "data")

needs_real_data = pytest.mark.skipif(
    not ROOT.is_dir(), reason="real scans and networks are absent: set ESEGETA_SHARED_DATA to their folder"
)


def image(name: str) -> Path:
    """A scan's file."""
    return ROOT / "images" / name


class Block(nn.Module):
    """Convolution, norm and PReLU, each registered under two names, as the trained network has it."""

    def __init__(self, inputs: int, outputs: int, norm: bool = True, kernel: int = 3, act: bool = True) -> None:
        super().__init__()
        self.conv_layer = nn.Conv3d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
        layers: list[nn.Module] = [self.conv_layer]
        if norm:
            self.norm_layer = nn.BatchNorm3d(outputs)
            layers.append(self.norm_layer)
        if act:
            self.activation_layer = nn.PReLU()
            layers.append(self.activation_layer)
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Stage(nn.Module):
    """Two blocks, and max pooling after those of an encoder."""

    def __init__(self, a: int, b: int, c: int, norm: bool = True, pool: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = Block(a, b, norm), Block(b, c)
        if pool:
            self.downsample = nn.MaxPool3d(2)


class BrainUNet(nn.Module):
    """The 3D U-Net of ``torchio_unet3d_brain_ixi4mm``: whole head at 4 mm in, background and brain out."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.encoding_blocks = nn.ModuleList(
            [Stage(1, 8, 16, norm=False, pool=True), Stage(16, 16, 32, pool=True)]
        )
        self.bottom_block = Stage(32, 32, 64)
        self.decoder = nn.Module()
        self.decoder.decoding_blocks = nn.ModuleList([Stage(96, 32, 32), Stage(48, 16, 16)])
        self.upsample = nn.Upsample(scale_factor=2, mode="trilinear", align_corners=False)
        self.classifier = Block(16, 2, norm=False, kernel=1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.encoder.encoding_blocks:
            x = stage.conv2(stage.conv1(x))
            skips.append(x)
            x = stage.downsample(x)
        x = self.bottom_block.conv2(self.bottom_block.conv1(x))
        for stage in self.decoder.decoding_blocks:
            x = torch.cat([skips.pop(), self.upsample(x)], 1)
            x = stage.conv2(stage.conv1(x))
        return self.classifier(x)


def brain_unet() -> nn.Module:
    """The trained network, in eval mode."""
    from safetensors.torch import load_file

    network = BrainUNet()
    network.load_state_dict(load_file(ROOT / "models" / "torchio_unet3d_brain_ixi4mm.safetensors"))
    return network.eval()


def meshnet(name: str = "meshnet_model5_gw_ae") -> tuple[nn.Module, dict[int, str]]:
    """A trained MeshNet in eval mode, and its class names."""
    from safetensors.torch import load_file

    state = load_file(ROOT / "models" / f"{name}.safetensors")
    labels = json.loads((ROOT / "models" / f"{name}_labels.json").read_text(encoding="utf-8"))
    layers: list[nn.Module] = []
    dilations = [1, 2, 4, 8, 16, 8, 4, 2, 1]
    for i, d in enumerate(dilations):
        weight = state[f"model.{2 * i}.weight"]
        layers += [nn.Conv3d(weight.shape[1], weight.shape[0], 3, padding=d, dilation=d)]
        layers += [nn.ReLU(inplace=True) if name == "meshnet_model5_gw_ae" else nn.ELU()]
    last = state[f"model.{2 * len(dilations)}.weight"]
    layers.append(nn.Conv3d(last.shape[1], last.shape[0], 1))
    network = nn.Sequential(*layers)
    network.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    return network.eval(), dict(enumerate(labels["labels"]))


def pneumonia_cnn() -> nn.Module:
    """The small trained 2D classifier of chest X-rays (convolution, batch norm, ReLU; 28 x 28), in eval mode."""
    from safetensors.torch import load_file

    layers: list[nn.Module] = []
    channels = [1, 16, 32, 64, 64]
    for i, (a, b) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i < 3 else []
    network = nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    network.load_state_dict(load_file(ROOT / "models" / "pneumonia2d_cnn.safetensors"))
    return network.eval()


def chest_images() -> tuple[Tensor, Tensor]:
    """Its test images (624, 1, 28, 28), 0 to 1, and their labels: 1 is pneumonia."""
    import numpy as np

    with np.load(image("pneumoniamnist_test28.npz")) as kept:
        pixels, labels = kept["images"], kept["labels"]
    return torch.from_numpy(pixels)[:, None].float() / 255, torch.from_numpy(labels)[:, 0].long()
