"""Salient relevance: context-aware saliency of a relevance map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.resize import interpolate, line_matrix
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import METHODS, Explained, Method
from esegeta_monai.methods.run import run

__all__ = ["SalientRelevance", "context_saliency"]


class SalientRelevance(Method):
    """Relevance, then context-aware saliency of the relevance map (Li et al. 2019): where relevance stands out.

    The relevance map, summed over channels and scaled to [0, 1], is divided into patches. A patch i is salient if also
    the K patches that are most like it differ from it: ``S_i = 1 − exp(−1/K Σ_k d(p_i, q_k))`` with
    ``d = |p_i − q_k| / (1 + c · |position_i − position_k|)`` (Goferman et al. 2012, whose colour distance is the mean
    absolute difference of the patches here). S is the mean over sizes of the patches. Voxels at a distance from the
    foci (``S ≥ threshold``) are weakened: ``S · (1 − distance to the nearest focus)``. Distances are relative to the
    longest side of the image.

    The relevance is exact; S is computed on a grid of at most ``max_patches`` patches and interpolated.

    Args:
        method: the method whose map is read: any with an input map.
        neighbours: K.
        position_weight: c.
        sizes: sides of the patches, relative to the distance of two patches of the grid.
        threshold: saliency of a focus.
        max_patches: greatest number of patches.

    Example:
        >>> SalientRelevance(neighbours=16).signed
        False
    """

    reference = "Li et al., Image and Vision Computing 83-84, 2019, arXiv:1712.08268"
    produces = "input map"
    additive = False
    units = "saliency of relevance, 0 to 1"

    method: Any = "LRP"
    neighbours: int = 64
    position_weight: float = 3.0
    sizes: Sequence[float] = (1.0, 2.0)
    threshold: float = 0.8
    max_patches: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method: Method = METHODS.create(self.method)
        if self.method.produces != "input map":
            raise UsageError(f"SalientRelevance needs a method with an input map, not {self.method.name}")
        if self.neighbours < 1 or self.max_patches < 2 or not self.sizes or any(s <= 0 for s in self.sizes):
            raise UsageError(
                f"SalientRelevance: neighbours={self.neighbours}, sizes={self.sizes!r} must be positive, "
                f"max_patches={self.max_patches} at least 2"
            )
        if self.position_weight < 0 or not 0 < self.threshold <= 1:
            raise UsageError(
                f"SalientRelevance: position_weight={self.position_weight} must not be negative, "
                f"threshold={self.threshold} in (0, 1]"
            )
        self.full_precision = self.method.full_precision  # type: ignore[misc]
        self.needs_gradient = self.method.needs_gradient  # type: ignore[misc]
        self.needs_linear = self.method.needs_linear  # type: ignore[misc]
        self.needs_positive = self.method.needs_positive  # type: ignore[misc]

    @property
    def signed(self) -> bool:
        return False

    def passes(self, objective: Objective) -> int:
        """Count the passes of the inner method."""
        return self.method.passes(objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        inner = run(self.method, objective)
        shape = inner.maps.shape[2:]
        step = max(1.0, (math.prod(shape) / self.max_patches) ** (1 / len(shape)))
        grid = tuple(max(1, int(n / step)) for n in shape)
        maps = []
        for relevance in inner.maps.sum(1).double():
            low, high = relevance.min(), relevance.max()
            scaled = (relevance - low) / (high - low) if high > low else torch.zeros_like(relevance)
            saliency = context_saliency(scaled, grid, self.sizes, self.neighbours, self.position_weight, self.threshold)
            wide = [line_matrix(0, n, g, n, saliency.dtype) for g, n in zip(grid, shape)]
            maps.append(interpolate(saliency[None, None], wide)[0])
        notes = {"patches": math.prod(grid), **{k: v for k, v in inner.notes.items() if k == "layer"}}
        return Explained(torch.stack(maps).to(objective.image), notes)


def context_saliency(
    values: Tensor,
    grid: Sequence[int],
    sizes: Sequence[float],
    neighbours: int,
    position_weight: float,
    threshold: float,
) -> Tensor:
    """Compute the context-aware saliency of an image at the centres of a grid of patches, see `SalientRelevance`.

    Args:
        values: (*spatial), in [0, 1].
        grid: number of patches along each axis.
        sizes: sides of the patches, relative to the distance of two patches.
        neighbours: number of most similar patches.
        position_weight: weight of the distance of positions.
        threshold: saliency of a focus.

    Returns:
        (*grid), in [0, 1], float64.

    >>> image = torch.zeros(8, 8, dtype=torch.float64)
    >>> context_saliency(image, (4, 4), [1.0], 4, 3.0, 0.8).unique().tolist()
    [0.0]
    """
    shape, values = values.shape, values.double()
    centres = [(torch.arange(g, dtype=torch.float64) + 0.5) * n / g for g, n in zip(grid, shape)]
    places = torch.cartesian_prod(*centres).reshape(-1, len(shape)) / max(shape)
    apart = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    total = torch.zeros(len(places), dtype=torch.float64)
    k = min(neighbours, len(places) - 1)
    for size in sizes:
        patches = _patches(values, grid, size).cpu()
        different = torch.cdist(patches, patches, p=1) / patches.shape[1]
        distance = (different / (1 + position_weight * apart)).fill_diagonal_(math.inf)
        if k:
            total += 1 - (-distance.topk(k, largest=False).values.mean(1)).exp()
    saliency = total / len(sizes)
    foci = (
        saliency >= threshold * saliency.max() if saliency.max() > 0 else torch.zeros_like(saliency, dtype=torch.bool)
    )
    if foci.any():
        saliency = saliency * (1 - apart[:, foci].amin(1)).clamp(min=0)
    return saliency.reshape(*grid).to(values.device)


def _patches(values: Tensor, grid: Sequence[int], size: float) -> Tensor:
    """Return one patch per position of a grid, (n, 3**dims): 3 values along each axis, within the patch's side."""
    lines = []
    for g, n in zip(grid, values.shape):
        centre = (torch.arange(g, dtype=torch.float64)[:, None] + 0.5) * n / g
        offset = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) * size * n / g / 3
        lines.append((centre + offset).clamp(0, n - 1e-9).long().flatten())
    picked = values
    for axis, line in enumerate(lines):
        picked = picked.index_select(axis, line.to(picked.device))
    dims = values.ndim
    picked = picked.reshape(*(m for g in grid for m in (g, 3)))
    order = [2 * a for a in range(dims)] + [2 * a + 1 for a in range(dims)]
    return picked.permute(*order).reshape(math.prod(grid), 3**dims)
