"""Parts of the image replaced, and how much the target changes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor

from esegeta_monai.baselines import baseline_for
from esegeta_monai.configurable import json_ready
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.objective import Objective
from esegeta_monai.perturbation import Boxes, change, passes_needed

__all__ = ["Occlusion"]


@dataclass(eq=False, repr=False)
class Occlusion(Method):
    """``a(v) = mean over occluders b that hold v of F(x) − F(x with b replaced)`` (Zeiler & Fergus 2014).

    Only the windows that an occluder touches, and that the target sees, are computed again.

    Args:
        window: shape of the occluder in voxels, spatial; one number for all axes.
        stride: steps between occluders; None: ``window``, so that occluders tile the image.
        baseline: what stands in the occluder, see `esegeta_monai.baselines`.
        per_channel: each channel is occluded by itself, else all together.

    Example:
        >>> Occlusion(window=8, stride=4).parameters
        {'window': 8, 'stride': 4, 'baseline': 'auto', 'per_channel': False}
    """

    reference = "Zeiler & Fergus, ECCV 2014, arXiv:1311.2901"
    additive = False
    needs_gradient = False

    window: int | Sequence[int] = 16
    stride: int | Sequence[int] | None = None
    baseline: Any = "auto"
    per_channel: bool = False
    name: str | None = field(default=None, kw_only=True)

    @property
    def units(self) -> str:
        return "change of the target when the voxel's surroundings are replaced"

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        baseline = baseline_for(self.baseline, local=True)
        reference = baseline.draw(objective, objective.generator())
        boxes = self.occluders(objective, reference)
        drops = (-change(objective, boxes)).to(objective.image)
        changed = drops.any(0).tolist()  # an occluder that no target sees has nothing to add
        maps = objective.new_maps()
        count = torch.zeros_like(maps[0])
        rows = boxes.channels or [range(objective.image.shape[0])] * len(boxes)
        for i, place in enumerate(boxes.boxes):
            for c in rows[i]:
                index: tuple[Any, ...] = (slice(None), c, *place)
                if changed[i]:
                    maps[index] += drops[:, i].reshape(-1, *(1,) * len(place))
                count[index[1:]] += 1
        maps /= count.clamp(min=1)
        notes = {"occluders": len(boxes), "passes_at_most": passes_needed(objective, boxes)}
        return Explained(maps, {**notes, "baseline": json_ready(baseline.record())})

    def passes(self, objective: Objective) -> int:
        """At most: occluders that change no voxel are found while running."""
        return passes_needed(objective, self.occluders(objective, objective.image))

    def occluders(self, objective: Objective, reference: Tensor) -> Boxes:
        """The boxes of this case."""
        shape = objective.plan.spatial_shape
        window = self._spatial(self.window, len(shape), "window")
        stride = window if self.stride is None else self._spatial(self.stride, len(shape), "stride")
        lines = [range(0, max(n - w, 0) + s, s) for n, w, s in zip(shape, window, stride)]
        starts = [s for s in itertools.product(*lines) if all(a < n for a, n in zip(s, shape))]
        stops = [[min(a + w, n) for a, w, n in zip(s, window, shape)] for s in starts]
        channels: list[Sequence[int]] | None = None
        if self.per_channel:
            n_channels = objective.image.shape[0]
            channels = [(c,) for c in range(n_channels) for _ in starts]
            starts, stops = starts * n_channels, stops * n_channels
        return Boxes(starts, stops, reference, channels)

    @staticmethod
    def _spatial(value: int | Sequence[int], axes: int, what: str) -> tuple[int, ...]:
        try:
            shape = tuple(int(v) for v in ensure_tuple_rep(value, axes))
        except ValueError as error:
            raise UsageError(f"Occlusion: {what}={value} does not fit an image of {axes} axes") from error
        if any(v < 1 for v in shape):
            raise UsageError(f"Occlusion: {what}={value} must be positive")
        return shape
