"""RISE: the mean of random masks, weighted by the score of the masked image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.feature_masks import per_axis
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.game import split_half
from esegeta_monai.engine.perturbation.masks import SmoothMasks
from esegeta_monai.engine.perturbation.scoring import known_score_changes
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.perturbation.base import PerturbationMethod
from esegeta_monai.utils.registry import json_ready

__all__ = ["Rise"]


class Rise(PerturbationMethod):
    """``a(v) = 1 / (p N) Σ_i F(x₀ + m_i (x − x₀)) m_i(v)`` over random smooth masks (Petsiuk et al. 2018).

    A mask is a coarse grid of ones (with probability p) and zeros, interpolated linearly and shifted by a random part
    of a cell. Masks are computed per window and summed one by one. In 2D and 3D.

    Args:
        n_masks: N.
        grid: cells per axis of the coarse grid; one number for all axes.
        p: probability that a cell is kept.
        baseline: x₀; the paper's is ``"zero"``.
        score: ``"value"``: weights are F, as in the paper; ``"change"``: F(x') − F(x), which has less noise if F is far
            from zero.

    The record has ``convergence``, the correlation between the maps of either half of the masks.

    Example:
        >>> Rise(n_masks=500, grid=5).signed
        True
    """

    reference = "Petsiuk et al., BMVC 2018, arXiv:1806.07421"
    units = "target where the voxel is kept"
    n_masks: int = 2000
    grid: int | Sequence[int] = 7
    p: float = 0.5
    baseline: Any = "auto"
    score: Literal["value", "change"] = "value"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_masks < 2 or not 0 < self.p < 1:
            raise UsageError(f"Rise: n_masks={self.n_masks} (at least 2), p={self.p} (between 0 and 1)")

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        baseline = baseline_for(self.baseline, local=True)
        masks = self.masks(objective, baseline.draw(objective, objective.generator()))
        scores = known_score_changes(objective, masks)
        if self.score == "value":
            scores = scores + objective.image_values().cpu()[:, None]
        halves = [self._mean(masks, scores, range(first, self.n_masks, 2)) for first in (0, 1)]
        sizes = [len(range(first, self.n_masks, 2)) for first in (0, 1)]
        maps = (halves[0] * sizes[0] + halves[1] * sizes[1]) / self.n_masks
        notes = {"n_masks": self.n_masks, "convergence": split_half(*halves)}
        return Explained(maps[:, None].to(objective.image), {**notes, "baseline": json_ready(baseline.record())})

    def predictions(self, objective: Objective) -> int:
        return self.n_masks

    def perturbations(self, objective: Objective) -> SmoothMasks:
        """Return all masks."""
        reference = baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        return self.masks(objective, reference)

    def masks(self, objective: Objective, reference: Tensor) -> SmoothMasks:
        """Return random masks, blended with ``reference`` (C, *spatial).

        Their grid extends over the image by one cell, so that it can be shifted.
        """
        shape = objective.plan.spatial_shape
        cells = per_axis(self.grid, len(shape), "Rise(grid=…)")
        sides = [math.ceil(n / g) for n, g in zip(shape, cells)]
        generator = objective.generator()
        grids = (torch.rand(self.n_masks, *cells, generator=generator) < self.p).to("cpu", objective.image.dtype)
        shifts = torch.stack([torch.randint(0, s, (self.n_masks,), generator=generator) for s in sides], 1)
        extent = [(g + 1) * s for g, s in zip(cells, sides)]
        return SmoothMasks(grids, shape, reference, shifts, extent)

    def _mean(self, masks: SmoothMasks, scores: Tensor, which: range) -> Tensor:
        """Return the mean of the masks in ``which``, weighted by their scores, (k, *spatial)."""
        chosen = scores.new_zeros(scores.shape)
        chosen[:, which] = scores[:, which]
        return masks.weighted_sum(chosen) / (self.p * len(which))
