"""The end of a map's colour scale, and how much of the target lies beyond it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Scale", "saturated_share", "scale_of"]

OF_MAP, OF_TARGET = 99.5, 99.0
"""Percentiles of the voxels that are not zero, and of the target's voxels."""
BEYOND = 0.1
"""Largest share of the map's strength that may lie beyond the end of the scale where the target has no voxels."""


class Scale(NamedTuple):
    """The end of a colour scale, in units of the map, and where it comes from, in words; 0 for a map of zeros."""

    limit: float
    origin: str


def scale_of(values: np.ndarray, signed: bool, mask: np.ndarray | None = None) -> Scale:
    """Return the end of the colour scale of a map: the larger of two values of its strength.

    Strength is |a|, or max(a, 0) for a map without sign. The percentiles are the 99.5th of the voxels that are not
    zero, and the 99th inside the target's mask, the largest of all channels. With the first alone a lesion of a
    thousandth of the volume is one block in the colour of the scale's end; with the second at most 1 % of the target
    lies beyond the end, since it is a value of the target itself, and never one between two of them. A target without
    voxels, such as the score of a class, has in place of the second the value beyond which at most a tenth of the map's
    strength lies: a map that is strong in a few voxels would be one block too.

    Args:
        values: map (C, *spatial). Values that are not finite are left out.
        signed: True if the sign of the map is meaningful.
        mask: bool (*spatial), the target's voxels; None: it has none.

    >>> values = np.zeros((1, 100, 100)); values[0, :, :50] = 0.1; values[0, :2, :10] = np.arange(1, 11)
    >>> mask = values[0] >= 1
    >>> scale_of(values, True, mask)
    Scale(limit=10.0, origin='99th percentile inside the target')
    >>> scale_of(values, True)
    Scale(limit=7.0, origin='value beyond which a tenth of the map lies')
    """
    strength = _strength(values, signed)
    if not strength.any():
        return Scale(0.0, "no scale")
    limit, origin = float(np.percentile(strength[strength > 0], OF_MAP)), f"{OF_MAP}th percentile of non-zero voxels"
    if mask is not None and mask.any():
        inside = max(float(np.percentile(channel[mask], OF_TARGET, method="higher")) for channel in strength)
        if inside > limit:
            limit, origin = inside, f"{OF_TARGET:g}th percentile inside the target"
    else:
        beyond = np.sort(strength[strength > limit].astype(np.float64))[::-1]
        of_tenth = int(np.searchsorted(beyond.cumsum(), BEYOND * strength.sum(dtype=np.float64), side="right"))
        if of_tenth < len(beyond):
            limit, origin = float(beyond[of_tenth]), "value beyond which a tenth of the map lies"
    return Scale(limit, origin)


def saturated_share(values: np.ndarray, limit: float, signed: bool, mask: np.ndarray | None) -> float | None:
    """Return the share (0 to 1) of the target's voxels beyond the end of the scale, the largest of all channels.

    Args:
        values, signed, mask: as in `scale_of`.
        limit: end of the scale.

    Returns:
        None without a target, or for a scale that has no end.

    >>> values = np.arange(10.0).reshape(1, 10, 1)
    >>> saturated_share(values, 7.5, True, np.ones((10, 1), bool))
    0.2
    """
    if mask is None or not mask.any() or not limit > 0:
        return None
    strength = _strength(values, signed)
    return max(float((channel[mask] > limit).mean()) for channel in strength)


def _strength(values: np.ndarray, signed: bool) -> np.ndarray:
    """Return |a| or max(a, 0) of a map, 0 where it is not finite."""
    finite = np.where(np.isfinite(values), values, 0)
    return np.abs(finite) if signed else np.maximum(finite, 0)
