"""Additive attribution maps back on the scan's own grid, with nothing lost on the way.

A preprocessing samples the scan: x_net = W x_scan. What an additive map a_net says about network voxels is handed
back to the scan voxels that they were made of,

    a_scan = Wᵀ D a_net,

where D makes every network voxel give away exactly its own relevance. The sum is conserved voxel by voxel, so that
maps whose positive and negative parts nearly cancel are right too; rescaling an interpolated map by a quotient of
sums is not (its denominator may be zero). Voxels that were sampled from outside of the scan (constant padding) hand
the share concerned to nobody; it is booked as ``sum_in_padding``:

    sum_network_grid = sum_scan_grid + sum_in_padding
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping
from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.transforms import MapTransform, Transform
from monai.utils import MetaKeys, ensure_tuple_rep

from esegeta_monai.errors import InputError
from esegeta_monai.transforms.trace import Step, steps

__all__ = ["InvertAttribution", "InvertAttributionD", "InvertAttributionDict", "InvertAttributiond"]

Taps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""For N positions: voxels read (N, T), their weights (N, T), and the share lost in padding (N,); rows sum to 1."""

CHUNK = 1 << 18  # network voxels handled at a time where axes do not separate: bounds the memory beside the maps


class InvertAttribution(Transform):
    """Bring an additive map from the network's grid to the scan's: a_scan = Wᵀ D a_net, sums conserved.

    For a map of activations times weights (GradCam, LayerActivation, …), which does not add up, use MONAI's
    ``Invertd(nearest_interp=False)``: it interpolates, so a constant stays that constant. Give it MetaTensors, since
    it leaves a plain tensor where it is, with no more than a warning.

    Every geometric transform that MONAI traces is undone, last first:

    * permutations (Orientation, Flip, Rotate90) move voxels back, bit by bit;
    * crops come back with zeros around; constant padding is cut off and booked, padding that copies voxels (reflect,
      edge, wrap, symmetric) is folded back onto the voxels copied;
    * Spacing, SpatialResample, ResampleToMatch, Affine, Rotate, Resize, Zoom: the adjoint of the sampling, see below.

    Random variants are read as what they drew. Lazy transforms are merged as MONAI merges them. Intensity transforms
    leave no trace and need none. What MONAI does not trace (Transpose, elastic deformation) cannot be undone; where
    the scan's ``original_affine`` and ``spatial_shape`` are known, ending elsewhere gives a warning.

    **Weights.** Network voxel i was sampled at the scan position p_i = X i. It hands its relevance to scan voxels j by
    tents along the scan's axes, D makes them sum to 1 less the share in padding:

        w_ij ∝ Π_k max(0, 1 − |p_ik − j_k| / h_k)           h_k = max(1, |row k of X|)

    Where the network's grid is as fine as the scan's or finer (h = 1) this is the exact adjoint of linear
    interpolation. Where it is coarser, the exact adjoint would put all relevance on the few scan voxels next to the
    sampling points, one voxel of 27 at a spacing of 3, and zero between: true to the letter, as the network has read
    nothing else, but it shows the sampling pattern rather than the anatomy, and moving the scan by one voxel would
    show another one. The tent is therefore as wide as the coarser of the two grids: the adjoint of the sampling
    with the anti-aliasing that it lacked. ``spread=False`` gives the exact adjoint. The mean over covered voxels
    (``mode="area"``, the default of Resize and Zoom) reads all voxels and is undone exactly. Nearest-neighbour
    sampling puts the centre of the tent on the voxel read. Splines of higher order are treated as linear: their
    negative lobes would give neighbours relevance of the opposite sign.

    Args:
        spread: whether a tent is widened to the coarser of the two grids (above).

    Memory: the map on the grids before and after one step, and a bounded chunk of weights. No dense matrix.

    Example:
        >>> from monai.transforms import Spacing
        >>> scan = MetaTensor(torch.rand(1, 8, 8, 8, dtype=torch.float64), affine=torch.eye(4))
        >>> image = Spacing((2.0, 1.0, 0.5))(scan)
        >>> attribution = image * torch.randn(image.shape, dtype=torch.float64)
        >>> back = InvertAttribution()(attribution)
        >>> tuple(back.shape), bool(torch.isclose(back.sum(), attribution.sum()))
        ((1, 8, 8, 8), True)
    """

    def __init__(self, spread: bool = True) -> None:
        self.spread = spread

    def __call__(self, attribution: torch.Tensor, image: MetaTensor | None = None) -> MetaTensor:
        """Return the map on the scan's grid.

        Args:
            attribution: additive map (C, *spatial), 2D or 3D, on the network's grid. It is not modified.
            image: preprocessed image (any channels, *spatial) whose ``applied_operations`` and affine describe how
                that grid came about; None where ``attribution`` is a MetaTensor that carries them itself.

        Returns:
            MetaTensor (C, *scan), in the dtype of the map (float32 for half precision), with the scan's affine and
            the image's metadata, no applied operations left, and in ``meta`` the floats ``sum_network_grid``,
            ``sum_scan_grid`` and ``sum_in_padding`` (over all channels, accumulated in float64).

        Raises:
            InputError: no trace, pending lazy operations, shapes that differ, or a transform of unknown adjoint.
        """
        source = self._checked(attribution, attribution if image is None else image)
        values = attribution.detach()
        values = values.as_tensor() if isinstance(values, MetaTensor) else values
        values = values if values.dtype in (torch.float32, torch.float64) else values.float()
        total, lost = _sum(values), 0.0

        network_affine = torch.as_tensor(source.affine).to("cpu", torch.float64)
        chain, affine = steps(source.applied_operations, values.shape[1:], network_affine)
        for step in chain:
            values, share = _hand_back(values, step, self.spread)
            lost += share

        meta = deepcopy(source.meta)
        meta[MetaKeys.AFFINE] = affine
        if MetaKeys.PIXDIM in meta:
            spacing = affine_to_spacing(affine)
            meta[MetaKeys.PIXDIM][1 : 1 + len(spacing)] = np.asarray(spacing)
        _warn_if_elsewhere(meta, values.shape[1:], affine)
        meta.update(sum_network_grid=total, sum_scan_grid=_sum(values), sum_in_padding=lost)
        return MetaTensor(values, meta=meta, applied_operations=[])

    @staticmethod
    def _checked(attribution: torch.Tensor, source: torch.Tensor) -> MetaTensor:
        if not isinstance(source, MetaTensor):
            raise InputError(
                "a plain tensor does not say how it was preprocessed: give a MetaTensor, or the image beside it "
                "(orig_keys of InvertAttributiond)"
            )
        for tensor in (attribution, source):
            if isinstance(tensor, MetaTensor) and tensor.pending_operations:
                names = ", ".join(str(operation["class"]) for operation in tensor.pending_operations)
                raise InputError(f"lazy transforms wait to be applied ({names}): put ApplyPendingd before the network")
        if source.is_batch:
            raise InputError("a batch has a trace for each of its images: decollate it and bring the maps back singly")
        if attribution.ndim not in (3, 4) or attribution.is_complex():
            raise InputError(f"a map is real and (C, *spatial) in 2D or 3D, got {tuple(attribution.shape)}")
        if attribution.shape[1:] != source.shape[1:]:
            raise InputError(
                f"the map lies on a grid of {tuple(attribution.shape[1:])}, its image on {tuple(source.shape[1:])}: "
                "upsample layer maps to the image first, and give the image that the network has seen"
            )
        return source


class InvertAttributiond(MapTransform):
    """Dictionary version of :class:`InvertAttribution`; the place of ``Invertd`` for maps that add up.

    Unlike ``Invertd`` it needs no ``transform``: the trace says all.

    Args:
        keys: additive maps (C, *spatial) on the network's grid.
        orig_keys: for each key, the preprocessed image whose trace and affine count; None: the map's own.
        spread: see :class:`InvertAttribution`.
        allow_missing_keys: skip keys that are not there.

    Raises:
        InputError: as :class:`InvertAttribution`, and where an ``orig_keys`` entry is missing.

    Example:
        >>> from monai.transforms import Flipd
        >>> data = Flipd("image")({"image": MetaTensor(torch.zeros(1, 4, 4))})
        >>> data["map"] = torch.arange(16.0).reshape(1, 4, 4)
        >>> back = InvertAttributiond("map", orig_keys="image")(data)["map"]
        >>> bool((back == data["map"].flip(1, 2)).all()), back.meta["sum_scan_grid"]
        (True, 120.0)
    """

    def __init__(
        self,
        keys: KeysCollection,
        orig_keys: KeysCollection | None = None,
        spread: bool = True,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.orig_keys = ensure_tuple_rep(orig_keys, len(self.keys))
        self.inverter = InvertAttribution(spread)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key, orig_key in self.key_iterator(result, self.orig_keys):
            if orig_key is not None and orig_key not in data:
                raise InputError(f"orig_keys names {orig_key!r}, which is not among {sorted(map(str, data))}")
            result[key] = self.inverter(data[key], None if orig_key is None else data[orig_key])
        return result


InvertAttributionD = InvertAttributionDict = InvertAttributiond


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _warn_if_elsewhere(meta: Mapping[str, Any], size: torch.Size, affine: torch.Tensor) -> None:
    loaded, shape = meta.get(MetaKeys.ORIGINAL_AFFINE), meta.get(MetaKeys.SPATIAL_SHAPE)
    if loaded is None or shape is None:
        return
    same_affine = np.allclose(to_affine_nd(len(affine) - 1, np.asarray(loaded)), affine.numpy(), rtol=1e-4, atol=1e-3)
    if not same_affine or tuple(int(n) for n in shape[: len(size)]) != tuple(size):
        warnings.warn(
            f"undoing the traced transforms gives a grid of {tuple(size)} that is not the one loaded "
            f"({tuple(int(n) for n in shape)}): some transform moved voxels and left no trace, "
            "or the image was resampled to another one",
            stacklevel=3,
        )


# ---- one step ------------------------------------------------------------------------------------------------------


def _hand_back(values: torch.Tensor, step: Step, spread: bool) -> tuple[torch.Tensor, float]:
    """Wᵀ D of one step on ``values`` (C, *size_out): the map (C, *size_in), and the sum lost in padding."""
    if step.is_identity:
        return values, 0.0
    linear, offset = step.xform[:-1, :-1], step.xform[:-1, -1]
    half = np.maximum(1.0, np.linalg.norm(linear, axis=1)) if spread else np.ones(len(linear))
    axes = _separable_axes(linear, step.size_out)
    if axes is None:
        return _hand_back_oblique(values, step, half)
    values = values.permute(0, *(1 + axis for axis in axes))
    lost = 0.0
    for k, axis in enumerate(axes):
        positions = linear[k, axis] * torch.arange(step.size_out[axis], dtype=torch.float64) + offset[k]
        voxels, weights, shares = _axis_taps(positions, step, k, float(half[k]))
        along = [1] * values.ndim
        along[k + 1] = -1
        if shares.any():
            lost += _sum(values.double() * shares.to(values.device).view(along))
        shape = list(values.shape)
        shape[k + 1] = step.size_in[k]
        out = values.new_zeros(shape)
        for voxel, weight in zip(voxels.T.to(values.device), weights.T.to(values)):
            out.index_add_(k + 1, voxel, values * weight.view(along))
        values = out
    return values, lost


def _hand_back_oblique(values: torch.Tensor, step: Step, half: np.ndarray) -> tuple[torch.Tensor, float]:
    channels, device = len(values), values.device
    flat = values.reshape(channels, -1)
    out = values.new_zeros(channels, math.prod(step.size_in))
    matrix = torch.as_tensor(step.xform, device=device)
    lost = 0.0
    for start in range(0, flat.shape[1], CHUNK):
        part = flat[:, start : start + CHUNK]
        index = torch.arange(start, start + part.shape[1], device=device)
        where = torch.stack([i.double() for i in torch.unravel_index(index, step.size_out)])
        positions = matrix[:-1, :-1] @ where + matrix[:-1, -1:]
        taps = [_taps(p, n, float(h), step.padding, step.kernel) for p, n, h in zip(positions, step.size_in, half)]
        kept = torch.stack([1.0 - shares for _, _, shares in taps]).prod(0)
        lost += _sum(part.double() * (1.0 - kept))
        for corner in product(*(range(voxels.shape[1]) for voxels, _, _ in taps)):
            target = torch.zeros_like(index)
            weight = torch.ones_like(kept)
            for (voxels, weights, _), tap, n in zip(taps, corner, step.size_in):
                target = target * n + voxels[:, tap]
                weight = weight * weights[:, tap]
            out.index_add_(1, target, part * weight.to(part))
    return out.reshape(channels, *step.size_in), lost


def _separable_axes(linear: np.ndarray, size_out: tuple[int, ...]) -> list[int] | None:
    """For each input axis the output axis that runs along it, or None where the grids are not parallel.

    A drift below 1e-4 voxels from end to end is noise of affines stored as float32.
    """
    axes = [int(axis) for axis in np.abs(linear).argmax(axis=1)]
    drift = np.abs(linear) * np.maximum(np.array(size_out) - 1, 1)
    drift[range(len(axes)), axes] = 0.0
    return axes if sorted(axes) == list(range(len(axes))) and drift.sum(axis=1).max() < 1e-4 else None


def _axis_taps(positions: torch.Tensor, step: Step, axis: int, half: float) -> Taps:
    n_in, n_out = step.size_in[axis], len(positions)
    index = torch.arange(n_out)
    if step.kernel == "area":  # torch's adaptive average pooling
        first, end = index * n_in // n_out, -((-(index + 1) * n_in) // n_out)
        voxels = first[:, None] + torch.arange(int((end - first).max()))
        inside = voxels < end[:, None]
        return voxels.clamp(max=n_in - 1), inside / inside.sum(1, keepdim=True).double(), torch.zeros(n_out)
    if step.kernel in ("floor", "round"):  # in integers: at halves, rounded products decide otherwise than torch does
        middle = 1 if step.kernel == "round" else 0
        positions = ((2 * index + middle) * n_in // (2 * n_out)).double()
    return _taps(positions, n_in, half, step.padding, step.kernel)


def _taps(p: torch.Tensor, n: int, half: float, padding: str, kernel: str) -> Taps:
    """Voxels of an axis of length ``n`` that positions ``p`` (N,) read, by a tent of half-width ``half``."""
    p = _fold(p, n, padding)
    if kernel == "nearest":
        p = p.round()
    kept = _tent(p, n, 1.0, padding)[1].sum(1)  # what the forward sampling took from inside
    voxels, weights = _tent(p, n, half, padding)
    weights = weights * (kept / weights.sum(1).where(kept > 0, torch.ones_like(kept)))[:, None]
    used = weights.any(0)
    return voxels[:, used], weights[:, used], 1.0 - kept


def _tent(p: torch.Tensor, n: int, half: float, padding: str) -> tuple[torch.Tensor, torch.Tensor]:
    voxels = ((p - half).floor().long() + 1)[:, None] + torch.arange(math.ceil(2 * half), device=p.device)
    weights = (1.0 - (voxels - p[:, None]).abs() / half).clamp(min=0.0)
    if padding == "wrap":
        return voxels % n, weights
    return voxels.clamp(0, n - 1), weights * ((voxels >= 0) & (voxels < n))


def _fold(p: torch.Tensor, n: int, padding: str) -> torch.Tensor:
    """Where a position outside of the voxel centres 0 … n − 1 is read instead; constant padding reads nowhere."""
    if padding in ("zeros", "wrap"):
        return p
    if padding == "mirror" and n > 1:
        p = p % (2 * (n - 1))
        p = torch.minimum(p, 2 * (n - 1) - p)
    elif padding == "reflection":
        p = (p + 0.5) % (2 * n)
        p = torch.minimum(p, 2 * n - p) - 0.5
    return p.clamp(0, n - 1)
