"""The voxels of a score's mask as a list, and which of them are inside each window.

Nothing outside the mask is copied, blended or added: beside the forward pass, the cost of a perturbed window is
proportional to the number of mask voxels inside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.utils.tensors import take, true_positions

__all__ = ["MaskVoxels", "WindowVoxels"]


@dataclass(frozen=True)
class WindowVoxels:
    """The m voxels of the mask inside one window.

    Attributes:
        cells: their positions in the window's flattened output (m,); None: they are the whole output, in order.
        voxels: their numbers in the list of the mask's voxels (m,).
        weight: blending weights ``ĝ_w`` (m,).
    """

    cells: Tensor | None
    voxels: Tensor
    weight: Tensor


class MaskVoxels:
    """The n voxels of one score's mask, numbered in the order of memory.

    Args:
        objective: the case.
        target: number of the score.
    """

    def __init__(self, objective: Objective, target: int) -> None:
        self.objective, self.score = objective, objective.scores[target]
        self.windows = frozenset(objective.score_windows[target])
        self.rows = objective.rows[target]
        self.mask = self.score.mask.to(objective.image.device)
        self.n = int(torch.count_nonzero(self.mask))
        self._where = true_positions(self.mask)
        self._number = self._where.new_empty(self.mask.shape, dtype=torch.int32)
        self._number.view(-1)[self._where] = torch.arange(self.n, dtype=torch.int32, device=self.mask.device)

    def count(self, window: int) -> int:
        """Return m, the number of mask voxels inside a window."""
        _, in_box = self.objective.grid.meet(self.score.box, window)
        return int(torch.count_nonzero(self.mask[in_box]))

    def window_voxels(self, window: int) -> WindowVoxels:
        """Return the mask voxels inside a window."""
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
        """Return `Score.contrast` at the mask voxels of windows.

        Args:
            out: the network's output (n, R, *out_roi).
            parts: rows of the output that show one window, and the mask voxels inside it.

        Returns:
            For each part (rows, channels, m).
        """
        seen = out[:, self.rows].reshape(len(out), len(self.score.channels), -1)
        gathered = [seen[rows] if h.cells is None else take(seen[rows], h.cells.to(seen.device)) for rows, h in parts]
        return [self.score.contrast(values) for values in gathered]

    def of(self, prediction: Tensor) -> Tensor:
        """Return `Score.contrast` at the mask's voxels (channels, n) in float64.

        Args:
            prediction: what the score reads of a prediction (channels, *box).
        """
        return self.score.contrast(take(prediction.reshape(len(prediction), -1), self._where).double())

    def box(self, values: Tensor) -> Tensor:
        """Scatter values of the mask's voxels (channels, n) into their box (channels, *box), zero outside the mask."""
        box = values.new_zeros((len(values), self.mask.numel()))
        box[:, self._where] = values
        return box.view(len(values), *self.mask.shape)
