"""Saliency from the statistics of a layer's activations, without gradient and target."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from esegeta_monai.engine.layer_maps import BlendedActivations, to_window
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.cam.gradient_cam import LayerPasses, _Cam

__all__ = ["SmoeScale"]

EPSILON = 1e-7
"""Added to the activations, so that their logarithm exists."""


class SmoeScale(_Cam):
    """``μ · (log₂ μ − mean_c log₂ A_c)`` with ``A_c = max(a_c, 0) + 1e-7`` and μ their mean over channels, position by
    position: the scale of a gamma distribution of the activations (Mundhenk et al. 2020, SMOE scale).

    It is 0 where all channels are equal, and large where few of them are strongly active. It needs no gradient and is
    the same for every target. The statistic is computed in each window at the layer's own resolution; the windows are
    blended.

    Args:
        layer: see `GradCam`; the paper takes layers that end in a rectifier.
        relu: no effect, since the map is never negative.
    """

    reference = "Mundhenk et al. 2020, arXiv:1911.11293"
    units = "activation times bits"
    needs_gradient = False
    several_calls = True

    @property
    def signed(self) -> bool:
        return False

    def passes(self, objective: Objective) -> int:
        """Count the activations of all windows."""
        return len(objective.plan)

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        maps: Tensor = yield _Statistic(layer, "mean")
        return maps[None].expand(objective.n_targets, *maps.shape).clone()


class _Statistic(BlendedActivations):
    """The statistic of each position on the image's grid, (1, *spatial)."""

    @property
    def key(self) -> Hashable:
        return ("smoe scale", self.layers)

    def _reduced(self, values: Tensor, number: int) -> Tensor:
        a = values.clamp(min=0) + EPSILON
        mean = a.mean(1, keepdim=True)
        scale = mean * (mean.log2() - a.log2().mean(1, keepdim=True))
        return to_window(scale.to(self.objective.image.dtype), self.objective.plan)
