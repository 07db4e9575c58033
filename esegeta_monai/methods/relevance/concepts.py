"""Relevance that flows through given channels of a layer: what a concept of the network contributes, and where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.layer_frames import channel_axis
from esegeta_monai.engine.network.hooks import find_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method, completeness
from esegeta_monai.methods.relevance.lrp import CompositeMethod

__all__ = ["ConceptRelevance"]

MOST = 0.5
"""Share of the relevance through the layer below which a warning states that the map shows the smaller part."""


class _OfLayer(Method, registered=False):
    """A layer and its channels: the first parameters."""

    layer: str | None = None
    channels: int | Sequence[int] | None = None


class ConceptRelevance(CompositeMethod, _OfLayer):
    """Relevance of F that flows through given channels of a layer (concept relevance propagation, Achtibat et al.
    2023): LRP whose relevance at the layer is set to zero in all other channels. Linear scores only.

    Paths around the layer are left out (``exclude_parallel=True`` of zennit-crp), so that maps of channels add up to
    that of all channels. It is the whole map of `LRP` only where all paths pass the layer; in a U-Net that is the first
    level and the head, while skip connections lead around deeper layers. The map and ``booked``, what
    biases below the layer absorb, add up to the relevance of the channels at the layer.

    The record has ``share_through_layer``, the relevance of all channels divided by F without what biases elsewhere
    absorb, and ``share_around``, the rest; a share through the layer below one half is warned of.
    ``share_of_channels`` is the relevance of the given channels divided by that of all channels of the layer.

    Args:
        layer: dotted name of a layer that runs once; None: the default layer, named in the record.
        channels: number of a channel, or several; None: all channels.
        composite, epsilon, gamma: see `LRP`.

    Raises:
        UsageError: no channel, a negative one, or the same one twice.

    Example:
        >>> ConceptRelevance("model.0", channels=3).parameters["channels"]
        3
    """

    reference = "Achtibat et al., Nature Machine Intelligence 5, 2023, arXiv:2206.03208"
    produces = "input map"
    units = "target per voxel"
    for_ensembles = False

    def __post_init__(self) -> None:
        super().__post_init__()
        chosen = self._chosen()
        if chosen is not None and (not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen)):
            raise UsageError(f"channels={self.channels}: give one or several channel numbers from 0 on, each once")

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        layer = check_layer(objective, self.layer)
        axis, modules = channel_axis(objective, layer), {layer: find_layer(objective.model.network, layer)}
        composite = rules.composite_of(self.composite, **self.limits(objective))
        # relevance below the layer that biases absorb, of the channels, of the layer, around it
        sums = torch.zeros(4, objective.n_targets, dtype=torch.float64)

        def of(batch: Batch) -> torch.Tensor:
            part = rules.lrp_through(
                batch.forwards,
                batch.image,
                batch.stacked_cotangents(),
                composite,
                modules,
                self._chosen(),
                axis,
                compares=batch.compares,
            )
            values = (part.absorbed, part.at_channels, part.at_layer, part.around)
            sums.add_(torch.stack([v.double().sum(1).cpu() for v in values]))
            return part.input

        maps, padding = objective.scatter(of, sums=[sums])
        absorbed, at_channels, at_layer, around = sums
        lost = padding.sum(1, dtype=torch.float64).cpu()
        through = _shares(at_layer, at_layer + around)
        chosen = self._chosen()
        notes: dict[str, Any] = {
            "layer": layer,
            "channels_through": "all" if chosen is None else tuple(chosen),
            "booked": absorbed,
            "sum_in_padding": lost,
            "share_through_layer": through,
            "share_around": _shares(around, at_layer + around),
            "share_of_channels": _shares(at_channels, at_layer),
        }
        for score, share in zip(objective.scores, through):
            if share is not None and share < MOST:
                objective.context.progress.warn(
                    f"{self.name}: {100 * share:.2g} % of the relevance passes layer {layer!r}, the rest flows around "
                    "it: the map shows the smaller part; choose a layer that all paths pass, or read it with maps of "
                    "the layers beside it",
                    score.label,
                )
        return Explained(maps, {**notes, **completeness(maps, at_channels, lost + absorbed)})

    def _chosen(self) -> list[int] | None:
        if self.channels is None:
            return None
        return [self.channels] if isinstance(self.channels, int) else [int(c) for c in self.channels]


def _shares(parts: torch.Tensor, wholes: torch.Tensor) -> list[float | None]:
    return [float(p / w) if w != 0 else None for p, w in zip(parts, wholes)]
