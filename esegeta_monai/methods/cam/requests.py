"""Requests of class activation maps to a sweep over the windows."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai.engine.layer_maps import position_weights
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request, View
from esegeta_monai.errors import MethodError


class _LayerRequest(Request):
    """Sums over the positions of one layer; there is one request of each class per layer."""

    def __init__(self, layer: str) -> None:
        self.layers = (layer,)

    @property
    def key(self) -> Hashable:
        return (type(self).__name__, self.layers)

    def begin(self, objective: Objective) -> None:
        self.objective = objective


class _ChannelRequest(_LayerRequest):
    """A sum over windows and positions per channel; the result is (k, C), float64, or (views, k, C) for a layer that
    runs several times."""

    summed = ("total",)
    total: Tensor | None = None

    def see(self, view: View) -> None:
        layer = self.layers[0]
        share = view.batch.call.weight  # the blending weights of the activations contain it
        views = [(a.flatten(2), g.flatten(3) / share) for a, g in zip(view.maps(layer), view.gradient_maps(layer))]
        part = torch.stack([self.part(activations, gradients, view).cpu() for activations, gradients in views])
        if self.total is None:
            self.total = part.new_zeros((self.objective.plan.call_count * len(part), *part.shape[1:]))
        self.total[view.of_call(len(part))] += part

    def part(self, activations: Tensor, gradients: Tensor, view: View) -> Tensor:
        """Return the sum of one batch (k, C), float64, from activations (n, C, p) and gradients (k, n, C, p)."""
        raise NotImplementedError

    def result(self) -> Tensor:
        if self.total is None:
            raise MethodError("the target sees no window, so there are no gradients")
        return self.total[0] if len(self.total) == 1 else self.total


class ChannelGradients(_ChannelRequest):
    """``α_c``: the sum of ``∂F/∂A_c`` over all windows and positions, over the number of positions in the volume.

    A volume of one window gives the usual mean over the layer's positions.
    """

    def part(self, activations: Tensor, gradients: Tensor, view: View) -> Tensor:
        plan = self.objective.plan
        positions = gradients.shape[-1] * math.prod(plan.padded_shape) / math.prod(plan.roi)
        return gradients.sum((1, 3), dtype=torch.float64) / positions


class _PlusPlusWeights(_ChannelRequest):
    """``Σ α ReLU(g)``, given ``Σ A``."""

    def __init__(self, layer: str, sums: Tensor) -> None:
        super().__init__(layer)
        self.sums = sums

    def part(self, activations: Tensor, gradients: Tensor, view: View) -> Tensor:
        gradients = gradients.double()
        sums = self.sums if self.sums.ndim == 1 else self.sums[view.of_call(1).start]
        below = 2 + gradients * sums.to(gradients.device)[:, None]  # g² divided out
        return torch.where(gradients > 0, gradients / below, 0.0).sum((1, 3))


class _Products(_ChannelRequest):
    """``Σ A g``."""

    def part(self, activations: Tensor, gradients: Tensor, view: View) -> Tensor:
        return (activations.double() * gradients.double()).sum((1, 3))


@dataclass
class ChannelMoments:
    """Sums over the layer's positions in the volume, each window with its blending weight; float64.

    Attributes:
        count: number of positions.
        first: ``Σ A_c``, (C,).
        second: ``Σ A_c A_d``, (C, C).
    """

    count: float
    first: Tensor
    second: Tensor


class _Weighted(_LayerRequest):
    """Sums over the layer's positions in the volume, from all windows, each with its blending weight."""

    everywhere = True
    backward = False

    def __init__(self, layer: str, *, before_gradient: bool = False) -> None:
        super().__init__(layer)
        self.before_gradient = before_gradient
        self.first: Tensor | None = None

    def values(self, view: View) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield activations (n, C, p) and weights (n, p) of each view, float64."""
        for values in view.maps(self.layers[0]):
            share = view.batch.call.weight
            weights = [position_weights(self.objective, w, values.shape[2:]) / share for w in view.batch.windows]
            yield values.flatten(2).double(), torch.stack(weights).to(values.device).flatten(1).double()


class ChannelSums(_Weighted):
    """``Σ A_c`` of a layer: (C,), float64, or (views, C) for a layer that runs several times."""

    summed = ("first",)

    def see(self, view: View) -> None:
        first = torch.stack([torch.einsum("ncp,np->c", *pair).cpu() for pair in self.values(view)])
        if self.first is None:
            self.first = first.new_zeros((self.objective.plan.call_count * len(first), *first.shape[1:]))
        self.first[view.of_call(len(first))] += first

    def result(self) -> Tensor:
        assert self.first is not None
        return self.first[0] if len(self.first) == 1 else self.first


class Moments(_Weighted):
    """`ChannelMoments` of a layer that runs once."""

    summed = ("count", "first", "second")

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.second: Tensor | None = None

    def begin(self, objective: Objective) -> None:
        super().begin(objective)
        self.count = torch.zeros((), dtype=torch.float64)

    def see(self, view: View) -> None:
        ((values, weights),) = self.values(view)
        weighted = values * weights[:, None]
        self.count += weights.sum().cpu()
        first, second = weighted.sum((0, 2)).cpu(), torch.bmm(weighted, values.mT).sum(0).cpu()
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second + second

    def result(self) -> ChannelMoments:
        assert self.first is not None
        assert self.second is not None
        return ChannelMoments(float(self.count), self.first, self.second)
