"""Features switched off one by one: by a baseline, or by the same feature of other cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.baselines import Image
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.game import Game
from esegeta_monai.engine.perturbation.masks import Segments
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.perturbation.base import PerturbationMethod

__all__ = ["FeatureAblation", "FeaturePermutation", "cases_of", "exchange_drops", "one_off"]


class FeatureAblation(PerturbationMethod):
    """``a_j = F(x) − F(x with feature j replaced)``, shown at every voxel of the feature.

    Args:
        feature_mask: the features, see `esegeta_monai.engine.feature_masks`: ``"supervoxels"``, ``"grid(size=16)"``,
            ``"channels"``, or a label map.
        baseline: replaces a feature that is off, see `esegeta_monai.engine.baselines`; ``"feature mean"``: the
            feature's mean.

    The record has a table of the features under ``features``. Windows that a feature does not touch are not computed.

    Example:
        >>> FeatureAblation("grid(size=8)").parameters["baseline"]
        'auto'
    """

    map_check = "cells"
    reference = "Zeiler & Fergus, ECCV 2014, arXiv:1311.2901 (one feature at a time)"
    units = "change of the target when the voxel's feature is replaced"
    feature_mask: Any = "supervoxels"
    baseline: Any = "auto"

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) where features are channels."""
        game = Game.of(objective, self.feature_mask, self.baseline)
        drops = -game.values(one_off(game))
        maps = game.features.paint(drops).to(objective.image.dtype)
        return Explained(maps, {**game.notes(), "features": game.features.table(drops)})

    def perturbations(self, objective: Objective) -> Segments:
        """Return one coalition per feature."""
        game = Game.of(objective, self.feature_mask, self.baseline)
        return game.segments(one_off(game))

    def replaced_at(self, objective: Objective, channel: int, voxel: Sequence[int]) -> list[Tensor]:
        """Return the image (C, *spatial) whose change is the map's value at a voxel (channel, *voxel), in a list that
        is empty for a voxel of no feature."""
        game = Game.of(objective, self.feature_mask, self.baseline)
        labels = game.features.labels.to(objective.image.device)
        place = (channel, *voxel)
        feature = labels[place]
        replaced = torch.where(labels == feature, game.reference.to(objective.image), objective.image)
        return [] if feature < 0 else [replaced]


class FeaturePermutation(PerturbationMethod):
    """``a_j = F(x) − mean over other cases i of F(x with feature j of case i)`` (Breiman 2001, Fisher et al. 2019).

    Permuting a feature within a set of cases gives each case the feature of a random other case; here the mean over all
    other cases is computed, which is deterministic.

    Args:
        cases: at least two other cases: NIfTI files on the network's grid or tensors (C, *spatial), preprocessed like
            the image.
        feature_mask: see `FeatureAblation`.

    The record's table has the standard deviation over the cases.

    Raises:
        UsageError: fewer than two cases.
    """

    reference = "Fisher et al., JMLR 20(177), 2019, arXiv:1801.01489"
    units = "mean change of the target when the voxel's feature comes from another case"
    cases: Sequence[Any] = ()
    feature_mask: Any = "supervoxels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cases) < 2:
            raise UsageError(
                f"FeaturePermutation exchanges features between cases, but cases has {len(self.cases)} entries: give "
                "at least two files or tensors, or use FeatureAblation, which needs none"
            )

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) where features are channels."""
        game = Game.of(objective, self.feature_mask, 0.0)
        others = cases_of(objective, self.cases)
        drops = exchange_drops(game, others)
        mean, spread = drops.mean(0), drops.std(0)
        maps = game.features.paint(mean).to(objective.image.dtype)
        table = game.features.table(mean, standard_deviation=spread)
        return Explained(maps, {"n_features": len(game.features), "n_cases": len(others), "features": table})

    def perturbations(self, objective: Objective) -> Segments:
        """Return one round, with the first of the other cases."""
        game = Game.of(objective, self.feature_mask, 0.0)
        return game.segments(one_off(game), cases_of(objective, self.cases)[0])

    def predictions(self, objective: Objective) -> int:
        return len(self.cases) * super().predictions(objective)

    def passes(self, objective: Objective) -> int:
        """Count one round of all features per case, and the image itself once."""
        game = Game.of(objective, self.feature_mask, 0.0)
        return game.passes(one_off(game), cases_of(objective, self.cases))


def cases_of(objective: Objective, cases: Sequence[Any]) -> list[Tensor]:
    """Load other cases, files or tensors (C, *spatial), on the network's grid: (C, *spatial) each.

    Raises:
        InputError: a case has another shape than the image.
    """
    return [Image(c).draw(objective, objective.generator()) for c in cases]


def exchange_drops(game: Game, others: Sequence[Tensor]) -> Tensor:
    """Return ``F(x) − F(x with feature j of case i)`` for K cases (C, *spatial): (K, k, n), float64."""
    return torch.stack([-game.values(one_off(game), other) for other in others])


def one_off(game: Game) -> np.ndarray:
    """Return the coalitions that lack one feature (n, n), bool."""
    game.check_size(len(game.features))
    return ~np.eye(len(game.features), dtype=bool)
