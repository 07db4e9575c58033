"""The window plan: the places of the windows, their padding, and the blending of their outputs.

It reproduces MONAI's ``sliding_window_inference`` exactly,

    P(v) = Σ_w ĝ_w(v) · f(x_w)(v),        ĝ_w = g_w / Σ_w g_w,

but separates cutting, blending and their adjoints, so that a method can process one window batch after the other.
No padded volume is ever stored: along an axis that MONAI pads, every window spans the whole axis, so padding each
cut-out window gives the same values as cutting the padded volume.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from monai.data.utils import dense_patch_slices
from torch import Tensor

from esegeta_monai.errors import NetworkError

__all__ = [
    "Call",
    "WindowPlan",
    "last_axes",
    "picked",
]

Slices = tuple[slice, ...]


@dataclass(frozen=True)
class Call:
    """How the network is called on a window: with which weights, and on which view.

    The prediction is ``P = Σ_w a_w ĝ_w T_w⁻¹ f_w(T_w x_w)``, with T the view and f the member of an ensemble.

    Attributes:
        member: number of the member, 0 for a single network.
        flips: spatial axes along which the window is mirrored before the network, and its output after it.
        weight: a, the share of this call in the prediction.
        around: True: the view is that of the whole volume (MONAI's test-time augmentation), so that places and blending
            weights are mirrored too; False: it is that of the window (nnU-Net).
        axes: order of the spatial axes in the view, exchanged before it is mirrored (a rotation by 90° exchanges two
            axes and mirrors one); empty: unchanged.
    """

    member: int = 0
    flips: tuple[int, ...] = ()
    weight: float = 1.0
    around: bool = False
    axes: tuple[int, ...] = ()

    @property
    def turned(self) -> bool:
        """True if the network sees another view than the image itself."""
        return bool(self.flips or self.axes)

    def apply(self, values: Tensor, dims: int) -> Tensor:
        """Return the view T of values (…, *spatial) with ``dims`` spatial axes, whose order may change."""
        if self.axes:
            lead = values.ndim - dims
            values = values.permute(*range(lead), *(lead + axis for axis in self.axes))
        return values.flip([axis - dims for axis in self.flips]) if self.flips else values

    def undo(self, values: Tensor, dims: int) -> Tensor:
        """Return values (…, *spatial) in the frame of the image, from the frame of the view: T⁻¹.

        >>> call, x = Call(flips=(0,), axes=(1, 0)), torch.rand(2, 3)
        >>> tuple(call.apply(x, 2).shape), torch.equal(call.undo(call.apply(x, 2), 2), x)
        ((3, 2), True)
        """
        if self.flips:
            values = values.flip([axis - dims for axis in self.flips])
        if self.axes:
            lead = values.ndim - dims
            values = values.permute(*range(lead), *(lead + self.axes.index(axis) for axis in range(dims)))
        return values


PLAIN = Call()


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one volume.

    Attributes:
        spatial_shape: spatial shape of the volume, without padding.
        roi: shape of a window.
        slices: place of each window in padded coordinates, in MONAI's order.
        pads: padding (before, after) in voxels, per spatial axis.
        padding_mode, cval: mode and value of `torch.nn.functional.pad`.
        importance: g (*roi), or None for a single window that covers the volume.
        batch_size: windows per forward pass, ``sw_batch_size``.
        slice_axis: the axis that a 2D network does not see (`SliceInferer`), or None.
        with_coord: True: the network receives the coordinates of the window.
        whole: True: the network (or an unknown inferer) sees the volume at once, without blending.
        calls: the call of each window, where the members of an ensemble or mirrored views see the same place; windows
            of one call lie side by side. Empty: one plain call for each place.
        member_weights: not empty: the predictions of the members are not added but kept apart, one after the other
            along the channels (M·K, *spatial), for scores that are not linear in their sum; the weight of each member
            in such a score. The weights of calls are then those of the views alone.
        owned: for each window the box, in padded coordinates, in which its output counts; its weight elsewhere is zero,
            ``g_w(v) = g(v) · 1[v in owned_w]``. Empty: everywhere.
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
    calls: tuple[Call, ...] = ()
    member_weights: tuple[float, ...] = ()
    owned: tuple[Slices, ...] = ()

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def apart(self) -> bool:
        """True if the predictions of the members are kept apart."""
        return bool(self.member_weights)

    def share(self, call: Call) -> float:
        """Return the share of a call in an average over members and views."""
        return call.weight * (self.member_weights[call.member] if self.apart else 1.0)

    @property
    def padded(self) -> bool:
        """True if the volume is padded along some axis."""
        return any(lo or hi for lo, hi in self.pads)

    @property
    def padded_shape(self) -> tuple[int, ...]:
        """Shape of the volume with its padding."""
        return tuple(n + lo + hi for n, (lo, hi) in zip(self.spatial_shape, self.pads))

    def place(self, window: int) -> Slices:
        """Return the part of the unpadded volume in a window."""
        return self._places[window]

    @functools.cached_property
    def _places(self) -> list[Slices]:
        lows = [lo for lo, _ in self.pads]
        return [unpadded(window, lows, self.spatial_shape) for window in self.slices]

    def counted(self, window: int) -> Slices:
        """Return the part of a window's output (*roi) that counts in the prediction.

        >>> places, owned = ((slice(0, 4),), (slice(2, 6),)), ((slice(0, 3),), (slice(3, 6),))
        >>> plan = WindowPlan((6,), (4,), places, ((0, 0),), importance=torch.ones(4), owned=owned)
        >>> plan.counted(0), plan.counted(1)
        ((slice(0, 3, None),), (slice(1, 4, None),))
        """
        if not self.owned:
            return tuple(slice(0, n) for n in self.roi)
        return within(self.slices[window], self.owned[window])

    def pad(self, values: Tensor, *, cval: float | None = None) -> Tensor:
        """Pad a cut-out (…, *place) to (…, *roi) like MONAI; differentiable. ``cval`` replaces the constant."""
        if not self.padded:
            return values
        amounts = [p for lo_hi in reversed(self.pads) for p in lo_hi]
        fill = {"value": self.cval if cval is None else cval} if self.padding_mode == "constant" else {}
        flat = values.flatten(0, -len(self.roi) - 2) if values.ndim > len(self.roi) + 2 else values
        padded = F.pad(flat, amounts, mode=self.padding_mode, **fill)
        return padded.reshape(*values.shape[: -len(self.roi)], *padded.shape[-len(self.roi) :])

    def cut(self, volume: Tensor, window: int) -> Tensor:
        """Cut a window out of a volume (…, *spatial) and pad it: (…, *roi)."""
        return self.pad(volume[last_axes(self.place(window))])

    def add(self, volume: Tensor, window: int, values: Tensor) -> Tensor:
        """Add values (…, *roi) to a volume (…, *spatial) in place, the adjoint of `cut`.

        Returns:
            The sum of the values on constant padding, (…).
        """
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
        """List the windows that contain a voxel of a box of the unpadded volume."""
        return [w for w in range(len(self)) if overlap(self.place(w), box)]

    def call(self, window: int) -> Call:
        """Return how the network is called on a window."""
        return self.calls[window] if self.calls else PLAIN

    @functools.cached_property
    def _numbers(self) -> dict[Call, int]:
        return {call: number for number, call in enumerate(dict.fromkeys(self.calls))}

    @property
    def call_count(self) -> int:
        """Number of calls that see each place: members times views."""
        return max(len(self._numbers), 1)

    def call_number(self, window: int) -> int:
        """Return the number of the call of a window."""
        return self._numbers[self.calls[window]] if self.calls else 0

    @property
    def member_count(self) -> int:
        """Number of members of the ensemble, 1 for a single network."""
        return len({call.member for call in self.calls}) or 1

    def with_calls(
        self, calls: Sequence[Call], turned: Mapping[tuple[int, ...], WindowPlan] | None = None
    ) -> WindowPlan:
        """Return the plan in which each call sees all windows of this plan.

        Args:
            calls: members and views, with weights.
            turned: for views round the volume that exchange axes: the plan of the volume with its axes in that order.

        Raises:
            NetworkError: the plan has several calls already, the network receives coordinates, the padding of a
                mirrored volume would differ, or windows have another shape after an exchange of axes.

        >>> plan = WindowPlan((6,), (4,), ((slice(0, 4),), (slice(2, 6),)), ((0, 0),), importance=torch.ones(4))
        >>> len(plan.with_calls([Call(weight=0.5), Call(flips=(0,), weight=0.5)]))
        4
        """
        if self.calls:
            raise NetworkError("the inferer already has members or views: name all of them in one EnsembleInferer")
        if self.with_coord and any(call.turned for call in calls):
            raise NetworkError("a network that receives the coordinates of its window has no mirrored views")
        for call in calls:
            if call.around and any(lo != hi for axis, (lo, hi) in enumerate(self.pads) if axis in call.flips):
                raise NetworkError(
                    f"the volume {self.spatial_shape} is padded by an odd number of voxels to windows of {self.roi}, "
                    "so its mirrored views have other windows: pad it in the preprocessing (SpatialPadd)"
                )
        slices: list[Slices] = []
        owned: list[Slices] = []
        repeated: list[Call] = []
        for call in calls:
            view = (turned or {}).get(call.axes, self)
            places = self._places_of(call, view)
            slices += places
            repeated += [call] * len(places)
            owned += self._boxes_of(call, view, "owned")
        return replace(self, slices=tuple(slices), calls=tuple(repeated), owned=tuple(owned))

    def _places_of(self, call: Call, view: WindowPlan) -> list[Slices]:
        """Return the places that a call sees in this volume, from the plan of its view."""
        if call.axes and not self.whole:
            back = [call.axes.index(axis) for axis in range(len(self.roi))]
            here = (tuple(view.roi[axis] for axis in back), tuple(view.pads[axis] for axis in back))
            if here != (self.roi, self.pads) or (
                self.slice_axis is not None and back[self.slice_axis] != self.slice_axis
            ):
                raise NetworkError(
                    f"windows {self.roi} of the volume {self.spatial_shape} have another shape or padding in a view "
                    f"with the axes {call.axes}: use windows of equal size along these axes, and pad smaller volumes "
                    "in the preprocessing (SpatialPadd)"
                )
        return self._boxes_of(call, view, "slices")

    def _boxes_of(self, call: Call, view: WindowPlan, kind: Literal["slices", "owned"]) -> list[Slices]:
        """Return boxes of the view's windows in this volume."""
        if not call.around or self.whole:
            return list(getattr(self, kind))
        mirrored: list[Slices] = [
            tuple(
                slice(n - s.stop, n - s.start) if axis in call.flips else s
                for axis, (s, n) in enumerate(zip(box, view.padded_shape))
            )
            for box in getattr(view, kind)
        ]
        if not call.axes:
            return mirrored
        return [tuple(box[call.axes.index(axis)] for axis in range(len(box))) for box in mirrored]

    def coordinates(self, window: int) -> list[slice]:
        """Return the argument that MONAI passes to a network under ``with_coord=True``, in padded coordinates."""
        return [slice(0, 1), slice(None), *self.slices[window]]

    def single(self) -> WindowPlan:
        """Return the plan of one window alone, with the padding of this plan."""
        if len(self) == 1:
            return self
        shape = tuple(min(n, r) for n, r in zip(self.spatial_shape, self.roi))
        place = tuple(slice(0, r) for r in self.roi)
        return replace(self, spatial_shape=shape, slices=(place,), calls=self.calls[:1], owned=())

    def resized(self, shape: Sequence[int]) -> WindowPlan:
        """Return the plan of the same windows at the same distances for a volume that is not larger along any axis.

        A volume smaller than the window (or, if the network sees the whole volume, than that volume) is padded by
        replicating its edge.

        Raises:
            NetworkError: the plan has several calls for each place, or windows whose output counts in part.
        """
        if self.calls:
            raise NetworkError("images are synthesised for a single network without mirrored views: choose one member")
        if self.owned:
            raise NetworkError(
                "images are synthesised with windows whose whole output counts, and those of this inferer count in "
                "part: give another inferer"
            )
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
        """Share of the voxels where the output of at least one window counts (always 1 for MONAI's dense windows)."""
        covered, lows = torch.zeros(self.spatial_shape, dtype=torch.bool), [lo for lo, _ in self.pads]
        for w, place in enumerate(self.slices):
            counted = tuple(slice(s.start + c.start, s.start + c.stop) for s, c in zip(place, self.counted(w)))
            covered[unpadded(counted, lows, self.spatial_shape)] = True
        return int(torch.count_nonzero(covered)) / covered.numel()


def last_axes(slices: Slices) -> tuple[Any, ...]:
    """Return an index of the last axes."""
    return (..., *slices)


def picked(positions: list[int]) -> list[int] | slice:
    """Return positions along an axis as an index; a slice, which avoids a copy, if they are consecutive."""
    first = positions[0]
    last = first + len(positions)
    return slice(first, last) if positions == list(range(first, last)) else positions


def unpadded(window: Slices, lows: Sequence[int], shape: Sequence[int]) -> Slices:
    """Convert a window of the padded volume to unpadded coordinates, without its padding."""
    return tuple(slice(max(s.start - lo, 0), min(s.stop - lo, n)) for s, n, lo in zip(window, shape, lows))


def within(window: Slices, box: Slices) -> Slices:
    """Return the part of a window that lies in a box, in coordinates of the window."""
    return tuple(
        slice(first := min(max(b.start - s.start, 0), s.stop - s.start), max(min(b.stop, s.stop) - s.start, first))
        for s, b in zip(window, box)
    )


def overlap(a: Slices, b: Slices) -> bool:
    """Return True if two boxes have a voxel in common."""
    return all(p.start < q.stop and q.start < p.stop for p, q in zip(a, b))
