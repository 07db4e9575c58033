"""Networks whose images influence each other in a batch. The twins compute for one image what these do alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from tests.odd.base import Around, Classifier, OddCase, Segmenter, image, logit, mask_sum, replaced, seeded

X = image(1, 12, 12)
EACH = (1, 2, 3)


def around(before: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """Return a maker of a classifier with a function before it."""
    return lambda: seeded(lambda: Around(Classifier(), before))


def batch_norm(make: Callable[..., nn.Module]) -> nn.Module:
    """Build a network whose batch norm has no running statistics."""
    return seeded(lambda: make(nn.BatchNorm2d(4, track_running_stats=False)))


def with_instance_norm(odd: nn.Module) -> nn.Module:
    """Statistics of a batch of one image are those of the image."""
    twin = copy.deepcopy(odd)
    norm = nn.InstanceNorm2d(4, affine=True).double()
    norm.load_state_dict(twin.down[1].state_dict(), strict=False)
    twin.down[1] = norm
    return twin


class FunctionalBatchNorm(nn.Module):
    """Uses statistics of the batch, also in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def functional_twin(odd: nn.Module) -> nn.Module:
    twin = copy.deepcopy(odd)
    twin.down[1] = nn.InstanceNorm2d(4)
    return twin


def segmenter(norm: nn.Module) -> nn.Module:
    network = Segmenter()
    network.down = nn.Sequential(network.down[0], norm, network.down[1])
    network.down[0] = nn.Conv2d(4, 4, 3, 2, 1)
    network.head = nn.Conv2d(8, 3, 1)
    return network


class OneOnly(nn.Module):
    """Accepts one image at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError("one image at a time")
        return self.net(x)


class FirstOnly(OneOnly):
    """Reads the first image of a batch only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x[:1])


class Flattened(OneOnly):
    """Flattens the batch too: the linear layer fits one image only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.net.down(self.net.stem(x)).flatten()[None])


class BatchAttention(nn.Module):
    """Forgets ``batch_first``: tokens attend over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU())
        self.attend = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.down(x).flatten(2).movedim(1, 2)
        return self.head(self.attend(tokens, tokens, tokens)[0].flatten(1))


class OneKey(BatchAttention):
    """Each token attends to itself only, as it does in a batch of one image."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.down(x).flatten(2).movedim(1, 2)
        alone = tokens.flatten(0, 1)[None]
        return self.head(self.attend(alone, alone, alone)[0][0].unflatten(0, tokens.shape[:2]).flatten(1))


def one_key(odd: nn.Module) -> nn.Module:
    twin = OneKey().double()
    twin.load_state_dict(odd.state_dict())
    return twin


def whole(x: Tensor) -> Tensor:
    return (x - x.mean()) / x.std()


def each(x: Tensor) -> Tensor:
    return (x - x.mean(EACH, keepdim=True)) / x.std(EACH, keepdim=True)


def case(name: str, network: Callable[[], nn.Module], twin: Callable[[nn.Module], nn.Module], layer: str) -> OddCase:
    return OddCase(name, "batch", network, X, logit(), twin=twin, layer=layer)


CASES = [
    case("standardises over the batch", around(whole), replaced(each), "net.down"),
    case("scales by the batch's range", around(lambda x: torch.tanh(3 * x / x.amax())),
         replaced(lambda x: torch.tanh(3 * x / x.amax(EACH, keepdim=True))), "net.down"),
    case("rolls over the batch", around(lambda x: x + x.roll(-1, 0)), replaced(lambda x: x + x.clone()), "net.down"),
    case("adds the batch's mean", around(lambda x: x + x.mean(0, keepdim=True)),
         replaced(lambda x: x + x.clone()), "net.down"),
    case("batch statistics", lambda: batch_norm(lambda norm: Classifier(norm=norm)), with_instance_norm, "down"),
    case("functional batch statistics", lambda: seeded(lambda: Classifier(norm=FunctionalBatchNorm())),
         functional_twin, "down"),
    case("attention over the batch", lambda: seeded(BatchAttention), one_key, "down"),
    case("accepts one image only", lambda: seeded(OneOnly), replaced(), "net.down"),
    case("reads the first image only", lambda: seeded(FirstOnly), replaced(), "net.down"),
    case("flattens the batch", lambda: seeded(Flattened), replaced(), "net.down"),
    OddCase("batch statistics in windows", "batch", lambda: batch_norm(segmenter), X, mask_sum(2),
            "MultiClassMask(2)", twin=with_instance_norm, layer="down",
            inferer=SlidingWindowInferer((8, 8), 4, 0.5)),
    OddCase("standardises windows over the batch", "batch", lambda: seeded(lambda: Around(Segmenter(), whole)), X,
            mask_sum(), "MultiClassMask(1)", twin=replaced(each), layer="net.down",
            inferer=SlidingWindowInferer((8, 8), 4, 0.5)),
]  # fmt: skip
