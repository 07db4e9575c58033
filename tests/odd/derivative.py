"""Networks whose backward pass is, or may not be, the derivative of their forward pass. Twins have the derivative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.odd.base import Around, Classifier, OddCase, image, logit, seeded
from tests.support.backward import Half, Reverse

X = image(1, 12, 12)


class Between(nn.Module):
    """A classifier of features and of a skip path, with a function of the features between.

    Args:
        between: function of the features (B, 4, 12, 12).
        no_grad: context in which the encoder runs.
    """

    def __init__(self, between: Callable[[Tensor], Tensor], context: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Softplus())
        self.down = nn.Sequential(nn.Conv2d(5, 4, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(4 * 36, 3)
        self.between, self.context = between, context

    def forward(self, x: Tensor) -> Tensor:
        if self.context is None:
            h = self.enc(x)
        else:
            with self.context():
                h = self.enc(x)
        h = self.between(h)
        return self.head(self.down(torch.cat([h, x], 1)).flatten(1))


class Swish(torch.autograd.Function):
    """x σ(x) with its own, right backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


class TwiceSwish(Swish):
    """The same with a factor too many in the backward pass."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * Swish.backward(ctx, gradient)


def rounded(x: Tensor) -> Tensor:
    return torch.round(4 * x) / 4


def hooked(x: Tensor) -> Tensor:
    y = x * 1
    if y.requires_grad:
        y.register_hook(lambda g: g / 2)
    return y


def through_numpy(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() ** 2).to(x)


def largest_channel(x: Tensor) -> Tensor:
    return x * F.one_hot(x.argmax(1), x.shape[1]).movedim(-1, 1)


def energy_gradient(x: Tensor) -> Tensor:
    """The gradient of Σ log cosh x, computed in forward."""
    with torch.enable_grad():
        y = x if x.requires_grad else x.detach().requires_grad_(True)
        energy = (F.softplus(2 * y) - y).sum()
        (gradient,) = torch.autograd.grad(energy, y, create_graph=True)
    return gradient if x.requires_grad else gradient.detach()


def root(x: Tensor) -> Tensor:
    """|x| with a derivative that is NaN at 0."""
    return x.pow(2).sqrt()


def wrong_hook() -> nn.Module:
    network = seeded(lambda: Between(torch.square))
    network.enc.register_full_backward_hook(lambda m, gi, go: tuple(g / 2 for g in gi))
    return network


def same(x: Tensor) -> Tensor:
    return x


def case(
    name: str,
    between: Callable[[Tensor], Tensor],
    truth: Callable[[Tensor], Tensor],
    context: Callable[[], Any] | None = None,
) -> OddCase:
    def twin(odd: nn.Module) -> nn.Module:
        ordinary = Between(truth).double()
        ordinary.load_state_dict(odd.state_dict())
        return ordinary

    return OddCase(
        name, "derivative", lambda: seeded(lambda: Between(between, context)), X, logit(), twin=twin, layer="enc"
    )


def zero_background() -> Tensor:
    x = X.clone()
    x[..., 8:] = 0
    return x


CASES = [
    case("encoder under no_grad", same, same, torch.no_grad),
    case("encoder under inference_mode", torch.clone, same, torch.inference_mode),
    case("detached features", torch.detach, same),
    case("gradient reversal", Reverse.apply, same),
    case("halved gradient", Half.apply, same),
    case("gradient halved by a tensor hook", hooked, same),
    case("straight-through rounding", lambda x: x + (rounded(x) - x).detach(), rounded),
    case("own function, right backward", Swish.apply, F.silu),
    case("own function, wrong backward", TwiceSwish.apply, F.silu),
    case("computes in numpy", through_numpy, torch.square),
    case("argmax inside", largest_channel, lambda x: x * (x == x.amax(1, keepdim=True))),
    replace(case("gradient inside forward", energy_gradient, torch.tanh),
            cause="inference mode|'grad'|without a gradient"),
    OddCase("gradient halved by a module hook", "derivative", wrong_hook, X, logit(), layer="enc",
            twin=case("", torch.square, torch.square).twin),
    OddCase("root of zero", "derivative", lambda: seeded(lambda: Around(Classifier(), root)), zero_background(),
            logit(), layer="net.down", twin=lambda odd: Around(odd.net, torch.abs)),
]  # fmt: skip
