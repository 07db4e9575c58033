"""Perturbations by coalitions of features and by smooth masks, each made for one window at a time.

x' = x where a voxel's feature is in the coalition, else x₀                   (`Segments`)
x' = x₀ + m · (x − x₀), m interpolated from a coarse grid                     (`SmoothMasks`)
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.baselines import Baseline, baseline_for
from esegeta_monai.change import known_change, known_passes
from esegeta_monai.configurable import json_ready
from esegeta_monai.errors import MethodError
from esegeta_monai.features import Features, features_for
from esegeta_monai.interpolation import interpolate, line_matrix
from esegeta_monai.objective import Objective
from esegeta_monai.perturbation import UNCHANGED, Perturbations, digest
from esegeta_monai.windows import Slices, last_axes

__all__ = ["Game", "Segments", "SmoothMasks", "reference_image", "split_half"]

TABLE_BYTES = 2**30
"""The largest table of coalitions that is made."""


class Segments(Perturbations):
    """Features that are not in the coalition are replaced by a baseline.

    Windows in which coalitions agree are computed once for all of them.

    Args:
        labels: see `esegeta_monai.features.Features`.
        coalitions: (m, n) bool, True where a feature is kept.
        baseline, image: (C, *spatial); a feature that is equal in both changes nothing.
    """

    def __init__(self, labels: Tensor, coalitions: np.ndarray, baseline: Tensor, image: Tensor) -> None:
        self.labels, self.coalitions = labels, np.ascontiguousarray(coalitions, dtype=bool)
        self.baseline, self.image = baseline, image
        self._differing: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        self._last: tuple[Slices, np.ndarray] | None = None
        self._here: _Crop | None = None
        self._digest: bytes | None = None

    def __len__(self) -> int:
        return len(self.coalitions)

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        here = self._here
        if here is None or here.place != place or here.crop is not crop:
            inside = last_axes(place)
            entries = (self.labels[inside] + 1).to(crop.device)
            here = self._here = _Crop(place, crop, entries, self.baseline[inside].to(crop))
        return here.keeping(self.coalitions[index])

    def altered(self, index: int, crop: Tensor, place: Slices) -> Tensor | None:
        return self.apply(index, crop, place) if self.changes(index, crop, place) else None

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        return not self.coalitions[index, self._features(place)].all()

    def key(self, index: int, window: int, place: Slices) -> Hashable:
        return self.keys([index], window, place)[0]

    def keys(self, indices: Sequence[int], window: int, place: Slices) -> Sequence[Hashable]:
        kept = self.coalitions[np.asarray(indices, dtype=int)[:, None], self._features(place)]
        whole, packed = kept.all(axis=1).tolist(), np.packbits(kept, axis=1)
        return [UNCHANGED if all_kept else row.tobytes() for all_kept, row in zip(whole, packed)]

    def _features(self, place: Slices) -> np.ndarray:
        """The features that have a voxel at ``place`` which differs from the baseline."""
        if self._last is not None and self._last[0] is place:
            return self._last[1]
        where = tuple((p.start, p.stop) for p in place)
        if where not in self._differing:
            inside = last_axes(place)
            labels, differs = self.labels[inside], self.image[inside] != self.baseline[inside].to(self.image)
            if len(labels) == 1:
                differs = differs.any(0, keepdim=True)
            entries = torch.where(differs, labels + 1, 0).flatten()  # the first entry is no feature
            present = torch.zeros(self.coalitions.shape[1] + 1, dtype=torch.bool, device=labels.device)
            self._differing[where] = np.flatnonzero(present.index_fill_(0, entries, True)[1:].cpu().numpy())
        self._last = place, self._differing[where]
        return self._last[1]

    def identity(self, index: int) -> Hashable:
        if self._digest is None:
            self._digest = digest(self.labels, self.baseline)
        return self._digest, np.packbits(self.coalitions[index]).tobytes()


class _Crop:
    """A crop of which features are replaced, one coalition after the other.

    What `torch.where` gives is computed bit by bit, in a third of its time: ``x₀ ^ (m & (x ^ x₀))``, all bits of m set
    where a voxel is kept.

    Args:
        place, crop: where it lies, and the image there (C, *place).
        entries: (1 or C, *place), the number of each voxel's feature from 1 on, 0 where there is none.
        baseline: (C, *place).
    """

    def __init__(self, place: Slices, crop: Tensor, entries: Tensor, baseline: Tensor) -> None:
        self.place, self.crop, self.entries = place, crop, entries
        self.bits = torch.int64 if crop.dtype == torch.float64 else torch.int32
        self.baseline = baseline.view(self.bits)
        self.differing = crop.view(self.bits) ^ self.baseline

    def keeping(self, coalition: np.ndarray) -> Tensor:
        """The crop with the features outside a coalition (n,) replaced."""
        kept = torch.from_numpy(np.append(True, coalition)).to(self.crop.device, self.bits).neg_()
        mask = kept.index_select(0, self.entries.flatten()).view(self.entries.shape)
        return (mask & self.differing).bitwise_xor_(self.baseline).view(self.crop.dtype)


class SmoothMasks(Perturbations):
    """Masks in [0, 1] on coarse grids, interpolated linearly: ``x' = x₀ + m (x − x₀)``, 1 keeps the image.

    A mask is made for the crop at hand only, by one small matrix an axis.

    Args:
        grids: (m, *g).
        shape: of the volume.
        baseline: (C, *spatial).
        shifts: (m, d), by how many voxels each mask is moved towards the origin; None: not at all.
        extent: voxels that the grid is stretched over; None: ``shape``.
    """

    def __init__(
        self,
        grids: Tensor,
        shape: Sequence[int],
        baseline: Tensor,
        shifts: Tensor | None = None,
        extent: Sequence[int] | None = None,
    ) -> None:
        self.grids, self.baseline = grids, baseline
        self.shifts = torch.zeros(len(grids), len(shape), dtype=torch.long) if shifts is None else shifts
        self.shape, self.extent = tuple(shape), tuple(extent or shape)
        self._digest: bytes | None = None

    def __len__(self) -> int:
        return len(self.grids)

    def mask(self, index: int, place: Slices) -> Tensor:
        """The mask on a box of the volume (*place), in the dtype of the grids."""
        return interpolate(self.grids[index], self._matrices(index, place))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """``Σ_i weights[:, i] · mask_i`` on the whole volume: (k, *spatial); masks of equal shift are made as one."""
        everywhere = tuple(slice(0, n) for n in self.shape)
        total = torch.zeros((len(weights), *self.shape), dtype=weights.dtype)
        shifts, which = torch.unique(self.shifts, dim=0, return_inverse=True)
        for s in range(len(shifts)):
            chosen = torch.nonzero(which == s).flatten()
            grids = torch.tensordot(weights[:, chosen], self.grids[chosen].to(weights), 1)
            matrices = [m.to(weights) for m in self._matrices(int(chosen[0]), everywhere)]
            for k, grid in enumerate(grids):
                total[k] += interpolate(grid, matrices)
        return total

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        mask = self.mask(index, place).to(crop)
        baseline = self.baseline[last_axes(place)].to(crop)
        return baseline + mask * (crop - baseline)

    def key(self, index: int, window: int, place: Slices) -> Hashable:
        shift = self.shifts[index].tolist()
        cells = tuple(_cells(p, s, g, e) for p, s, g, e in zip(place, shift, self.grids.shape[1:], self.extent))
        part = self.grids[index][cells].contiguous()
        if bool((part == 1).all()):
            return UNCHANGED
        return tuple(shift), tuple((c.start, c.stop) for c in cells), part.numpy().tobytes()

    def identity(self, index: int) -> Hashable:
        if self._digest is None:
            self._digest = digest(self.baseline)
        grid = self.grids[index]
        return self._digest, self.extent, tuple(grid.shape), tuple(self.shifts[index].tolist()), grid.numpy().tobytes()

    def _matrices(self, index: int, place: Slices) -> list[Tensor]:
        shift = self.shifts[index].tolist()
        return [
            line_matrix(p.start + s, p.stop + s, g, e, self.grids.dtype)
            for p, s, g, e in zip(place, shift, self.grids.shape[1:], self.extent)
        ]


def _cells(place: slice, shift: int, cells: int, extent: int) -> slice:
    """The cells that voxels of ``place`` are interpolated from."""
    ends = [(v + shift + 0.5) * cells / extent - 0.5 for v in (place.start, place.stop - 1)]
    low, high = (min(max(e, 0.0), cells - 1.0) for e in ends)
    return slice(math.floor(low), math.ceil(high) + 1)


def split_half(a: Tensor, b: Tensor) -> list[float | None]:
    """Pearson correlation between two estimates (k, …) of the same maps, a target each; None where one is constant."""
    found: list[float | None] = []
    for x, y in zip(a.flatten(1).double(), b.flatten(1).double()):
        x, y = x - x.mean(), y - y.mean()
        scale = float(x.norm() * y.norm())
        found.append(float(x @ y) / scale if scale > 0 else None)
    return found


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
        known = _FEATURES.setdefault(objective, {})
        if not isinstance(feature_mask, str):
            features = features_for(feature_mask).of(objective)
        elif feature_mask in known:
            features = known[feature_mask]
        else:
            features = known[feature_mask] = features_for(feature_mask).of(objective)
        found, reference = reference_image(objective, features, baseline)
        return cls(objective, features, reference, found)

    def segments(self, coalitions: np.ndarray, reference: Tensor | None = None) -> Segments:
        """The perturbations that leave these coalitions (m, n)."""
        baseline = self.reference if reference is None else reference
        return Segments(self.features.labels, coalitions, baseline, self.objective.image)

    def values(self, coalitions: np.ndarray, reference: Tensor | None = None) -> Tensor:
        """``v(S)`` for coalitions (m, n): (k, m), each distinct one computed once on an objective."""
        return known_change(self.objective, self.segments(coalitions, reference))

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


_FEATURES: WeakKeyDictionary[Objective, dict[str, Features]] = WeakKeyDictionary()
"""Features by objective and description: counted beforehand and used afterwards, or by several methods, found once."""


def is_feature_mean(baseline: object) -> bool:
    """Whether a baseline is, in words, each feature's own mean."""
    return isinstance(baseline, str) and baseline.replace("_", " ") == "feature mean"


def reference_image(objective: Objective, features: Features, baseline: object) -> tuple[Baseline | None, Tensor]:
    """What stands where a feature is off, and where it came from.

    ``baseline="feature mean"``: each feature's own mean in each channel, as LIME has it. Anything else: see
    `esegeta_monai.baselines`.
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
    found = baseline_for(baseline, local=True)
    return found, found.draw(objective, objective.generator())
