"""Networks that write into their input or into a further input. The twins compute the same on copies."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from tests.odd.base import Around, Classifier, OddCase, Segmenter, image, logit, mask_sum, replaced, seeded

X = image(2, 12, 12)
PRIOR = image(1, 12, 12, seed=5)


def view(x: Tensor) -> Tensor:
    x[:, :1].mul_(2)
    return x


def indexed(x: Tensor) -> Tensor:
    x[x < 0] = 0
    return x


def by_data(x: Tensor) -> Tensor:
    x.data.mul_(2)
    return x


def out(x: Tensor) -> Tensor:
    with torch.no_grad():
        torch.mul(x, 2, out=x)
    return x


def twice_first(x: Tensor) -> Tensor:
    return torch.cat([2 * x[:, :1], x[:, 1:]], 1)


def border(x: Tensor) -> Tensor:
    x[..., :2] = 0
    return x


class WithPrior(nn.Module):
    """A classifier with a further input, into which it writes."""

    def __init__(self, write: bool = True) -> None:
        super().__init__()
        self.net, self.write = Classifier(2), write

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        scaled = prior.mul_(0.5) if self.write else 0.5 * prior
        return self.net(torch.tanh(x + scaled))


class KnownPrior(nn.Module):
    """The same with a prior of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.tanh(x + 0.5 * PRIOR))


def case(name: str, write: Callable[[Tensor], Tensor], pure: Callable[[Tensor], Tensor]) -> OddCase:
    make = lambda: seeded(lambda: Around(Classifier(2), write))  # noqa: E731
    return OddCase(name, "writers", make, X.clone(), logit(), twin=replaced(pure), layer="net.down")


CASES = [
    case("scales its input in place", lambda x: x.mul_(2).sub_(1), lambda x: 2 * x - 1),
    case("in-place ReLU on the input", torch.relu_, torch.relu),
    case("in-place leaky ReLU on the input", lambda x: F.leaky_relu(x, 0.1, inplace=True),
         lambda x: F.leaky_relu(x, 0.1)),
    case("writes into a view of its input", view, twice_first),
    case("writes by an index", indexed, torch.relu),
    case("writes behind autograd's back", by_data, lambda x: 2 * x),
    case("writes by out=", out, lambda x: 2 * x),
    case("sets the border to zero", border, lambda x: torch.cat([0 * x[..., :2], x[..., 2:]], -1)),
    OddCase("scales its input in place, in windows", "writers",
            lambda: seeded(lambda: Around(Segmenter(channels=2), lambda x: x.mul_(2).sub_(1))), X.clone(), mask_sum(),
            "MultiClassMask(1)", twin=replaced(lambda x: 2 * x - 1), layer="net.down",
            inferer=SlidingWindowInferer((8, 8), 2, 0.5)),
    OddCase("writes into a further input", "writers", lambda: seeded(WithPrior), X.clone(), logit(),
            twin=lambda odd: KnownPrior(odd.net), layer="net.down", call=lambda: {"network_args": [PRIOR.clone()]}),
    OddCase("writes into a named further input", "writers", lambda: seeded(WithPrior), X.clone(), logit(),
            twin=lambda odd: KnownPrior(odd.net), layer="net.down",
            call=lambda: {"network_kwargs": {"prior": PRIOR.clone()}}),
]  # fmt: skip
