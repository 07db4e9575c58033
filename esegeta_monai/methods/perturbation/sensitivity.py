"""Global sensitivity analysis of masks: the part of the target's variation that each part of the image explains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.baselines import Baseline, baseline_for
from esegeta_monai.engine.feature_masks import per_axis
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.game import TABLE_BYTES, split_half
from esegeta_monai.engine.perturbation.masks import SmoothMasks
from esegeta_monai.engine.perturbation.scoring import known_score_changes
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.perturbation.base import PerturbationMethod, finite_scores
from esegeta_monai.utils.registry import json_ready

__all__ = ["Hsic", "Sobol", "hsic", "jansen", "quasi_random"]


class _MaskSensitivity(PerturbationMethod):
    """Base class: masks over the cells of a coarse grid, one index per cell, interpolated to a map.

    Args:
        n_samples: N, a power of two.
        grid: cells per axis; one number for all axes.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
    """

    n_samples: int = 32
    grid: int | Sequence[int] = 8
    baseline: Any = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.n_samples
        if n < 4 or n & (n - 1):
            raise UsageError(f"n_samples={n}: a quasi-random sequence is balanced at powers of two: 4, 8, 16, …")

    @property
    def signed(self) -> bool:
        return False

    def cells(self, objective: Objective) -> tuple[int, ...]:
        """Return the cells per axis, at most one per voxel."""
        shape = objective.plan.spatial_shape
        return tuple(min(g, n) for g, n in zip(per_axis(self.grid, len(shape), "grid=…"), shape))

    def design(self, objective: Objective) -> Tensor:
        """Return the masks (m, cells), in [0, 1]."""
        raise NotImplementedError

    def masks(self, objective: Objective, reference: Tensor) -> SmoothMasks:
        """Return the masks of this case, blended with ``reference`` (C, *spatial)."""
        values = self.design(objective).to(objective.image.dtype)
        return SmoothMasks(values.reshape(-1, *self.cells(objective)), objective.plan.spatial_shape, reference)

    def predictions(self, objective: Objective) -> int:
        return self.n_samples

    def perturbations(self, objective: Objective) -> SmoothMasks:
        """Return all masks."""
        reference = baseline_for(self.baseline, local=True).draw(objective, objective.generator())
        return self.masks(objective, reference)

    def scored(self, objective: Objective) -> tuple[SmoothMasks, Tensor, Baseline]:
        """Return the masks, their scores (k, m), and the baseline."""
        baseline = baseline_for(self.baseline, local=True)
        masks = self.masks(objective, baseline.draw(objective, objective.generator()))
        return masks, finite_scores(self, known_score_changes(objective, masks)), baseline

    def explained(
        self, masks: SmoothMasks, index: Tensor, halves: Sequence[Tensor], notes: dict[str, Any]
    ) -> Explained:
        """Build the maps from indices (k, cells) of all samples and of either half."""
        cells = masks.grids.shape[1:]
        grid = SmoothMasks(index.reshape(-1, *cells), masks.shape, masks.baseline)
        maps = grid.weighted_sum(torch.eye(len(index), dtype=index.dtype))[:, None].to(masks.baseline)
        return Explained(maps, {"cells": list(cells), "convergence": split_half(*halves), **notes})


class Sobol(_MaskSensitivity):
    """Total-order Sobol indices of the cells of a mask, by Jansen's estimator (Fel et al. 2021).

    ``S_Ti = E[(F(A) − F(A with cell i of B))²] / (2 Var F(A))``, A and B masks with cells uniform on [0, 1] from one
    quasi-random design; ``x' = x₀ + m (x − x₀)``. It is the share of the target's variance in which cell i takes
    part. A window is not computed again when a cell outside it is exchanged.

    Args:
        n_samples: N, a power of two; ``N (cells + 1)`` predictions at most.
        grid: cells per axis.
        baseline: x₀, see `esegeta_monai.engine.baselines`.

    The record has the greatest standard error of an index and ``convergence``, the correlation of the indices from
    either half of the samples.

    Example:
        >>> Sobol(n_samples=16, grid=4).signed
        False
    """

    reference = "Fel et al., NeurIPS 2021, arXiv:2111.04138; Jansen 1999"
    units = "share of the target's variance under random masks (total order)"

    def design(self, objective: Objective) -> Tensor:
        """Return A, then A with cell i of B for each i: (m, cells) with m = N (cells + 1)."""
        d, n = math.prod(self.cells(objective)), self.n_samples
        if n * (d + 1) * d * 8 > TABLE_BYTES:
            raise MethodError(f"Sobol: {d} cells need {n * (d + 1)} predictions: use a coarser grid than {self.grid}")
        a, b = quasi_random(n, 2 * d, objective.seed).split(d, 1)
        exchanged = torch.where(torch.eye(d, dtype=torch.bool)[:, None], b, a)  # (cells, N, cells)
        return torch.cat([a, exchanged.reshape(-1, d)])

    def predictions(self, objective: Objective) -> int:
        return self.n_samples * (math.prod(self.cells(objective)) + 1)

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        masks, scores, baseline = self.scored(objective)
        n = self.n_samples
        at_a, exchanged = scores[:, :n], scores[:, n:].reshape(len(scores), -1, n)
        index, error = jansen(at_a, exchanged)
        halves = [jansen(at_a[:, h], exchanged[:, :, h])[0] for h in _halves(n)]
        notes = {"standard_error": error.amax(1).tolist(), "baseline": json_ready(baseline.record())}
        return self.explained(masks, index, halves, notes)


class Hsic(_MaskSensitivity):
    """Dependence between each cell of a random mask and the target (Novello et al. 2022).

    ``HSIC_i = 1/(N−1)² tr(K_i H L H)``: ``K_i`` the Dirac kernel of cell i (1 where two masks agree there), L a
    Gaussian kernel of the target with the median distance as its width, ``H = I − 1/N``. Cells are 0 or 1, from a
    quasi-random design; N predictions whatever the number of cells.

    Args:
        n_samples: N, a power of two.
        grid: cells per axis.
        baseline: x₀, see `esegeta_monai.engine.baselines`.

    The record has ``convergence``, the correlation of the indices from either half of the samples.
    """

    reference = "Novello et al., NeurIPS 2022, arXiv:2206.06219"
    units = "dependence of the target on the voxel's cell (HSIC)"

    n_samples: int = 1024
    grid: int | Sequence[int] = 7

    def design(self, objective: Objective) -> Tensor:
        """Return masks (N, cells) of 0 and 1."""
        d = math.prod(self.cells(objective))
        return quasi_random(self.n_samples, d, objective.seed, binary=True)

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        masks, scores, baseline = self.scored(objective)
        ones = masks.grids.flatten(1)
        halves = [hsic(ones[h], scores[:, h]) for h in _halves(self.n_samples)]
        return self.explained(masks, hsic(ones, scores), halves, {"baseline": json_ready(baseline.record())})


def jansen(at_a: Tensor, exchanged: Tensor) -> tuple[Tensor, Tensor]:
    """Return total-order indices and standard errors (k, d), from F(A) (k, N) and F(A with input i of B) (k, d, N)."""
    squares = (at_a[:, None] - exchanged) ** 2 / 2
    variance = at_a.var(1, keepdim=True)
    scale = torch.where(variance > 0, variance, 1)
    return squares.mean(2) / scale, squares.std(2) / math.sqrt(at_a.shape[1]) / scale


def hsic(cells: Tensor, values: Tensor) -> Tensor:
    """Compute ``1/(N−1)² tr(K_i H L H)`` (k, d) for binary inputs (N, d) and values (k, N).

    With ``s = ±1``, the Dirac kernel is ``(1 + s sᵀ)/2``, whose constant part H removes.
    """
    n, signs = len(cells), 2 * cells.double() - 1
    effects = []
    for y in values.double():
        squares = (y[:, None] - y) ** 2
        width = torch.nanmedian(torch.where(squares > 0, squares, torch.nan))  # of distinct values
        kernel = torch.exp(-squares / (2 * width)) if bool(torch.isfinite(width)) else torch.ones_like(squares)
        centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
        effects.append((signs * (centred @ signs)).sum(0) / 2 / (n - 1) ** 2)
    return torch.stack(effects)


def quasi_random(n: int, d: int, seed: int, *, binary: bool = False) -> Tensor:
    """Return n well-spread points (n, d) in [0, 1), float64; ``binary``: rounded to 0 and 1.

    A scrambled Sobol sequence, unless two of its dimensions correlate more than any two of a Latin hypercube, which
    is used then: some of the 128 dimensions of 32 Sobol points agree in the first bit at every point, and masks of
    such a design could not separate these cells.
    """
    from scipy.stats import qmc

    def drawn(kind: Any) -> Tensor:
        points = torch.from_numpy(kind(d, seed=np.random.default_rng(seed)).random(n))
        return (points >= 0.5).double() if binary else points

    latin = drawn(qmc.LatinHypercube)
    if d > qmc.Sobol.MAXDIM:
        return latin
    sobol = drawn(qmc.Sobol)
    return sobol if _likeness(sobol) <= _likeness(latin) else latin


def _halves(n: int) -> tuple[slice, slice]:
    """Return the first and second half of n points; each is well spread, which every other Sobol point is not."""
    return slice(0, n // 2), slice(n // 2, n)


def _likeness(points: Tensor) -> float:
    """Return the greatest absolute correlation between two dimensions, of the points and of their first bits."""
    largest = 0.0
    for values in (points, (points >= 0.5).double()) if points.shape[1] > 1 else ():
        correlation = torch.corrcoef(values.T).fill_diagonal_(0)
        largest = max(largest, float(correlation.abs().max()))
    return largest
