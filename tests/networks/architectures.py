"""The constructors of the test networks: MONAI's classes as narrow as they go, and our own for what MONAI lacks.

Where a class fixes its widths (VNet, SENet), a subclass builds the same blocks narrower and keeps the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from monai.networks.blocks import BaseEncoder, Convolution, UnetOutBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.nets import (
    UNETR,
    AttentionUnet,
    BasicUNet,
    BasicUNetPlusPlus,
    DenseNet121,
    DynUNet,
    EfficientNet,
    FlexibleUNet,
    HighResNet,
    RegUNet,
    ResNet,
    SegResNet,
    SegResNetDS,
    SENet,
    SwinUNETR,
    UNet,
    ViT,
    ViTAutoEnc,
    VNet,
)
from monai.networks.nets.flexible_unet import FLEXUNET_BACKBONE
from monai.networks.nets.vnet import DownTransition, InputTransition, OutputTransition, UpTransition
from torch import nn

CLASSES = 3
SEGMENTATION, CLASSIFICATION = "segmentation", "classification"


@dataclass(frozen=True)
class Spec:
    """Properties of a network that the factory needs and cannot read off the network itself."""

    make: Callable[[int, int, int], nn.Module]  # (spatial_dims, in_channels, size) -> network
    kind: str
    cam_layer: str
    sizes: tuple[int, int] = (16, 16)  # edge of the 2D and of the 3D window
    output: str | int | None = None
    before: str | None = None  # the module that returns the logits, where an activation follows it
    probability: bool = False  # that activation is a softmax
    lift: float = 0.0  # added to the logits, so that a ReLU that follows them passes most


class TinyVNet(VNet):
    """VNet at a quarter of its widths: 5x5x5 kernels on 256 channels would be 45 million parameters."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        nn.Module.__init__(self)
        act = ("elu", {"inplace": True})
        self.in_tr = InputTransition(spatial_dims, in_channels, 4, act)
        self.down_tr32 = DownTransition(spatial_dims, 4, 1, act)
        self.down_tr64 = DownTransition(spatial_dims, 8, 1, act)
        self.down_tr128 = DownTransition(spatial_dims, 16, 1, act, dropout_prob=0.5)
        self.down_tr256 = DownTransition(spatial_dims, 32, 1, act, dropout_prob=0.5)
        self.up_tr256 = UpTransition(spatial_dims, 64, 64, 1, act, dropout_prob=(0.5, 0.5))
        self.up_tr128 = UpTransition(spatial_dims, 64, 32, 1, act, dropout_prob=(0.5, 0.5))
        self.up_tr64 = UpTransition(spatial_dims, 32, 16, 1, act)
        self.up_tr32 = UpTransition(spatial_dims, 16, 8, 1, act)
        self.out_tr = OutputTransition(spatial_dims, 8, out_channels, act)


class TinySENet(SENet):
    """SENet at an eighth of its widths and one block a stage; `last_linear` follows."""

    def __init__(self, spatial_dims: int, in_channels: int, num_classes: int, block: str, **kwargs: Any) -> None:
        super().__init__(
            spatial_dims, in_channels, block, (1, 1, 1, 1), inplanes=8, num_classes=num_classes, reduction=4, **kwargs
        )
        self.last_linear = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 8, *args, **kwargs)


class TinySwinUNETR(SwinUNETR):
    """SwinUNETR with its smallest width (12), and 4 channels at full resolution, where float64 is slow."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, norm: str) -> None:
        super().__init__(
            in_channels,
            out_channels,
            depths=(2, 1, 1, 1),
            window_size=4,
            feature_size=12,
            norm_name=norm,
            spatial_dims=spatial_dims,
        )
        self.encoder1 = UnetrBasicBlock(spatial_dims, in_channels, 4, 3, 1, norm, res_block=True)
        self.decoder1 = UnetrUpBlock(spatial_dims, 12, 4, 3, 2, norm, res_block=True)
        self.out = UnetOutBlock(spatial_dims, 4, out_channels)


class MeshNet(nn.Sequential):
    """Dilated convolutions at full resolution (Fedorov et al., 2017): the context grows, the grid does not shrink."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, width: int = 6) -> None:
        blocks: list[nn.Module] = []
        for dilation in (1, 2, 4, 2, 1):
            blocks.append(
                Convolution(
                    spatial_dims,
                    in_channels,
                    width,
                    dilation=dilation,
                    adn_ordering="NDA",
                    norm="batch",
                    act="relu",
                    dropout=0.1,
                )
            )
            in_channels = width
        super().__init__(*blocks, Convolution(spatial_dims, width, out_channels, kernel_size=1, conv_only=True))


class Trunk(nn.Sequential):
    """Two convolutions with batch norm; the second activation is given, for kinds that no MONAI default has."""

    def __init__(self, spatial_dims: int, in_channels: int, act: nn.Module) -> None:
        super().__init__(
            Convolution(spatial_dims, in_channels, 6, norm="batch", act="relu"),
            Convolution(spatial_dims, 6, 6, norm="batch", act=None),
            act,
        )


class TwoHeads(nn.Module):
    """One trunk, two answers in a dictionary: a segmentation and a distance map, as HoVer-Net-like networks do."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.trunk = Trunk(spatial_dims, in_channels, nn.SiLU())
        self.distance = Convolution(spatial_dims, 6, 1, kernel_size=1, conv_only=True)
        self.segmentation = Convolution(spatial_dims, 6, out_channels, kernel_size=1, conv_only=True)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.trunk(x)
        return {"distance": self.distance(features), "segmentation": self.segmentation(features)}


class TupleNet(nn.Module):
    """Returns (features, logits): what is to be explained is not the first entry."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.trunk = Trunk(spatial_dims, in_channels, nn.Mish())
        self.head = Convolution(spatial_dims, 6, out_channels, kernel_size=1, conv_only=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.trunk(x)
        return features, self.head(features)


class SoftmaxInside(nn.Module):
    """Ends in softmax: what is blended are probabilities, and their mean stays in (0, 1)."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.trunk = Trunk(spatial_dims, in_channels, nn.Softplus())
        self.head = Convolution(spatial_dims, 6, out_channels, kernel_size=1, conv_only=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.head(self.trunk(x)), dim=1)


class SharedNet(nn.Module):
    """One block and one in-place activation, registered under two names each and used several times."""

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.stem = Convolution(spatial_dims, in_channels, 6, norm="batch", act=None)
        self.first = Convolution(spatial_dims, 6, 6, norm="batch", act=None)
        self.second = self.first
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.act_again = self.act
        self.head = Convolution(spatial_dims, 6, out_channels, kernel_size=1, conv_only=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.stem(x))
        x = self.act_again(self.first(x))
        return self.head(self.act(self.second(x)))


class TinyEncoder(nn.Module, BaseEncoder):
    """A backbone for FlexibleUNet in three stages; EfficientNet-b0, its smallest own, has 4 million parameters."""

    channels = (4, 8, 12)

    def __init__(self, spatial_dims: int, in_channels: int, pretrained: bool) -> None:
        super().__init__()
        widths = (in_channels, *self.channels)
        self.stages = nn.ModuleList(
            Convolution(spatial_dims, a, b, strides=2, norm="batch", act="swish") for a, b in pairwise(widths)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features

    @classmethod
    def get_encoder_parameters(cls) -> list[dict]:
        return [{"spatial_dims": 2, "in_channels": 1, "pretrained": False}]

    @classmethod
    def num_channels_per_output(cls) -> list[tuple[int, ...]]:
        return [cls.channels]

    @classmethod
    def num_outputs(cls) -> list[int]:
        return [len(cls.channels)]

    @classmethod
    def get_encoder_names(cls) -> list[str]:
        return ["tiny"]


FLEXUNET_BACKBONE.register_class(TinyEncoder)


def _dynunet(dims: int, channels: int, size: int) -> nn.Module:
    return DynUNet(
        dims,
        channels,
        CLASSES,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[4, 8, 8],
        deep_supervision=True,
        deep_supr_num=1,
    )


def _efficientnet(dims: int, channels: int, size: int) -> nn.Module:
    b0 = [
        "r1_k3_s11_e1_i32_o16_se0.25",
        "r1_k3_s22_e6_i16_o24_se0.25",
        "r1_k5_s22_e6_i24_o40_se0.25",
        "r2_k3_s22_e6_i40_o80_se0.25",
        "r1_k5_s11_e6_i80_o112_se0.25",
        "r1_k3_s11_e6_i112_o192_se0.25",
    ]
    return EfficientNet(b0, dims, channels, CLASSES, width_coefficient=0.25, image_size=size)


def _resnet(block: str, layers: list[int]) -> Callable[[int, int, int], nn.Module]:
    return lambda dims, channels, size: ResNet(
        block, layers, [4, 8, 8, 16], dims, channels, conv1_t_size=3, conv1_t_stride=1, num_classes=CLASSES
    )


SPECS: dict[str, Spec] = {
    "UNet_instance": Spec(
        lambda d, c, s: UNet(d, c, CLASSES, channels=(4, 8, 16), strides=(2, 2), num_res_units=2),
        SEGMENTATION,
        "model.1.submodule.1.submodule",
    ),
    "UNet_batch": Spec(
        lambda d, c, s: UNet(d, c, CLASSES, channels=(4, 8, 16), strides=(2, 2), act="relu", norm="batch"),
        SEGMENTATION,
        "model.1.submodule.1.submodule",
    ),
    "BasicUNet": Spec(
        lambda d, c, s: BasicUNet(d, c, CLASSES, features=(2, 4, 8, 8, 8, 2)),
        SEGMENTATION,
        "down_3",
        (32, 32),
    ),
    "BasicUNetPlusPlus": Spec(
        lambda d, c, s: BasicUNetPlusPlus(d, c, CLASSES, features=(4, 4, 4, 4, 4, 4), norm="batch"),
        SEGMENTATION,
        "conv_2_0",
        output=0,
    ),
    "DynUNet": Spec(_dynunet, SEGMENTATION, "bottleneck"),
    "SegResNet": Spec(
        lambda d, c, s: SegResNet(d, 8, c, CLASSES, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
        SEGMENTATION,
        "down_layers.2",
    ),
    "SegResNetDS": Spec(
        lambda d, c, s: SegResNetDS(d, 4, c, CLASSES, blocks_down=(1, 1, 1), dsdepth=2),
        SEGMENTATION,
        "encoder.layers.2.blocks",
    ),
    "AttentionUnet": Spec(
        lambda d, c, s: AttentionUnet(d, c, CLASSES, channels=(4, 8, 16), strides=(2, 2)),
        SEGMENTATION,
        "model.1.submodule.1.submodule",
    ),
    "VNet": Spec(lambda d, c, s: TinyVNet(d, c, CLASSES), SEGMENTATION, "down_tr64"),
    "FlexibleUNet": Spec(
        lambda d, c, s: FlexibleUNet(c, CLASSES, "tiny", pretrained=False, spatial_dims=d, decoder_channels=(8, 8, 4)),
        SEGMENTATION,
        "decoder.blocks.0",
    ),
    "UNETR": Spec(
        lambda d, c, s: UNETR(c, CLASSES, s, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3, spatial_dims=d),
        SEGMENTATION,
        "decoder5",
        (64, 32),
    ),
    "SwinUNETR": Spec(
        lambda d, c, s: TinySwinUNETR(d, c, CLASSES, norm="instance" if d == 2 else "batch"),  # 32³ ends as one voxel
        SEGMENTATION,
        "decoder4",
        (64, 32),
    ),
    "ViT": Spec(
        lambda d, c, s: ViT(
            c,
            s,
            4,
            hidden_size=24,
            mlp_dim=48,
            num_layers=2,
            num_heads=3,
            classification=True,
            num_classes=CLASSES,
            spatial_dims=d,
            post_activation="none",
        ),
        CLASSIFICATION,
        "blocks.1.norm1",
        output=0,
    ),
    "ViTAutoEnc": Spec(
        lambda d, c, s: ViTAutoEnc(
            c, s, 4, CLASSES, 4, hidden_size=24, mlp_dim=48, num_layers=2, num_heads=3, spatial_dims=d
        ),
        SEGMENTATION,
        "blocks.1.norm1",
        output=0,
    ),
    "DenseNet121": Spec(
        lambda d, c, s: DenseNet121(d, c, CLASSES, init_features=8, growth_rate=4, block_config=(2, 2, 2, 2)),
        CLASSIFICATION,
        "features.denseblock2",
        (32, 32),
    ),
    "ResNet18": Spec(_resnet("basic", [2, 2, 2, 2]), CLASSIFICATION, "layer2"),
    "ResNet50": Spec(_resnet("bottleneck", [2, 1, 1, 1]), CLASSIFICATION, "layer2"),
    "SEResNet50": Spec(
        lambda d, c, s: TinySENet(
            d,
            c,
            CLASSES,
            "se_resnet_bottleneck",
            groups=1,
            dropout_prob=None,
            downsample_kernel_size=1,
            input_3x3=False,
        ),
        CLASSIFICATION,
        "layer1",
    ),
    "SENet154": Spec(
        lambda d, c, s: TinySENet(d, c, CLASSES, "se_bottleneck", groups=4),
        CLASSIFICATION,
        "layer1",
    ),
    "EfficientNet": Spec(_efficientnet, CLASSIFICATION, "_blocks.2", (32, 32)),
    "HighResNet": Spec(
        lambda d, c, s: HighResNet(
            d,
            c,
            CLASSES,
            layer_params=(
                {"name": "conv_0", "n_features": 8, "kernel_size": 3},
                {"name": "res_1", "n_features": 8, "kernels": (3, 3), "repeat": 1},
                {"name": "res_2", "n_features": 8, "kernels": (3, 3), "repeat": 1},
                {"name": "res_3", "n_features": 8, "kernels": (3, 3), "repeat": 1},
                {"name": "conv_1", "n_features": 16, "kernel_size": 1},
                {"name": "conv_2", "kernel_size": 1},
            ),
        ),
        SEGMENTATION,
        "blocks.3",
        before="blocks.5.adn.N",
        lift=4.0,  # the class itself ends in norm and ReLU
    ),
    "RegUNet": Spec(
        lambda d, c, s: RegUNet(d, c, num_channel_initial=4, depth=2, out_channels=CLASSES, concat_skip=True),
        SEGMENTATION,
        "bottom_block",
    ),
    "MeshNet": Spec(lambda d, c, s: MeshNet(d, c, CLASSES), SEGMENTATION, "2"),
    "TwoHeads": Spec(lambda d, c, s: TwoHeads(d, c, CLASSES), SEGMENTATION, "trunk", output="segmentation"),
    "TupleNet": Spec(lambda d, c, s: TupleNet(d, c, CLASSES), SEGMENTATION, "trunk", output=1),
    "SoftmaxInside": Spec(
        lambda d, c, s: SoftmaxInside(d, c, CLASSES), SEGMENTATION, "trunk", before="head", probability=True
    ),
    "SharedNet": Spec(lambda d, c, s: SharedNet(d, c, CLASSES), SEGMENTATION, "stem"),
}
