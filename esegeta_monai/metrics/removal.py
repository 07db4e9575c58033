"""The parts of an image that metrics remove, and the map's share of each part.

Metrics that remove parts share their features, reference images and scores: scores of perturbations that were computed
for another map are reused (`esegeta_monai.engine.perturbation.scoring.known_score_changes`).
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
from esegeta_monai.utils.tensors import digest

__all__ = [
    "Removal",
    "blind",
    "check_parts",
    "drawn_removals",
    "is_random",
    "ranking",
    "removal_of",
    "used_parts",
    "value_of",
]

CELLS = {2: 16, 3: 8}
"""Default number of blocks per axis, by dimension."""

SAME = 9
"""Decimals, relative to the greatest mean, to which means over features must agree to be equal: rounding depends on the
size of a feature."""


@dataclass
class Removal:
    """Features of an image, each replaced by a reference where it is removed.

    Attributes:
        objective: has all targets, whose scores are shared.
        alone: has the subject's target only.
        features: see `esegeta_monai.engine.feature_masks`.
        row: index of the subject's target in ``objective``.
        random: True if each draw has another reference.
        seed: seed of the order of features with equal means of the map.
    """

    objective: Objective
    alone: Objective
    features: Features
    segments: Segments
    """The features and their reference, shared by all coalitions and by all maps of the image."""
    row: int
    shares: Tensor
    """Sum of the map over each feature (n,), float64."""
    voxels: Tensor
    """Number of entries of each feature (n,), float64."""
    seen: np.ndarray
    """Indices of the features inside windows that the target sees; all others change nothing."""

    random: bool
    seed: int

    @property
    def full(self) -> float:
        """``F(x₀) − F(x)``: all features removed."""
        return float(self.own(np.zeros((1, len(self.features)), dtype=bool))[0])

    def own(self, coalitions: np.ndarray) -> np.ndarray:
        """Compute ``F(x_S) − F(x)`` (m,) for coalitions (m, n) that depend on the map: for this target alone."""
        return self._change(self.alone, coalitions)[0].numpy()

    def common(self, coalitions: np.ndarray) -> np.ndarray:
        """Compute the same for coalitions that other maps share: for all targets, once."""
        return self._change(self.objective, coalitions)[self.row].numpy()

    def _change(self, objective: Objective, coalitions: np.ndarray) -> Tensor:
        return known_score_changes(objective, self.segments.with_coalitions(coalitions))

    @cached_property
    def means(self) -> Tensor:
        """Means of the map over the features that are seen (m,), relative to the greatest, rounded."""
        means = (self.shares / self.voxels.clamp(min=1))[torch.from_numpy(self.seen)]
        return (means / means.abs().max().clamp(min=torch.finfo(means.dtype).tiny)).round(decimals=SAME)

    @cached_property
    def order(self) -> np.ndarray:
        """Indices of the features that are seen, by descending mean of the map; see `ranking`."""
        return self.seen[ranking(self.means, self.seed).numpy()]

    @property
    def tied(self) -> bool:
        """True if some features have equal means of the map, so that their order is random."""
        return len(self.means.unique()) < len(self.means)


def ranking(values: Tensor, seed: int) -> Tensor:
    """Return indices of values (n,) in descending order; equal values in a random order.

    An order by index would favour maps that are flat where the cause happens to come first.

    >>> ranking(torch.tensor([1.0, 3.0, 2.0]), seed=0).tolist()
    [1, 2, 0]
    """
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(values))).to(values.device)
    return drawn[torch.argsort(values[drawn], descending=True, stable=True)]


def drawn_removals(subject: MetricInput, features: Any, baseline: Any, n_samples: int) -> Iterator[Removal]:
    """Yield `removal_of` for several draws of a random baseline and of the order of equal features; one draw if neither
    is random."""
    for draw in range(n_samples):
        removal = removal_of(subject, features, baseline, draw)
        yield removal
        if not removal.random and not removal.tied:
            return


def removal_of(subject: MetricInput, features: Any, baseline: Any, draw: int = 0) -> Removal:
    """Return the features of a subject's image, with the map's sum over each.

    Args:
        features: see `esegeta_monai.engine.feature_masks.features_for`; ``"blocks"``: about 16 blocks per axis in 2D,
            8 in 3D.
        baseline: see `reference_image`.
        draw: index of the draw of a random baseline and of the order of equal features; 0 uses the run's seed.
    """
    objective = subject.need_objective()
    spec = _blocks(objective) if isinstance(features, str) and features == "blocks" else features_for(features)
    what = repr(json_ready(spec)) if not isinstance(spec, Tensor) else id(features)
    parts = subject.once(("features", what), lambda: spec.of(objective))
    random = is_random(baseline)
    seed = objective.seed + draw

    def segments_of() -> Segments:
        drawn = objective.derive(seed=seed) if random else objective
        reference = reference_image(drawn, parts, baseline)[1]
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
            f"the target sees {len(seen)} of the {len(parts)} features: too few to compare; use smaller ones, "
            "such as features='grid(size=4)'"
        )
    voxels = parts.counts.double().cpu()
    return Removal(
        objective, subject.alone, parts, segments, subject.target, shares[1:].cpu(), voxels, seen, random, seed
    )


def is_random(baseline: Any) -> bool:
    """True if each draw of a baseline, as given to a metric, has other values."""
    return not is_feature_mean(baseline) and baseline_for(baseline, local=True).random


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
    """Return ``F(x)`` of the subject's target, computed once for all maps."""
    objective = subject.need_objective()
    return float(subject.once("values", lambda: objective.image_values().cpu())[subject.target])


def blind(subject: MetricInput, full: float) -> bool:
    """True if ``F(x₀) − F(x)`` is at most 100 units of rounding of F in the image's precision: differences in units of
    it would be rounding errors."""
    value = value_of(subject)
    return abs(full) <= 100 * torch.finfo(subject.need_objective().image.dtype).eps * max(abs(value), abs(value + full))


def used_parts(metric: object, subject: MetricInput) -> dict[str, Any]:
    """Return what a metric replaces and by what, so that its value can be computed again.

    Returns:
        ``baseline``, as chosen, with its value per channel if it is constant, and the SHA-256 of its first draw;
        ``features``, as chosen. {} for metrics without these parameters.

    No window pass is needed: a baseline that replaces a part of the image is chosen from the image alone.
    """
    used: dict[str, Any] = {}
    baseline, features = getattr(metric, "baseline", None), getattr(metric, "features", None)
    objective = subject.need_objective()
    if is_feature_mean(baseline):
        used["baseline"] = {"name": "mean of each feature"}
    elif baseline is not None:

        def drawn() -> dict[str, Any]:
            parsed = baseline_for(baseline, local=True)
            volume = parsed.draw(objective, objective.generator())
            flat = volume.flatten(1)
            values = {"values": flat[:, 0].tolist()} if bool((flat == flat[:, :1]).all()) else {}
            return {**parsed.record(), **values, "sha256": digest(volume).hex()}

        by = id(baseline) if isinstance(baseline, Tensor) else repr(json_ready(baseline))
        used["baseline"] = json_ready(subject.once(("used baseline", by), drawn))
    if features is not None:
        blocks = isinstance(features, str) and features == "blocks"
        used["features"] = json_ready(_blocks(objective) if blocks else features_for(features))
    return used


def check_parts(features: Any, baseline: Any) -> None:
    """Check features and baseline of `removal_of` before anything is computed.

    Raises:
        UsageError: no such features or baseline.
    """
    if not (isinstance(features, str) and features == "blocks"):
        features_for(features)
    if not is_feature_mean(baseline):
        baseline_for(baseline, local=True)


def at_least(metric: object, what: str, value: float, least: float) -> None:
    """Check a parameter's lower limit.

    Raises:
        UsageError: it is below ``least``.
    """
    if isinstance(value, bool) or value < least:
        raise UsageError(f"{type(metric).__name__}: {what}={value} must be at least {least:g}")
