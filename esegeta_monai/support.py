"""What a score sees: the voxels of its mask as a list, and which of them each window holds.

Nothing outside the mask is ever copied, blended or added: what a perturbed window costs beside the network goes by the
voxels of the mask that lie in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai.objective import Objective

__all__ = ["Held", "Support"]


@dataclass(frozen=True)
class Held:
    """The m voxels of the mask that one window holds.

    Attributes:
        cells: where they lie in the window's flattened output (m,), int32; None: they are all of it, in order.
        voxels: their numbers in the list of the mask's voxels (m,), int64, as `torch.Tensor.index_add_` is fast.
        weight: ``ĝ_w`` there (m,).
    """

    cells: Tensor | None
    voxels: Tensor
    weight: Tensor


class Support:
    """The n voxels of one score's mask, numbered in the order of memory.

    Args:
        objective: the case.
        target: which of its scores.
    """

    def __init__(self, objective: Objective, target: int) -> None:
        self.objective, self.score = objective, objective.scores[target]
        self.windows = frozenset(objective.support[target])
        rows = objective.rows[target]
        self.rows = None if rows == list(range(len(objective.read))) else rows
        mask = self.score.mask.to(objective.image.device)
        self.n = self.score.voxels
        self._number = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
        self._number[mask] = torch.arange(self.n, dtype=torch.int32, device=mask.device)

    def count(self, window: int) -> int:
        """m, how many of the voxels a window holds."""
        _, in_box = self.objective.grid.meet(self.score.box, window)
        return int(torch.count_nonzero(self._number[in_box] >= 0))

    def held(self, window: int) -> Held:
        """Which of the voxels a window holds, and where."""
        grid = self.objective.grid
        in_window, in_box = grid.meet(self.score.box, window)
        number = self._number[in_box].reshape(-1)
        at = torch.nonzero(number >= 0).flatten()
        weight = grid.weight(window)[in_window].reshape(-1)[at]
        if len(at) == grid.size:
            return Held(None, number.long(), weight)
        cells = torch.arange(grid.size, dtype=torch.int32, device=at.device).reshape(grid.out_roi)[in_window]
        return Held(cells.reshape(-1)[at], number[at].long(), weight)

    def read(self, out: Tensor, held: Held) -> Tensor:
        """The voxels that a window holds, from its output (n, R, *out_roi): (n, channels, m)."""
        seen = out.reshape(*out.shape[:2], -1)
        if self.rows is not None:
            seen = seen[:, self.rows]
        return seen if held.cells is None else seen[:, :, held.cells.to(seen.device)]

    def of(self, prediction: Tensor) -> Tensor:
        """The mask's voxels of what the score reads of a prediction, (channels, *box): (channels, n)."""
        return prediction[:, self._number >= 0].reshape(len(prediction), -1)

    def cotangent(self, window: int, held: Held) -> Tensor:
        """``ĝ_w ∂s/∂P`` of a linear score at the voxels that a window holds: (channels, m), float64."""
        grid, score = self.objective.grid, self.score
        inside = score.window_cotangent(lambda values: grid.cut(values, score.box, window))
        inside = inside.expand(len(score.channels), *grid.out_roi)[None]
        seen = inside.reshape(*inside.shape[:2], -1)[0].to(held.weight.device)
        seen = seen if held.cells is None else seen[:, held.cells]
        return seen.double() * held.weight

    def box(self, values: Tensor) -> Tensor:
        """Values of the mask's voxels (channels, n) in their box, zero outside the mask: (channels, *box)."""
        box = values.new_zeros((len(values), *self._number.shape))
        box[:, self._number >= 0] = values
        return box
