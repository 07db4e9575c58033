"""Grad-CAM with weights from a second-order expansion of the target."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_frames import spatial_map
from esegeta_monai.engine.layer_maps import BlendedActivations
from esegeta_monai.engine.network.hooks import capture
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError
from esegeta_monai.methods.cam.gradient_cam import LayerPasses, _Cam

__all__ = ["ShapleyCam"]


class ShapleyCam(_Cam):
    """``ReLU(Σ_c α_c A_c)`` with ``α_c`` the mean over positions of ``g − ½ H A`` (Cai 2025).

    g and H are the gradient and the Hessian of F at the layer, A is its map, without class tokens. α_c is the Shapley
    value of a channel in the second-order expansion of F, per unit of activation.

    Where F is piecewise linear above the layer (rectifiers and the logit), ``H A = 0`` and the map is that of
    `GradCam`. Linear scores only (``output="logit"``): windows then do not interact, so that H has one block for each.

    Args:
        layer, relu: see `GradCam`.
    """

    call_by_call = True
    needs_linear = True
    full_precision = True  # second derivatives
    reference = "Cai 2025, arXiv:2501.06261"

    def layer_map(self, objective: Objective, layer: str) -> LayerPasses:
        weights = self._weights(objective, layer)
        return (yield BlendedActivations(layer, weights))

    def _weights(self, objective: Objective, layer: str) -> Tensor:
        """Return α (k, C), float64."""
        plan = objective.plan
        total: list[Tensor] = []

        def see(batch: Batch, values: Tensor) -> None:
            on_grid = batch.unmirrored(spatial_map(values, objective, layer, lead=2))
            positions = math.prod(on_grid.shape[3:]) * math.prod(plan.padded_shape) / math.prod(plan.roi)
            part = on_grid.flatten(3).sum((1, 3), dtype=torch.float64).cpu() / positions
            total[:] = [total[0] + part] if total else [part]

        def run(batch: Batch) -> None:
            seen = capture(objective.model.network, [layer], leaves=True)
            # fused attention has no second derivative
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), seen as captured:
                out = batch.forward(batch.image.detach())
            if not out.requires_grad:
                raise _no_path(layer)
            a = captured[layer]
            along = a.detach() * _in_map(a, objective, layer)
            weights = torch.zeros((objective.n_targets, *a.shape), dtype=a.dtype, device=a.device)
            for k, cotangent in enumerate(batch.cotangents):
                if cotangent is not None:
                    weights[k] = _second_order(out, cotangent, a, along, layer)
            see(batch, weights)

        objective.each([(0, w) for w in objective.windows], run)
        if not total:
            raise MethodError("the target sees no window, so there are no gradients")
        return total[0]


def _in_map(a: Tensor, objective: Objective, layer: str) -> Tensor:
    """Return 1 for the entries of a layer's output (n, …) that are in its map, 0 for others, such as a class token."""
    with torch.enable_grad():
        probe = torch.zeros_like(a).requires_grad_(True)
        (inside,) = torch.autograd.grad(spatial_map(probe, objective, layer).sum(), probe)
    return inside


def _no_path(layer: str) -> MethodError:
    return MethodError(f"the target does not depend on layer {layer!r} by a differentiable path: choose another")


def _second_order(out: Tensor, cotangent: Tensor, a: Tensor, along: Tensor, layer: str) -> Tensor:
    """Return ``g − ½ H v`` (n, …) of the score of a network output (n, R, *out_roi) at a layer's output a (n, …).

    v is ``along`` (n, …).
    """
    with torch.enable_grad():
        (g,) = torch.autograd.grad((out * cotangent).sum(), a, create_graph=True, allow_unused=True, retain_graph=True)
        if g is None:
            raise _no_path(layer)
        if not g.requires_grad:  # linear above the layer
            return g
        try:
            (product,) = torch.autograd.grad(g, a, along, allow_unused=True, retain_graph=True)
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise MethodError(
                f"ShapleyCam needs second derivatives, which an operation after layer {layer!r} does not have "
                f"({' '.join(str(error).split())[:200]}): use GradCam"
            ) from error
    g = g.detach()
    return g if product is None else g - product / 2
