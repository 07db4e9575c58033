"""What is changed: many perturbations of one volume, each described by what it does to a part of it.

A perturbation never holds a copy of the volume. `esegeta_monai.change` scores them.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.windows import Slices, last_axes, picked

__all__ = ["UNCHANGED", "Added", "Boxes", "Perturbations", "digest"]

UNCHANGED: Final = "unchanged"
"""The `Perturbations.key` of a window in which the perturbation changes nothing."""


class Perturbations(ABC):
    """m perturbations of one volume (C, *spatial), described by what each changes."""

    @abstractmethod
    def __len__(self) -> int:
        """m."""

    @abstractmethod
    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        """The perturbed copy of ``crop`` (C, *place), which lies at ``place`` of the volume. Never changes ``crop``."""

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        """Whether perturbation ``index`` changes a voxel of ``crop`` (C, *place): what does not is never computed."""
        return not torch.equal(self.apply(index, crop, place), crop)

    def write(self, indices: Sequence[int], crop: Tensor, place: Slices, out: Tensor) -> Sequence[int]:
        """`apply` of several perturbations into the first rows of ``out`` (n, C, *place), those left out that change no
        voxel of ``crop``.

        `key` says of none that it is `UNCHANGED`.

        Returns:
            Positions in ``indices`` of those written.
        """
        written: list[int] = []
        for position, i in enumerate(indices):
            if self._write(i, crop, place, out[len(written)]):
                written.append(position)
        return written

    def _write(self, index: int, crop: Tensor, place: Slices, row: Tensor) -> bool:
        """`apply` into ``row`` (C, *place), and whether it changes a voxel; else ``row`` may hold anything."""
        perturbed = self.apply(index, crop, place)
        row.copy_(perturbed)
        return not torch.equal(perturbed, crop)

    def reaching(self, place: Slices) -> Sequence[int]:
        """The perturbations that may change a voxel at ``place``, in order."""
        return range(len(self))

    def key(self, index: int, window: int, place: Slices) -> Hashable | None:
        """What determines the perturbed window, so that equal ones are computed once; None: always computed.

        `UNCHANGED` says that nothing of the window is changed: then it is not even looked at.
        """
        return None

    def keys(self, indices: Sequence[int], window: int, place: Slices) -> Sequence[Hashable | None]:
        """`key` of several perturbations in one window."""
        return [self.key(i, window, place) for i in indices]

    def identity(self, index: int) -> Hashable | None:
        """What determines the whole perturbation; None: no other is ever equal to it.

        Equal perturbations are scored once (`esegeta_monai.change.known_score_changes`).
        """
        return None

    def fingerprint(self) -> str | None:
        """A hash of all of them, under which their scores are kept on disk; None: they are not kept."""
        names = [self.identity(i) for i in range(len(self))]
        return None if None in names else hashlib.sha256(repr(names).encode()).hexdigest()

    def take(self, indices: Sequence[int]) -> Perturbations:
        """Some of these perturbations, in this order."""
        return self if list(indices) == list(range(len(self))) else _Part(self, list(indices))


class _Part(Perturbations):
    """Some of other perturbations."""

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


class Boxes(Perturbations):
    """Boxes replaced by a baseline.

    Args:
        starts, stops: (m, d) corners, ``stops`` excluded.
        baseline: (C, *spatial) volume or a number.
        channels: for each box the channels that are replaced; None: all.
    """

    def __init__(
        self,
        starts: Sequence[Sequence[int]],
        stops: Sequence[Sequence[int]],
        baseline: Tensor | float = 0.0,
        channels: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.boxes = [tuple(slice(a, b) for a, b in zip(s, t)) for s, t in zip(starts, stops)]
        self.baseline, self.channels = baseline, channels
        self._corners = np.array([starts, stops], dtype=int)
        self._digest: bytes | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def reaching(self, place: Slices) -> Sequence[int]:
        if not self.boxes:
            return []
        starts, stops = self._corners
        meet = (starts < [p.stop for p in place]) & (stops > [p.start for p in place])
        return np.flatnonzero(meet.all(1)).tolist()

    def identity(self, index: int) -> Hashable:
        if self._digest is None:
            self._digest = digest(torch.as_tensor(self.baseline))
        rows = None if self.channels is None else tuple(self.channels[index])
        return self._digest, rows, tuple((b.start, b.stop) for b in self.boxes[index])

    def apply(self, index: int, crop: Tensor, place: Slices) -> Tensor:
        inside, value = self._replaced(index, crop, place)
        perturbed = crop.clone()
        perturbed[inside] = value
        return perturbed

    def changes(self, index: int, crop: Tensor, place: Slices) -> bool:
        inside, value = self._replaced(index, crop, place)
        return _differ(crop[inside], value)  # the box alone, not the whole window

    def write(self, indices: Sequence[int], crop: Tensor, place: Slices, out: Tensor) -> Sequence[int]:
        out[: len(indices)] = crop
        written: list[int] = []
        for position, i in enumerate(indices):
            inside, value = self._replaced(i, crop, place)
            if _differ(crop[inside], value):
                out[len(written)][inside] = value
                written.append(position)
        return written

    def fingerprint(self) -> str:
        baseline = self.baseline if isinstance(self.baseline, Tensor) else torch.tensor(self.baseline)
        parts = digest(torch.from_numpy(self._corners), baseline).hex()
        return hashlib.sha256(f"{parts}{self.channels}".encode()).hexdigest()

    def _replaced(self, index: int, crop: Tensor, place: Slices) -> tuple[tuple[Any, ...], Tensor | float]:
        """The part of the crop that lies in the box, and what stands there afterwards."""
        common = [slice(max(b.start, p.start), min(b.stop, p.stop)) for b, p in zip(self.boxes[index], place)]
        inside = tuple(slice(c.start - p.start, c.stop - p.start) for c, p in zip(common, place))
        rows = slice(None) if self.channels is None else picked(list(self.channels[index]))
        value = self.baseline
        if isinstance(value, Tensor):
            there: tuple[Any, ...] = (rows, *common)
            value = value[there].to(crop.device, crop.dtype)
        return (rows, *inside), value


def _differ(values: Tensor, other: Tensor | float) -> bool:
    return not torch.equal(values, other) if isinstance(other, Tensor) else bool((values != other).any())


class Added(Perturbations):
    """Whole volumes added: ``x' = x + δ``.

    Args:
        deltas: (m, C, *spatial).
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


def digest(*tensors: Tensor) -> bytes:
    """SHA-256 over shapes and bytes; what a view repeats along an axis counts once, so that a volume of one value a
    channel (`esegeta_monai.baselines.per_channel`) is not gone through."""
    found = hashlib.sha256()
    for whole in tensors:
        t = whole[tuple(slice(0, 1) if step == 0 else slice(None) for step in whole.stride())]
        found.update(f"{tuple(whole.shape)}{tuple(t.shape)}".encode())
        found.update(np.ascontiguousarray(t.detach().cpu().numpy()).data)
    return found.digest()
