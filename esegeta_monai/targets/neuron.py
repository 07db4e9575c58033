"""A unit of an inner layer as the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field

import torch
from torch import Tensor

from esegeta_monai.engine.score import Case, Score, WeightedScore
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import Target
from esegeta_monai.targets.regions import Voxel

__all__ = ["LayerNeuron"]


class LayerNeuron(Target):
    """One unit of an inner layer: ``s = Σ_w ĝ_w(v) · A_w(c, p(v))`` over the windows w that hold the voxel v, p(v) the
    position of the layer whose cell holds v.

    The layer takes the place of the prediction (`esegeta_monai.engine.layer_maps.LayerOutput`), so that every
    input method, and methods at every earlier layer, can explain this unit. Linear in the layer.

    Args:
        layer: dotted name.
        channel: c.
        world: v in RAS mm; the nearest voxel is taken.
        index: v as voxel index on the network's grid. For a layer whose output is a vector give neither.

    Example:
        >>> LayerNeuron("model.0", 3, index=(8, 8, 4)).parameters["channel"]
        3
    """

    layer: str = field()  # type: ignore[misc]  # no default, although the base class has one
    channel: int
    world: Sequence[float] | None = None
    index: Sequence[int] | None = None

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """One score; ``prediction`` is the layer's output (C, *spatial), or (C,).

        Raises:
            TargetError: no such channel, or no such place.
        """
        channels = prediction.shape[0]
        if isinstance(self.channel, bool) or not 0 <= self.channel < channels:
            raise TargetError(f"LayerNeuron: layer {self.layer!r} has {channels} channels, not {self.channel}")
        label = self.given_name or f"LayerNeuron-{self.layer}-{self.channel}"
        if prediction.ndim == 1:
            if self.world is not None or self.index is not None:
                raise TargetError(f"LayerNeuron: layer {self.layer!r} gives a vector: leave world and index away")
            score = WeightedScore(torch.tensor(True, device=prediction.device), self.channel, channels, label=label)
        elif self.world is None and self.index is None:
            raise TargetError(
                f"LayerNeuron: layer {self.layer!r} has positions: give world=(x, y, z) or index=(i, j, k)"
            )
        else:
            (at,) = Voxel(self.channel, world=self.world, index=self.index, name=label).bind(prediction, case)
            assert isinstance(at, WeightedScore)
            score = at
        score.class_index = score.class_name = None
        return [score]
