"""The window plan: where the windows lie, how they are padded, and how their outputs are blended.

It reproduces MONAI's ``sliding_window_inference`` exactly,

    P(v) = Σ_w ĝ_w(v) · f(x_w)(v),        ĝ_w = g_w / Σ_w g_w,

but keeps cutting, blending and their adjoints apart, so that a method can do one window batch after the other.
Nothing here ever holds a padded volume: along an axis that MONAI pads, every window spans the whole axis, so that
padding each cut-out window is the same as cutting the padded volume.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import (
    AvgMerger,
    PatchInferer,
    SimpleInferer,
    SliceInferer,
    SlidingWindowInferer,
    SlidingWindowInfererAdapt,
    SlidingWindowSplitter,
)
from monai.inferers.utils import _get_scan_interval, sliding_window_inference
from monai.utils import ensure_tuple_rep, fall_back_tuple
from torch import Tensor

from esegeta_monai.errors import NetworkError

__all__ = ["OutputGrid", "WindowPlan", "as_inferer", "last_axes", "picked", "plan_windows"]

Slices = tuple[slice, ...]

WEIGHTS_BYTES, KEPT = 4 * 2**20, 16
"""Memory for blending weights of windows that are small enough for so many of them: they are asked for again and
again, and a small window's network takes little longer."""


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
        return [_unpadded(window, lows, self.spatial_shape) for window in self.slices]

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
        return [w for w in range(len(self)) if _overlap(self.place(w), box)]

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


class OutputGrid:
    """The grid of the prediction and the blending weights on it.

    For most networks it is the volume's own grid. A network whose output is smaller or larger than its window by a
    factor gets MONAI's scaled coordinates.

    Args:
        plan: the window plan.
        out_roi: spatial shape of the network's output for one window; empty for a classification network.
        dtype, device: of the blending weights.
    """

    def __init__(
        self, plan: WindowPlan, out_roi: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.plan, self.out_roi = plan, tuple(out_roi)
        if plan.whole:
            self.shape = self.out_roi
            self._slices: tuple[Slices, ...] = (tuple(slice(0, n) for n in self.out_roi),)
            self._weight = torch.ones(self.out_roi, dtype=dtype, device=device)
            self._count: Tensor | None = None
            return
        if len(self.out_roi) != len(plan.roi):
            raise NetworkError(
                f"the network gives an output of spatial shape {self.out_roi} for windows {plan.roi}: a sliding "
                "window needs one value a voxel; explain a classification network with SimpleInferer"
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
        self._count = torch.zeros(padded, dtype=dtype, device=device)
        for place in self._slices:
            self._count[place] += importance

    @property
    def size(self) -> int:
        """Voxels of a window's output."""
        return math.prod(self.out_roi)

    def place(self, window: int) -> Slices:
        """The window's output on the prediction's grid, padding aside."""
        return self._slices[0] if self.plan.whole else self._places[window]

    @functools.cached_property
    def _places(self) -> list[Slices]:
        lows = [lo for lo, _ in self._pads]
        return [_unpadded(window, lows, self.shape) for window in self._slices]

    def inside(self, window: int) -> Slices:
        """The part of the window's output (*out_roi) that is no padding: what `place` receives."""
        if self.plan.whole:
            return self._slices[0]
        return tuple(
            slice(p.start + lo - s.start, p.stop + lo - s.start)
            for p, s, (lo, _) in zip(self.place(window), self._slices[window], self._pads)
        )

    def weight(self, window: int, part: Slices | None = None) -> Tensor:
        """``ĝ_w`` (*out_roi), or a part of it: the importance map over the sum of all windows' maps."""
        if self._count is None or KEPT * self._weight.nbytes > WEIGHTS_BYTES:
            return self._weight_of(window, part)
        if window not in self._weights:
            if (len(self._weights) + 1) * self._weight.nbytes > WEIGHTS_BYTES:
                self._weights.clear()
            with torch.inference_mode(False):  # whoever asks first, another one may need it in a graph
                self._weights[window] = self._weight_of(window, None)
        return self._weights[window] if part is None else self._weights[window][part]

    def _weight_of(self, window: int, part: Slices | None) -> Tensor:
        importance = self._weight if part is None else self._weight[part]
        if self._count is None:
            return importance
        count = self._count[self._slices[window]]
        return importance / (count if part is None else count[part])

    def unblended(self) -> OutputGrid:
        """The same grid with weights of one: what a single window gives is the prediction."""
        other = copy.copy(self)
        other._weight, other._count = torch.ones_like(self._weight), None
        return other

    def windows_of(self, box: Slices, mask: Tensor | None = None) -> list[int]:
        """The windows whose output holds a voxel of ``mask``, which lies in ``box`` of the prediction's grid."""
        if self.plan.whole:
            return [0]
        found = []
        for w in range(len(self.plan)):
            place = self.place(w)
            if _overlap(place, box) and (mask is None or bool(torch.count_nonzero(mask[_relative(place, box)]))):
                found.append(w)
        return found

    def cut(self, values: Tensor, box: Slices, window: int) -> Tensor:
        """Values (…, *box) on the prediction's grid cut to the window's output (…, *out_roi), zero elsewhere."""
        cut = values.new_zeros((*values.shape[: values.ndim - len(box)], *self.out_roi))
        target, source = self.meet(box, window)
        cut[last_axes(target)] = values[last_axes(source)]
        return cut

    def blend(self, values: Tensor, box: Slices, window: int, output: Tensor) -> None:
        """Adds ``ĝ_w`` times the window's output (…, *out_roi) into values (…, *box) in place."""
        source, target = self.meet(box, window)
        seen = output[last_axes(source)].to(values.device, values.dtype)
        values[last_axes(target)].addcmul_(seen, self.weight(window, source).to(values.device, values.dtype))

    def meet(self, box: Slices, window: int) -> tuple[Slices, Slices]:
        """The part that a box and the window's output have in common: in the window, and in the box."""
        place, inside = self.place(window), self.inside(window)
        common = [slice(max(p.start, b.start), max(min(p.stop, b.stop), p.start, b.start)) for p, b in zip(place, box)]
        in_window = tuple(
            slice(c.start - p.start + i.start, c.stop - p.start + i.start) for c, p, i in zip(common, place, inside)
        )
        return in_window, tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box))


def _unpadded(window: Slices, lows: Sequence[int], shape: Sequence[int]) -> Slices:
    """The part of a window of the padded volume that is none of the padding, in the unpadded one."""
    return tuple(slice(max(s.start - lo, 0), min(s.stop - lo, n)) for s, n, lo in zip(window, shape, lows))


def last_axes(slices: Slices) -> tuple[Any, ...]:
    """An index of the last axes."""
    return (..., *slices)


def picked(positions: list[int]) -> list[int] | slice:
    """Positions along an axis as an index, which copies nothing where they are neighbours in order."""
    first = positions[0]
    last = first + len(positions)
    return slice(first, last) if positions == list(range(first, last)) else positions


def _overlap(a: Slices, b: Slices) -> bool:
    return all(p.start < q.stop and q.start < p.stop for p, q in zip(a, b))


def _relative(place: Slices, box: Slices) -> Slices:
    return tuple(slice(max(p.start - b.start, 0), max(min(p.stop, b.stop) - b.start, 0)) for p, b in zip(place, box))


def as_inferer(inferer: Any) -> Any:
    """An inferer object from None (`SimpleInferer`) or ``functools.partial(sliding_window_inference, …)``."""
    if inferer is None:
        return SimpleInferer()
    if isinstance(inferer, functools.partial) and inferer.func is sliding_window_inference and not inferer.args:
        options = dict(inferer.keywords)
        predictor, process_fn = options.pop("predictor", None), options.pop("process_fn", None)
        roi_weight_map = options.pop("roi_weight_map", None)
        if process_fn is not None or predictor is not None:
            raise NetworkError(
                "sliding_window_inference with process_fn or a bound predictor is not supported: give a "
                "SlidingWindowInferer, or wrap what process_fn does into the network"
            )
        built = SlidingWindowInferer(**options)
        built.roi_weight_map = roi_weight_map
        return built
    return inferer


_SLIDING: tuple[Callable[..., Any], ...] = (
    SlidingWindowInferer.__call__,
    SlidingWindowInfererAdapt.__call__,
    SliceInferer.__call__,
)


def plan_windows(inferer: Any, spatial_shape: Sequence[int], dtype: torch.dtype = torch.float32) -> WindowPlan:
    """The window plan of an inferer for a volume.

    `SimpleInferer` is one window of the whole volume; `SlidingWindowInferer`, `SlidingWindowInfererAdapt` and
    `SliceInferer` give their windows, and so does a `PatchInferer` that averages what a `SlidingWindowSplitter` cuts
    (then ĝ_w is one over the patches at a voxel). Any other callable is one window too, with a warning that names the
    reason and the cost.

    Args:
        inferer: as `as_inferer` returns it.
        spatial_shape: of the volume.
        dtype: in which MONAI would compute (that of the image): the importance map is made in it.

    Raises:
        NetworkError: the inferer's windows do not fit the dimensions of the volume, or leave part of it out.

    >>> plan = plan_windows(SlidingWindowInferer((8, 8), overlap=0.5), (12, 6))
    >>> len(plan), plan.pads, plan.place(0)
    (2, ((0, 0), (1, 1)), (slice(0, 8, None), slice(0, 6, None)))
    """
    shape = tuple(int(n) for n in spatial_shape)
    if type(inferer).__call__ not in _SLIDING:
        if type(inferer).__call__ is not SimpleInferer.__call__:
            plan = _patches(inferer, shape, dtype) if type(inferer) is PatchInferer else "is not known"
            if isinstance(plan, WindowPlan):
                return plan
            warnings.warn(
                f"{type(inferer).__name__} {plan}: it is explained as one window of {shape}, so the memory of a "
                "backward pass through the whole volume is needed; SlidingWindowInferer needs that of one window batch",
                stacklevel=2,
            )
        return WindowPlan(shape, shape, (tuple(slice(0, n) for n in shape),), ((0, 0),) * len(shape), whole=True)

    slice_axis = None
    roi_size = inferer.roi_size
    if isinstance(inferer, SliceInferer):
        if len(inferer.orig_roi_size) != 2 or len(shape) != 3:
            raise NetworkError(f"SliceInferer takes a 2D roi on 3D images, got {inferer.orig_roi_size} on {shape}")
        slice_axis = inferer.spatial_dim
        roi_size = list(inferer.orig_roi_size)
        roi_size.insert(slice_axis, 1)
    if isinstance(roi_size, Sequence) and len(roi_size) != len(shape):
        raise NetworkError(
            f"the inferer's windows {tuple(roi_size)} do not fit an image with {len(shape)} axes {shape}"
        )
    roi = tuple(int(n) for n in fall_back_tuple(roi_size, shape))
    diff = [max(r - n, 0) for r, n in zip(roi, shape)]
    pads = tuple((d // 2, d - d // 2) for d in diff)
    padded = tuple(n + d for n, d in zip(shape, diff))
    overlap = ensure_tuple_rep(inferer.overlap, len(shape))
    interval = _get_scan_interval(padded, roi, len(shape), overlap)
    slices = tuple(
        tuple(slice(int(s.start), int(s.stop)) for s in place) for place in dense_patch_slices(padded, roi, interval)
    )
    if inferer.roi_weight_map is not None:
        importance = torch.as_tensor(inferer.roi_weight_map).cpu().to(dtype)
    else:
        importance = compute_importance_map(roi, mode=inferer.mode, sigma_scale=inferer.sigma_scale, dtype=dtype)
    return WindowPlan(
        shape,
        roi,
        slices,
        pads,
        str(getattr(inferer.padding_mode, "value", inferer.padding_mode)),
        float(inferer.cval),
        importance,
        int(inferer.sw_batch_size),
        slice_axis,
        bool(inferer.with_coord),
    )


def _patches(inferer: PatchInferer, shape: tuple[int, ...], dtype: torch.dtype) -> WindowPlan | str:
    """The windows of a `PatchInferer` whose merging is linear and whose padding is a plan's; else why they are not.

    Raises:
        NetworkError: the patches leave voxels out, where `AvgMerger` divides by zero.
    """
    splitter = inferer.splitter
    if type(splitter) is not SlidingWindowSplitter or splitter.filter_fn is not None:
        return "does not split by a plain SlidingWindowSplitter"
    if inferer.merger_cls is not AvgMerger or {"merged_shape", "cropped_shape"} & set(inferer.merger_kwargs):
        return f"merges by {inferer.merger_cls.__name__} with settings of its own, no plain AvgMerger"
    if inferer.preprocessing or inferer.postprocessing or inferer.output_keys:
        return "transforms patches, or keeps several outputs"
    roi, overlap, offset = splitter._get_valid_shape_parameters(shape)
    roi = tuple(r or n for r, n in zip(roi, shape))
    sizes, _ = splitter._calculate_pad_size(shape, len(shape), roi, offset, overlap)
    pads = tuple(zip(sizes[1::2], sizes[::2]))
    padded = tuple(n + lo + hi for n, (lo, hi) in zip(shape, pads))
    if any((lo or hi) and n != r for (lo, hi), n, r in zip(pads, padded, roi)):
        return "pads behind its last patches"
    if any(pads) and not inferer.match_spatial_shape:
        return "gives the padding out as part of the prediction"
    starts = itertools.product(*_starts(padded, roi, [o + lo for o, (lo, _) in zip(offset, pads)], overlap))
    slices = tuple(tuple(slice(a, a + r) for a, r in zip(start, roi)) for start in starts)
    plan = WindowPlan(
        shape,
        roi,
        slices,
        pads,
        str(splitter.pad_mode or "constant"),
        float(splitter.pad_value),
        torch.ones(roi, dtype=dtype),
        int(inferer.batch_size),
    )
    if plan.coverage < 1:
        raise NetworkError(
            f"PatchInferer's patches of {roi} cover {100 * plan.coverage:.0f} % of the image {shape}, and AvgMerger "
            'divides by zero in the rest: give its splitter pad_mode="constant" and an offset of 0'
        )
    return plan


def _starts(padded: Sequence[int], roi: Sequence[int], offset: Sequence[int], overlap: Sequence[float]) -> list[range]:
    """Where patches begin along each axis, as `monai.data.utils.iter_patch_position` has it."""
    steps = [round(r * (1.0 - o)) if isinstance(o, float) else r - o for r, o in zip(roi, overlap)]
    return [range(first, n - r + 1, step) for first, n, r, step in zip(offset, padded, roi, steps)]
