"""A map for the viewer of a page: its volumes, its colour scale, and its meaning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from esegeta_monai.explain.record import Record
from esegeta_monai.files.pictures.planes import largest_section
from esegeta_monai.files.pictures.scale import saturated_share, scale_of
from esegeta_monai.methods.meaning import meaning_of
from esegeta_monai.output.report.case_volumes import CaseVolumes
from esegeta_monai.output.report.collect import Result
from esegeta_monai.output.report.volumes import Steps

__all__ = ["first_map", "map_entry", "mark_nil"]

COLOURED = 80
"""Percentile of the body's voxels at which the threshold of the first view lies, so that anatomy is visible."""
NIL = 1e-6
"""A map whose largest value is below this share of that of other maps of its method is numerically nil."""


def map_entry(
    result: Result, values: list[np.ndarray], volumes: CaseVolumes, levels: int, add: Callable[[np.ndarray], str]
) -> dict[str, Any]:
    """Return a map for the viewer: its volumes, its scale, its strongest voxel, and its meaning."""
    record, mask, body = result.record, volumes.mask_of(result), volumes.body
    signed = record.signed is not False
    together = np.stack(values)
    limit, limit_is = scale_of(together, signed, mask)
    strength = np.abs(together) if signed else np.maximum(together, 0)
    channel, *peak = (int(n) for n in np.unravel_index(int(strength.argmax()), strength.shape))
    steps = Steps.of(together, limit, levels)
    inside = strength[:, body] if body is not None else strength[strength > 0]
    threshold = math.ceil(20 * float(np.percentile(inside, COLOURED)) / limit) / 20 if limit and inside.size else 0.05
    total = float(strength.sum())
    meaning = meaning_of(record.method, produces=record.produces, signed=signed, additive=record.additive)
    return {
        "volumes": [add(steps.encode(v)) for v in values],
        "levels": levels,
        "knee": steps.knee,
        "extreme": steps.peak,
        "error": steps.error,
        "target": result.target,
        "method": result.method,
        "signed": signed,
        "limit": limit,
        "limit_is": limit_is,
        "saturated": saturated_share(together, limit, signed, mask),
        "threshold": min(max(threshold, 0.05), 0.5),
        "outside": float(strength[:, ~body].sum()) / total if body is not None and total else None,
        "text": meaning.text,
        "low": meaning.low,
        "high": meaning.high,
        "effect": meaning.effect,
        "complete": bool(record.additive),
        "spacing": record.layer_spacing if record.produces in ("layer map", "activation") else None,
        "grid": _spacing(record),
        "length": "mm" if record.network_affine else "voxels",
        "bars": _bars(result),
        "nil": None,
        "units": record.units or "attribution",
        "peak": peak,
        "start": _start(mask, peak if limit else None, together.shape[1:]),
        "channel": channel,
        "value": float(together[channel][tuple(peak)]),
    }


def _spacing(record: Record) -> list[float]:
    """Return the voxel size of the network's grid, mm."""
    affine = record.network_affine
    return [1.0] if not affine else np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0).tolist()


def _bars(result: Result) -> list[dict[str, Any]] | None:
    """Return name, value and standard error by channel, of a map that has one value for each input channel."""
    rows, channels = result.record.features, result.record.channel_names or []
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) and "feature" in r for r in rows):
        return None
    plain = [f"channel {c}" for c in range(len(rows))]
    if [r["feature"] for r in rows] not in (plain, channels):
        return None
    bars = [{"name": r["feature"], "value": r.get("value"), "error": r.get("standard_error")} for r in rows]
    return bars if all(isinstance(b["value"], (int, float)) for b in bars) else None


def mark_nil(maps: list[dict[str, Any]]) -> None:
    """Set ``nil`` of maps that are zero but for rounding, beside others of the same method and units."""
    for entry in maps:
        others = [m for m in maps if m is not entry and (m["method"], m["units"]) == (entry["method"], entry["units"])]
        largest = max(others, key=lambda m: m["extreme"], default=None)
        if largest is not None and 0 < entry["extreme"] < NIL * largest["extreme"]:
            share = entry["extreme"] / largest["extreme"]
            entry["nil"] = (
                f"numerically nil: its largest value is {share:.1g} of that for {largest['target']}, which is rounding"
            )


def _start(mask: np.ndarray | None, peak: list[int] | None, shape: tuple[int, ...]) -> list[int]:
    """Return the first position of the planes: the target's largest cross-sections, else the map's strongest voxel."""
    if mask is not None:
        return list(largest_section(mask))
    return peak if peak is not None else [n // 2 for n in shape]


def first_map(maps: list[dict[str, Any]]) -> int:
    """Return the map of the first view: one with sign that shows effects, and is neither zero nor nil, if there is one.

    Shares that add up to the score come first.
    """

    def rank(i: int) -> tuple[bool, ...]:
        entry = maps[i]
        there = entry["limit"] > 0 and entry["nil"] is None
        return not there, not entry["effect"], not entry["signed"], entry["bars"] is not None, not entry["complete"]

    return min(range(len(maps)), key=rank, default=0)
