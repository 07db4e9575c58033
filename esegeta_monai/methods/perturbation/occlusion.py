"""Occlusion: the change of the target when boxes of the image are replaced."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from monai.utils import ensure_tuple_rep
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.perturbation.base import PerturbationMethod
from esegeta_monai.methods.perturbation.refined import boxes_of_all_sizes, count_of_all_sizes, refined
from esegeta_monai.utils.registry import json_ready

__all__ = ["Occlusion"]


class Occlusion(PerturbationMethod):
    """``a(v) = mean over occluders b that contain v of F(x) − F(x with b replaced)`` (Zeiler & Fergus 2014).

    Only windows that an occluder overlaps and that the target sees are recomputed.

    Args:
        window: side lengths of the occluder in voxels; one number for all axes.
        stride: distance between occluders in voxels, at most ``window`` along each axis that is longer than the
            window; None: ``window``, so that occluders tile the image.
        baseline: replaces the voxels of the occluder, see `esegeta_monai.engine.baselines`.
        per_channel: True: occlude each channel separately; False: all channels together, so that the map has one
            channel, which does not say which of them the network used.
        refine: 2, 4, 8, …: first occlude boxes whose edge is this multiple of ``window``, and halve the edge of those
            boxes only whose effect is large. In the other boxes each voxel has the effect of the box divided by the
            number of occluders that it would hold, which is exact only if these add up. The record lists the boxes in
            which the map is exactly the full one under ``exact_boxes`` (start and stop of each axis, in voxels of the
            network's grid), and their share of the voxels under ``exact_share``. Large effects of opposite sign in one
            box may cancel and stay unseen. None: occlude all.
        refine_above: a box is divided if its effect on any target is at least this share of the largest effect of the
            boxes of its size.

    Raises:
        UsageError: the stride leaves voxels between the occluders, which no occluder would ever cover.

    Example:
        >>> Occlusion(window=8, stride=4).parameters
        {'window': 8, 'stride': 4, 'baseline': 'auto', 'per_channel': False, 'refine': None, 'refine_above': 0.05}
    """

    map_check = "cells"
    reference = "Zeiler & Fergus, ECCV 2014, arXiv:1311.2901"
    units = "change of the target when the voxel's surroundings are replaced"
    window: int | Sequence[int] = 16
    stride: int | Sequence[int] | None = None
    baseline: Any = "auto"
    per_channel: bool = False
    refine: int | None = None
    refine_above: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.refine is None:
            return
        if self.refine < 2 or self.refine & (self.refine - 1) or not 0 < self.refine_above <= 1:
            raise UsageError(
                f"Occlusion: refine={self.refine} must be 2, 4, 8, …, and refine_above={self.refine_above} above 0 and "
                "at most 1"
            )
        if self.per_channel or (self.stride is not None and self.stride != self.window):
            raise UsageError("Occlusion: refine divides boxes that tile the image: omit stride and per_channel")
        self.map_check = "none"  # type: ignore[misc] # it would compare voxels outside of the exact boxes

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial) with ``per_channel``, else (k, 1, *spatial)."""
        baseline = baseline_for(self.baseline, local=True)
        reference = baseline.draw(objective, objective.generator())
        if self.refine is not None:
            maps, notes = refined(self._edges(objective), self.refine, self.refine_above, objective, reference)
            return Explained(maps, {**notes, "baseline": json_ready(baseline.record())})
        boxes = self.occluders(objective, reference)
        drops = (-score_changes(objective, boxes)).to(objective.image)
        maps = objective.new_maps(None if self.per_channel else 1)
        changed = drops.any(0).nonzero().flatten().tolist()  # occluders that no target sees add nothing
        for i in changed:
            place = boxes.boxes[i]
            for c in range(len(maps[0])) if boxes.channels is None else boxes.channels[i]:
                index: tuple[Any, ...] = (slice(None), c, *place)
                maps[index] += drops[:, i].reshape(-1, *(1,) * len(place))
        if changed:  # otherwise the map is zero
            places = list(zip(*(boxes.boxes[i] for i in changed)))
            touched = tuple(slice(min(p.start for p in axis), max(p.stop for p in axis)) for axis in places)
            index = (..., *touched)
            counts = [count[t] for count, t in zip(self._counts(objective.plan.spatial_shape), touched)]
            for axis, count in enumerate(
                counts
            ):  # occluders form a grid: the number that contain a voxel is a product over the axes
                maps[index] /= count.to(maps).reshape(-1, *(1,) * (len(counts) - 1 - axis))
        return Explained(maps, {"occluders": len(boxes), "baseline": json_ready(baseline.record())})

    def perturbations(self, objective: Objective) -> Boxes:
        """Return all occluders, with ``refine`` those of all sizes."""
        reference = baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        if self.refine is not None:
            return boxes_of_all_sizes(self._edges(objective), self.refine, objective.plan.spatial_shape, reference)
        return self.occluders(objective, reference)

    def _edges(self, objective: Objective) -> tuple[int, ...]:
        return self._spatial(self.window, len(objective.plan.spatial_shape), "window")

    @property
    def passes_data_dependent(self) -> bool:
        return self.refine is not None or super().passes_data_dependent

    def replaced_at(self, objective: Objective, channel: int, voxel: Sequence[int]) -> list[Tensor]:
        """Return the images (C, *spatial) whose mean change is the map's value at a voxel (channel, *voxel)."""
        reference = baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        lines = self._lines(objective.plan.spatial_shape)
        holding = [[slice(a, b) for a, b in line if a <= v < b] for line, v in zip(lines, voxel)]
        rows: Any = channel if self.per_channel else slice(None)
        images = []
        for box in itertools.product(*holding):
            image, place = objective.image.clone(), (rows, *box)
            image[place] = reference[place]
            images.append(image)
        return images

    def predictions(self, objective: Objective) -> int:
        if self.refine is not None:
            return count_of_all_sizes(self._edges(objective), self.refine, objective.plan.spatial_shape)
        occluders = math.prod(len(line) for line in self._lines(objective.plan.spatial_shape))
        return occluders * (objective.image.shape[0] if self.per_channel else 1)

    def occluders(self, objective: Objective, reference: Tensor) -> Boxes:
        """Return the boxes of this case, replaced by ``reference`` (C, *spatial)."""
        lines = self._lines(objective.plan.spatial_shape)
        starts = [[s for s, _ in corner] for corner in itertools.product(*lines)]
        stops = [[t for _, t in corner] for corner in itertools.product(*lines)]
        channels: list[Sequence[int]] | None = None
        if self.per_channel:
            n_channels = objective.image.shape[0]
            channels = [(c,) for c in range(n_channels) for _ in starts]
            starts, stops = starts * n_channels, stops * n_channels
        return Boxes(starts, stops, reference, channels)

    def _lines(self, shape: Sequence[int]) -> list[list[tuple[int, int]]]:
        """Return start and stop (excluded) of the occluders along each axis."""
        window = self._spatial(self.window, len(shape), "window")
        stride = window if self.stride is None else self._spatial(self.stride, len(shape), "stride")
        for axis, (n, w, s) in enumerate(zip(shape, window, stride)):
            if s > w and n > w:  # a single occluder covers a shorter axis
                raise UsageError(
                    f"Occlusion: stride={s} is larger than window={w} along axis {axis} of {n} voxels, so no occluder "
                    f"covers the voxels between: give a stride of at most {w}"
                )
        starts = [range(0, max(n - w, 0) + s, s) for n, w, s in zip(shape, window, stride)]
        return [[(a, min(a + w, n)) for a in line if a < n] for line, w, n in zip(starts, window, shape)]

    def _counts(self, shape: Sequence[int]) -> list[Tensor]:
        """Return per axis the number of occluders that contain each voxel, at least 1."""
        counts = []
        for line, n in zip(self._lines(shape), shape):
            count = torch.zeros(n)
            for a, b in line:
                count[a:b] += 1
            counts.append(count.clamp(min=1))
        return counts

    @staticmethod
    def _spatial(value: int | Sequence[int], axes: int, what: str) -> tuple[int, ...]:
        try:
            shape = tuple(int(v) for v in ensure_tuple_rep(value, axes))
        except ValueError as error:
            raise UsageError(f"Occlusion: {what}={value} does not fit an image of {axes} axes") from error
        if any(v < 1 for v in shape):
            raise UsageError(f"Occlusion: {what}={value} must be positive")
        return shape
