"""Layer maps that contain gradients: spread over the window with their sum preserved, then added over windows."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Literal

import torch
from torch import Tensor

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_frames import spatial_map
from esegeta_monai.engine.layer_maps import check_one_member, spread
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request, View
from esegeta_monai.errors import MethodError, UsageError

__all__ = ["LayerSum", "Reduce", "ScatteredGradients", "check_reduce", "reduce_channels"]

Reduce = Literal["channels", "sum", "mean", "abs", "positive"]


def check_reduce(how: str) -> None:
    """Check the parameter ``reduce``.

    Raises:
        UsageError: it is none of the permitted words.
    """
    if how not in ("channels", "sum", "mean", "abs", "positive"):
        raise UsageError(f"reduce={how!r}: give channels, sum, mean, abs or positive")


def reduce_channels(values: Tensor, how: Reduce, axis: int = 0) -> Tensor:
    """Reduce the channels of values (n, C, …) along ``axis`` to (n, 1, …); ``"channels"`` returns them all."""
    if how == "channels":
        return values
    if how == "abs":
        return values.abs().sum(axis, keepdim=True)
    if how == "positive":
        return values.relu().sum(axis, keepdim=True)
    return values.sum(axis, keepdim=True) if how == "sum" else values.mean(axis, keepdim=True)


class LayerSum:
    """The sum over windows of a layer's attributions, on the image's grid; sums of values are preserved.

    Args:
        layer: dotted name; tokens are arranged on their grid.
        reduce: as in `reduce_channels`. ``"sum"`` and ``"mean"`` are applied per window, which saves memory, ``"abs"``
            and ``"positive"`` after the windows have been added.
    """

    def __init__(self, objective: Objective, layer: str, reduce: Reduce) -> None:
        self.objective, self.layer, self.reduce = objective, layer, reduce
        self.maps: Tensor | None = None
        self.padding: Tensor | None = None

    summed = ("maps", "padding")

    def add(self, batch: Batch, values: Tensor) -> None:
        """Add attributions in the layer's own shape, (k, n, …)."""
        self.add_map(batch, batch.unmirrored(spatial_map(values, self.objective, self.layer, lead=2)))

    def add_map(self, batch: Batch, values: Tensor) -> None:
        """Add attributions (k, n, C, *positions)."""
        if self.reduce == "channels":
            check_one_member(self.objective)
        if self.reduce in ("sum", "mean"):
            values = reduce_channels(values, self.reduce, axis=2)
        wide = spread(values.flatten(0, 1), self.objective.plan).unflatten(0, values.shape[:2])
        if self.maps is None:
            self.maps = self.objective.new_maps(values.shape[2])
            self.padding = self.maps.new_zeros(self.maps.shape[:2])
        assert self.padding is not None
        self.padding += self.objective.add(self.maps, batch, wide.to(self.maps.dtype))

    def scale(self, factor: float) -> None:
        """Multiply the sum so far by ``factor``."""
        if self.maps is not None and self.padding is not None:
            self.maps *= factor
            self.padding *= factor

    def share(self, change: Tensor) -> list[float | None]:
        """Return per target the sum, padding included, divided by a change of F (k,); None where F does not change."""
        maps, padding = self.result()
        sums = maps.flatten(1).sum(1, dtype=torch.float64).cpu() + padding.cpu()
        return [float(s / c) if c != 0 else None for s, c in zip(sums, change.cpu())]

    def result(self) -> tuple[Tensor, Tensor]:
        """Return maps (k, C or 1, *spatial), and the sum on constant padding (k,), float64."""
        if self.maps is None or self.padding is None:
            raise MethodError("the target sees no window, so there are no gradients")
        maps = self.maps if self.reduce in ("sum", "mean") else reduce_channels(self.maps, self.reduce, axis=1)
        return maps, self.padding.sum(1, dtype=torch.float64)


class ScatteredGradients(Request):
    """``Σ_w spread(combine(A_w, ∂F/∂A_w))`` from the pass at the image, as a `LayerSum`; summed over the calls of a
    layer that runs several times, each in the frame of the window.

    Args:
        layer: dotted name.
        combine: maps activations (n, C, *positions) and gradients (k, n, C, *positions) to attributions shaped like
            the gradients. It must be homogeneous in the gradients, which contain ĝ_w. Equal functions share a result.
        reduce: see `LayerSum`.
    """

    def __init__(self, layer: str, combine: Callable[[Tensor, Tensor], Tensor], reduce: Reduce = "sum") -> None:
        self.layers, self.combine, self.reduce = (layer,), combine, reduce

    @property
    def key(self) -> Hashable:
        return ("scattered", self.layers, self.combine, self.reduce)

    @property
    def parts(self) -> list[LayerSum]:
        return [self.total]

    def begin(self, objective: Objective) -> None:
        self.objective, self.total = objective, LayerSum(objective, self.layers[0], self.reduce)

    def see(self, view: View) -> None:
        layer = self.layers[0]
        for activations, gradients in zip(view.maps(layer), view.gradient_maps(layer)):
            self.total.add_map(view.batch, self.combine(activations, gradients))

    def result(self) -> tuple[Tensor, Tensor]:
        return self.total.result()
