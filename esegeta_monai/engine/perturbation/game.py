"""Features of a case as the players of a cooperative game."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.baselines import Baseline, baseline_for
from esegeta_monai.engine.feature_masks import Features, features_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.masks import Segments
from esegeta_monai.engine.perturbation.scoring import known_passes, known_score_changes
from esegeta_monai.errors import MethodError
from esegeta_monai.utils.registry import json_ready

__all__ = ["Game", "reference_image", "split_half"]


TABLE_BYTES = 2**30
"""The largest table of coalitions that is made."""


def split_half(a: Tensor, b: Tensor) -> list[float | None]:
    """Pearson correlation between two estimates (k, …) of the same maps, a target each; None where one is constant."""
    correlations: list[float | None] = []
    for x, y in zip(a.flatten(1).double(), b.flatten(1).double()):
        x, y = x - x.mean(), y - y.mean()
        scale = float(x.norm() * y.norm())
        correlations.append(float(x @ y) / scale if scale > 0 else None)
    return correlations


@dataclass
class Game:
    """The features of a case as players: ``v(S) = F(x with the features outside S replaced) − F(x)``."""

    objective: Objective
    features: Features
    reference: Tensor
    baseline: Baseline | None

    @classmethod
    def of(cls, objective: Objective, feature_mask: object, baseline: object) -> Game:
        """From a method's parameters, see `features_for` and `reference_image`."""
        if isinstance(feature_mask, str):  # counted before the run and used in it, or by several methods: found once
            features = objective.memo(("features", feature_mask), lambda: features_for(feature_mask).of(objective))
        else:
            features = features_for(feature_mask).of(objective)
        drawn_from, reference = reference_image(objective, features, baseline)
        return cls(objective, features, reference, drawn_from)

    def segments(self, coalitions: np.ndarray, reference: Tensor | None = None) -> Segments:
        """The perturbations that leave these coalitions (m, n)."""
        if reference is None or reference is self.reference:
            return self._segments.with_coalitions(coalitions)
        return Segments(self.features.labels, coalitions, reference, self.objective.image)

    @functools.cached_property
    def _segments(self) -> Segments:
        """What all coalitions share."""
        none = np.ones((0, len(self.features)), dtype=bool)
        return Segments(self.features.labels, none, self.reference, self.objective.image)

    def values(self, coalitions: np.ndarray, reference: Tensor | None = None) -> Tensor:
        """``v(S)`` for coalitions (m, n): (k, m), each distinct one computed once on an objective."""
        return known_score_changes(self.objective, self.segments(coalitions, reference))

    def passes(self, coalitions: np.ndarray, references: Sequence[Tensor]) -> int:
        """Window passes that `values` needs for one reference after the other."""
        return known_passes(self.objective, *(self.segments(coalitions, r) for r in references))

    def notes(self) -> dict[str, object]:
        """For the record."""
        how = "mean of each feature" if self.baseline is None else json_ready(self.baseline.record())
        return {"n_features": len(self.features), "baseline": how}

    def check_size(self, coalitions: int) -> None:
        """Raises where the table of coalitions would not fit in memory."""
        n = len(self.features)
        if coalitions * n > TABLE_BYTES:
            raise MethodError(
                f"{coalitions} evaluations of {n} features each are too many: take larger features, such as "
                "feature_mask='supervoxels(n_segments=200)', or Occlusion"
            )


def is_feature_mean(baseline: object) -> bool:
    """Whether a baseline is, in words, each feature's own mean."""
    return isinstance(baseline, str) and baseline.replace("_", " ") == "feature mean"


def reference_image(objective: Objective, features: Features, baseline: object) -> tuple[Baseline | None, Tensor]:
    """What stands where a feature is off, and where it came from.

    ``baseline="feature mean"``: each feature's own mean in each channel, as LIME has it. Anything else: see
    `esegeta_monai.engine.baselines`.
    """
    if is_feature_mean(baseline):
        image, labels = objective.image, features.labels.expand(objective.image.shape)
        reference = image.clone()
        for c in range(len(image)):
            flat = labels[c].flatten() + 1
            total = torch.zeros(len(features) + 1, dtype=image.dtype, device=image.device)
            total.index_add_(0, flat, image[c].flatten())
            mean = total / torch.bincount(flat, minlength=len(total)).clamp(min=1)
            reference[c] = torch.where(labels[c] < 0, image[c], mean[labels[c] + 1])
        return None, reference
    parsed = baseline_for(baseline, local=True)
    return parsed, parsed.draw(objective, objective.generator())
