"""What a score sees: the voxels of its mask as a list, and which of them each window holds.

Nothing outside the mask is ever copied, blended or added: what a perturbed window costs beside the network goes by the
voxels of the mask that lie in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.utils.tensors import take, true_positions

__all__ = ["MaskVoxels", "WindowVoxels"]


DENSE = 8
"""By how much to pick a voxel is dearer than to look at one in order."""


@dataclass(frozen=True)
class WindowVoxels:
    """The m voxels of the mask that one window holds.

    Attributes:
        cells: where they lie in the window's flattened output (m,); None: they are all of it, in order.
        voxels: their numbers in the list of the mask's voxels (m,).
        weight: ``ĝ_w`` there (m,).
    """

    cells: Tensor | None
    voxels: Tensor
    weight: Tensor


class MaskVoxels:
    """The n voxels of one score's mask, numbered in the order of memory.

    Args:
        objective: the case.
        target: which of its scores.
    """

    def __init__(self, objective: Objective, target: int) -> None:
        self.objective, self.score = objective, objective.scores[target]
        self.windows = frozenset(objective.score_windows[target])
        self.rows = objective.rows[target]
        self.mask = self.score.mask.to(objective.image.device)
        self.n = self.score.voxels
        self._where = true_positions(self.mask)
        self._number = self._where.new_empty(self.mask.shape, dtype=torch.int32)
        self._number.view(-1)[self._where] = torch.arange(self.n, dtype=torch.int32, device=self.mask.device)

    def count(self, window: int) -> int:
        """m, how many of the voxels a window holds."""
        _, in_box = self.objective.grid.meet(self.score.box, window)
        return int(torch.count_nonzero(self.mask[in_box]))

    def window_voxels(self, window: int) -> WindowVoxels:
        """Which of the voxels a window holds, and where."""
        grid = self.objective.grid
        in_window, in_box = grid.meet(self.score.box, window)
        part = self.mask[in_box]
        at = true_positions(part)
        weight = grid.weight(window, in_window).reshape(-1).index_select(0, at)
        voxels = self._number[in_box].reshape(-1).index_select(0, at).long()
        if len(at) == grid.size:
            return WindowVoxels(None, voxels, weight)
        if part.numel() == grid.size:
            return WindowVoxels(at, voxels, weight)
        inside = part.new_zeros(grid.out_roi)
        inside[in_window] = part
        return WindowVoxels(true_positions(inside), voxels, weight)

    def read(self, out: Tensor, parts: Sequence[tuple[slice, WindowVoxels]]) -> list[Tensor]:
        """`Score.contrast` at the voxels that windows hold, from the network's output (n, R, *out_roi).

        Args:
            parts: some rows of the output that are of one window, and what it holds.

        Returns:
            For each of them (rows, channels, m).
        """
        seen = out[:, self.rows].reshape(len(out), len(self.score.channels), -1)
        dense = any(h.cells is None or DENSE * len(h.cells) > seen.shape[-1] for _, h in parts)
        if dense:  # fewer channels are picked from
            seen = self.score.contrast(seen)
        picked = [seen[rows] if h.cells is None else take(seen[rows], h.cells.to(seen.device)) for rows, h in parts]
        return picked if dense else [self.score.contrast(values) for values in picked]

    def of(self, prediction: Tensor) -> Tensor:
        """`Score.contrast` at the mask's voxels of what the score reads of a prediction (channels, *box), in float64:
        (channels, n)."""
        return self.score.contrast(take(prediction.reshape(len(prediction), -1), self._where).double())

    def box(self, values: Tensor) -> Tensor:
        """Values of the mask's voxels (channels, n) in their box, zero outside the mask: (channels, *box)."""
        box = values.new_zeros((len(values), self.mask.numel()))
        box[:, self._where] = values
        return box.view(len(values), *self.mask.shape)
