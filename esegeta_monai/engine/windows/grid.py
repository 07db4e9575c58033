"""The grid of the blended output, and the weight of each window on it."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.engine.windows.plan import Call, Slices, WindowPlan, last_axes, overlap, unpadded, within
from esegeta_monai.errors import NetworkError

__all__ = ["OutputGrid"]


WEIGHTS_BYTES, KEPT = 4 * 2**20, 16
"""Size of the cache of blending weights in bytes, used if at least KEPT windows fit.

Weights are read repeatedly, and computing them for a small window takes about as long as its network pass.
"""


View = tuple[tuple[int, ...], tuple[int, ...]]
"""Mirrored axes and order of the axes of a view round the volume."""


class OutputGrid:
    """The grid of the prediction and the blending weights on it.

    For most networks it is the grid of the volume. If the output of a network is smaller or larger than its window by a
    factor, the grid has MONAI's scaled coordinates.

    Args:
        plan: the window plan.
        out_roi: spatial shape of the network's output for one window; empty for a classification network.
        dtype, device: dtype and device of the blending weights.

    Raises:
        NetworkError: the output has another number of axes than the window, or windows fall on fractions of voxels.
    """

    def __init__(
        self, plan: WindowPlan, out_roi: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.plan, self.out_roi, self._owned = plan, tuple(out_roi), plan.owned
        if plan.whole:
            self.shape = self.out_roi
            self._slices: tuple[Slices, ...] = (tuple(slice(0, n) for n in self.out_roi),) * len(plan)
            self._weight = torch.ones(self.out_roi, dtype=dtype, device=device)
            self._counts: dict[View, Tensor] | None = None
            return
        if len(self.out_roi) != len(plan.roi):
            raise NetworkError(
                f"the network gives an output of spatial shape {self.out_roi} for windows {plan.roi}: a sliding "
                "window needs one value per voxel; explain a classification network with SimpleInferer"
            )
        assert plan.importance is not None
        importance = plan.importance.to(device, dtype)
        padded, self._slices = plan.padded_shape, plan.slices
        pads, inner = plan.pads, plan.spatial_shape
        if self.out_roi != plan.roi:
            zoom = [o / i for o, i in zip(self.out_roi, plan.roi)]
            importance = F.interpolate(importance[None, None], self.out_roi, mode="nearest-exact")[0, 0]
            self._slices = tuple(
                tuple(slice(int(s.start * z), int(s.stop * z)) for s, z in zip(window, zoom)) for window in plan.slices
            )
            padded = tuple(int(n * z) for n, z in zip(padded, zoom))
            edges = [edge * z for box in plan.owned for s, z in zip(box, zoom) for edge in (s.start, s.stop)]
            if any(edge % 1 for edge in edges):
                raise NetworkError(
                    f"windows {plan.roi} with output {self.out_roi} count in boxes that do not fall on whole output "
                    "voxels: choose boxes whose edges do (owned)"
                )
            self._owned = tuple(
                tuple(slice(int(s.start * z), int(s.stop * z)) for s, z in zip(box, zoom)) for box in plan.owned
            )
            if any(s.stop - s.start != o for window in self._slices for s, o in zip(window, self.out_roi)):
                raise NetworkError(
                    f"windows {plan.roi} with output {self.out_roi} do not fall on whole output voxels: choose roi "
                    "and overlap so that overlap * roi * output / roi is a whole number"
                )
            pads = tuple(
                (round(lo * z), o - round((lo + n) * z) if lo or hi else 0)
                for (lo, hi), n, z, o in zip(plan.pads, plan.spatial_shape, zoom, padded)
            )
            inner = tuple(o - lo - hi for o, (lo, hi) in zip(padded, pads))
        self._pads, self.shape, self._weight = pads, inner, importance
        self._weights: dict[int, Tensor] = {}
        self._counts = {}
        first: dict[View, Call] = {}
        for window, place in enumerate(self._slices):
            view, call = self._view(window), plan.call(window)
            if first.setdefault(view, call) is call:  # each view is blended by itself: other members see it again
                if view not in self._counts:
                    self._counts[view] = torch.zeros(padded, dtype=dtype, device=device)
                self._counts[view][place] += self._importance(window)

    @property
    def size(self) -> int:
        """Number of voxels of a window's output."""
        return math.prod(self.out_roi)

    def place(self, window: int) -> Slices:
        """Return the place of a window's output on the prediction's grid, without padding."""
        return self._slices[window] if self.plan.whole else self._places[window]

    @functools.cached_property
    def _places(self) -> list[Slices]:
        lows = [lo for lo, _ in self._pads]
        return [unpadded(window, lows, self.shape) for window in self._slices]

    @functools.cached_property
    def _counted(self) -> list[Slices]:
        """The part of each window's place whose output counts."""
        if not self._owned:
            return self._places
        lows = [lo for lo, _ in self._pads]
        parts = zip(self._slices, self._owned)
        boxes = (tuple(slice(s.start + c.start, s.start + c.stop) for s, c in zip(p, within(p, o))) for p, o in parts)
        return [unpadded(box, lows, self.shape) for box in boxes]

    def inside(self, window: int) -> Slices:
        """Return the part of a window's output (*out_roi) that is no padding; its place is `place`."""
        if self.plan.whole:
            return self._slices[window]
        return tuple(
            slice(p.start + lo - s.start, p.stop + lo - s.start)
            for p, s, (lo, _) in zip(self.place(window), self._slices[window], self._pads)
        )

    def weight(self, window: int, part: Slices | None = None) -> Tensor:
        """Return ``ĝ_w`` (*out_roi), or a part of it: the importance map divided by the sum over all windows."""
        if self._counts is None or KEPT * self._weight.nbytes > WEIGHTS_BYTES:
            return self._weight_of(window, part)
        if window not in self._weights:
            if (len(self._weights) + 1) * self._weight.nbytes > WEIGHTS_BYTES:
                self._weights.clear()
            with torch.inference_mode(False):  # a later caller may need it in a graph
                self._weights[window] = self._weight_of(window, None)
        return self._weights[window] if part is None else self._weights[window][part]

    def _weight_of(self, window: int, part: Slices | None) -> Tensor:
        view, share = self._view(window), self.plan.call(window).weight
        importance = self._importance(window)
        weight = importance if part is None else importance[part]
        if self._counts is not None:
            count = self._counts[view][self._slices[window]]
            weight = weight / (count if part is None else count[part])
            if self._owned:  # 0/0 in padding that no window owns
                weight = weight.nan_to_num(nan=0.0)
        return weight if share == 1 else weight * share

    def _view(self, window: int) -> View:
        """Return how the whole volume is turned and mirrored for a window."""
        call = self.plan.call(window)
        return (call.flips, call.axes) if call.around else ((), ())

    def _importance(self, window: int) -> Tensor:
        """Return the blending weights of a window (*out_roi), before their normalisation."""
        if self._counts is None:  # all ones
            return self._weight
        flips, axes = self._view(window)
        values = Call(flips=flips, axes=axes).undo(self._weight, self._weight.ndim)
        if not self._owned:
            return values
        kept, part = torch.zeros_like(values), within(self._slices[window], self._owned[window])
        kept[part] = values[part]
        return kept

    def unblended(self) -> OutputGrid:
        """Return the same grid with weights of one: the output of a single window is the prediction."""
        other = copy.copy(self)
        other._weight, other._counts = torch.ones_like(self._weight), None
        return other

    def windows_of(self, box: Slices, mask: Tensor | None = None) -> list[int]:
        """List the windows whose output contains a voxel of a box of the prediction's grid, or of ``mask`` (*box)."""
        if self.plan.whole:
            return list(range(len(self.plan)))
        windows = []
        for w in range(len(self.plan)):
            place = self._counted[w]
            if overlap(place, box) and (mask is None or bool(torch.count_nonzero(mask[_relative(place, box)]))):
                windows.append(w)
        return windows

    def cut(self, values: Tensor, box: Slices, window: int) -> Tensor:
        """Cut values (…, *box) on the prediction's grid to the window's output (…, *out_roi); zero outside the box."""
        cut = values.new_zeros((*values.shape[: values.ndim - len(box)], *self.out_roi))
        target, source = self.meet(box, window)
        cut[last_axes(target)] = values[last_axes(source)]
        return cut

    def blend(self, values: Tensor, box: Slices, window: int, output: Tensor) -> None:
        """Add ``ĝ_w`` times the window's output (…, *out_roi) to values (…, *box) in place."""
        source, target = self.meet(box, window)
        read: tuple[Any, ...] = (..., *source)
        written: tuple[Any, ...] = (..., *target)
        part = output[read].to(values.device, values.dtype)
        values[written].addcmul_(part, self.weight(window, source).to(values.device, values.dtype))

    def meet(self, box: Slices, window: int) -> tuple[Slices, Slices]:
        """Return the intersection of a box and the window's output, in coordinates of the window and of the box."""
        place, inside = self.place(window), self.inside(window)
        common = [slice(max(p.start, b.start), max(min(p.stop, b.stop), p.start, b.start)) for p, b in zip(place, box)]
        in_window = tuple(
            slice(c.start - p.start + i.start, c.stop - p.start + i.start) for c, p, i in zip(common, place, inside)
        )
        return in_window, tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box))


def _relative(place: Slices, box: Slices) -> Slices:
    return tuple(slice(max(p.start - b.start, 0), max(min(p.stop, b.stop) - b.start, 0)) for p, b in zip(place, box))
