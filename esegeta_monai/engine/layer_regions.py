"""Activations of a layer averaged over regions of the image, and gradients of a layer summed over its positions.

A region is a mask on the image's grid. The layer's map of each window is placed on that grid as in
`esegeta_monai.engine.layer_maps.BlendedActivations`; the mean over a region is computed without the map itself, by the
transpose of the interpolation, so that memory does not grow with channels times voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.layer_maps import check_one_member, input_grid
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request, View
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.resize import interpolate, line_matrix
from esegeta_monai.errors import InputError, MethodError
from esegeta_monai.utils.tensors import bounding_box

__all__ = ["MaskedBox", "PooledActivations", "RegionGradients", "SummedGradients", "regions_of"]


@dataclass(frozen=True)
class MaskedBox:
    """A region of the image.

    Attributes:
        box: one slice per spatial axis of the image.
        mask: bool (*box), with at least one voxel.
    """

    box: tuple[slice, ...]
    mask: Tensor

    @classmethod
    def of(cls, mask: Tensor) -> MaskedBox:
        """Cut a mask (*spatial) to the smallest box.

        Raises:
            InputError: the mask has no voxel.

        >>> MaskedBox.of(torch.tensor([[0, 0, 0], [0, 1, 1]])).box
        (slice(1, 2, None), slice(1, 3, None))
        """
        inside = mask.as_subclass(Tensor) > 0
        if not bool(inside.any()):
            raise InputError("a region has no voxel on the image's grid: give another mask")
        box = bounding_box(inside)
        return cls(box, inside[box])

    def moved(self, start: Sequence[int]) -> MaskedBox:
        """Return the same mask with its box at another first voxel, one number per axis."""
        return MaskedBox(tuple(slice(s, s + n) for s, n in zip(start, self.mask.shape)), self.mask)


def regions_of(labels: Tensor, count: int) -> list[MaskedBox]:
    """Return the regions 0 … count − 1 of a label map (*spatial), int64; other values belong to no region.

    Raises:
        InputError: a region has no voxel.
    """
    from scipy.ndimage import find_objects

    numbers = labels.cpu().as_subclass(Tensor)
    boxes = find_objects((numbers + 1).clamp(min=0).numpy(), max_label=count)
    if any(box is None for box in boxes):
        raise InputError("a region has no voxel on the image's grid: give another label map")
    return [MaskedBox(tuple(box), (numbers[box] == i).to(labels.device)) for i, box in enumerate(boxes)]


class PooledActivations(Request):
    """Mean of a layer's activations over regions: ``1/|M| Σ_{v ∈ M} Σ_w ĝ_w(v) up(A_w)(v)``.

    It equals the mean of `BlendedActivations` over each region. The result is (R, C), float64.

    Args:
        layer: dotted name.
        regions: R regions of the image.
        parts: True: positive and negative parts are averaged separately, ``A⁺`` and ``A⁻`` with ``A = A⁺ − A⁻``; the
            result is (R, 2C), all values at least 0.
    """

    everywhere = True
    backward = False
    summed = ("total",)

    def __init__(self, layer: str, regions: Sequence[MaskedBox], *, parts: bool = False) -> None:
        self.layers, self.regions, self.parts_apart = (layer,), regions, parts
        self.total: Tensor | None = None

    def begin(self, objective: Objective) -> None:
        check_one_member(objective)
        self.objective, self.grid = objective, input_grid(objective)
        self.total = None

    def see(self, view: View) -> None:
        plan, call = self.objective.plan, view.batch.call
        views = view.maps(self.layers[0])
        share = plan.share(call) / call.weight / len(views)
        values = torch.stack([v.double() for v in views]) * share
        if self.parts_apart:
            values = torch.cat([values.relu(), (-values).relu()], 2)
        values = values.sum(0)
        if self.total is None:
            self.total = torch.zeros(len(self.regions), values.shape[1], dtype=torch.float64)
        positions = tuple(values.shape[2:])
        for window, activations in zip(view.batch.windows, values):
            for number, region in enumerate(self.regions):
                weighted = _on_positions(region, self.grid, window, positions, blended=True)
                if weighted is not None:
                    cells, weights = weighted
                    index: tuple[Any, ...] = (slice(None), *cells)
                    part = activations[index].flatten(1) @ weights.to(activations).flatten()
                    self.total[number] += part.cpu()

    def result(self) -> Tensor:
        assert self.total is not None
        return self.total / torch.tensor([float(r.mask.sum()) for r in self.regions], dtype=torch.float64)[:, None]


def _on_positions(
    region: MaskedBox, grid: OutputGrid, window: int, positions: Sequence[int], *, blended: bool
) -> tuple[tuple[slice, ...], Tensor] | None:
    """Return the positions of the layer that a region reads in a window, and their weights, float64.

    Weights are ``Uᵀ(ĝ_w m)`` with ``blended``, else the share of each position in the region, ``Uᵀm / Uᵀ1``; U is the
    linear interpolation from positions to the window. None: the window does not see the region.
    """
    inside, in_box = grid.meet(region.box, window)
    if any(s.start >= s.stop for s in inside):
        return None
    mask = region.mask[in_box]
    if not bool(mask.any()):
        return None
    weights = mask.double()
    if blended:
        weights = grid.weight(window, inside).double() * mask.to(grid.weight(window, inside).device)
    read = [_cells_of(part.start, part.stop, p, n) for part, n, p in zip(inside, grid.plan.roi, positions)]
    values = interpolate(weights, [matrix for _, matrix in read])
    if not blended:
        for axis, ((cells, _), n, p) in enumerate(zip(read, grid.plan.roi, positions)):
            column = _cells_of(0, n, p, n)[1].sum(1)[cells].to(values)
            values = values / column.reshape(-1, *(1,) * (values.ndim - 1 - axis))
    return tuple(cells for cells, _ in read), values


@lru_cache(maxsize=4096)
def _cells_of(start: int, stop: int, cells: int, extent: int) -> tuple[slice, Tensor]:
    """Return the cells that the voxels ``start`` … ``stop`` − 1 of a line are interpolated from, and the transpose of
    the interpolation from them, (cells, voxels)."""
    if cells == extent:
        return slice(start, stop), torch.eye(stop - start, dtype=torch.float64)
    matrix = line_matrix(start, stop, cells, extent, torch.float64)
    (used,) = bounding_box((matrix != 0).any(0))
    return used, matrix[:, used].T.contiguous()


class RegionGradients(Request):
    """Derivative of F along each channel of a layer within regions: ``Σ_w Σ_p q_w(p) ∂F/∂A_w,c(p)``.

    The result is (k, R, C), float64. q is the share of a position's cell that is in the region, 0 to 1. The product
    with a vector v is the derivative of F when q v is added to the layer's output.

    Args:
        layer: dotted name.
        regions: R regions of the image.
    """

    summed = ("total",)

    def __init__(self, layer: str, regions: Sequence[MaskedBox]) -> None:
        self.layers, self.regions = (layer,), regions
        self.total: Tensor | None = None

    def begin(self, objective: Objective) -> None:
        check_one_member(objective)
        self.grid, self.total = input_grid(objective), None

    def see(self, view: View) -> None:
        for gradients in view.gradient_maps(self.layers[0]):  # (k, n, C, *positions)
            k, _, channels = gradients.shape[:3]
            if self.total is None:
                self.total = torch.zeros(k, len(self.regions), channels, dtype=torch.float64)
            for j, window in enumerate(view.batch.windows):
                for number, region in enumerate(self.regions):
                    shares = _on_positions(region, self.grid, window, gradients.shape[3:], blended=False)
                    if shares is not None:
                        cells, weights = shares
                        index: tuple[Any, ...] = (slice(None), j, slice(None), *cells)
                        part = gradients[index].flatten(2).double()
                        self.total[:, number] += (part @ weights.to(part).flatten()).cpu()

    def result(self) -> Tensor:
        if self.total is None:
            raise MethodError("the target sees no window, so there are no gradients")
        return self.total


class SummedGradients(Request):
    """Derivative of F along each channel of a layer: ``Σ_w Σ_p ∂F/∂A_w,c(p)``, (k, C), float64.

    Its product with a vector v is the derivative of F when v is added to the layer's output at every position of every
    window. Calls of a layer that runs several times are added.

    Args:
        layer: dotted name.
    """

    summed = ("total",)

    def __init__(self, layer: str) -> None:
        self.layers = (layer,)
        self.total: Tensor | None = None

    def begin(self, objective: Objective) -> None:
        check_one_member(objective)
        self.total = None

    def see(self, view: View) -> None:
        for gradients in view.gradient_maps(self.layers[0]):  # (k, n, C, *positions)
            part = gradients.flatten(3).sum((1, 3), dtype=torch.float64).cpu()
            self.total = part if self.total is None else self.total + part

    def result(self) -> Tensor:
        if self.total is None:
            raise MethodError("the target sees no window, so there are no gradients")
        return self.total
