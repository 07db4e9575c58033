"""The window plan: where the windows lie, how they are padded, and how their outputs are blended.

It reproduces MONAI's ``sliding_window_inference`` exactly,

    P(v) = Σ_w ĝ_w(v) · f(x_w)(v),        ĝ_w = g_w / Σ_w g_w,

but keeps cutting, blending and their adjoints apart, so that a method can do one window batch after the other.
Nothing here ever holds a padded volume: along an axis that MONAI pads, every window spans the whole axis, so that
padding each cut-out window is the same as cutting the padded volume.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from monai.data.utils import dense_patch_slices
from torch import Tensor

__all__ = [
    "WindowPlan",
    "last_axes",
    "picked",
]

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one volume.

    Attributes:
        spatial_shape: of the volume, without padding.
        roi: shape of a window.
        slices: each window's place in padded coordinates, in MONAI's order.
        pads: (before, after) a spatial axis.
        padding_mode, cval: as in `torch.nn.functional.pad`.
        importance: g (*roi), or None for a single window that covers the volume.
        batch_size: windows a forward pass, ``sw_batch_size``.
        slice_axis: the axis that a 2D network does not see (`SliceInferer`), or None.
        with_coord: whether the network is given the window's coordinates.
        whole: the network (or an inferer we do not know) sees the volume at once; nothing is blended.
    """

    spatial_shape: tuple[int, ...]
    roi: tuple[int, ...]
    slices: tuple[Slices, ...]
    pads: tuple[tuple[int, int], ...]
    padding_mode: str = "constant"
    cval: float = 0.0
    importance: Tensor | None = None
    batch_size: int = 1
    slice_axis: int | None = None
    with_coord: bool = False
    whole: bool = False

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def padded(self) -> bool:
        """Whether the volume is smaller than the window along some axis."""
        return any(lo or hi for lo, hi in self.pads)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape of the volume with its padding."""
        return tuple(n + lo + hi for n, (lo, hi) in zip(self.spatial_shape, self.pads))

    def place(self, window: int) -> Slices:
        """The window's part of the unpadded volume."""
        return self._places[window]

    @functools.cached_property
    def _places(self) -> list[Slices]:
        lows = [lo for lo, _ in self.pads]
        return [unpadded(window, lows, self.spatial_shape) for window in self.slices]

    def pad(self, values: Tensor, *, cval: float | None = None) -> Tensor:
        """Pads a cut-out (…, *place) to (…, *roi) as MONAI pads the volume; differentiable."""
        if not self.padded:
            return values
        amounts = [p for lo_hi in reversed(self.pads) for p in lo_hi]
        fill = {"value": self.cval if cval is None else cval} if self.padding_mode == "constant" else {}
        flat = values.flatten(0, -len(self.roi) - 2) if values.ndim > len(self.roi) + 2 else values
        padded = F.pad(flat, amounts, mode=self.padding_mode, **fill)
        return padded.reshape(*values.shape[: -len(self.roi)], *padded.shape[-len(self.roi) :])

    def cut(self, volume: Tensor, window: int) -> Tensor:
        """The window of a volume (…, *spatial), padded: (…, *roi)."""
        return self.pad(volume[last_axes(self.place(window))])

    def add(self, volume: Tensor, window: int, values: Tensor) -> Tensor:
        """The adjoint of `cut`: adds (…, *roi) into a volume in place; returns what fell on constant padding (…)."""
        lost = values.new_zeros(values.shape[: -len(self.roi)])
        if self.padded:
            before = values.flatten(-len(self.roi)).sum(-1)
            values = self._unpad(values)
            lost = before - values.flatten(-len(self.roi)).sum(-1)
        volume[last_axes(self.place(window))] += values.to(volume.device, volume.dtype)
        return lost

    def _unpad(self, values: Tensor) -> Tensor:
        inner = tuple(slice(lo, v - hi) for v, (lo, hi) in zip(self.roi, self.pads))
        if self.padding_mode == "constant":
            return values[last_axes(inner)]
        with torch.enable_grad():
            probe = torch.zeros_like(values[last_axes(inner)]).requires_grad_(True)
            (folded,) = torch.autograd.grad(self.pad(probe), probe, values)
        return folded

    def touched(self, box: Slices) -> list[int]:
        """The windows that hold a voxel of a box of the unpadded volume."""
        return [w for w in range(len(self)) if overlap(self.place(w), box)]

    def coordinates(self, window: int) -> list[slice]:
        """What MONAI passes to a network under ``with_coord=True``, in padded coordinates."""
        return [slice(0, 1), slice(None), *self.slices[window]]

    def single(self) -> WindowPlan:
        """One window alone, padded as it is in this plan: what the network sees at once."""
        if len(self) == 1:
            return self
        shape = tuple(min(n, r) for n, r in zip(self.spatial_shape, self.roi))
        return replace(self, spatial_shape=shape, slices=(tuple(slice(0, r) for r in self.roi),))

    def resized(self, shape: Sequence[int]) -> WindowPlan:
        """The same windows at the same distances over a volume that is not larger along any axis.

        One that is smaller than the window (for a network that sees the whole volume: than that volume) is padded with
        its own edge.
        """
        pads = tuple(((r - n) // 2, r - n - (r - n) // 2) if r > n else (0, 0) for r, n in zip(self.roi, shape))
        if self.whole:
            return replace(self, spatial_shape=tuple(shape), pads=pads, padding_mode="replicate")
        padded = tuple(n + lo + hi for n, (lo, hi) in zip(shape, pads))
        starts = [sorted({place[axis].start for place in self.slices}) for axis in range(len(self.roi))]
        interval = tuple(s[1] - s[0] if len(s) > 1 else r for s, r in zip(starts, self.roi))
        places = dense_patch_slices(padded, self.roi, interval)
        slices = tuple(tuple(slice(int(s.start), int(s.stop)) for s in place) for place in places)
        return replace(self, spatial_shape=tuple(shape), pads=pads, slices=slices, padding_mode="replicate")

    @functools.cached_property
    def coverage(self) -> float:
        """Share of the volume's voxels that some window holds (always 1 for MONAI's dense windows)."""
        seen = torch.zeros(self.spatial_shape, dtype=torch.bool)
        for w in range(len(self)):
            seen[self.place(w)] = True
        return int(torch.count_nonzero(seen)) / seen.numel()


def last_axes(slices: Slices) -> tuple[Any, ...]:
    """An index of the last axes."""
    return (..., *slices)


def picked(positions: list[int]) -> list[int] | slice:
    """Positions along an axis as an index, which copies nothing where they are neighbours in order."""
    first = positions[0]
    last = first + len(positions)
    return slice(first, last) if positions == list(range(first, last)) else positions


def unpadded(window: Slices, lows: Sequence[int], shape: Sequence[int]) -> Slices:
    """The part of a window of the padded volume that is none of the padding, in the unpadded one."""
    return tuple(slice(max(s.start - lo, 0), min(s.stop - lo, n)) for s, n, lo in zip(window, shape, lows))


def overlap(a: Slices, b: Slices) -> bool:
    return all(p.start < q.stop and q.start < p.stop for p, q in zip(a, b))
