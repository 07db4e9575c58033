"""The check of the derivative: correct networks pass, whatever their kinks, and faulty backward passes are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import f as f_distribution
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.checks.derivative import Derivative
from esegeta_monai.methods import GradCam, Occlusion, Saliency
from esegeta_monai.targets import ClassScore
from tests.support.backward import Half, Reverse
from tests.support.checks import blob, checked


class Body(nn.Module):
    """An encoder, a part between, and a head that also reads the image through a skip path."""

    def __init__(self, between: Callable[[Tensor], Tensor], seed: int = 0, no_grad: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)
        )
        self.head = nn.Conv2d(5, 2, 3, padding=1)
        self.between, self.no_grad = between, no_grad

    def forward(self, x: Tensor) -> Tensor:
        if self.no_grad:
            with torch.no_grad():
                h = self.encoder(x)
        else:
            h = self.encoder(x)
        return self.head(torch.cat([self.between(h), 0.1 * x], 1))


def straight_through(x: Tensor) -> Tensor:
    return x + (torch.round(4 * x) / 4 - x).detach()


FAULTY: dict[str, Callable[[Tensor], Tensor]] = {
    "detached": lambda x: x.detach(),
    "reversed": Reverse.apply,
    "halved": Half.apply,
    "straight through": straight_through,
}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["no_grad", *FAULTY])
def test_a_backward_pass_that_is_no_derivative_is_found(kind: str, seed: int) -> None:
    network = Body(FAULTY.get(kind, lambda x: x), seed, no_grad=kind == "no_grad")
    result = checked(network, blob(seed))["derivative"]
    assert result.verdict == "warned"
    assert result.value is not None
    assert result.value > 0.05


@pytest.mark.parametrize("seed", range(20))
def test_the_correct_network_passes(seed: int) -> None:
    results = checked(Body(lambda x: x, seed), blob(seed))
    assert {r.verdict for r in results.values()} == {"passed"}
    assert results["derivative"].value < 0.01


class Float32Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.float().to(x.dtype))


def test_a_network_that_computes_in_float32_inside_is_not_checked() -> None:
    result = checked(Float32Inside())["derivative"]
    assert result.verdict == "not checked"
    assert "float32" in result.text


def test_warnings_of_the_derivative_are_for_methods_that_use_it() -> None:
    network = nn.Sequential(Body(FAULTY["reversed"]), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    ours = Explainer(network)(blob()[None], [Saliency(), GradCam("0.encoder"), Occlusion(window=4)], [ClassScore(1)])
    warned = {a.method.name: any("backward pass" in w for w in a.record["warnings"]) for a in ours}
    assert warned == {"Saliency": True, "GradCam": True, "Occlusion": False}


def test_few_directions_decide_only_what_is_clear() -> None:
    """The probability stated in the docstring, and the number of passes of a clear and of an unclear network."""
    ratio = (Derivative.clear / Derivative.wrong) ** 2
    assert f_distribution.cdf(ratio, 3, 3) == pytest.approx(1.4e-5, rel=0.05)
    clear, unclear = checked(Body(lambda x: x))["derivative"], checked(Body(Half.apply))["derivative"]
    assert (clear.passes, unclear.passes) == (1 + 2 * 4, 1 + 2 * 9)
    assert clear.value is not None
    assert clear.value < Derivative.clear


class Little(torch.autograd.Function):
    """The identity with a gradient that is wrong by 0.3 % along each of its entries."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 1.003 * gradient


def test_a_small_deviation_takes_all_directions() -> None:
    result = checked(nn.Sequential(nn.Conv2d(1, 2, 3), Applied(Little)))["derivative"]
    assert result.value == pytest.approx(0.003, rel=1e-3)
    assert (result.verdict, result.passes) == ("passed", 1 + 2 * 9)


class Applied(nn.Module):
    """An autograd function as a module."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class KeepsGraph(nn.Module):
    """Keeps a tensor with a graph from its last pass with gradients, so that it cannot be copied after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.last


def test_a_network_that_keeps_its_last_output_is_checked() -> None:
    assert checked(KeepsGraph())["derivative"].verdict == "passed"


class Saturated(nn.Module):
    """A softmax of equal logits: the output is constant, but for the rounding of the logits.

    Args:
        logits: their size.
        between: function of the features.
    """

    def __init__(self, logits: float, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head, self.between = nn.Linear(144, 20), nn.Linear(20, 10), between
        with torch.no_grad():
            self.hidden.weight.fill_(logits / 144 / 20)
            self.head.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.hidden(x.flatten(1)).relu())).softmax(1)


@pytest.mark.parametrize("logits", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_no_wrong_derivative(logits: float, seed: int) -> None:
    result = checked(Saturated(logits), blob(seed))["derivative"]
    assert result.verdict == "not checked"
    assert "flat" in result.text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", FAULTY)
def test_a_small_derivative_that_is_wrong_is_still_found(kind: str, seed: int) -> None:
    network = Body(FAULTY[kind], seed)
    with torch.no_grad():
        network.head.weight *= 1e-4  # beside a constant of 1; rounding hides differences below about 3e-6 here
        network.head.bias.fill_(1.0)
    assert checked(network, blob(seed))["derivative"].verdict == "warned"


def test_a_gradient_where_the_forward_pass_is_flat_is_found() -> None:
    network = Body(straight_through)
    with torch.no_grad():
        network.head.weight[:, 4] = 0.0  # no skip path: central differences are zero between the steps
    assert checked(network)["derivative"].verdict == "warned"


class NanOnce(nn.Module):
    """x³ with NaN in one pass."""

    passes = 0

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at
        type(self).passes = 0

    def forward(self, x: Tensor) -> Tensor:
        type(self).passes += 1  # of all copies
        return x**3 * (float("nan") if self.passes == self.at else 1.0)


def test_nan_in_one_pass_is_no_wrong_derivative() -> None:
    results = [checked(NanOnce(at))["derivative"] for at in range(1, 16)]
    assert {result.verdict for result in results} == {"passed", "not checked"}
    assert any("NaN or infinite" in result.text for result in results)
