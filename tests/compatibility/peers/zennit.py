"""zennit, with batch norms merged into convolutions first, as in its examples, and the smallest stabiliser it accepts.
It needs torchvision, so an environment of its own (`make test-peers`).

Its flat rule gives the padding nothing, ours records the share of the padding: `EpsilonPlusFlat` has no cell.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.model import select_output
from esegeta_monai.engine.rules import COMPOSITES
from tests.compatibility.peers.base import Map, Peer, installed, our_relevance
from tests.compatibility.sight import Sight

__all__ = ["ZENNIT"]

TINY = 1e-13


def _merge() -> Any:
    """Return zennit's merging of batch norms. It leaves ε in the emptied norm: a factor of 1 − 5e-6, removed here."""
    from zennit.canonizers import SequentialMergeBatchNorm

    class Merge(SequentialMergeBatchNorm):
        @staticmethod
        def merge_batch_norm(modules: Any, batch_norm: nn.Module) -> None:
            SequentialMergeBatchNorm.merge_batch_norm(modules, batch_norm)
            batch_norm.eps = 0.0

    return Merge()


def _zennit(composite: str, of_image: Callable[[Tensor], tuple[Any, ...]] = lambda x: (), **options: Any) -> Map:
    """Return the function of the image's relevance, which starts at the prediction like ours."""

    def attribute(sight: Sight, **parameters: Any) -> Tensor:
        from zennit import composites

        make = getattr(composites, composite)
        given = make(*of_image(sight.image), canonizers=[_merge()], stabilizer=TINY, **options)
        return _relevance(sight, given, by_output=composite != "ExcitationBackprop")

    return attribute


def _modified_gradient(composite: str) -> Map:
    def attribute(sight: Sight, **parameters: Any) -> Tensor:
        from zennit import composites

        return _relevance(sight, getattr(composites, composite)(), by_output=False)

    return attribute


def _relevance(sight: Sight, composite: Any, by_output: bool) -> Tensor:
    _, cotangents = sight.window_cotangents()
    with composite.context(sight.network) as network:
        x = sight.image[None].clone().requires_grad_(True)
        out = select_output(network(x), sight.s.output)
        start = cotangents * out.detach() if by_output else cotangents
        (relevance,) = torch.autograd.grad(out, x, start)
    return relevance[0]


def _zennit_epsilon(epsilon: float) -> Map:
    def attribute(sight: Sight, **parameters: Any) -> Tensor:
        from zennit.composites import LayerMapComposite
        from zennit.rules import Epsilon, Norm
        from zennit.types import AvgPool, Convolution, Linear

        layers = [(Convolution, Epsilon(epsilon)), (Linear, Epsilon(epsilon)), (AvgPool, Norm(stabilizer=TINY))]
        composite = LayerMapComposite(layers, canonizers=[_merge()])
        return _relevance(sight, composite, by_output=True)

    return attribute


def _merge_batch_norms(sight: Sight) -> None:
    """Merge batch norms as zennit does, if that leaves the network's values unchanged: it follows the order of modules,
    which may differ from that of execution."""
    before = sight.value(sight.image)
    instances = _merge().apply(sight.network)
    if abs(sight.value(sight.image) - before) > 1e-9 * abs(before):
        for instance in instances:
            instance.remove()


def _image_range(x: Tensor) -> tuple[Any, ...]:
    return x.min(), x.max()


MAPS: dict[str, Map] = {
    "GuidedBackprop": _modified_gradient("GuidedBackprop"),
    "Deconvolution": _modified_gradient("DeconvNet"),
    # the paper leaves biases out, zennit only on request
    "ExcitationBackprop": _zennit("ExcitationBackprop", zero_params=["bias"]),
    "LRP EpsilonPlus": _zennit("EpsilonPlus"),
    "LRP EpsilonAlpha2Beta1": _zennit("EpsilonAlpha2Beta1"),
    "LRP EpsilonGammaBox": _zennit("EpsilonGammaBox", _image_range),
    "LRP Epsilon": _zennit_epsilon(1e-6),
    "LRP LRP0": _zennit_epsilon(TINY),
}

ZENNIT = Peer(
    "zennit",
    MAPS,
    {f"LRP {name}": our_relevance(name, _merge_batch_norms) for name in COMPOSITES if f"LRP {name}" in MAPS},
    installed("zennit"),
)
