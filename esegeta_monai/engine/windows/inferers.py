"""The windows of MONAI inferers."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
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
from monai.inferers.utils import sliding_window_inference
from monai.utils import ensure_tuple_rep, fall_back_tuple

from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import NetworkError
from esegeta_monai.utils.upstream import scan_interval, splitter_padding, splitter_parameters

__all__ = ["as_inferer", "plan_windows"]


def as_inferer(inferer: Any) -> Any:
    """Return an inferer object for None (`SimpleInferer`) or ``functools.partial(sliding_window_inference, …)``.

    Any other inferer is returned unchanged.

    Raises:
        NetworkError: the partial function binds ``process_fn`` or a predictor, or it is Auto3DSeg's ``AlgoEnsemble``.
    """
    if inferer is None:
        return SimpleInferer()
    if any(kind.__module__.startswith("monai.apps.auto3dseg") for kind in type(inferer).__mro__):
        raise NetworkError(
            f"{type(inferer).__name__} joins the finished predictions of algorithms with preprocessing and windows of "
            "their own, so it declares no windows: explain each algorithm with its own inferer, and folds of one "
            "algorithm by EnsembleInferer(inferer, members=[...], average='softmax')"
        )
    if isinstance(inferer, functools.partial) and inferer.func is sliding_window_inference and not inferer.args:
        options = dict(inferer.keywords)
        predictor, process_fn = options.pop("predictor", None), options.pop("process_fn", None)
        roi_weight_map = options.pop("roi_weight_map", None)
        if process_fn is not None or predictor is not None:
            raise NetworkError(
                "sliding_window_inference with process_fn or a bound predictor is not supported: give a "
                "SlidingWindowInferer, or include the work of process_fn in the network"
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
    """Return the window plan of an inferer for a volume.

    `SimpleInferer` has one window, the whole volume. `SlidingWindowInferer`, `SlidingWindowInfererAdapt` and
    `SliceInferer` have their windows, and so has a `PatchInferer` that averages the patches of a
    `SlidingWindowSplitter` (ĝ_w is then 1 / number of patches at a voxel). Any other callable is treated as one window;
    a warning names the reason and the cost. An inferer of one's own declares its windows by a method
    ``declared_windows(spatial_shape, dtype)`` that returns a `WindowPlan`.

    Args:
        inferer: result of `as_inferer`.
        spatial_shape: spatial shape of the volume.
        dtype: dtype of the image, in which MONAI computes the importance map.

    Raises:
        NetworkError: the inferer's windows do not fit the dimensions of the volume, or leave part of it out.

    >>> plan = plan_windows(SlidingWindowInferer((8, 8), overlap=0.5), (12, 6))
    >>> len(plan), plan.pads, plan.place(0)
    (2, ((0, 0), (1, 1)), (slice(0, 8, None), slice(0, 6, None)))
    """
    shape = tuple(int(n) for n in spatial_shape)
    if hasattr(inferer, "declared_windows"):
        return _declared(inferer, shape, dtype)
    if type(inferer).__call__ not in _SLIDING:
        if type(inferer).__call__ is not SimpleInferer.__call__:
            plan = _patches(inferer, shape, dtype) if type(inferer) is PatchInferer else "is not known"
            if isinstance(plan, WindowPlan):
                return plan
            warnings.warn(
                f"{type(inferer).__name__} {plan}: it is explained as one window of {shape}, which needs the memory of "
                "a backward pass through the whole volume; SlidingWindowInferer needs that of one window batch",
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
    interval = scan_interval(padded, roi, overlap)
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


def _declared(inferer: Any, shape: tuple[int, ...], dtype: torch.dtype) -> WindowPlan:
    """Return the windows that an inferer declares.

    Raises:
        NetworkError: they do not fit the volume.
    """
    plan = inferer.declared_windows(shape, dtype)
    name = type(inferer).__name__
    if not isinstance(plan, WindowPlan) or plan.spatial_shape != shape:
        raise NetworkError(f"{name}.declared_windows: give a WindowPlan of the volume {shape}, got {plan!r:.80}")
    sizes = {tuple(s.stop - s.start for s in place) for place in plan.slices}
    if sizes != {plan.roi} and not plan.whole:
        raise NetworkError(f"{name}: all windows must have the shape roi={plan.roi}, got {sorted(sizes)[:3]}")
    if any(s.start < 0 or s.stop > n for place in plan.slices for s, n in zip(place, plan.padded_shape)):
        raise NetworkError(f"{name}: a window lies outside the padded volume {plan.padded_shape}")
    if plan.owned and (plan.whole or len(plan.owned) != len(plan)):
        raise NetworkError(f"{name}: owned has {len(plan.owned)} boxes for {len(plan)} windows: give one for each")
    if plan.coverage < 1:
        raise NetworkError(f"{name}: the windows cover {100 * plan.coverage:.0f} % of the volume {shape}: cover it all")
    return plan


def _patches(inferer: PatchInferer, shape: tuple[int, ...], dtype: torch.dtype) -> WindowPlan | str:
    """Return the window plan of a `PatchInferer`, or the reason why a plan cannot represent it.

    A plan requires a linear merger and padding like that of a sliding window.

    Raises:
        NetworkError: the patches do not cover some voxels, where `AvgMerger` divides by zero.
    """
    splitter = inferer.splitter
    if type(splitter) is not SlidingWindowSplitter or splitter.filter_fn is not None:
        return "does not split by a plain SlidingWindowSplitter"
    if inferer.merger_cls is not AvgMerger or {"merged_shape", "cropped_shape"} & set(inferer.merger_kwargs):
        return f"merges by {inferer.merger_cls.__name__} with settings of its own, not by a plain AvgMerger"
    if inferer.preprocessing or inferer.postprocessing or inferer.output_keys:
        return "transforms patches, or keeps several outputs"
    roi, overlap, offset = splitter_parameters(splitter, shape)
    roi = tuple(r or n for r, n in zip(roi, shape))
    pads = tuple(splitter_padding(splitter, shape, roi, offset, overlap))
    padded = tuple(n + lo + hi for n, (lo, hi) in zip(shape, pads))
    if any((lo or hi) and n != r for (lo, hi), n, r in zip(pads, padded, roi)):
        return "pads after its last patches"
    if any(pads) and not inferer.match_spatial_shape:
        return "returns the padding as part of the prediction"
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
    """Return the first voxels of patches along each axis, like `monai.data.utils.iter_patch_position`."""
    steps = [round(r * (1.0 - o)) if isinstance(o, float) else r - o for r, o in zip(roi, overlap)]
    return [range(first, n - r + 1, step) for first, n, r, step in zip(offset, padded, roi, steps)]
