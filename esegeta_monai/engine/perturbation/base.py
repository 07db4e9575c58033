"""Perturbations of one volume, each described by its effect on a part of it.

A perturbation never stores a copy of the volume. `esegeta_monai.engine.perturbation.scoring` scores them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Final

import torch
from torch import Tensor

from esegeta_monai.engine.windows.plan import Slices, last_axes
from esegeta_monai.utils.tensors import digest

__all__ = ["UNCHANGED", "Added", "Perturbations", "digest"]

UNCHANGED: Final = "unchanged"
"""The `Perturbations.key` of a window in which the perturbation changes nothing."""


class Perturbations(ABC):
    """m perturbations of one volume (C, *spatial)."""

    @abstractmethod
    def __len__(self) -> int:
        """Return m."""

    @abstractmethod
    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        """Return a perturbed copy of ``crop`` (C, *place), the part of the volume at ``place``.

        Never changes ``crop``.
        """

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        """Return True if a perturbation changes a voxel of ``crop`` (C, *place); else the window is not computed."""
        return not torch.equal(self.apply(index, crop, place), crop)

    def write(self, indices: Sequence[int], crop: Tensor, place: Slices, out: Tensor) -> Sequence[int]:
        """Write perturbed copies of ``crop`` (C, *place) into the first rows of ``out`` (n, C, *place).

        Perturbations that change no voxel of ``crop`` are left out.

        Args:
            indices: perturbations, none with the key `UNCHANGED`.
            crop: the part of the volume at ``place``.
            place: where the crop is.
            out: rows for the copies.

        Returns:
            The positions in ``indices`` of those written.
        """
        written: list[int] = []
        for position, i in enumerate(indices):
            if self._write(i, crop, place, out[len(written)]):
                written.append(position)
        return written

    def _write(self, index: int, crop: Tensor, place: Slices, row: Tensor) -> bool:
        """Write a perturbed copy into ``row`` (C, *place); return True if it differs, else ``row`` is undefined."""
        perturbed = self.apply(index, crop, place)
        row.copy_(perturbed)
        return not torch.equal(perturbed, crop)

    def reaching(self, place: Slices) -> Sequence[int]:
        """Return the perturbations that may change a voxel at ``place``, in order."""
        return range(len(self))

    def key(self, index: int, window: int, place: Slices) -> Hashable | None:
        """Return a key of the perturbed window: windows of equal key are computed once; None: always compute it.

        `UNCHANGED`: the perturbation changes nothing in the window, which is skipped.
        """
        return None

    def keys(self, indices: Sequence[int], window: int, place: Slices) -> Sequence[Hashable | None]:
        """Return the `key` of several perturbations in one window."""
        return [self.key(i, window, place) for i in indices]

    def identity(self, index: int) -> Hashable | None:
        """Return a key of the whole perturbation; None: no other one is equal to it.

        Perturbations of equal identity are scored once (`known_score_changes` of
        `esegeta_monai.engine.perturbation.scoring`).
        """
        return None

    def fingerprint(self) -> str | None:
        """Return a hash of all perturbations, the name of their scores on disk; None: they are not stored."""
        names = [self.identity(i) for i in range(len(self))]
        return None if None in names else hashlib.sha256(repr(names).encode()).hexdigest()

    def take(self, indices: Sequence[int]) -> Perturbations:
        """Return the perturbations with these indices, in this order."""
        return self if list(indices) == list(range(len(self))) else _Part(self, list(indices))


class _Part(Perturbations):
    """A selection of other perturbations."""

    def __init__(self, whole: Perturbations, indices: Sequence[int]) -> None:
        self.whole, self.indices = whole, indices

    def __len__(self) -> int:
        return len(self.indices)

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        return self.whole.apply(self.indices[index], crop, place)

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        return self.whole.changes(self.indices[index], crop, place)

    def write(self, indices: Sequence[int], crop: Tensor, place: Slices, out: Tensor) -> Sequence[int]:
        return self.whole.write([self.indices[i] for i in indices], crop, place, out)

    def reaching(self, place: Slices) -> Sequence[int]:
        near = set(self.whole.reaching(place))
        return [j for j, i in enumerate(self.indices) if i in near]

    def key(self, index: int, window: int, place: Slices) -> Hashable | None:
        return self.whole.key(self.indices[index], window, place)

    def keys(self, indices: Sequence[int], window: int, place: Slices) -> Sequence[Hashable | None]:
        return self.whole.keys([self.indices[i] for i in indices], window, place)

    def identity(self, index: int) -> Hashable | None:
        return self.whole.identity(self.indices[index])

    def fingerprint(self) -> str | None:
        whole = self.whole.fingerprint()
        return None if whole is None else hashlib.sha256(f"{whole}{self.indices}".encode()).hexdigest()


class Added(Perturbations):
    """Whole volumes added: ``x' = x + δ``.

    Args:
        deltas: the m volumes δ (m, C, *spatial).
    """

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas
        self._digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.deltas)

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        return crop + self.deltas[index][last_axes(place)].to(crop)

    def identity(self, index: int) -> Hashable:
        if index not in self._digests:
            self._digests[index] = digest(self.deltas[index])
        return "added", self._digests[index]
