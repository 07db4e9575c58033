"""Layer-wise relevance at a layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.network.hooks import find_layer
from esegeta_monai.engine.objective import Batch, Objective
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.layer.activation import LayerMethod
from esegeta_monai.methods.layer.scattered import LayerSum
from esegeta_monai.methods.relevance.lrp import input_range

__all__ = ["LayerLRP"]


class LayerLRP(LayerMethod):
    """Layer-wise relevance that arrives at a layer's units (Bach et al. 2015), see `LRP`. Linear scores only.

    Args:
        layer: dotted name; None: a sensible one is found and named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        composite, epsilon, gamma: see `LRP`.
    """

    reference = "Bach et al., PLoS ONE 2015, doi:10.1371/journal.pone.0130140"
    additive = True
    units = "target per voxel"
    full_precision = True
    needs_linear = True

    composite: str | Mapping[str, Any] = "EpsilonPlus"
    epsilon: float = 1e-6
    gamma: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        rules.composite_of(self.composite, epsilon=self.epsilon, gamma=self.gamma, low=0.0, high=1.0)

    def passes(self, objective: Objective) -> int:
        """Once, and the first window twice: its output under the rules is compared with the plain one."""
        return len(objective.windows) + 1

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        module = find_layer(objective.model.network, layer)
        total = LayerSum(objective, layer, self.reduce)
        low, high = input_range(objective)
        limits: dict[str, Any] = {"epsilon": self.epsilon, "gamma": self.gamma, "low": low, "high": high}

        def run(batch: Batch) -> None:
            found = rules.lrp(
                batch.forwards,
                batch.image,
                batch.stacked_cotangents(),
                self.composite,
                layers={layer: module},
                compare=batch.compares,
                **limits,
            )
            total.add(batch, found.layers[layer].relevance)

        objective.each([(0, w) for w in objective.windows], run, sums=[total])
        maps, padding = total.result()
        notes: dict[str, Any] = {"layer": layer, "sum_in_padding": padding}
        return Explained(maps, notes)
