"""The adjoint of a resampling step: bring a map back to the scan's grid and conserve its sum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing, to_affine_nd
from monai.utils import MetaKeys

from esegeta_monai.errors import InputError
from esegeta_monai.files.grids.trace import Step, steps

__all__ = ["invert_attribution"]

Taps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""For N positions: voxels read (N, T), their weights (N, T), and the share lost in padding (N,). Weights and share
sum to 1 per position."""


CHUNK = 1 << 18  # network voxels per step if axes do not separate: bounds the memory


def invert_attribution(
    attribution: torch.Tensor, image: MetaTensor | None = None, *, spread: bool = True
) -> MetaTensor:
    """Bring a map (C, *spatial) back to the scan's grid (C, *scan) and conserve its sum.

    See `esegeta_monai.transforms.InvertAttribution` for arguments, result and errors.
    """
    source = _checked(attribution, attribution if image is None else image)
    values = attribution.detach()
    values = values.as_tensor() if isinstance(values, MetaTensor) else values
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    total, lost = _sum(values), 0.0

    network_affine = torch.as_tensor(source.affine).to("cpu", torch.float64)
    chain, affine = steps(source.applied_operations, values.shape[1:], network_affine)
    for step in chain:
        values, share = _hand_back(values, step, spread)
        lost += share

    meta = deepcopy(source.meta)
    meta[MetaKeys.AFFINE] = affine
    if MetaKeys.PIXDIM in meta:
        spacing = affine_to_spacing(affine)
        meta[MetaKeys.PIXDIM][1 : 1 + len(spacing)] = np.asarray(spacing)
    _warn_if_elsewhere(meta, values.shape[1:], affine)
    meta.update(sum_network_grid=total, sum_scan_grid=_sum(values), sum_in_padding=lost)
    return MetaTensor(values, meta=meta, applied_operations=[])


def _checked(attribution: torch.Tensor, source: torch.Tensor) -> MetaTensor:
    if not isinstance(source, MetaTensor):
        raise InputError(
            "a plain tensor has no trace of its preprocessing: give a MetaTensor, or also the image "
            "(orig_keys of InvertAttributiond)"
        )
    for tensor in (attribution, source):
        if isinstance(tensor, MetaTensor) and tensor.pending_operations:
            names = ", ".join(str(operation["class"]) for operation in tensor.pending_operations)
            raise InputError(f"lazy transforms are pending ({names}): put ApplyPendingd before the network")
    if source.is_batch:
        raise InputError("a batch has a trace for each of its images: decollate it and invert the maps one by one")
    if attribution.ndim not in (3, 4) or attribution.is_complex():
        raise InputError(f"a map is real and (C, *spatial) in 2D or 3D, got {tuple(attribution.shape)}")
    if attribution.shape[1:] != source.shape[1:]:
        raise InputError(
            f"the map has a grid of {tuple(attribution.shape[1:])}, its image one of {tuple(source.shape[1:])}: "
            "upsample layer maps to the image first, and give the image that the network has seen"
        )
    return source


def _warn_if_elsewhere(meta: Mapping[str, Any], size: torch.Size, affine: torch.Tensor) -> None:
    loaded, shape = meta.get(MetaKeys.ORIGINAL_AFFINE), meta.get(MetaKeys.SPATIAL_SHAPE)
    if loaded is None or shape is None:
        return
    same_affine = np.allclose(to_affine_nd(len(affine) - 1, np.asarray(loaded)), affine.numpy(), rtol=1e-4, atol=1e-3)
    if not same_affine or tuple(int(n) for n in shape[: len(size)]) != tuple(size):
        warnings.warn(
            f"inverting the traced transforms gives a grid of {tuple(size)} that is not the one loaded "
            f"({tuple(int(n) for n in shape)}): some transform moved voxels and left no trace, "
            "or the image was resampled to another one",
            stacklevel=3,
        )


# ---- one step ------------------------------------------------------------------------------------------------------


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _hand_back(values: torch.Tensor, step: Step, spread: bool) -> tuple[torch.Tensor, float]:
    """Apply Wᵀ D of one step to ``values`` (C, *size_out); return the map (C, *size_in) and the sum lost in padding."""
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
    """Return for each input axis the parallel output axis, or None if the grids are not parallel.

    A drift below 1e-4 voxels over the whole axis is rounding of affines stored as float32.
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
    if step.kernel in ("floor", "round"):  # in integers: rounded products differ from torch at halves
        middle = 1 if step.kernel == "round" else 0
        positions = ((2 * index + middle) * n_in // (2 * n_out)).double()
    return _taps(positions, n_in, half, step.padding, step.kernel)


def _taps(p: torch.Tensor, n: int, half: float, padding: str, kernel: str) -> Taps:
    """Return the voxels of an axis of length ``n`` that ``p`` (N,) read by a tent of half-width ``half``."""
    p = _fold(p, n, padding)
    if kernel == "nearest":
        p = p.round()
    kept = _tent(p, n, 1.0, padding)[1].sum(1)  # share of the forward sampling inside the image
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
    """Map positions outside the voxel centres 0 … n − 1 to where padding reads them; constant padding reads nowhere."""
    if padding in ("zeros", "wrap"):
        return p
    if padding == "mirror" and n > 1:
        p = p % (2 * (n - 1))
        p = torch.minimum(p, 2 * (n - 1) - p)
    elif padding == "reflection":
        p = (p + 0.5) % (2 * n)
        p = torch.minimum(p, 2 * n - p) - 0.5
    return p.clamp(0, n - 1)
