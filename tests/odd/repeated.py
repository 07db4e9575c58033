"""Layers that run several times in a pass. The twins have a copy of the layer for each call; its map is that of all
calls, each in the frame of the image."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.odd.base import Classifier, Framed, OddCase, Segmenter, image, logit, mask_sum, seeded, volume

X = image(1, 12, 12)
Turn = Callable[[Tensor], Tensor]


def flip(x: Tensor) -> Tensor:
    return x.flip(-1)


def both(x: Tensor) -> Tensor:
    return x.flip(-1, -2)


def turn(x: Tensor) -> Tensor:
    return x.rot90(1, (-2, -1))


def back(x: Tensor) -> Tensor:
    return x.rot90(-1, (-2, -1))


def same(x: Tensor) -> Tensor:
    return x


class Mirrored(nn.Module):
    """The mean of passes of one network on turned images, turned back.

    Args:
        net: the network; a list of one a view in the twin.
        views: how the image is turned, and how the output is turned back.
    """

    def __init__(self, net: nn.Module, views: list[tuple[Turn, Turn]]) -> None:
        super().__init__()
        self.net, self.views = net, views

    def forward(self, x: Tensor) -> Tensor:
        nets = list(self.net) if isinstance(self.net, nn.ModuleList) else [self.net] * len(self.views)
        return torch.stack([undo(net(do(x))) for net, (do, undo) in zip(nets, self.views)]).mean(0)


def mirrored(
    name: str, make: Callable[[], nn.Module], views: list[tuple[Turn, Turn]], segments: bool, channel: int = 1
) -> OddCase:
    outs = [(do, undo if segments else same) for do, undo in views]

    def twin(odd: nn.Module) -> nn.Module:
        nets = [copy.deepcopy(odd.net) for _ in views]
        for net, (do, undo) in zip(nets, views):
            net.down = Framed(net.down, net.down[0].out_channels, do, undo)
        return Mirrored(nn.ModuleList(nets), outs)

    return OddCase(
        name,
        "repeated",
        lambda: seeded(lambda: Mirrored(make(), outs)),
        X,
        mask_sum(channel) if segments else logit(),
        f"MultiClassMask({channel})" if segments else "ClassScore(1)",
        twin=twin,
        alike=lambda odd: Mirrored(nn.ModuleList(copy.deepcopy(odd.net) for _ in views), outs),
        layer="net.down",
        parts=tuple(f"net.{i}.down.seen.conv" for i in range(len(views))),
    )


class Shared(nn.Module):
    """Encoders of several inputs of an image, and a head on what `join` makes of their features.

    Args:
        inputs: the inputs, from the image.
        join: the features of all inputs to (B, 144).
        calls: number of encoders; 1: they share one.
    """

    def __init__(self, inputs: Callable[[Tensor], list[Tensor]], join: Callable[[list[Tensor]], Tensor]) -> None:
        super().__init__()
        self.enc: nn.Module = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(4 * 36, 3)
        self.inputs, self.join = inputs, join

    def forward(self, x: Tensor) -> Tensor:
        inputs = self.inputs(x)
        encoders = list(self.enc) if isinstance(self.enc, nn.ModuleList) else [self.enc] * len(inputs)
        return self.head(self.join([e(i) for e, i in zip(encoders, inputs)]))


def shared(
    name: str,
    inputs: Callable[[Tensor], list[Tensor]],
    join: Callable[[list[Tensor]], Tensor],
    turns: list[Turn],
    x: Tensor = X,
) -> OddCase:
    def alike(odd: nn.Module) -> nn.Module:
        odd.enc = nn.ModuleList(copy.deepcopy(odd.enc) for _ in turns)
        return odd

    def twin(odd: nn.Module) -> nn.Module:
        odd.enc = nn.ModuleList(Framed(copy.deepcopy(odd.enc), 4, turned, turned) for turned in turns)
        return odd

    parts = tuple(f"enc.{i}.seen.conv" for i in range(len(turns)))
    return OddCase(
        name,
        "repeated",
        lambda: seeded(lambda: Shared(inputs, join)),
        x,
        logit(),
        twin=twin,
        alike=alike,
        layer="enc",
        parts=parts,
    )


def added(features: list[Tensor]) -> Tensor:
    return torch.tanh(sum(features)).flatten(1)  # type: ignore[arg-type]


class Recurrent(nn.Module):
    """A block applied three times to its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1)
        self.block: nn.Module = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        blocks = list(self.block) if isinstance(self.block, nn.ModuleList) else [self.block] * 3
        for block in blocks:
            h = h + block(h)
        return self.head(h.flatten(1))


def unrolled(odd: nn.Module) -> nn.Module:
    odd.block = nn.ModuleList(copy.deepcopy(odd.block) for _ in range(3))
    return odd


class OneActivation(nn.Module):
    """One activation after two convolutions at two resolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.act: nn.Module = nn.ReLU()
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        first, second = list(self.act) if isinstance(self.act, nn.ModuleList) else [self.act] * 2
        return self.head(second(self.b(first(self.a(x)))).flatten(1))


def two_activations(odd: nn.Module) -> nn.Module:
    odd.act = nn.ModuleList([nn.ReLU(), nn.ReLU()])
    return odd


class TwoNames(nn.Module):
    """A block registered under two names, and run once."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()
        self.alias = self.net.down

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.alias(self.net.stem(x)).flatten(1))


class Ensemble(nn.Module):
    """The mean of two members with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList([Classifier(), Classifier()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([m(x) for m in self.members]).mean(0)


class Slices(nn.Module):
    """A 2D encoder on the slices of a volume, then an LSTM over them.

    Args:
        loop: one call for each slice; else the slices are rows of one batch.
    """

    def __init__(self, loop: bool) -> None:
        super().__init__()
        self.enc: nn.Module = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU())
        self.lstm, self.head = nn.LSTM(64, 6, batch_first=True), nn.Linear(6, 3)
        self.loop = loop

    def features(self, x: Tensor) -> Tensor:
        if self.loop:
            return torch.stack([self.enc(s).flatten(1) for s in x.unbind(-1)], 1)
        rows = x.movedim(-1, 1).flatten(0, 1)
        return self.enc(rows).flatten(1).unflatten(0, (len(x), -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.features(x))[0][:, -1])


class SlicesAtOnce(Slices):
    """The same with 3D convolutions that are flat along the last axis."""

    def __init__(self, odd: Slices) -> None:
        super().__init__(False)
        self.enc = nn.Sequential(nn.Conv3d(1, 4, (3, 3, 1), (2, 2, 1), (1, 1, 0)), nn.ReLU())
        self.double()
        self.lstm, self.head = odd.lstm, odd.head
        with torch.no_grad():
            self.enc[0].weight.copy_(odd.enc[0].weight[..., None])
            self.enc[0].bias.copy_(odd.enc[0].bias)

    def features(self, x: Tensor) -> Tensor:
        return self.enc(x).movedim(-1, 1).flatten(2)


def slices(name: str, loop: bool) -> OddCase:
    return OddCase(
        name,
        "repeated",
        lambda: seeded(lambda: Slices(loop)),
        volume(),
        logit(),
        twin=lambda odd: SlicesAtOnce(odd),
        layer="enc",
    )


def pyramid(x: Tensor) -> list[Tensor]:
    return [x, F.avg_pool2d(x, 2)]


def pooled(features: list[Tensor]) -> Tensor:
    return torch.tanh(features[0] + F.interpolate(features[1], scale_factor=2)).flatten(1)


CASES = [
    mirrored("mirrored passes, segmentation", Segmenter, [(same, same), (flip, flip)], True),
    mirrored("mirrored passes, classification", Classifier, [(same, same), (flip, flip)], False),
    mirrored("only the mirrored pass", Segmenter, [(flip, flip)], True),
    mirrored("four mirrored passes", Segmenter, [(same, same), (flip, flip), (both, both), (turn, back)], True, 0),
    mirrored("turned passes, classification", Classifier, [(same, same), (turn, back)], False),
    shared("shared encoder of two channels", lambda x: list(x.split(1, 1)), added, [same, same], image(2, 12, 12)),
    shared("one side against the other", lambda x: [x, x.flip(-1)],
           lambda f: torch.tanh(f[0] - 0.5 * f[1].flip(-1)).flatten(1), [same, flip]),
    shared("pyramid of resolutions", pyramid, pooled, [same, same]),
    OddCase("recurrent block", "repeated", lambda: seeded(Recurrent), X, logit(), twin=unrolled, layer="block",
            parts=("block.0", "block.1", "block.2")),
    OddCase("one activation used twice", "repeated", lambda: seeded(OneActivation), X, logit(), twin=two_activations,
            layer="act", parts=("act.0", "act.1")),
    OddCase("block with two names", "repeated", lambda: seeded(TwoNames), X, logit(),
            twin=lambda odd: copy.deepcopy(odd.net), layer="alias", parts=("down",)),
    OddCase("ensemble in one module", "repeated", lambda: seeded(Ensemble), X, logit(), twin=lambda odd: odd,
            layer="members.0.down"),
    slices("encoder of slices as rows", False),
    slices("encoder of slices in a loop", True),
]  # fmt: skip
