"""The parts of an image that metrics remove, and what a map says about each of them.

Metrics that remove parts share their features, reference images and scores: a perturbation that another method's map
has been judged by is looked up (`esegeta_monai.change.known_change`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.change import change, known_change
from esegeta_monai.coalitions import Segments, reference_image
from esegeta_monai.configurable import json_ready
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.features import Features, Grid, features_for
from esegeta_monai.metrics.base import Subject
from esegeta_monai.objective import Objective

__all__ = ["Removal", "removal_of"]

CELLS = {2: 16, 3: 8}
"""Voxel blocks an axis, by default."""


@dataclass
class Removal:
    """Features of an image, each replaced by a reference where it is removed.

    Attributes:
        objective: with all targets, whose scores are shared; ``alone``: with the subject's target only.
        features, reference: see `esegeta_monai.features` and `esegeta_monai.coalitions.reference_image`.
        row: of the subject's target in ``objective``.
    """

    objective: Objective
    alone: Objective
    features: Features
    reference: Tensor
    row: int
    shares: Tensor
    """What the map says of each feature: the sum of the map over it (n,), float64."""
    voxels: Tensor
    """Entries of each feature (n,)."""
    seen: np.ndarray
    """Numbers of the features that lie in some window that the target sees; all others change nothing."""

    @property
    def full(self) -> float:
        """``F(x₀) − F(x)``: all features removed."""
        return float(self._change(self.alone, np.zeros((1, len(self.features)), dtype=bool), known=True)[0])

    def own(self, coalitions: np.ndarray) -> np.ndarray:
        """``F(x_S) − F(x)`` for coalitions (m, n) that depend on the map: of this target alone."""
        return self._change(self.alone, coalitions, known=False)

    def common(self, coalitions: np.ndarray) -> np.ndarray:
        """The same for coalitions that other maps are judged by too: of all targets, computed once."""
        return self._change(self.objective, coalitions, known=True)

    def _change(self, objective: Objective, coalitions: np.ndarray, known: bool) -> np.ndarray:
        segments = Segments(self.features.labels, coalitions, self.reference, objective.image)
        found = (known_change if known else change)(objective, segments)
        return found[self.row if objective is self.objective else 0].numpy()

    def order(self, by: Tensor | None = None) -> np.ndarray:
        """Numbers of the features by the mean of the map over them, greatest first; ties by number."""
        means = self.shares / self.voxels.clamp(min=1) if by is None else by
        return np.argsort(-means.numpy(), kind="stable")


def removal_of(subject: Subject, features: Any, baseline: Any, seed: int | None = None) -> Removal:
    """The features of a subject's image and what its map says of them.

    Args:
        features: see `esegeta_monai.features.features_for`; ``"blocks"``: about 16 blocks an axis in 2D, 8 in 3D.
        baseline: see `reference_image`.
        seed: of a random baseline; None: the run's.
    """
    objective = subject.need_objective()
    spec = _blocks(objective) if isinstance(features, str) and features == "blocks" else features_for(features)
    what = repr(json_ready(spec)) if not isinstance(spec, Tensor) else id(features)
    found = subject.once(("features", what), lambda: spec.of(objective))

    def draw() -> Tensor:
        if seed is None:
            return reference_image(objective, found, baseline)[1]
        drawn, objective.seed = objective.seed, seed
        try:
            return reference_image(objective, found, baseline)[1]
        finally:
            objective.seed = drawn

    by = id(baseline) if isinstance(baseline, Tensor) else repr(json_ready(baseline))
    reference = subject.once(("reference", what, by, seed), draw)
    values = subject.per_channel.to(found.labels.device)
    if len(found.labels) == 1:
        values = values.sum(0, keepdim=True)
    flat = found.labels.flatten() + 1
    shares = torch.zeros(len(found) + 1, dtype=torch.float64, device=values.device)
    shares.index_add_(0, flat, values.flatten())
    seen = subject.once(("seen", what, subject.target), lambda: _seen(subject.alone, found))
    if len(seen) < 2:
        raise MetricError(
            f"the target sees {len(seen)} of the {len(found)} features: nothing could be compared; take smaller ones, "
            "such as features='grid(size=4)'"
        )
    return Removal(
        objective, subject.alone, found, reference, subject.target, shares[1:].cpu(), found.counts.double().cpu(), seen
    )


def _blocks(objective: Objective) -> Grid:
    shape = objective.plan.spatial_shape
    return Grid([math.ceil(n / CELLS[len(shape)]) for n in shape])


def _seen(objective: Objective, features: Features) -> np.ndarray:
    inside = torch.zeros(objective.plan.spatial_shape, dtype=torch.bool)
    for w in objective.windows:
        inside[objective.plan.place(w)] = True
    labels = features.labels.cpu()
    found = torch.unique(labels[inside.expand(labels.shape)]).numpy()
    return found[found >= 0]


def at_least(metric: object, what: str, value: float, least: float) -> None:
    """Raises where a parameter is too small."""
    if isinstance(value, bool) or value < least:
        raise UsageError(f"{type(metric).__name__}: {what}={value} must be at least {least:g}")
