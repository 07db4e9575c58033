"""How far the members of an ensemble, or its mirrored views, agree on a map.

The map of a member is that of the same score with the same mask, baseline and draws, computed with this member alone.
For methods that are linear in the score, the weighted mean of these maps is the map of the ensemble.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai.engine.calls import parts_of
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.plan import Call, WindowPlan
from esegeta_monai.errors import named_reason
from esegeta_monai.methods.base import Method
from esegeta_monai.methods.run import run_together

__all__ = ["AgreementMaps", "Kind", "compared", "part_maps", "part_passes", "spread", "summary"]

Kind = Literal["members", "views"]
DDOF: Final[dict[Kind, int]] = {"members": 1, "views": 0}
"""Members are a sample of the networks that a training could give; views are all there are."""
RELEVANT = 0.01
"""Share of the largest |a| of a map above which a voxel counts."""
BLOCKS, SHUFFLES = 8, 3
"""Blocks per axis that are exchanged, and how often."""


@dataclass
class AgreementMaps:
    """The maps of the members and of the views of one attribution.

    Attributes:
        members: (C, *spatial) of each member; empty for a single network.
        views: (C, *spatial) of each mirrored view; empty if there is one.
    """

    members: list[MetaTensor]
    views: list[MetaTensor]

    def of(self, kind: Kind) -> list[MetaTensor]:
        """Return the maps (C, *spatial) of the members, or of the views."""
        return self.members if kind == "members" else self.views


def compared(plan: WindowPlan | None) -> list[Kind]:
    """Return what a plan has several of: ``"members"``, ``"views"``, both or nothing."""
    if plan is None or not plan.calls:
        return []
    views = {_view(call) for call in plan.calls}
    kinds: list[Kind] = ["members"] if plan.member_count > 1 else []
    return [*kinds, "views"] if len(views) > 1 else kinds


def _member(call: Call) -> int:
    return call.member


def _view(call: Call) -> tuple[Any, ...]:
    return call.flips, call.axes


def part_maps(
    methods: Sequence[Method], objective: Objective, kind: Kind
) -> tuple[list[float], list[list[Tensor] | str]]:
    """Compute the maps of each member, or of each view, alone.

    Args:
        methods: methods that may share passes.
        objective: that of the ensemble; the network is in evaluation mode.
        kind: what is compared.

    Returns:
        The share of each member or view in the prediction; and per method its maps (k, C, *spatial) of each, or the
        reason why there are none.
    """
    shares: list[float] = []
    maps: list[list[Tensor] | str] = [[] for _ in methods]
    for share, part in parts_of(objective, _member if kind == "members" else _view):
        shares.append(share)
        for i, outcome in enumerate(run_together(methods, part)):
            known = maps[i]
            if isinstance(known, str):
                continue
            if outcome.result is None:
                assert outcome.error is not None
                maps[i] = named_reason(outcome.error)
            else:
                known.append(outcome.result.maps)
    return shares, maps


def part_passes(method: Method, objective: Objective, kind: Kind) -> int:
    """Return the window passes of `part_maps` for a method; the prediction of a part is not known beforehand."""
    parts = [part for _, part in parts_of(objective, _member if kind == "members" else _view)]
    reads = method.reads_image_value or not objective.linear
    return sum(method.passes(part) + (len(part.windows) if reads else 0) for part in parts)


def spread(maps: Sequence[Tensor], kind: Kind) -> Tensor:
    """Return the standard deviation (C, *spatial) over maps of this shape: ddof 1 over members, 0 over views.

    >>> float(spread([torch.zeros(1, 2), torch.ones(1, 2)], "views")[0, 0])
    0.5
    """
    return torch.stack([torch.as_tensor(m).as_subclass(Tensor) for m in maps]).std(0, correction=DDOF[kind])


def summary(
    maps: Sequence[Tensor], shares: Sequence[float], whole: Tensor, kind: Kind, generator: torch.Generator
) -> dict[str, Any]:
    """Summarise how far maps agree, beside the values of the same maps with their blocks shuffled.

    Args:
        maps: (C, *spatial) of each member or view.
        shares: their shares in the prediction.
        whole: map of the ensemble (C, *spatial).
        kind: what the maps are of.
        generator: of the permutations.

    Returns:
        ``count``; ``mean_deviation``: largest difference of their weighted mean from the ensemble's map, relative to
        its largest value; and the values of `_values`, beside those of maps whose blocks (8 per axis) were exchanged
        independently, under ``shuffled``.
    """
    stacked = torch.stack([m.detach().cpu().double() for m in maps])
    weights = torch.tensor(list(shares), dtype=torch.float64).reshape(-1, *(1,) * (stacked.ndim - 1))
    full = whole.detach().cpu().double()
    largest = float(full.abs().max())
    difference = float(((stacked * weights).sum(0) - full).abs().max())
    drawn = [_values(torch.stack([_shuffled(values, generator) for values in stacked]), kind) for _ in range(SHUFFLES)]
    means = {name: _mean([values[name] for values in drawn]) for name in drawn[0] if name != "voxels"}
    return {
        "count": len(maps),
        "mean_deviation": difference / largest if largest else None,
        **_values(stacked, kind),
        "shuffled": means,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def _values(maps: Tensor, kind: Kind) -> dict[str, Any]:
    """Compute the measures of maps (M, C, *spatial), in voxels where any |a| exceeds 1 % of its map's maximum.

    Returns:
        ``voxels``: how many; ``sd``: mean standard deviation, in units of the map; ``sd_normalised``: sum over all
        voxels of that of the maps divided by their Σ|a|, from 0; ``same_sign``: mean share of maps with the sign of the
        mean, 0 to 1, None for maps without negative values; ``rank_correlation`` and ``least_rank_correlation``: mean
        and minimum over pairs, -1 to 1.
    """
    peaks = maps.flatten(1).abs().amax(1).reshape(-1, *(1,) * (maps.ndim - 1))
    here = ((maps.abs() > RELEVANT * peaks) & (peaks > 0)).any(0)
    if not bool(here.any()):
        names = ("sd", "sd_normalised", "same_sign", "rank_correlation", "least_rank_correlation")
        return {"voxels": 0, **dict.fromkeys(names)}
    correction = DDOF[kind]
    sums = maps.flatten(1).abs().sum(1).reshape(peaks.shape).clamp_min(torch.finfo(maps.dtype).tiny)
    sign = None
    if bool((maps < 0).any()):
        sign = float((maps.sign() == maps.mean(0).sign())[:, here].double().mean())
    pairs = _rank_correlations(maps[:, here].numpy())
    return {
        "voxels": int(here.sum()),
        "sd": float(maps.std(0, correction=correction)[here].mean()),
        "sd_normalised": float((maps / sums).std(0, correction=correction).sum()),
        "same_sign": sign,
        "rank_correlation": math.fsum(pairs) / len(pairs) if pairs else None,
        "least_rank_correlation": min(pairs, default=None),
    }


def _rank_correlations(values: np.ndarray) -> list[float]:
    """Return Spearman's correlation of each pair of rows (M, n); empty if a row is constant."""
    from scipy.stats import rankdata

    if values.shape[1] < 2 or bool((values.max(1) == values.min(1)).any()):
        return []
    ranks = np.stack([rankdata(row) for row in values])
    table = np.corrcoef(ranks)
    return [float(table[i, j]) for i, j in itertools.combinations(range(len(values)), 2)]


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    """Return a map (C, *spatial) with its blocks in random order; voxels beyond the last whole block are left out."""
    edges = [math.ceil(n / BLOCKS) for n in values.shape[1:]]
    for axis, (n, edge) in enumerate(zip(values.shape[1:], edges), 1):
        values = values.narrow(axis, n % edge // 2, n - n % edge)
    shape, dims = values.shape, values.ndim - 1
    counts = [n // edge for n, edge in zip(shape[1:], edges)]
    split = itertools.chain.from_iterable(zip(counts, edges))
    blocks = values.reshape(shape[0], *split).permute(0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2))
    flat = blocks.reshape(shape[0], math.prod(counts), *edges)
    mixed = flat[:, torch.randperm(flat.shape[1], generator=generator)]
    together = mixed.reshape(shape[0], *counts, *edges)
    order = [0, *itertools.chain.from_iterable((1 + a, 1 + dims + a) for a in range(dims))]
    return together.permute(order).reshape(shape)
