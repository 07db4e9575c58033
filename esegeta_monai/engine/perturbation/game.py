"""The features of a case as players of a cooperative game."""

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
"""Size of the largest table of coalitions, in bytes."""


def split_half(a: Tensor, b: Tensor) -> list[float | None]:
    """Correlate two estimates (k, …) of the same maps: Pearson's r per target; None if an estimate is constant."""
    correlations: list[float | None] = []
    for x, y in zip(a.flatten(1).double(), b.flatten(1).double()):
        x, y = x - x.mean(), y - y.mean()
        scale = float(x.norm() * y.norm())
        correlations.append(float(x @ y) / scale if scale > 0 else None)
    return correlations


@dataclass
class Game:
    """A game whose players are features: ``v(S) = F(x with the features outside S replaced) − F(x)``.

    Attributes:
        objective: the case.
        features: the players.
        reference: (C, *spatial), the values of replaced features.
        baseline: how the reference was made; None: each feature's own mean.
    """

    objective: Objective
    features: Features
    reference: Tensor
    baseline: Baseline | None

    @classmethod
    def of(cls, objective: Objective, feature_mask: object, baseline: object) -> Game:
        """Build the game from a method's parameters, see `features_for` and `reference_image`."""
        if isinstance(feature_mask, str):  # the cost estimate, the run and other methods share them
            features = objective.memo(("features", feature_mask), lambda: features_for(feature_mask).of(objective))
        else:
            features = features_for(feature_mask).of(objective)
        drawn_from, reference = reference_image(objective, features, baseline)
        return cls(objective, features, reference, drawn_from)

    def segments(self, coalitions: np.ndarray, reference: Tensor | None = None) -> Segments:
        """Return the perturbations that keep these coalitions (m, n) and replace all other features.

        Args:
            coalitions: bool (m, n), True where a feature is kept.
            reference: values of replaced features (C, *spatial); None: those of the game.
        """
        if reference is None or reference is self.reference:
            return self._segments.with_coalitions(coalitions)
        return Segments(self.features.labels, coalitions, reference, self.objective.image)

    @functools.cached_property
    def _segments(self) -> Segments:
        """A set of no coalitions, which holds everything that all sets share."""
        none = np.ones((0, len(self.features)), dtype=bool)
        return Segments(self.features.labels, none, self.reference, self.objective.image)

    def values(self, coalitions: np.ndarray, reference: Tensor | None = None) -> Tensor:
        """Compute ``v(S)`` for coalitions (m, n): (k, m); each distinct coalition is computed once per objective."""
        return known_score_changes(self.objective, self.segments(coalitions, reference))

    def passes(self, coalitions: np.ndarray, references: Sequence[Tensor]) -> int:
        """Count the window passes of `values` for references (C, *spatial), in order."""
        return known_passes(self.objective, *(self.segments(coalitions, r) for r in references))

    def notes(self) -> dict[str, object]:
        """Return the number of features and the baseline, for the record."""
        how = "mean of each feature" if self.baseline is None else json_ready(self.baseline.record())
        return {"n_features": len(self.features), "baseline": how}

    def check_size(self, coalitions: int) -> None:
        """Check that the table of coalitions fits into memory.

        Raises:
            MethodError: the table would be larger than `TABLE_BYTES`.
        """
        n = len(self.features)
        if coalitions * n > TABLE_BYTES:
            raise MethodError(
                f"{coalitions} evaluations of {n} features each are too many: take larger features, such as "
                "feature_mask='supervoxels(n_segments=200)', or Occlusion"
            )


def is_feature_mean(baseline: object) -> bool:
    """Return True for the text ``"feature mean"``: each feature's own mean."""
    return isinstance(baseline, str) and baseline.replace("_", " ") == "feature mean"


def reference_image(objective: Objective, features: Features, baseline: object) -> tuple[Baseline | None, Tensor]:
    """Return the baseline and the values of replaced features (C, *spatial).

    ``baseline="feature mean"``: each feature's own mean per channel, as in LIME, and no baseline. Anything else: see
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
