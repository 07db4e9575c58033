"""Shapley values of the prompts of an interactive network: points and the class."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError
from esegeta_monai.methods.base import Explained, Method, completeness
from esegeta_monai.methods.perturbation.shapley import all_coalitions, shapley_values

__all__ = ["PromptShapley"]

MOST = 10
"""Greatest number of prompts: 2ⁿ predictions."""


class PromptShapley(Method):
    """The exact Shapley value of each prompt of a network such as VISTA3D or SAM: ``φ_j`` of the game
    ``v(S) = F(image, the prompts in S)``, with the mask of all prompts frozen.

    A point that is off keeps its place and has the label ``off``, which these networks ignore; a class prompt that is
    off is None. Σ φ is ``F(all prompts) − F(no prompt)``. Prompts are further inputs of the network, given by name.

    Args:
        labels: name of the input with the points' labels, (1, n).
        points: name of the input with their coordinates, (1, n, axes), in voxels of the network's grid; each point has
            its value in the map. None: the map is zero, and the values are in the record only.
        classes: name of the input that prompts by class; None: there is none.
        off: label of a point that is ignored.

    The record's table ``features`` has the value of each prompt.

    Example:
        >>> PromptShapley(classes="class_vector").parameters["classes"]
        'class_vector'
    """

    reference = "Shapley 1953; Lundberg & Lee, NeurIPS 2017, arXiv:1705.07874"
    produces = "input map"
    additive = True
    units = "target per prompt"
    needs_gradient = False

    labels: str = "point_labels"
    points: str | None = "point_coords"
    classes: str | None = None
    off: float = -1

    def passes(self, objective: Objective) -> int:
        """Count the windows of the target once for each set of prompts."""
        return 2 ** len(self._names(objective)) * len(objective.windows)

    def predictions(self, objective: Objective) -> int:
        return 2 ** len(self._names(objective))

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        names = self._names(objective)
        sets = all_coalitions(len(names))
        values = torch.stack([self._value(objective, row.tolist()) for row in sets], 1)
        phi = shapley_values(values)
        maps = objective.new_maps(1)
        if self.points is not None and self.labels in objective.model.kwargs:
            self._paint(objective, phi, maps)
        table = [[{"feature": n, "value": float(v)} for n, v in zip(names, row)] for row in phi]
        sums = completeness(phi, values[:, -1] - values[:, 0])
        return Explained(maps, {**sums, "n_features": len(names), "baseline_value": values[:, 0], "features": table})

    def _names(self, objective: Objective) -> list[str]:
        """Return the names of the players: points, then the class.

        Raises:
            MethodError: there is no prompt of these names, or there are too many.
        """
        given = objective.model.kwargs
        labels = given.get(self.labels)
        names = [] if labels is None else [f"point {j}" for j in range(torch.as_tensor(labels).shape[-1])]
        if self.classes is not None and given.get(self.classes) is not None:
            names.append("class")
        if not names:
            raise MethodError(
                f"PromptShapley: the network has no further input {self.labels!r}"
                + (f" or {self.classes!r}" if self.classes else "")
                + f": it has {', '.join(sorted(given)) or 'none'}; name them by labels=, points= and classes="
            )
        if len(names) > MOST:
            raise MethodError(f"PromptShapley: {len(names)} prompts need 2^{len(names)} predictions; at most {MOST}")
        return names

    def _value(self, objective: Objective, inside: Sequence[bool]) -> Tensor:
        """Return F with some prompts only (k,), float64."""
        model = copy.copy(objective.model)
        model.kwargs = dict(model.kwargs)
        labels = model.kwargs.get(self.labels)
        if labels is not None:
            known = torch.as_tensor(labels)
            keep = torch.tensor(inside[: known.shape[-1]], device=known.device)
            model.kwargs[self.labels] = torch.where(keep, known, torch.full_like(known, self.off))
            inside = inside[known.shape[-1] :]
        if inside and not inside[0]:
            model.kwargs[str(self.classes)] = None
        return objective.derive(model=model, grid=objective.grid, prediction=None).value(objective.image[None])[:, 0]

    def _paint(self, objective: Objective, phi: Tensor, maps: Tensor) -> None:
        """Add the value of each point at its voxel of the maps (k, 1, *spatial)."""
        places: Any = objective.model.kwargs.get(str(self.points))
        shape = objective.plan.spatial_shape
        if places is None:
            raise MethodError(f"PromptShapley: the network has no further input {self.points!r}: give points=None")
        for j, place in enumerate(torch.as_tensor(places).reshape(-1, len(shape)).round().long().tolist()):
            if not all(0 <= p < n for p, n in zip(place, shape)):
                raise MethodError(f"PromptShapley: point {j} at {tuple(place)} is outside of the image {shape}")
            voxel: tuple[Any, ...] = (slice(None), 0, *place)
            maps[voxel] += phi[:, j].to(maps)
