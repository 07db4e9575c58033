"""Targets of a region: a reference region, a component, a voxel, a box, an error, a regression output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.labels import _affine, label_on_grid
from esegeta_monai.engine.score import Activation, Case, Output, Reduction, Score
from esegeta_monai.errors import TargetError
from esegeta_monai.targets.base import Target, class_output, masked_score, need_classes, need_map
from esegeta_monai.targets.classes import class_mask, ranked_classes

__all__ = ["Box", "Component", "Errors", "LabelMask", "OutputValue", "Voxel"]


class LabelMask(Target):
    """The output of a class under a given mask: ``s(P) = Σ_v m(v) φ(P)(c, v)``.

    Args:
        mask: a NIfTI file, a key of the data dictionary, or a tensor (*spatial) or (1, *spatial). A file or a
            MetaTensor with another affine is resampled to the network's grid by nearest neighbour.
        label: the value of the region in the mask; None: every value above zero.
        class_index: number or name of the class whose output is summed; None: ``label``.
        output, activation, reduction: see `Target`.

    >>> target = LabelMask(torch.tensor([[0, 1, 1]]), class_index=0)
    >>> target.bind(torch.zeros(2, 1, 3), Case())[0].voxels
    2
    """

    mask: str | Path | Tensor
    label: int | None = None
    class_index: int | str | None = None
    output: Output = "logit"
    activation: Activation = "auto"
    reduction: Reduction = "sum"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score; ``prediction`` is (K, *spatial).

        Raises:
            TargetError: no such class, key or file, or a mask on another grid without an affine.
        """
        need_map(prediction, self)
        labels = label_on_grid(self.mask, prediction, case)
        which = self.label if self.class_index is None else self.class_index
        if which is None:
            raise TargetError("LabelMask needs class_index (the output that is summed) if no label is given")
        chosen = labels > 0 if self.label is None else labels == self.label
        return [masked_score(self, chosen, which, prediction, case)]


class Component(Target):
    """One connected component of a class: ``s(P) = Σ_v m(v) φ(P)(c, v)``, m one component of the argmax map.

    Voxels that touch at faces, edges or corners are connected.

    Args:
        class_index: number or name of the class.
        which: ``"largest"``, k for the k-th largest (1 is the largest), or a world coordinate (RAS mm): the component
            that contains it, else the nearest one within ``max_distance``.
        max_distance: largest distance of the component from the coordinate, in mm.
        output, activation, reduction: see `Target`.
    """

    class_index: int | str
    which: int | str | Sequence[float] = "largest"
    max_distance: float = 10.0
    output: Output = "logit"
    activation: Activation = "auto"
    reduction: Reduction = "sum"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score, empty if the class has no such component; ``prediction`` is (K, *spatial).

        Raises:
            TargetError: no such class, an invalid ``which``, or a coordinate although the grid has no affine.
        """
        from scipy import ndimage

        need_map(prediction, self)
        need_classes(self, case)
        which = class_output(self.class_index, prediction.shape[0], case)
        mask = class_mask(prediction, which, self.activation, case).cpu().numpy()
        parts, count = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
        chosen = self._choose(parts, count, case)
        return [masked_score(self, torch.from_numpy(chosen).to(prediction.device), which.index, prediction, case)]

    def _choose(self, parts: np.ndarray, count: int, case: Case) -> np.ndarray:
        if isinstance(self.which, (int, str)):
            rank = 1 if self.which == "largest" else self.which
            if isinstance(rank, str) or rank < 1:
                raise TargetError(f"which={self.which!r}: give 'largest', 1, 2, … or a world coordinate")
            sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
            if rank > count:
                return np.zeros_like(parts, dtype=bool)
            return parts == 1 + int(np.argsort(-sizes, kind="stable")[rank - 1])
        point = np.asarray(self.which, dtype=float)
        affine = _affine(case, len(point), "Component(which=coordinate)")
        voxels = np.argwhere(parts > 0)
        if not len(voxels):
            return np.zeros_like(parts, dtype=bool)
        world = voxels @ affine[:-1, :-1].T + affine[:-1, -1]
        distance = np.linalg.norm(world - point, axis=1)
        nearest = int(distance.argmin())
        half_voxel = np.linalg.norm(affine[:-1, :-1], axis=0).max() / 2
        if distance[nearest] > max(self.max_distance, half_voxel):
            return np.zeros_like(parts, dtype=bool)
        return parts == parts[tuple(voxels[nearest])]


class Voxel(Target):
    """One voxel: ``s(P) = φ(P)(c, v)``, at a world coordinate or an index of the network's grid.

    Args:
        class_index: number or name of the class, or ``"predicted"``: the class predicted at that voxel.
        world: position in RAS mm, rounded to the nearest voxel.
        index: voxel index on the network's grid.
        output, activation: see `Target`.
    """

    class_index: int | str = "predicted"
    world: Sequence[float] | None = None
    index: Sequence[int] | None = None
    output: Output = "logit"
    activation: Activation = "auto"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score; ``prediction`` is (K, *spatial).

        Raises:
            TargetError: neither or both of world and index, or a voxel outside the prediction.
        """
        need_map(prediction, self)
        shape = prediction.shape[1:]
        if (self.world is None) == (self.index is None):
            raise TargetError("Voxel needs either world=(x, y, z) in RAS mm or index=(i, j, k)")
        if self.index is not None:
            place = [int(i) for i in self.index]
        else:
            assert self.world is not None
            affine = _affine(case, len(self.world), "Voxel(world=…)")
            place = np.rint(np.linalg.solve(affine, [*self.world, 1.0])[:-1]).astype(int).tolist()
        if len(place) != len(shape) or any(not 0 <= p < n for p, n in zip(place, shape)):
            raise TargetError(f"the voxel {place} is outside the prediction {tuple(shape)}")
        mask = torch.zeros(shape, dtype=torch.bool, device=prediction.device)
        mask[tuple(place)] = True
        which = self.class_index
        if which == "predicted":
            which = ranked_classes(prediction.flatten(1)[:, int(np.ravel_multi_index(place, shape))], case)[0]
        return [masked_score(self, mask, which, prediction, case)]


class Box(Target):
    """A box of voxels: ``s(P) = Σ_{v in box} φ(P)(c, v)``.

    Args:
        class_index: number or name of the class.
        start, stop: corners, ``stop`` excluded; voxel indices of the network's grid, or RAS mm with ``world=True``
            (then the smallest voxel box around both corners).
        world: True: the corners are world coordinates.
        output, activation, reduction: see `Target`.
    """

    class_index: int | str
    start: Sequence[float]
    stop: Sequence[float]
    world: bool = False
    output: Output = "logit"
    activation: Activation = "auto"
    reduction: Reduction = "sum"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score, empty if the box is outside the prediction; ``prediction`` is (K, *spatial).

        Raises:
            TargetError: corners of the wrong dimension, or world corners although the grid has no affine.
        """
        need_map(prediction, self)
        shape = prediction.shape[1:]
        if len(self.start) != len(shape) or len(self.stop) != len(shape):
            raise TargetError(f"Box needs corners of {len(shape)} numbers, got {self.start} and {self.stop}")
        low, high = np.asarray(self.start, float), np.asarray(self.stop, float)
        if self.world:
            inverse = np.linalg.inv(_affine(case, len(shape), "Box(world=True)"))
            corners = np.stack(np.meshgrid(*zip(low, high), indexing="ij"), -1).reshape(-1, len(shape))
            voxels = corners @ inverse[:-1, :-1].T + inverse[:-1, -1]
            low, high = np.floor(voxels.min(0) + 0.5), np.ceil(voxels.max(0) + 0.5)
        mask = torch.zeros(shape, dtype=torch.bool, device=prediction.device)
        mask[tuple(slice(max(int(a), 0), max(int(b), 0)) for a, b in zip(low, high))] = True
        return [masked_score(self, mask, self.class_index, prediction, case)]


class Errors(Target):
    """The voxels where the prediction differs from a label: ``s(P) = Σ_{v wrong} φ(P)(c, v)``.

    Args:
        label: a file, a key of the data dictionary, or a tensor (*spatial), with the class numbers of the network.
        kind: ``"false_positive"`` (class predicted, label differs) or ``"false_negative"`` (label, not predicted).
        class_index: number or name of the class.
        output, activation, reduction: see `Target`.
    """

    label: str | Path | Tensor
    kind: Literal["false_positive", "false_negative"]
    class_index: int | str
    output: Output = "logit"
    activation: Activation = "auto"
    reduction: Reduction = "sum"

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score, empty if the prediction has no such error; ``prediction`` is (K, *spatial).

        Raises:
            TargetError: unknown class or label.
        """
        need_map(prediction, self)
        need_classes(self, case)
        which = class_output(self.class_index, prediction.shape[0], case)
        truth = label_on_grid(self.label, prediction, case)
        truth = truth == which.index if prediction.shape[0] > 1 or which.complement else truth > 0
        predicted = class_mask(prediction, which, self.activation, case)
        wrong = predicted & ~truth if self.kind == "false_positive" else truth & ~predicted
        return [masked_score(self, wrong, which.index, prediction, case)]


class OutputValue(Target):
    """A regression output minus a reference value: ``s(P) = P(c) − r``, averaged over the voxels, if any.

    Args:
        channel: number or name of the output.
        reference: the value r, in the units of the output; it shifts F and has no effect on the map.
    """

    channel: int | str = 0
    reference: float = 0.0

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score; ``prediction`` is (K, *spatial), or (K,).

        Raises:
            TargetError: the network has no such output.
        """
        mask = torch.ones(prediction.shape[1:], dtype=torch.bool, device=prediction.device)
        more: dict[str, Any] = {"reduction": "mean", "reference": self.reference}
        return [masked_score(self, mask, self.channel, prediction, case, "channel", by_channel=True, **more)]
