"""Class activation maps: activations of a layer, weighted by how much the target depends on each channel."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from esegeta_monai.errors import MethodError
from esegeta_monai.layers import BlendedActivations, check_layer, spatial_map
from esegeta_monai.methods.base import Explained, Method, Passes
from esegeta_monai.objective import Objective, Request, View

__all__ = ["GradCam"]


@dataclass(eq=False, repr=False)
class GradCam(Method):
    """``ReLU(Σ_c α_c A_c)`` with ``α_c`` the mean of ``∂F/∂A_c`` over the layer's positions (Selvaraju et al. 2017).

    The channel weights are those of the whole volume: gradients of all windows that the target sees are summed first;
    then the weighted activations of **all** windows are blended, and ReLU is taken of the blend. With a segmentation
    target this is Seg-Grad-CAM (Vinogradova et al. 2020).

    Args:
        layer: dotted name; None: a sensible one is found and named in the record.
        relu: keep only what speaks for the target.

    Example:
        >>> GradCam(layer="model.0").signed
        False
    """

    reference = "Selvaraju et al., ICCV 2017, arXiv:1610.02391"
    produces = "layer map"
    additive = False
    aliases = ("SegGradCam",)

    layer: str | None = None
    relu: bool = True
    name: str | None = field(default=None, kw_only=True)

    @property
    def signed(self) -> bool:
        return not self.relu

    @property
    def units(self) -> str:
        return "weighted activation"

    def passes(self, objective: Objective) -> int:
        """Gradients where the target sees, activations everywhere (besides one or two where a layer is looked for)."""
        return len(objective.windows) + len(objective.plan)

    def attribute(self, objective: Objective) -> Passes:
        """(k, 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        weights = yield ChannelGradients(layer)
        maps = yield BlendedActivations(layer, weights)
        return Explained(maps.relu() if self.relu else maps, {"layer": layer})


class ChannelGradients(Request):
    """``α_c``: the sum of ``∂F/∂A_c`` over all windows and positions, over the number of positions in the volume.

    The result is (k, C). A volume of one window gives the usual mean over the layer's positions.
    """

    def __init__(self, layer: str) -> None:
        self.layers = (layer,)
        self.total: Tensor | None = None

    @property
    def key(self) -> Hashable:
        return ("channel gradients", self.layers)

    def begin(self, objective: Objective) -> None:
        self.objective = objective

    def see(self, view: View) -> None:
        plan, layer = self.objective.plan, self.layers[0]
        if layer not in view.gradients:
            raise MethodError(f"the target does not depend on layer {layer!r} by a differentiable path: choose another")
        gradients = spatial_map(view.gradients[layer], self.objective, layer, lead=2)
        summed = gradients.flatten(3).sum((1, 3), dtype=torch.float64).cpu()
        positions = math.prod(gradients.shape[3:])
        volume = math.prod(plan.padded_shape) / math.prod(plan.roi)
        self.total = summed / (positions * volume) if self.total is None else self.total + summed / (positions * volume)

    def result(self) -> Tensor:
        if self.total is None:
            raise MethodError("the target sees no window, so there are no gradients")
        return self.total
