"""XRAI: supervoxels of several sizes, ranked by their mean attribution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.baselines import per_channel
from esegeta_monai.engine.feature_masks import Supervoxels
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import METHODS, Explained, Method
from esegeta_monai.methods.path.integrated_gradients import IntegratedGradients
from esegeta_monai.methods.run import run

__all__ = ["XRAI", "rank_regions"]


class XRAI(Method):
    """The mean attribution of the region with which each voxel joins the explanation (Kapishnikov et al. 2019).

    The image is divided into supervoxels of several sizes. Repeatedly, the supervoxel joins whose voxels that have not
    joined yet have the greatest mean attribution. Attributions are those of ``method``, by default
    integrated gradients from each channel's smallest and from its largest value, averaged (black and white in the
    paper), summed over channels. The paper grows its (2D) segments by some pixels; supervoxels here stay as they are.

    Args:
        n_segments: approximate number of supervoxels of each size.
        compactness: see `esegeta_monai.engine.feature_masks.Supervoxels`.
        method: any method that gives an input map, in place of integrated gradients.
        n_steps: steps of integrated gradients.

    Example:
        >>> XRAI(n_segments=[20, 100]).additive
        False
    """

    reference = "Kapishnikov et al., ICCV 2019, arXiv:1906.02825"
    produces = "input map"
    additive = False
    units = "mean attribution of a region"

    n_segments: Sequence[int] = (50, 150, 400)
    compactness: float = 0.1
    method: Any = None
    n_steps: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.n_segments or any(n < 1 for n in self.n_segments):
            raise UsageError(f"XRAI: n_segments={self.n_segments!r} must be positive numbers")
        if self.method is not None:
            self.method = METHODS.create(self.method)
            if self.method.produces != "input map":
                raise UsageError(f"XRAI: {type(self.method).__name__} has no input map")
            self.full_precision = self.method.full_precision  # type: ignore[misc]
            self.needs_gradient = self.method.needs_gradient  # type: ignore[misc]
            self.needs_linear = self.method.needs_linear  # type: ignore[misc]

    def passes(self, objective: Objective) -> int:
        """Count the passes of the inner methods."""
        return sum(m.passes(objective) for m in self._methods(objective))

    def _methods(self, objective: Objective) -> list[Method]:
        """Return the methods whose attributions are averaged."""
        if self.method is not None:
            return [self.method]
        flat = objective.image.flatten(1)
        ends = [per_channel(end, objective.image) for end in (flat.amin(1), flat.amax(1))]
        return [IntegratedGradients(end, n_steps=self.n_steps) for end in ends]

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        inner = [run(m, objective) for m in self._methods(objective)]
        attribution = sum(f.maps.sum(1, dtype=torch.float64) for f in inner) / len(inner)
        assert isinstance(attribution, Tensor)
        sizes = [Supervoxels(n, self.compactness, mask="everything").of(objective) for n in self.n_segments]
        labels = np.stack([s.labels[0].cpu().numpy() for s in sizes])
        maps = [rank_regions(a.cpu().numpy(), labels) for a in attribution]
        notes = {"supervoxels": tuple(len(s) for s in sizes)}
        return Explained(torch.from_numpy(np.stack(maps)[:, None]).to(objective.image), notes)


def rank_regions(attribution: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Compute the map of XRAI.

    Args:
        attribution: (*spatial), summed over channels.
        labels: (sizes, *spatial) region numbers from 0, for each size of regions.

    Returns:
        (*spatial): for each voxel the mean attribution of the voxels that joined with it.

    >>> rank_regions(np.array([3.0, 1.0, 0.0, 0.0]), np.array([[0, 0, 1, 1], [0, 1, 1, 1]]))
    array([3., 1., 0., 0.])
    """
    values, flat = attribution.ravel(), labels.reshape(len(labels), -1)
    offsets = np.cumsum([0, *(int(row.max()) + 1 for row in flat[:-1])])
    flat = flat + offsets[:, None]
    total = int(flat.max()) + 1
    sums = np.sum([np.bincount(row, values, total) for row in flat], 0)
    counts = np.sum([np.bincount(row, minlength=total) for row in flat], 0)
    size_of = np.searchsorted(offsets, np.arange(total), side="right") - 1
    joined, gains = np.zeros(values.shape, bool), np.zeros(values.shape)
    while counts.any():
        means = np.divide(sums, counts, out=np.full(total, -np.inf), where=counts > 0)
        best = int(means.argmax())
        new = np.flatnonzero((flat[size_of[best]] == best) & ~joined)
        gains[new], joined[new] = means[best], True
        for row in flat:  # voxels that joined are removed from the regions of every size
            sums -= np.bincount(row[new], values[new], total)
            counts -= np.bincount(row[new], minlength=total)
    return gains.reshape(attribution.shape)
