"""A map's sums per label of a label map, per channel, per distance shell, and outside the body."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.metrics.base import MetricInput, magnitude
from esegeta_monai.metrics.localisation import distance_mm, shells

__all__ = ["OUTSIDE_ALARM", "region_table"]

OUTSIDE_ALARM = 0.1
"""Share of a map outside the body above which a table raises an alarm."""


def region_table(
    subject: MetricInput,
    *,
    regions: Tensor | None = None,
    names: Mapping[int, str] | None = None,
    origin: Tensor | None = None,
    channel_names: list[str] | None = None,
    alarm: float = OUTSIDE_ALARM,
) -> list[dict[str, Any]]:
    """Return one row per region: region, voxels, volume_mm3, sum, abs_sum, share_of_abs, mean, alarm.

    ``sum`` is ``Σ a`` over all channels, ``abs_sum`` ``Σ |a|``, ``share_of_abs`` its share of the whole map's, ``mean``
    the mean of a over the region's voxels and channels. Kinds of rows: ``all``, ``body`` and ``outside the body``
    (if a body mask is given), ``channel …`` (if there are several), the label map's regions, distance shells
    from ``origin`` (``distance inside``, ``distance 0-5 mm``, …). ``alarm`` is a sentence if more than the given
    share is outside the body, else None.

    Args:
        subject: map, body mask and spacing.
        regions: label map (*spatial) of whole numbers, zero for none.
        names: names of its labels.
        origin: bool (*spatial), from which distances are measured; None: the subject's label.
        channel_names: names of the image's channels.
        alarm: share outside the body above which the alarm is raised.
    """
    values = subject.map.double().cpu()
    weight = magnitude(values)
    whole = torch.ones(values.shape[1:], dtype=torch.bool)
    total = float(weight.sum())
    voxel = math.prod(subject.spacing) if subject.spacing is not None else None

    def row(region: str, inside: Tensor, part: Tensor = values, strength: Tensor = weight) -> dict[str, Any]:
        n, held = int(inside.sum()), float(strength[inside].sum())
        signed = float(part[:, inside].sum())
        return {
            "region": region,
            "voxels": n,
            "volume_mm3": None if voxel is None else n * voxel,
            "sum": signed,
            "abs_sum": held,
            "share_of_abs": held / total if total > 0 else None,
            "mean": signed / (n * len(part)) if n else None,
            "alarm": None,
        }

    rows = [row("all", whole)]
    if subject.body is not None:
        body = subject.body.cpu()
        outside = row("outside the body", ~body)
        if (outside["share_of_abs"] or 0) > alarm:
            outside["alarm"] = f"{100 * outside['share_of_abs']:.0f} % of the map lies outside the body"
        rows += [row("body", body), outside]
    if len(values) > 1:
        titles = channel_names if channel_names and len(channel_names) == len(values) else range(len(values))
        for c, title in enumerate(titles):
            rows.append(row(f"channel {title}", whole, values[c : c + 1], values[c].abs()))
    if regions is not None:
        labels = regions.cpu().long()
        for value in np.unique(labels.numpy()).tolist():
            if value:
                rows.append(row((names or {}).get(value, f"label {value}"), labels == value))
    origin = subject.label if origin is None else origin
    if origin is not None and subject.spacing is not None and bool(origin.any()):
        distance = distance_mm(origin.cpu(), subject.spacing)
        for name, inside in shells(distance, None if subject.body is None else subject.body.cpu()):
            if name != "outside the body":  # has its own row above; the label counts as body here
                rows.append(row(f"distance {name}", inside))
    return rows
