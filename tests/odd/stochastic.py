"""Random networks and networks with a state. Those whose output is not a function of the image have no right map."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.odd.base import Around, Classifier, OddCase, image, logit, replaced, seeded

X = image(1, 12, 12)


def around(before: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: seeded(lambda: Around(Classifier(), before))


class Stateful(nn.Module):
    """A classifier with a buffer and a number that a subclass changes in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Classifier()
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0


class Counter(Stateful):
    """Adds its number of calls to the output."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.net(x) + 0.1 * self.seen


class Cooling(Stateful):
    """Divides by its number of calls, which is no buffer."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) / self.calls


class RunningMean(Stateful):
    """Subtracts a mean of the images it has seen."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.mean().detach()
        return self.net(x - self.seen)


class KeptStatistic(Stateful):
    """Keeps a mean that nothing reads."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.mean().detach()
        return self.net(x)


class UnusedCounter(Stateful):
    """Counts its calls, without effect."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        return self.net(x)


class KeptFeatures(Stateful):
    """Keeps its last features, as hooks for figures do."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.net.stem(x)
        return self.net.head(self.net.down(self.features).flatten(1))


class FirstImage(Stateful):
    """Keeps the mean of the first image it sees and subtracts it from all later ones."""

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == 0:
            self.calls, self.first = 1, x.detach().mean()
        return self.net(x - self.first)


class DropoutOn(nn.Module):
    """Switches its dropout on in forward, as Monte Carlo dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Classifier(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop.train()(x))


class LeftInTraining(nn.Module):
    """Has dropout and batch norm, and was left in training mode: maps are those of the evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Classifier(norm=nn.BatchNorm2d(4)), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


class DropPath(Stateful):
    """Leaves out its second convolution in a part of the passes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.net.stem(x)
        h = h + self.net.stem[0].bias.sum() * (torch.rand(()) > 0.5)
        return self.net.head(self.net.down(h).flatten(1))


def no_map(name: str, network: Callable[[], nn.Module]) -> OddCase:
    return OddCase(name, "stochastic", network, X, logit(), layer="net.down")


def same(name: str, network: Callable[[], nn.Module], train: bool = False) -> OddCase:
    twin: Callable[[nn.Module], nn.Module] = lambda odd: Around(copy.deepcopy(odd.net))  # noqa: E731
    return OddCase(name, "stochastic", network, X, logit(), layer="net.down", twin=twin, train=train)


CASES = [
    no_map("dropout on", around(lambda x: F.dropout(x, 0.5, training=True))),
    no_map("dropout switched on in forward", lambda: seeded(DropoutOn)),
    no_map("adds noise", around(lambda x: x + 0.1 * torch.randn_like(x))),
    no_map("adds noise of numpy", around(lambda x: x + 0.1 * np.random.randn())),
    no_map("adds noise of Python", around(lambda x: x + 0.1 * random.random())),
    no_map("stochastic depth on", lambda: seeded(DropPath)),
    no_map("adds its number of calls", lambda: seeded(Counter)),
    no_map("divides by its number of calls", lambda: seeded(Cooling)),
    no_map("subtracts a running mean", lambda: seeded(RunningMean)),
    no_map("subtracts the first image's mean", lambda: seeded(FirstImage)),
    same("keeps a statistic", lambda: seeded(KeptStatistic)),
    same("counts its calls", lambda: seeded(UnusedCounter)),
    same("keeps its features", lambda: seeded(KeptFeatures)),
    same("left in training mode", lambda: seeded(LeftInTraining), train=True),
    OddCase("draws with its own seed", "stochastic",
            around(lambda x: x + 0.1 * torch.randn(12, 12, dtype=x.dtype, generator=torch.Generator().manual_seed(0))),
            X, logit(), layer="net.down",
            twin=replaced(lambda x: x + 0.1 * torch.randn(12, 12, dtype=x.dtype,
                                                          generator=torch.Generator().manual_seed(0)))),
]  # fmt: skip
