"""The target of one unit of an inner layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, replace

import torch
from torch import Tensor

from esegeta_monai.engine.head import Head
from esegeta_monai.engine.score import Case, Score, WeightedScore
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import Target
from esegeta_monai.targets.regions import Voxel

__all__ = ["LayerNeuron"]


class LayerNeuron(Target):
    """One unit of an inner layer: ``s = Σ_w ĝ_w(v) · A_w(c, p(v))``.

    The sum is over the windows w that contain the voxel v; p(v) is the position of the layer whose cell contains v. The
    layer replaces the prediction (`esegeta_monai.engine.layer_maps.LayerOutput`), so the unit can be explained by every
    input method and in every earlier layer. The score is linear in the layer.

    Args:
        layer: dotted name.
        channel: c.
        world: v in RAS mm, rounded to the nearest voxel.
        index: v as voxel index on the network's grid. Omit both for a layer that gives a vector.

    Example:
        >>> LayerNeuron("model.0", 3, index=(8, 8, 4)).parameters["channel"]
        3
    """

    layer: str = field()  # type: ignore[misc]  # no default, although the base class has one
    channel: int
    world: Sequence[float] | None = None
    index: Sequence[int] | None = None

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score; ``prediction`` is the layer's output (C, *spatial), or (C,).

        Raises:
            TargetError: no such channel or voxel, or a voxel missing or given for a vector.
        """
        channels = prediction.shape[0]
        if isinstance(self.channel, bool) or not 0 <= self.channel < channels:
            raise TargetError(f"LayerNeuron: layer {self.layer!r} has {channels} channels, not {self.channel}")
        label = self.given_name or f"LayerNeuron-{self.layer}-{self.channel}"
        if prediction.ndim == 1:
            if self.world is not None or self.index is not None:
                raise TargetError(f"LayerNeuron: layer {self.layer!r} gives a vector: omit world and index")
            score = WeightedScore(torch.tensor(True, device=prediction.device), self.channel, channels, label=label)
        elif self.world is None and self.index is None:
            raise TargetError(
                f"LayerNeuron: layer {self.layer!r} has positions: give world=(x, y, z) or index=(i, j, k)"
            )
        else:
            case = replace(case, class_names={}, head=Head())  # those of the prediction, not of the layer
            (at,) = Voxel(self.channel, world=self.world, index=self.index, name=label).bind(prediction, case)
            assert isinstance(at, WeightedScore)
            score = at
        score.class_index = score.class_name = None
        return [score]
