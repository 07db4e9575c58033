"""Layer-wise relevance at a layer."""

from __future__ import annotations

import torch

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.network.hooks import find_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained, gaps
from esegeta_monai.methods.layer.activation import LayerMethod
from esegeta_monai.methods.layer.scattered import LayerSum
from esegeta_monai.methods.relevance.lrp import CompositeMethod, absorbed_notes

__all__ = ["LayerLRP"]


class LayerLRP(CompositeMethod, LayerMethod):
    """Layer-wise relevance of a layer's units (Bach et al. 2015), see `LRP`. Linear scores only.

    The record has what biases keep of the whole propagation down to the image (``booked``, ``absorbed_share``), and its
    completeness gap.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        composite, epsilon, gamma: see `LRP`.
    """

    reference = "Bach et al., PLoS ONE 2015, doi:10.1371/journal.pone.0130140"

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        module = find_layer(objective.model.network, layer)
        total = LayerSum(objective, layer, self.reduce)
        limits = self.limits(objective)
        # sums of the relevance at the image, of its absolute values, of what biases keep, and of the score
        sums = torch.zeros(4, objective.n_targets, dtype=torch.float64)

        def run(batch: Batch) -> None:
            relevance = rules.lrp(
                batch.forwards,
                batch.image,
                batch.stacked_cotangents(),
                self.composite,
                layers={layer: module},
                compare=batch.compares,
                **limits,
            )
            total.add(batch, relevance.layers[layer].relevance)
            at_image = relevance.input.double().flatten(1)
            kept, score = relevance.absorbed.double().sum(1), batch.scores(relevance.output).sum(1)
            sums.add_(torch.stack([v.cpu() for v in (at_image.sum(1), at_image.abs().sum(1), kept, score)]))

        objective.each([(0, w) for w in objective.windows], run, sums=[total, sums])
        maps, padding = total.result()
        at_image, sizes, kept, score = sums
        notes = {**absorbed_notes(kept, score), **gaps(at_image + kept, sizes, score)}
        return Explained(maps, {"layer": layer, "sum_in_padding": padding, **notes})
