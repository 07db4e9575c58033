"""Boxes of the image, replaced by a baseline."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.windows.plan import Slices, picked
from esegeta_monai.utils.tensors import digest

__all__ = ["Boxes"]


class Boxes(Perturbations):
    """Boxes replaced by a baseline.

    Args:
        starts, stops: corners (m, d) in voxels; ``stops`` are excluded.
        baseline: volume (C, *spatial) or a number.
        channels: channels that are replaced, per box; None: all channels.
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
        """Return the part of the crop inside the box, and its new values."""
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
