"""Gradient times activation at a layer, and guided backpropagation from a layer to the image."""

from __future__ import annotations

import torch
from torch import Tensor

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.layer_frames import spatial_map
from esegeta_monai.engine.layer_maps import check_one_member, position_weights
from esegeta_monai.engine.network.hooks import capture
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method, Passes
from esegeta_monai.methods.cam.gradient_cam import GradCam
from esegeta_monai.methods.layer.activation import LayerMethod
from esegeta_monai.methods.layer.scattered import ScatteredGradients

__all__ = ["LayerActivationGuidedBackprop", "LayerGradCam", "LayerGradientXActivation", "LinearApproximation"]


class LayerGradientXActivation(LayerMethod):
    """``A_c(p) · ∂F/∂A_c(p)``: activation times gradient at a layer, position by position.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.

    Example:
        >>> LayerGradientXActivation("model.0", reduce="abs").signed
        False
    """

    map_check = "activation times gradient"
    reference = "Shrikumar et al. 2016, arXiv:1605.01713"
    additive = True
    units = "target per voxel"
    several_calls = True

    def attribute(self, objective: Objective) -> Passes:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer, several=self.several_calls)
        maps, padding = yield ScatteredGradients(layer, torch.mul, self.reduce)
        return Explained(maps, {"layer": layer, "sum_in_padding": padding})


class LinearApproximation(LayerGradientXActivation):
    """``Σ_c A_c(p) · ∂F/∂A_c(p)``: each position's part of the first-order approximation of F above the layer
    (``linear_approx`` of TorchRay).

    It is `LayerGradientXActivation` summed over channels, and `HiResCam` before ReLU.
    """

    map_check = "activation times gradient"
    reference = "Fong et al., ICCV 2019 (TorchRay), arXiv:1910.08485"


class LayerGradCam(GradCam):
    """`GradCam` before ReLU: ``Σ_c α_c A_c`` with signs, under Captum's name.

    Args:
        layer, relu: see `GradCam`.
    """

    map_check = "grad-cam"
    relu: bool = False


class LayerActivationGuidedBackprop(Method):
    """Guided backpropagation of ``Σ_p |A_c(p)|`` from a layer, or one of its channels, to the image, each window with
    its blending weight (the layer visualisation of TorchEsegeta).

    It does not depend on the target: all targets get the same map.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        channel: c; None: the sum over all channels.
    """

    reference = "Springenberg et al., ICLR workshop 2015, arXiv:1412.6806"
    produces = "input map"
    additive = False
    units = "modified gradient of the activation"
    full_precision = True

    layer: str | None = None
    channel: int | None = None

    def passes(self, objective: Objective) -> int:
        """Count two passes of all windows: for the activation's signs, and under the rules."""
        return 2 * len(objective.plan)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        layer = check_layer(objective, self.layer)
        if self.channel is not None:
            check_one_member(objective)
        maps = objective.new_maps()[:1]

        def run(batch: Batch) -> None:
            def activation(x: Tensor) -> Tensor:
                with capture(objective.model.network, [layer]) as captured:
                    batch.forward(x)
                return captured[layer]

            with torch.no_grad():
                values = activation(batch.image)
            cotangent = self._sign(values, objective, layer, batch)
            guided = rules.guided(activation, batch.image, cotangent[None], compare=lambda x: values)
            objective.add(maps, batch, guided.input)

        objective.each([(0, w) for w in objective.all_windows], run, with_cotangents=False, sums=[maps])
        return Explained(maps.expand(objective.n_targets, *maps.shape[1:]).clone(), {"layer": layer})

    def _sign(self, values: Tensor, objective: Objective, layer: str, batch: Batch) -> Tensor:
        """Return ``∂ Σ_p ĝ_w |A_c| / ∂A``, in the layer's own shape."""
        values = values.detach().clone().requires_grad_(True)  # a network may give inference tensors
        with torch.enable_grad():
            on_grid = batch.unmirrored(spatial_map(values, objective, layer))
            if self.channel is not None:
                if not 0 <= self.channel < on_grid.shape[1]:
                    raise UsageError(f"channel={self.channel}: layer {layer!r} has {on_grid.shape[1]} channels")
                on_grid = on_grid[:, self.channel : self.channel + 1]
            weights = [position_weights(objective, w, on_grid.shape[2:]) for w in batch.windows]
            total = (on_grid.abs() * torch.stack(weights)[:, None].to(on_grid)).sum()
        return torch.autograd.grad(total, values)[0]
