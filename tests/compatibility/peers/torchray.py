"""torchray, in 2D, which gives one map, of the channels' sum or of their largest absolute value. It is called and never
copied (its licence forbids commercial use), in an environment with torchvision (`make test-peers`)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.compatibility.checks import Check, equals
from tests.compatibility.peers.base import Map, Peer, installed, relu_first, wrapped
from tests.compatibility.sight import Sight

__all__ = ["TORCHRAY"]


def _torchray(module: str, layer_wanted: bool = False, shown: Callable[[Sight, Tensor], Tensor] | None = None) -> Map:
    """torchray gives one map (1, 1, *positions), summed over channels or their largest absolute value."""

    def attribute(sight: Sight, layer: str = "", **parameters: Any) -> Tensor:
        function = getattr(importlib.import_module(f"torchray.attribution.{module}"), module)
        at = {"saliency_layer": f"network.{layer}"} if layer_wanted else {}
        values = function(wrapped(sight), sight.image[None].clone(), 0, **at)
        return values[0] if shown is None else shown(sight, values)

    return attribute


def _largest(gradient: Callable[[Sight], Tensor]) -> Check:
    """The largest absolute value over the channels."""
    return equals(lambda sight: gradient(sight).abs().amax(0, keepdim=True))


MAPS: dict[str, Map] = {
    "Saliency": _torchray("gradient"),
    "GuidedBackprop": _torchray("guided_backprop"),
    "Deconvolution": _torchray("deconvnet"),
    "ExcitationBackprop": _torchray("excitation_backprop"),
    "LinearApproximation": _torchray("linear_approx", True, lambda s, m: s.s.scatter(m)),
    "GradCam": _torchray("grad_cam", True, lambda s, m: s.upsampled(m[0])),
}

TORCHRAY = Peer(
    "torchray",
    MAPS,
    {
        "Saliency": _largest(lambda sight: sight.plain),
        "GuidedBackprop": _largest(lambda sight: sight.modified("guided")),
        "Deconvolution": _largest(lambda sight: sight.modified("deconvolution")),
        "GradCam": equals(relu_first),
    },
    installed("torchray"),
    (2,),
)
