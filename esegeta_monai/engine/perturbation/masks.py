"""Perturbations by coalitions of features and by smooth masks, computed for one window at a time.

x' = x where a voxel's feature is in the coalition, else x₀                   (`Segments`)
x' = x₀ + m · (x − x₀), m interpolated from a coarse grid                     (`SmoothMasks`)
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.perturbation.base import UNCHANGED, Perturbations, digest
from esegeta_monai.engine.windows.plan import Slices, last_axes
from esegeta_monai.engine.windows.resize import interpolate, line_matrix

__all__ = [
    "Segments",
    "SmoothMasks",
]


CLEAR = 1e-3
"""A change larger than this fraction of the largest value is not due to rounding."""

ENTRIES_BYTES = 4 * 2**20
"""Memory in bytes for the labels of windows that `Segments` keeps between `keys` and `write`."""


class Segments(Perturbations):
    """Coalitions of features: those outside the coalition are replaced by a baseline.

    A window in which several coalitions agree is computed once for all of them.

    Args:
        labels: see `esegeta_monai.engine.feature_masks.Features`.
        coalitions: (m, n) bool, True where a feature is kept.
        baseline, image: (C, *spatial); a feature that is equal in both changes nothing.
    """

    def __init__(self, labels: Tensor, coalitions: np.ndarray, baseline: Tensor, image: Tensor) -> None:
        self.labels, self.baseline, self.image = labels, baseline, image
        self._parts = _Parts(labels, baseline, image)
        self._set(coalitions)

    def _set(self, coalitions: np.ndarray) -> None:
        entries = np.ones((len(coalitions), coalitions.shape[1] + 1), dtype=bool)  # the first entry is no feature
        entries[:, 1:] = coalitions
        self.coalitions, self._entries = entries[:, 1:], entries.view(np.int8)

    def with_coalitions(self, coalitions: np.ndarray) -> Segments:
        """Return other coalitions (m, n) of the same features, image and baseline, whose preparation they share."""
        other = copy.copy(self)
        other._set(coalitions)
        return other

    def __len__(self) -> int:
        return len(self.coalitions)

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        out = crop.new_empty((1, *crop.shape))
        self._parts.at(crop, place).keep(self._entries[[index]], out)
        return out[0]

    def write(self, indices: Sequence[int], crop: Tensor, place: Slices, out: Tensor) -> Sequence[int]:
        self._parts.at(crop, place).keep(self._entries[list(indices)], out)
        return range(len(indices))  # their keys exclude those that change nothing

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        return not self.coalitions[index, self._parts.features(place)].all()

    def key(self, index: int, window: int, place: Slices) -> Hashable:
        return self.keys([index], window, place)[0]

    def keys(self, indices: Sequence[int], window: int, place: Slices) -> Sequence[Hashable]:
        kept = self.coalitions[np.asarray(indices, dtype=int)[:, None], self._parts.features(place)]
        whole, packed = kept.all(axis=1).tolist(), np.packbits(kept, axis=1)
        return [UNCHANGED if all_kept else row.tobytes() for all_kept, row in zip(whole, packed)]

    def identity(self, index: int) -> Hashable:
        return self._parts.digest, np.packbits(self.coalitions[index]).tobytes()


class _Parts:
    """The features of an image and their replacement, prepared once per window for all coalitions."""

    def __init__(self, labels: Tensor, baseline: Tensor, image: Tensor) -> None:
        self.labels, self.baseline, self.image = labels, baseline, image
        self._features: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
        self._entries: dict[tuple[tuple[int, int], ...], Tensor] = {}
        self._crop: _Crop | None = None

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of labels and baseline."""
        return digest(self.labels.int(), self.baseline)

    def features(self, place: Slices) -> np.ndarray:
        """Return the features with a voxel at ``place`` that differs from the baseline, in order."""
        where = tuple((p.start, p.stop) for p in place)
        if where not in self._features:
            inside = last_axes(place)
            self._features[where] = _differing(self.entries(place), self.image[inside], self.baseline[inside])
        return self._features[where]

    def at(self, crop: Tensor, place: Slices) -> _Crop:
        """Return the crop (C, *place), prepared for many coalitions."""
        if self._crop is None or self._crop.place != place or self._crop.crop is not crop:
            entries, baseline = self.entries(place).to(crop.device), self.baseline[last_axes(place)].to(crop)
            self._crop = _Crop(place, crop, entries, baseline)
        return self._crop

    def entries(self, place: Slices) -> Tensor:
        """Return the number of each voxel's feature (1 or C, *place), from 1; 0 for no feature."""
        where = tuple((p.start, p.stop) for p in place)
        if where not in self._entries:
            made = self.labels[last_axes(place)] + 1
            if (len(self._entries) + 1) * made.nbytes > ENTRIES_BYTES:
                self._entries.clear()
            self._entries[where] = made
        return self._entries[where]


def _differing(entries: Tensor, image: Tensor, baseline: Tensor) -> np.ndarray:
    """Return the features, one less than their numbers in ``entries`` (1 or C, *place), with a voxel in which two
    images (C, *place) differ."""
    baseline = baseline.to(image)
    if entries.device.type == "cpu" and image.device.type == "cpu":  # in half the time of torch
        unlike, numbers = image.detach().numpy() != baseline.detach().numpy(), entries.numpy()
        if len(unlike) > len(numbers):
            unlike = unlike.any(0, keepdims=True)
        return np.flatnonzero(np.bincount((numbers * unlike).ravel())[1:])
    differs = image != baseline
    if len(differs) > len(entries):
        differs = differs.any(0, keepdim=True)
    return np.flatnonzero(torch.bincount((entries * differs).flatten())[1:].cpu().numpy())


class _Crop:
    """A crop whose features are replaced, for many coalitions.

    Computes `torch.where` with bit operations, in a third of its time: ``x₀ ^ (m & (x ^ x₀))``, with all bits of m set
    where a voxel is kept.

    Args:
        place, crop: place in the volume, and the image there (C, *place).
        entries: see `_Parts.entries`.
        baseline: (C, *place).
    """

    def __init__(self, place: Slices, crop: Tensor, entries: Tensor, baseline: Tensor) -> None:
        self.place, self.crop = place, crop
        self.bits, self.table = (torch.int32, np.int32) if crop.element_size() == 4 else (torch.int64, np.int64)
        self.shape, self.entries = entries.shape, entries.flatten(1)[None]
        self.baseline = baseline.view(self.bits)
        self.differing = crop.view(self.bits) ^ self.baseline

    def keep(self, entries: np.ndarray, out: Tensor) -> None:
        """Write copies of the crop with features replaced.

        Args:
            entries: (m, 1 + n) int8, 1 where an entry is kept, else 0.
            out: receives the copies (m, C, *place).
        """
        m, (channels, cells) = len(entries), self.entries.shape[1:]
        table = torch.from_numpy(-entries.astype(self.table)).to(self.crop.device)  # all bits set where it is kept
        mask = table[:, None].expand(-1, channels, -1).gather(2, self.entries.expand(m, channels, cells))
        bits = out.view(self.bits)
        torch.bitwise_and(mask.view(m, *self.shape), self.differing, out=bits)
        bits.bitwise_xor_(self.baseline)


class SmoothMasks(Perturbations):
    """Masks in [0, 1] on coarse grids, interpolated linearly: ``x' = x₀ + m (x − x₀)``, 1 keeps the image.

    A mask is computed for one crop only, with one small matrix per axis.

    Args:
        grids: coarse masks (m, *g), on the CPU.
        shape: spatial shape of the volume.
        baseline: x₀ (C, *spatial).
        shifts: voxels by which each mask moves towards the origin (m, d); None: 0.
        extent: voxels that a grid covers, per axis; None: ``shape``.
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
        """Return the mask on a box of the volume (*place), in the dtype of the grids."""
        return interpolate(self.grids[index], self._matrices(index, place))

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Compute ``Σ_i weights[:, i] · mask_i`` on the whole volume: (k, *spatial), from weights (k, m).

        Masks of equal shift are summed before interpolation.
        """
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

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        """Return True if the mask changes a voxel of ``crop`` (C, *place): test the middle slice, and all voxels only
        if its change may be due to rounding."""
        middle = (place[0].stop - place[0].start) // 2
        at = slice(place[0].start + middle, place[0].start + middle + 1)
        part = crop[:, middle : middle + 1]
        change = (self.apply(index, part, (at, *place[1:])) - part).abs()
        return bool(change.max() > CLEAR * part.abs().max()) or super().changes(index, crop, place)

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
    """Return the grid cells that voxels of ``place`` are interpolated from."""
    ends = [(v + shift + 0.5) * cells / extent - 0.5 for v in (place.start, place.stop - 1)]
    low, high = (min(max(e, 0.0), cells - 1.0) for e in ends)
    return slice(math.floor(low), math.ceil(high) + 1)
