"""The right maps: of six methods by autograd, brute force and hooks on the twin alone; of the others by explaining the
twin, an ordinary network.

One image is in each pass, nothing of the engine is used for the six.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.engine.windows.inferers import as_inferer
from tests.odd.base import OddCase
from tests.support.tensors import DOUBLE

__all__ = ["INDEPENDENT", "Truth"]

CELL, STEPS = 4, 8


class Truth:
    """F of a case by its twin, and the maps of the six methods.

    Args:
        case: with a twin.
    """

    def __init__(self, case: OddCase) -> None:
        self.case, self.network, self.x = case, case.ordinary(), case.plain_image
        if not any(p.is_floating_point() for p in self.network.parameters()):
            self.network.double()
        self.inferer = as_inferer(case.inferer)
        with torch.no_grad():
            self.score = case.score(self.predict(self.x))

    def predict(self, x: Tensor) -> Tensor:
        """Return the prediction (K, *spatial) or (K,) of an image (1, C, *spatial), one window at a time."""
        dtype = next((p.dtype for p in self.network.parameters()), DOUBLE)
        return self.inferer(x.to(dtype), lambda w, *a: torch.cat([self.network(r) for r in w.split(1)]))[0]

    def F(self, x: Tensor) -> Tensor:  # noqa: N802 - its name in all formulas
        """Return F at an image (1, C, *spatial)."""
        return self.score(self.predict(x)).double()

    def gradient(self, x: Tensor) -> Tensor:
        """Return ∂F/∂x (C, *spatial)."""
        leaf = x.detach().clone().requires_grad_(True)
        value = self.F(leaf)
        if not value.requires_grad:  # whole numbers
            return torch.zeros_like(x)[0]
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
        return torch.zeros_like(x)[0] if gradient is None else gradient[0]

    def vanilla(self) -> Tensor:
        return self.gradient(self.x)

    def input_x_gradient(self) -> Tensor:
        return self.gradient(self.x) * self.x[0]

    def integrated(self) -> Tensor:
        """Gauss-Legendre quadrature with 8 nodes."""
        nodes, weights = np.polynomial.legendre.leggauss(STEPS)
        x0 = self.case.baseline[None]
        total = torch.zeros_like(self.x[0])
        for node, weight in zip(nodes, weights):
            total += weight / 2 * self.gradient(x0 + (node + 1) / 2 * (self.x - x0))
        return total * (self.x - x0)[0]

    def without_cells(self) -> Tensor:
        """F(x) − F(x with a cell of 4 voxels an axis replaced by the baseline), at the voxels of the cell."""
        result = torch.zeros_like(self.x[0, :1])
        with torch.no_grad():
            whole = self.F(self.x)
            for corner in itertools.product(*(range(0, n, CELL) for n in self.x.shape[2:])):
                cell = (..., *(slice(i, i + CELL) for i in corner))
                changed = self.x.clone()
                changed[cell] = self.case.baseline[None][cell]
                result[cell] = whole - self.F(changed)
        return result

    def ablation(self) -> Tensor:
        """The change of F is shared equally among the voxels of the cell, in all channels."""
        return self.without_cells().expand_as(self.x[0])

    def grad_cam(self) -> Tensor | None:
        """ReLU of the sum over calls of Σ_c mean(∂F/∂A_c) A_c, each in the frame of the image; None in windows."""
        case = self.case
        if case.inferer is not None or (case.layer is None and case.parts is None):
            return None
        parts = [str(case.layer)] if case.parts is None else case.parts
        kept: dict[str, Tensor] = {}
        handles = [self.network.get_submodule(n).register_forward_hook(_keep(kept, n)) for n in parts]
        value = self.F(self.x.clone().requires_grad_(True))
        for handle in handles:
            handle.remove()
        if not value.requires_grad:
            return torch.zeros_like(self.x[0, :1])
        gradients = torch.autograd.grad(value, [kept[n] for n in parts], allow_unused=True)
        total = torch.zeros_like(self.x[0, :1])
        for name, gradient in zip(parts, gradients):
            if gradient is not None:
                total = total + self._cam(kept[name].detach(), gradient)
        return total.relu()

    def _cam(self, activations: Tensor, gradient: Tensor) -> Tensor:
        axes = tuple(range(2, activations.ndim))
        small = (gradient.mean(axes, keepdim=True) * activations).sum(1, keepdim=True)
        mode = {4: "bilinear", 5: "trilinear"}[activations.ndim]
        return F.interpolate(small, size=self.x.shape[2:], mode=mode)[0]


def _keep(kept: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        kept[name] = output

    return hook


INDEPENDENT: dict[str, Callable[[Truth], Tensor | None]] = {
    "VanillaBackprop": Truth.vanilla,
    "InputXGradient": Truth.input_x_gradient,
    "IntegratedGradients": Truth.integrated,
    "Occlusion": Truth.without_cells,
    "FeatureAblation": Truth.ablation,
    "GradCam": Truth.grad_cam,
}
"""The six methods, by name."""
