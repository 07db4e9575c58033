"""LIME: a local linear model of the network around one image, over features."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.game import Game
from esegeta_monai.engine.perturbation.masks import Segments
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.perturbation.base import PerturbationMethod, finite_scores

__all__ = ["Lime"]


Distance = Literal["cosine", "euclidean", "sqeuclidean", "manhattan", "chebyshev", "hamming", "jaccard", "dice"]
"""The metrics of scikit-learn that are meaningful between a coalition and the coalition of all features."""


class Lime(PerturbationMethod):
    """The weights of a ridge regression of ``F(x with the features outside z off)`` on ``z ∈ {0, 1}ⁿ`` (Ribeiro 2016).

    z is uniform; a sample has the weight ``√exp(−d²/kernel_width²)``, d its distance from the image itself (all ones).
    Sampling and scoring are implemented here, in 2D and 3D and for any number of channels, so that windows in which
    samples agree are computed once; the regression is that of the `lime` package.

    Args:
        n_samples: number of samples; the first is the image itself.
        feature_mask, baseline: see `FeatureAblation`; ``baseline="feature mean"`` is that of `LimeImageExplainer`.
        kernel_width, distance_metric: as in `lime.lime_image.LimeImageExplainer`.
        num_features: number of features of greatest weight in the model; None: all.
        feature_selection: how these are selected, see `lime.lime_base.LimeBase.feature_selection`.
        alpha: weight of the ridge penalty.

    The record has the table of weights under ``features``, and per target ``r2``, the weighted R² of the linear model,
    and its ``intercept``. With a low R² the weights are not reliable.

    Example:
        >>> Lime(n_samples=100, feature_mask="grid(8)").parameters["kernel_width"]
        0.25
    """

    reference = "Ribeiro et al., KDD 2016, arXiv:1602.04938"
    units = "weight of the voxel's feature in a linear model of the target"
    n_samples: int = 1000
    feature_mask: Any = "supervoxels"
    baseline: Any = "auto"
    kernel_width: float = 0.25
    distance_metric: Distance = "cosine"
    num_features: int | None = None
    feature_selection: Literal["auto", "none", "forward_selection", "highest_weights", "lasso_path"] = "none"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples < 2:
            raise UsageError(f"n_samples={self.n_samples}: a regression needs at least two samples")
        if not self.kernel_width > 0 or not 0 <= self.alpha < math.inf:
            raise UsageError(
                f"kernel_width={self.kernel_width}, alpha={self.alpha}: the width must be above 0, alpha not below 0"
            )
        if self.num_features is not None and self.num_features < 1:
            raise UsageError(f"num_features={self.num_features}: give a number of features, or None for all")

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) where features are channels."""
        game = Game.of(objective, self.feature_mask, self.baseline)
        samples = self.coalitions(game)
        changes = finite_scores(self, game.values(samples))
        scores = (objective.image_values().cpu()[:, None] + changes).numpy()
        weights, r2, intercept = self.fit(samples, scores)
        coefficients = torch.from_numpy(weights)
        notes = {"r2": r2, "intercept": intercept, "features": game.features.table(coefficients)}
        maps = game.features.paint(coefficients).to(objective.image.dtype)
        return Explained(maps, {**game.notes(), **notes})

    def predictions(self, objective: Objective) -> int:
        return self.n_samples

    def perturbations(self, objective: Objective) -> Segments:
        """Return the samples."""
        game = Game.of(objective, self.feature_mask, self.baseline)
        return game.segments(self.coalitions(game))

    def coalitions(self, game: Game) -> np.ndarray:
        """Return the samples (n_samples, n), bool."""
        game.check_size(self.n_samples)
        generator = game.objective.generator()
        samples = torch.randint(0, 2, (self.n_samples, len(game.features)), generator=generator).bool().numpy()
        samples[0] = True
        return samples

    def fit(self, samples: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, list[float], list[float]]:
        """Fit weights (k, n), R² (k,) and intercepts (k,) to scores (k, m)."""
        from lime.lime_base import LimeBase
        from sklearn.linear_model import Ridge
        from sklearn.metrics import pairwise_distances

        data = samples.astype(float)
        distances = pairwise_distances(data, data[:1], metric=self.distance_metric).ravel()
        base = LimeBase(lambda d: np.sqrt(np.exp(-(d**2) / self.kernel_width**2)), random_state=0)
        weights, r2, intercepts = np.zeros((len(scores), data.shape[1])), [], []
        for k in range(len(scores)):
            intercept, weighted, fit, _ = base.explain_instance_with_data(
                data,
                scores.T,
                distances,
                k,
                self.num_features or data.shape[1],
                feature_selection=self.feature_selection,
                model_regressor=Ridge(alpha=self.alpha, fit_intercept=True, random_state=0),
            )
            for j, weight in weighted:
                weights[k, j] = weight
            r2.append(float(fit))
            intercepts.append(float(intercept))
        return weights, r2, intercepts
