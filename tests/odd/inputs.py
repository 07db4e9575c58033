"""Images and image inputs of unusual type, shape, layout or content. The twins get an ordinary copy."""

from __future__ import annotations

import copy
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from tests.odd.base import Around, Classifier, OddCase, image, logit, seeded
from tests.support.tensors import DOUBLE

X = image(1, 12, 12)


class TwoInputs(nn.Module):
    """A classifier of two image inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier(2)

    def forward(self, t1: Tensor, t2: Tensor) -> Tensor:
        return self.net(torch.cat([t1, t2], 1))


class OfDictionary(TwoInputs):
    """The same with one argument, a dictionary."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return self.net(torch.cat([batch["t1"], batch["t2"]], 1))


class OfList(TwoInputs):
    """The same with one argument, a list."""

    def forward(self, images: list[Tensor]) -> Tensor:  # type: ignore[override]
        t1, t2 = images
        return self.net(torch.cat([t1, t2], 1))


def plain(odd: nn.Module) -> nn.Module:
    return copy.deepcopy(odd)


def case(name: str, x: Any, twin_image: Tensor | None = None, **more: Any) -> OddCase:
    """An odd image for an ordinary classifier."""
    size = more.pop("size", (12, 12))
    channels = more.pop("channels", 1)
    more.setdefault("twin", plain)
    return OddCase(
        name, "inputs", lambda: seeded(lambda: Classifier(channels, len(size), size=size)), x, logit(),
        twin_image=twin_image, layer=more.pop("layer", "down"), **more,
    )  # fmt: skip


def bad(name: str, x: Any, cause: str) -> OddCase:
    """An image that cannot be explained."""
    return case(name, x, X, twin=None, cause=cause)


def with_value(value: float) -> Tensor:
    x = X.clone()
    x[0, 0, 3, 3] = value
    return x


def constant(value: float) -> Tensor:
    return torch.full((1, 1, 12, 12), value, dtype=DOUBLE)


INTEGERS = (20 * X).round()

CASES = [
    OddCase("two image inputs", "inputs", lambda: seeded(TwoInputs), {"t1": X, "t2": image(1, 12, 12, seed=3)}, logit(),
            twin=lambda odd: Around(copy.deepcopy(odd.net)), layer="net.down"),
    OddCase("network of a dictionary", "inputs", lambda: seeded(OfDictionary),
            {"t1": X, "t2": image(1, 12, 12, seed=3)}, logit(), layer="net.down", options={"inputs_as": "dict"},
            twin=lambda odd: Around(copy.deepcopy(odd.net))),
    OddCase("network of a list", "inputs", lambda: seeded(OfList), {"t1": X, "t2": image(1, 12, 12, seed=3)}, logit(),
            layer="net.down", options={"inputs_as": "list"}, twin=lambda odd: Around(copy.deepcopy(odd.net))),
    bad("constant image", constant(3.0), "every voxel is 3"),
    bad("image of zeros", constant(0.0), "every voxel is 0"),
    case("zeros outside a body", torch.nn.functional.pad(X[..., 3:9, 3:9], (3, 3, 3, 3))),
    case("one voxel wide, 2D", image(1, 12, 1), size=(12, 1)),
    case("one slice, 3D", image(1, 8, 8, 1), size=(8, 8, 1)),
    case("one voxel", image(1, 1, 1), size=(1, 1)),
    case("int16", INTEGERS.to(torch.int16), INTEGERS),
    case("uint8", INTEGERS.clamp(0).to(torch.uint8), INTEGERS.clamp(0)),
    case("bool", X > 0.5, (X > 0.5).double()),
    case("float32 image, float64 network", X.float(), X.float().double()),
    case("bfloat16 image", X.bfloat16(), X.bfloat16().double()),
    case("transposed view", X.transpose(-1, -2), X.transpose(-1, -2).contiguous()),
    case("every other voxel of a larger image", image(1, 24, 24)[..., ::2, ::2]),
    case("expanded image (stride 0)", X[..., :1].expand(1, 1, 12, 12)),
    case("channels_last memory", image(2, 12, 12).to(memory_format=torch.channels_last), channels=2),
    case("requires a gradient", X.clone().requires_grad_(True), X),
    case("inference tensor", torch.inference_mode()(X.clone)(), X),
    case("MetaTensor with an oblique affine",
         MetaTensor(X, affine=torch.tensor([[0.8, -0.6, 0, 5], [0.6, 0.8, 0, 7], [0, 0, 3, 1], [0, 0, 0, 1]])), X),
    case("very large values", 1e6 * X),
    case("very small values", 1e-8 * X),
    bad("NaN", with_value(float("nan")), "NaN"),
    bad("infinity", with_value(float("inf")), "infinite"),
    bad("complex image", torch.complex(X, X), "complex"),
    bad("sparse image", X.to_sparse(), "sparse"),
    bad("numpy array", X.numpy(), "tensor"),
    bad("no batch axis", X[0], "shape"),
    bad("two channels for a network of one", image(2, 12, 12), "channels"),
    bad("no voxels", X[..., :0], "shape"),
]  # fmt: skip
