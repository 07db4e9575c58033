"""An odd case: a network, image, head or output that breaks an assumption, and what its maps should be.

The right map is that of the *twin*, an ordinary network that computes the same function with the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.tensors import DOUBLE

__all__ = [
    "Around",
    "Classifier",
    "Framed",
    "OddCase",
    "Seen",
    "Segmenter",
    "image",
    "logit",
    "mask_sum",
    "seeded",
    "volume",
]

Score = Callable[[Tensor], Tensor]
"""F of a prediction (K, *spatial) or (K,)."""


@dataclass(frozen=True)
class OddCase:
    """An odd case and its truth.

    Attributes:
        name: a few words, unique.
        kind: name of the file.
        network: makes the odd network, the same weights at each call.
        image: the image (1, C, *spatial), or image inputs by name, as the user gives them.
        score: from the unperturbed prediction of the twin (K, *spatial) to the right F, which is frozen; without
            `esegeta_monai`.
        target: the target that the user gives.
        twin: makes the twin from the odd network; None: no map can be right (a random network has no F), and only a
            warning or a refusal is.
        twin_image: what the twin gets, where it is not the image.
        twin_target: the target with which an explanation of the twin has the right F, where it is not the target.
        layer: layer of layer methods; None: the default layer.
        parts: layers of the twin, one for each call of the layer, that have its output as a map in the frame of the
            image; None: the layer has the same name and is ordinary.
        alike: makes the twin of methods that read no layer, where the twin has more layers than the odd network: rules
            are applied to each.
        undefined: methods whose right map is not defined here.
        inferer: of the prediction.
        options: further parameters of the explainer.
        call: further parameters of its call, made anew each time, since the network may write into them.
        cause: regular expression that a refusal must contain; it names the cause.
        tolerance: largest relative difference of a right map.
        x0: the baseline (C, *spatial); None: a fixed one.
        methods: the only methods that can be measured; None: all.
        train: leave the network in training mode, which is what the user forgot.
    """

    name: str
    kind: str
    network: Callable[[], nn.Module]
    image: Any
    score: Callable[[Tensor], Score]
    target: Any = "ClassScore(1)"
    twin: Callable[[nn.Module], nn.Module] | None = None
    twin_image: Tensor | None = None
    twin_target: Any = None
    layer: str | None = None
    parts: tuple[str, ...] | None = None
    alike: Callable[[nn.Module], nn.Module] | None = None
    undefined: tuple[str, ...] = ()
    inferer: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[], dict[str, Any]] = dict
    cause: str = ""
    tolerance: float = 1e-6
    x0: Tensor | None = None
    methods: tuple[str, ...] | None = None
    train: bool = False

    def odd(self) -> nn.Module:
        """Build the odd network."""
        with torch.random.fork_rng(devices=[]):
            network = self.network()
        return network if self.train else network.eval()

    def ordinary(self, layered: bool = True) -> nn.Module:
        """Build the twin, for methods that read a layer or not."""
        make = self.alike if self.alike is not None and not layered else self.twin
        assert make is not None
        return make(self.odd()).eval()

    @property
    def plain_image(self) -> Tensor:
        """The image of the twin (1, C, *spatial), as a plain float64 tensor."""
        if self.twin_image is not None:
            return self.twin_image
        given = torch.cat(list(self.image.values()), 1) if isinstance(self.image, Mapping) else self.image
        return torch.as_tensor(given).as_subclass(Tensor).detach().to(DOUBLE).contiguous()

    @property
    def baseline(self) -> Tensor:
        """The baseline (C, *spatial) of all methods: neither constant nor zero, so that norms do not fail on it."""
        if self.x0 is not None:
            return self.x0
        flipped = self.plain_image[0].flip(-1)
        return 0.3 * flipped + 0.1 * image(*flipped.shape, seed=9)[0]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a float64 network whose parameters and floating-point buffers of norms are random, the same each time."""
    torch.manual_seed(seed)
    network = make().double()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
            for name in ("weight", "bias", "running_mean", "running_var"):
                value = getattr(module, name, None)
                if value is not None:
                    value.data.copy_(torch.rand(value.shape, dtype=DOUBLE) + (0.5 if name != "bias" else 0.0))
    return network


def image(*shape: int, seed: int = 0) -> Tensor:
    """Return an image (1, *shape) with noise and a bright blob that lies off the centre."""
    drawn = 0.3 * torch.randn(1, *shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    blob = tuple(slice(n // 6, n // 6 + max(n // 3, 1)) for n in shape[1:])
    drawn[(..., *blob)] += 2
    return drawn


def volume(*shape: int, seed: int = 0) -> Tensor:
    """Return a volume (1, 1, *shape), as `image`."""
    return image(1, *(shape or (8, 8, 8)), seed=seed)


def logit(channel: int = 1) -> Callable[[Tensor], Score]:
    """F is an output of a classifier."""
    return lambda prediction: lambda y: y[channel]


def mask_sum(channel: int = 1, phi: Callable[[Tensor], Tensor] = lambda y: y) -> Callable[[Tensor], Score]:
    """F is the sum of φ(y) of a class over the voxels where it is the largest."""

    def freeze(prediction: Tensor) -> Score:
        mask = prediction.argmax(0) == channel
        assert bool(mask.any()), "the class is predicted nowhere"
        return lambda y: (phi(y)[channel] * mask).sum()

    return freeze


def conv(dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Build a convolution in 2D or 3D."""
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(*args, **kwargs)


class Seen(nn.Module):
    """Returns a map (n, width, *positions) unchanged, by a convolution with the identity: an ordinary layer."""

    def __init__(self, dims: int, width: int) -> None:
        super().__init__()
        self.conv = conv(dims, width, width, 1, bias=False).double()
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(width).reshape(width, width, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Framed(nn.Module):
    """A layer on turned images, whose output is seen in the frame of the image.

    Args:
        layer: gives ``width`` channels in 2D.
        do: turns a map (n, C, h, w).
        undo: turns it back.
    """

    def __init__(
        self, layer: nn.Module, width: int, do: Callable[[Tensor], Tensor], undo: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.layer, self.seen, self.do, self.undo = layer, Seen(2, width), do, undo

    def forward(self, x: Tensor) -> Tensor:
        return self.do(self.seen(self.undo(self.layer(x))))


class Classifier(nn.Module):
    """Two convolutions, one with stride 2, and a linear layer: (B, 3).

    Args:
        channels: of the image.
        dims: 2 or 3.
        norm: of the second convolution.
        size: edges of the image.
    """

    def __init__(
        self, channels: int = 1, dims: int = 2, norm: nn.Module | None = None, size: tuple[int, ...] = (12, 12)
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(dims, channels, 4, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(conv(dims, 4, 4, 3, 2, 1), norm or nn.Identity(), nn.ReLU())
        self.head = nn.Linear(4 * torch.Size((n + 1) // 2 for n in size[:dims]).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.stem(x)).flatten(1))


class Segmenter(nn.Module):
    """An encoder at half resolution, upsampling and a skip path: (B, K, *spatial)."""

    def __init__(self, classes: int = 3, channels: int = 1, dims: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(dims, channels, 4, 3, padding=1), nn.ReLU())
        self.down = nn.Sequential(conv(dims, 4, 5, 3, 2, 1), nn.ReLU())
        self.head = conv(dims, 9, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        up = F.interpolate(self.down(skip), size=x.shape[2:], mode="nearest")
        return self.head(torch.cat([up, skip], 1))


class Around(nn.Module):
    """A network with a function before it and one after it.

    Args:
        net: the network, called ``net``.
        before: of the input.
        after: of the output.
    """

    def __init__(
        self,
        net: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Any] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Any:
        y = self.net(x if self.before is None else self.before(x))
        return y if self.after is None else self.after(y)


def replaced(
    before: Callable[[Tensor], Tensor] | None = None, after: Callable[[Tensor], Any] | None = None
) -> Callable[[nn.Module], nn.Module]:
    """Return a twin of `Around` with other functions and the same network."""
    return lambda odd: Around(copy.deepcopy(odd.net), before, after)
