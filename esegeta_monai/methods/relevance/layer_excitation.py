"""Excitation backpropagation at a layer, and its contrast with the opposite target at another layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.network.hooks import find_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.layer.activation import LayerMethod
from esegeta_monai.methods.layer.scattered import LayerSum, Reduce, reduce_channels

__all__ = ["LayerExcitationBackprop"]


class LayerExcitationBackprop(LayerMethod):
    """Excitation backpropagation at a layer: the probability that a winner drawn at the output is traced to a unit
    (Zhang et al. 2018); with ``contrast_layer`` minus that of the opposite target.

    With a contrast layer the map is ``prior · (T / t − A / a)``: T is the probability of the target at ``layer``, A the
    part of the opposite's probability that reaches ``layer`` through ``contrast_layer``; t and a are what the last
    weights pass down, as in `ContrastiveExcitationBackprop`. The opposite has the signs of the last weights changed.
    Paths around the contrast layer are not subtracted; where there are none, all contrast layers give the same map.
    Linear scores only, which rise with the outputs that they read.

    Args:
        layer: dotted name; None: the default layer, named in the record. ``"name:input"``: the input of the layer.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        contrast_layer: dotted name of the layer itself or of one between it and the output; None: no contrast.
        positive: keep positive values of the contrast only, after the channels are reduced, as TorchRay does.

    The record has ``share_at_layer``, the sum of T relative to the prior: below 1 where paths lead around the layer or
    only a bias excites a unit above it.

    Example:
        >>> LayerExcitationBackprop("model.0", contrast_layer="model.2").signed
        False
    """

    reference = "Zhang et al., IJCV 2018, doi:10.1007/s11263-017-1059-x"
    units = "share of the prior"
    additive = True
    full_precision = True
    needs_linear = True
    needs_positive = True

    contrast_layer: str | None = None
    positive: bool = True

    @property
    def signed(self) -> bool:
        return self.contrast_layer is not None and not self.positive and super().signed

    def passes(self, objective: Objective) -> int:
        """Count one pass, and a plain one of the first window, whose output is compared with that under the rules."""
        return len(objective.windows) + 1

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        contrast = None if self.contrast_layer is None else check_layer(objective, self.contrast_layer)
        network = objective.model.network
        modules = {name: find_layer(network, name) for name in dict.fromkeys([layer, contrast or layer])}
        inner: Reduce = self.reduce if self.reduce in ("sum", "mean") else "channels"
        sides = [LayerSum(objective, layer, inner) for _ in range(1 if contrast is None else 2)]
        kept = torch.zeros(2, objective.n_targets, dtype=torch.float64)
        prior = torch.zeros_like(kept[0])

        def run(batch: Batch) -> None:
            cotangents = batch.stacked_cotangents()
            prior.add_(cotangents.flatten(1).sum(1, dtype=torch.float64).cpu())
            if contrast is None:
                result = rules.excitation(batch.forward, batch.image, cotangents, layers=modules, compare=batch.compare)
                sides[0].add(batch, result.layers[layer].relevance)
                return
            both = rules.layer_contrast(
                batch.forward, batch.image, cotangents, modules, layer, contrast, compare=batch.compare
            )
            kept.add_(both.kept.cpu())
            sides[0].add(batch, both.target)
            sides[1].add(batch, both.opposite)

        objective.each([(0, w) for w in objective.windows], run, sums=[*sides, kept, prior])
        maps, padding = sides[0].result()
        notes: dict[str, Any] = {"layer": layer, "sum_in_padding": padding}
        if inner == "sum":
            notes["share_at_layer"] = sides[0].share(prior)
        if contrast is not None:
            factors = torch.where(kept > 0, prior / torch.where(kept > 0, kept, 1.0), 0.0)
            opposite, opposite_padding = sides[1].result()
            maps = _scaled(maps, factors[0]) - _scaled(opposite, factors[1])
            notes["sum_in_padding"] = padding.cpu() * factors[0] - opposite_padding.cpu() * factors[1]
            notes |= {"contrast_layer": contrast, "kept_target": kept[0] / prior, "kept_opposite": kept[1] / prior}
        if self.reduce != inner:
            maps = reduce_channels(maps, self.reduce, axis=1)
        return Explained(maps.clamp(min=0) if contrast is not None and self.positive else maps, notes)


def _scaled(maps: Tensor, factors: Tensor) -> Tensor:
    return maps * factors.reshape(-1, *(1,) * (maps.ndim - 1)).to(maps)
