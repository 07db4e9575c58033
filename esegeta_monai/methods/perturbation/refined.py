"""Occlusion from large boxes to small ones: a box is divided only where its effect is large."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import score_changes

__all__ = ["boxes_of_all_sizes", "count_of_all_sizes", "refined"]

Cell = tuple[int, ...]
"""Number of a box along each axis, in a grid of boxes of one size."""


def _factors(refine: int) -> list[int]:
    """Return the sizes of boxes in windows, from ``refine`` to 1, each half of the one before."""
    return [2**j for j in range(refine.bit_length() - 1, -1, -1)]


def _cells(edges: Sequence[int], factor: int, shape: Sequence[int]) -> Iterator[Cell]:
    return itertools.product(*(range(math.ceil(n / (e * factor))) for n, e in zip(shape, edges)))


def _place(cell: Cell, edges: Sequence[int], factor: int, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and stop (excluded) of a box along each axis."""
    return [(c * e * factor, min((c + 1) * e * factor, n)) for c, e, n in zip(cell, edges, shape)]


def _boxes(places: Sequence[Sequence[tuple[int, int]]], reference: Tensor) -> Boxes:
    return Boxes([[a for a, _ in p] for p in places], [[b for _, b in p] for p in places], reference)


def boxes_of_all_sizes(edges: Sequence[int], refine: int, shape: Sequence[int], reference: Tensor) -> Boxes:
    """Return the boxes of all sizes, the most that can be scored.

    Args:
        edges: edges of the smallest boxes in voxels.
        refine: edge of the largest boxes over that of the smallest.
        shape: of the image (*spatial).
        reference: (C, *spatial), which replaces the voxels.
    """
    places = [_place(c, edges, f, shape) for f in _factors(refine) for c in _cells(edges, f, shape)]
    return _boxes(places, reference)


def count_of_all_sizes(edges: Sequence[int], refine: int, shape: Sequence[int]) -> int:
    """Return the number of `boxes_of_all_sizes`; arguments as there.

    >>> count_of_all_sizes((2, 2), 2, (8, 8))
    20
    """
    return sum(math.prod(math.ceil(n / (e * f)) for n, e in zip(shape, edges)) for f in _factors(refine))


def refined(
    edges: Sequence[int], refine: int, above: float, objective: Objective, reference: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """Return the map (k, 1, *spatial) and the notes of the record.

    Args:
        edges, refine, reference: see `boxes_of_all_sizes`.
        above: share of the largest effect of its size from which a box is divided.
        objective: of the case.
    """
    shape = objective.plan.spatial_shape
    maps, scored = objective.new_maps(1), 0
    exact: list[list[list[int]]] = []
    cells = list(_cells(edges, refine, shape))
    for factor in _factors(refine):
        places = [_place(cell, edges, factor, shape) for cell in cells]
        drops = -score_changes(objective, _boxes(places, reference))
        scored += len(places)
        largest = drops.abs().amax(1, keepdim=True)
        divided = ((drops.abs() >= above * largest) & (drops != 0)).any(0)
        following: list[Cell] = []
        for i, (cell, place) in enumerate(zip(cells, places)):
            held = [math.ceil((b - a) / e) for (a, b), e in zip(place, edges)]
            if factor > 1 and bool(divided[i]) and math.prod(held) > 1:
                following += _halves(cell, edges, factor // 2, shape)
                continue
            index: tuple[Any, ...] = (slice(None), 0, *(slice(a, b) for a, b in place))
            value = (drops[:, i] / math.prod(held)).to(maps)
            maps[index] = value.reshape(-1, *(1,) * len(place))
            if math.prod(held) == 1:
                exact.append([list(ends) for ends in place])
        cells = following
        if not cells:
            break
    share = sum(math.prod(b - a for a, b in place) for place in exact) / math.prod(shape)
    return maps, {"occluders": scored, "exact_share": share, "exact_boxes": exact}


def _halves(cell: Cell, edges: Sequence[int], factor: int, shape: Sequence[int]) -> list[Cell]:
    """Return the boxes of half the edge, ``factor`` windows, inside a box."""
    inside = itertools.product(*((2 * c, 2 * c + 1) for c in cell))
    return [h for h in inside if all(c * e * factor < n for c, e, n in zip(h, edges, shape))]
