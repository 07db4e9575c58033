"""LRP rule by rule, composites, guided backpropagation, deconvolution and excitation against zennit, in 2D."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from esegeta_monai.methods import LRP, Deconvolution, ExcitationBackprop, GuidedBackprop
from tests.peers.plain import TARGET, close, explain, network_and_image, objective_for

pytestmark = pytest.mark.peers
zennit = pytest.importorskip("zennit")

from zennit import composites, rules  # noqa: E402
from zennit.types import AvgPool, Convolution, Linear  # noqa: E402

# zennit adds a stabiliser to every denominator, we only in the epsilon rule: made negligible, not hidden.
TINY = 1e-13


def by_zennit(network: torch.nn.Module, image: Tensor, composite: Any, by_output: bool = True) -> Tensor:
    """Relevance of the image; what enters at the top is the logit, or one."""
    with composite.context(network) as modified:
        x = image.clone().requires_grad_()
        out = modified(x)
        start = torch.zeros_like(out)
        start[0, TARGET] = out[0, TARGET].detach() if by_output else 1.0
        (result,) = torch.autograd.grad(out, x, start)
    return result.detach()


RULES = {
    "Epsilon": ("Epsilon", lambda: rules.Epsilon(1e-6)),
    "Gamma": ({"rule": "Gamma", "gamma": 0.25}, lambda: rules.Gamma(0.25, stabilizer=TINY)),
    "ZPlus": ("ZPlus", lambda: rules.ZPlus(stabilizer=TINY)),
    "AlphaBeta": (
        {"rule": "AlphaBeta", "alpha": 2.0, "beta": 1.0},
        lambda: rules.AlphaBeta(2.0, 1.0, stabilizer=TINY),
    ),
}


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("name", list(RULES))
def test_each_rule(name: str, bias: bool) -> None:
    network, image = network_and_image(bias)
    actual, make = RULES[name]
    pooled = [(AvgPool, rules.Norm(stabilizer=TINY))]
    composite = composites.LayerMapComposite([(Convolution, make()), (Linear, make()), *pooled])
    result = explain(LRP({"convolution": actual, "dense": actual}, epsilon=1e-6), objective_for(network, image)).maps[0]
    close(result, by_zennit(network, image, composite), 1e-8)


FIRST = {
    "Flat": lambda image: rules.Flat(stabilizer=TINY),
    # the paper has no bias in w²; zennit squares it too by default
    "WSquare": lambda image: rules.WSquare(stabilizer=TINY, zero_params=["bias"]),
    "ZBox": lambda image: rules.ZBox(image.min(), image.max(), stabilizer=TINY),
}


@pytest.mark.parametrize("name", list(FIRST))
def test_each_first_rule(name: str) -> None:
    network, image = network_and_image()
    layers = [
        (Convolution, rules.ZPlus(stabilizer=TINY)),
        (Linear, rules.Epsilon(1e-6)),
        (AvgPool, rules.Norm(stabilizer=TINY)),
    ]
    composite = composites.SpecialFirstLayerMapComposite(layers, [(Convolution, FIRST[name](image))])
    actual = LRP({"convolution": "ZPlus", "dense": "Epsilon", "first": name})
    network[1].padding = (0, 0)  # flat shares of the padding differ: we record them
    network.hidden = torch.nn.Linear(8 * 4, 20).double()
    result = explain(actual, objective_for(network, image)).maps[0]
    close(result, by_zennit(network, image, composite), 1e-8)


COMPOSITES = {
    "EpsilonPlus": lambda image: composites.EpsilonPlus(stabilizer=TINY),
    "EpsilonAlpha2Beta1": lambda image: composites.EpsilonAlpha2Beta1(stabilizer=TINY),
    "EpsilonGammaBox": lambda image: composites.EpsilonGammaBox(image.min(), image.max(), stabilizer=TINY),
    "EpsilonPlusFlat": lambda image: composites.EpsilonPlusFlat(stabilizer=TINY),
}


@pytest.mark.parametrize("name", list(COMPOSITES))
def test_each_composite(name: str) -> None:
    network, image = network_and_image()
    network[1].padding = (0, 0)
    network.hidden = torch.nn.Linear(8 * 4, 20).double()
    result = explain(LRP(name), objective_for(network, image)).maps[0]
    close(result, by_zennit(network, image, COMPOSITES[name](image)), 1e-8)


@pytest.mark.parametrize(
    ("method", "composite"),
    [(GuidedBackprop, composites.GuidedBackprop), (Deconvolution, composites.DeconvNet)],
)
def test_modified_gradients(method: Any, composite: Any) -> None:
    network, image = network_and_image()
    result = explain(method(), objective_for(network, image)).maps[0]
    close(result, by_zennit(network, image, composite(), by_output=False), 1e-10)


def test_excitation() -> None:
    """Without biases: zennit lets them take part, the paper and torchray do not."""
    network, image = network_and_image(bias=False)
    result = explain(ExcitationBackprop(), objective_for(network, image)).maps[0]
    close(result, by_zennit(network, image, composites.ExcitationBackprop(stabilizer=TINY), by_output=False), 1e-8)
