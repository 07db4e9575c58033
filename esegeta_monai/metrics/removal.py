"""The parts of an image that metrics remove, and what a map says about each of them.

Metrics that remove parts share their features, reference images and scores: a perturbation that another method's map
has been judged by is looked up (`esegeta_monai.engine.perturbation.scoring.known_score_changes`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.feature_masks import Features, Grid, features_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.game import is_feature_mean, reference_image
from esegeta_monai.engine.perturbation.masks import Segments
from esegeta_monai.engine.perturbation.scoring import known_score_changes
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.metrics.base import MetricInput
from esegeta_monai.utils.registry import json_ready

__all__ = ["Removal", "blind", "check_parts", "drawn_removals", "ranking", "removal_of", "value_of"]

CELLS = {2: 16, 3: 8}
"""Voxel blocks an axis, by default."""

SAME = 9
"""Digits, of the greatest, in which means over features must agree to be called equal: sums of one number over
features of different sizes differ in the last."""


@dataclass
class Removal:
    """Features of an image, each replaced by a reference where it is removed.

    Attributes:
        objective: with all targets, whose scores are shared; ``alone``: with the subject's target only.
        features: see `esegeta_monai.engine.feature_masks`.
        row: of the subject's target in ``objective``.
        random: whether another draw has another reference.
        seed: of the order of features that the map says the same of.
    """

    objective: Objective
    alone: Objective
    features: Features
    segments: Segments
    """The features and their reference, shared by all coalitions and by all maps of the image."""
    row: int
    shares: Tensor
    """What the map says of each feature: the sum of the map over it (n,), float64."""
    voxels: Tensor
    """Entries of each feature (n,)."""
    seen: np.ndarray
    """Numbers of the features that lie in some window that the target sees; all others change nothing."""

    random: bool
    seed: int

    @property
    def full(self) -> float:
        """``F(x₀) − F(x)``: all features removed."""
        return float(self.own(np.zeros((1, len(self.features)), dtype=bool))[0])

    def own(self, coalitions: np.ndarray) -> np.ndarray:
        """``F(x_S) − F(x)`` for coalitions (m, n) that depend on the map: of this target alone."""
        return self._change(self.alone, coalitions)[0].numpy()

    def common(self, coalitions: np.ndarray) -> np.ndarray:
        """The same for coalitions that other maps are judged by too: of all targets, computed once."""
        return self._change(self.objective, coalitions)[self.row].numpy()

    def _change(self, objective: Objective, coalitions: np.ndarray) -> Tensor:
        return known_score_changes(objective, self.segments.with_coalitions(coalitions))

    @cached_property
    def means(self) -> Tensor:
        """Of the map over the features that are seen, in units of the greatest, and rounded (m,)."""
        means = (self.shares / self.voxels.clamp(min=1))[torch.from_numpy(self.seen)]
        return (means / means.abs().max().clamp(min=torch.finfo(means.dtype).tiny)).round(decimals=SAME)

    @cached_property
    def order(self) -> np.ndarray:
        """Numbers of the features that are seen by the mean of the map over them, greatest first; see `ranking`."""
        return self.seen[ranking(self.means, self.seed).numpy()]

    @property
    def tied(self) -> bool:
        """Whether the map says the same of some features, so that the order rests on chance."""
        return len(self.means.unique()) < len(self.means)


def ranking(values: Tensor, seed: int) -> Tensor:
    """Positions of values (n,) from the greatest to the least; equal ones in a random order.

    An order by number would favour maps that are flat where the cause happens to come first.

    >>> ranking(torch.tensor([1.0, 3.0, 2.0]), seed=0).tolist()
    [1, 2, 0]
    """
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(values))).to(values.device)
    return drawn[torch.argsort(values[drawn], descending=True, stable=True)]


def drawn_removals(subject: MetricInput, features: Any, baseline: Any, n_samples: int) -> Iterator[Removal]:
    """`removal_of` for several draws of a random baseline and of the order of features that the map says the same of;
    one where neither is left to chance."""
    for draw in range(n_samples):
        removal = removal_of(subject, features, baseline, draw)
        yield removal
        if not removal.random and not removal.tied:
            return


def removal_of(subject: MetricInput, features: Any, baseline: Any, draw: int = 0) -> Removal:
    """The features of a subject's image and what its map says of them.

    Args:
        features: see `esegeta_monai.engine.feature_masks.features_for`; ``"blocks"``: about 16 blocks an axis in 2D, 8
        in 3D.
        baseline: see `reference_image`.
        draw: which one, of a random baseline and of the order of equal features; 0: by the run's seed.
    """
    objective = subject.need_objective()
    spec = _blocks(objective) if isinstance(features, str) and features == "blocks" else features_for(features)
    what = repr(json_ready(spec)) if not isinstance(spec, Tensor) else id(features)
    parts = subject.once(("features", what), lambda: spec.of(objective))
    random = not is_feature_mean(baseline) and baseline_for(baseline, local=True).random
    seed = objective.seed + draw

    def segments_of() -> Segments:
        run_seed = objective.seed
        objective.seed = seed if random else run_seed
        try:
            reference = reference_image(objective, parts, baseline)[1]
        finally:
            objective.seed = run_seed
        return Segments(parts.labels, np.ones((0, len(parts)), dtype=bool), reference, objective.image)

    by = id(baseline) if isinstance(baseline, Tensor) else repr(json_ready(baseline))
    segments = subject.once(("segments", what, by, draw if random else 0), segments_of)
    values = subject.per_channel.to(parts.labels.device)
    if len(parts.labels) == 1:
        values = values.sum(0, keepdim=True)
    flat = parts.labels.flatten() + 1
    shares = torch.zeros(len(parts) + 1, dtype=torch.float64, device=values.device)
    shares.index_add_(0, flat, values.flatten())
    seen = subject.once(("seen", what, subject.target), lambda: _seen(subject.alone, parts))
    if len(seen) < 2:
        raise MetricError(
            f"the target sees {len(seen)} of the {len(parts)} features: nothing could be compared; take smaller ones, "
            "such as features='grid(size=4)'"
        )
    voxels = parts.counts.double().cpu()
    return Removal(
        objective, subject.alone, parts, segments, subject.target, shares[1:].cpu(), voxels, seen, random, seed
    )


def _blocks(objective: Objective) -> Grid:
    shape = objective.plan.spatial_shape
    return Grid([math.ceil(n / CELLS[len(shape)]) for n in shape])


def _seen(objective: Objective, features: Features) -> np.ndarray:
    inside = torch.zeros(objective.plan.spatial_shape, dtype=torch.bool)
    for w in objective.windows:
        inside[objective.plan.place(w)] = True
    labels = features.labels.cpu()
    numbers = torch.unique(labels[inside.expand(labels.shape)]).numpy()
    return numbers[numbers >= 0]


def value_of(subject: MetricInput) -> float:
    """``F(x)`` of the subject's target, asked once for all maps."""
    objective = subject.need_objective()
    return float(subject.once("values", lambda: objective.image_values().cpu())[subject.target])


def blind(subject: MetricInput, full: float) -> bool:
    """Whether ``F(x₀) − F(x)`` is no more than the image's precision lets be seen, a hundred of its last digit of F: in
    units of it every loss would be rounding."""
    value = value_of(subject)
    return abs(full) <= 100 * torch.finfo(subject.need_objective().image.dtype).eps * max(abs(value), abs(value + full))


def check_parts(features: Any, baseline: Any) -> None:
    """Raises a UsageError where `removal_of` would not know features or baseline, before anything is computed."""
    if not (isinstance(features, str) and features == "blocks"):
        features_for(features)
    if not is_feature_mean(baseline):
        baseline_for(baseline, local=True)


def at_least(metric: object, what: str, value: float, least: float) -> None:
    """Raises where a parameter is too small."""
    if isinstance(value, bool) or value < least:
        raise UsageError(f"{type(metric).__name__}: {what}={value} must be at least {least:g}")
