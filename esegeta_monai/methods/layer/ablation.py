"""Features of a layer switched off one by one: by a value, or by the same feature of other cases."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.feature_masks import Features, features_for
from esegeta_monai.engine.layer_frames import only_frame, spatial_map
from esegeta_monai.engine.layer_maps import check_one_member
from esegeta_monai.engine.network.hooks import capture, replaced
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.perturbation.ablation import cases_of

__all__ = ["LayerFeatureAblation", "LayerFeaturePermutation"]

Replace = Callable[[Batch, Tensor], Tensor]
"""Returns the values that replace a layer's output (n, …) in a batch of windows."""


class _OneByOne(Method):
    """Base class: ``F(x) − F(x with feature j of the layer replaced)`` for every feature j.

    Each feature is replaced in all windows that hold one of its positions; other windows are not computed.
    """

    produces = "layer map"
    additive = False
    needs_gradient = False

    layer: str | None = None
    feature_mask: Any = "grid(size=16)"

    @property
    def passes_exact(self) -> bool:
        return False  # the default layer, whose grid decides, is chosen in the run

    def passes(self, objective: Objective) -> int:
        """Estimate the passes: for each feature, window that has it, and replacement, those with and without it."""
        features = None if self._of_channels else self._features(objective)
        windows = len(objective.windows)
        if features is None:  # 64 channels where the layer is not known
            return self._passes_of_one * self._rounds * windows * self._channel_count(objective)
        share = sum(_touches(objective, features, w).sum() for w in objective.windows)
        return self._passes_of_one * self._rounds * int(share)

    def _channel_count(self, objective: Objective) -> int:
        return 64 if self.layer is None else only_frame(objective, self.layer).grid[0]

    @property
    def _passes_of_one(self) -> int:
        """Window passes for one feature and replacement: with the feature and without it."""
        return 2

    @property
    def _of_channels(self) -> bool:
        return isinstance(self.feature_mask, str) and self.feature_mask.strip() == "channels"

    @property
    @abstractmethod
    def _rounds(self) -> int:
        """How often each feature is replaced."""

    def _features(self, objective: Objective) -> Features:
        features = features_for(self.feature_mask).of(objective)
        if len(features.labels) != 1:
            raise MethodError(
                f"{self.name}: regions of single image channels are no regions of a layer: use features of all "
                "channels together, or feature_mask='channels' for the channels of the layer"
            )
        return features

    def _drops(self, objective: Objective, layer: str, replace: Replace) -> tuple[Tensor, Features | None]:
        """Return ``F(x) − F(x with feature j replaced)`` (k, n), float64, and the features; None: channels."""
        grid = only_frame(objective, layer).grid
        if self._of_channels:
            check_one_member(objective)
            drops = [self._drop(objective, layer, replace, objective.windows, c, None) for c in range(grid[0])]
            return torch.stack(drops, 1), None
        features = self._features(objective)
        touched = {w: _touches(objective, features, w, grid[1:]) for w in objective.windows}
        drops = []
        for j in range(len(features)):
            windows = [w for w, inside in touched.items() if bool(inside[j])]
            drops.append(self._drop(objective, layer, replace, windows, j, features))
        return torch.stack(drops, 1), features

    def _drop(
        self,
        objective: Objective,
        layer: str,
        replace: Replace,
        windows: Sequence[int],
        number: int,
        features: Features | None,
    ) -> Tensor:
        """Return the change of F (k,) where one feature is replaced in these windows."""
        change = objective.new_predictions(1)

        def run(batch: Batch) -> None:
            with torch.no_grad():
                plain = batch.forward(batch.image)
                other = replace(batch, plain)

                def edit(values: Tensor) -> Tensor:
                    chosen = _chosen(batch, objective, layer, values, number, features)
                    return torch.where(chosen, other if other.ndim else other.expand_as(values), values)

                with replaced(objective.model.network, layer, edit):
                    changed = batch.forward(batch.image)
            objective.blend(change, batch, changed - plain)

        objective.each([(0, w) for w in windows], run, with_cotangents=False, sums=change)
        before = objective.image_predictions()
        return torch.stack(
            [s.value(b[None]) - s.value(b[None] + c) for s, b, c in zip(objective.scores, before, change)]
        )[:, 0].cpu()

    def _explained(
        self, objective: Objective, layer: str, drops: Tensor, features: Features | None, **columns: Tensor
    ) -> Explained:
        if features is None:
            wide = drops.reshape(*drops.shape, *(1,) * len(objective.plan.spatial_shape)).to(objective.image)
            maps = wide.expand(*drops.shape, *objective.plan.spatial_shape).clone()
            table = [
                [
                    {"feature": f"channel {c}", "value": float(row[c])}
                    | {title: float(column[k, c]) for title, column in columns.items()}
                    for c in range(len(row))
                ]
                for k, row in enumerate(drops)
            ]
        else:
            maps = features.paint(drops).to(objective.image.dtype)
            table = features.table(drops, **columns)
        return Explained(maps, {"layer": layer, "n_features": drops.shape[1], "features": table})


class LayerFeatureAblation(_OneByOne):
    """``a_j = F(x) − F(x with feature j of a layer's output replaced by a value)``, at every voxel of the feature.

    Args:
        layer: dotted name; None: the default layer, named in the record. ``"name:input"``: the input of the layer.
        feature_mask: regions of the image, see `FeatureAblation`: all units of the layer whose position lies in the
            region are replaced together. ``"channels"``: each channel of the layer, in all positions; the map of a
            channel is then constant.
        baseline: the value of a replaced unit, in the layer's own units.

    The record has a table of the features under ``features``.

    Example:
        >>> LayerFeatureAblation("model.0", feature_mask="channels").parameters["baseline"]
        0.0
    """

    reference = "Zeiler & Fergus, ECCV 2014, arXiv:1311.2901 (one feature at a time); Captum, arXiv:2009.07896"
    units = "change of the target when the feature of the layer is replaced"

    baseline: float = 0.0

    @property
    def _rounds(self) -> int:
        return 1

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) for the C channels of the layer."""
        layer = check_layer(objective, self.layer)

        def replace(batch: Batch, out: Tensor) -> Tensor:
            return out.new_tensor(self.baseline)

        return self._explained(objective, layer, *self._drops(objective, layer, replace))


class LayerFeaturePermutation(_OneByOne):
    """``a_j = F(x) − mean over other cases i of F(x with feature j of the layer's output of case i)`` (Breiman 2001).

    As `FeaturePermutation`, with features of a layer. The record's table has the standard deviation over the cases.

    Args:
        layer, feature_mask: see `LayerFeatureAblation`.
        cases: at least two other cases: NIfTI files on the network's grid or tensors (C, *spatial), preprocessed like
            the image.

    Raises:
        UsageError: fewer than two cases.
    """

    reference = "Fisher et al., JMLR 20(177), 2019, arXiv:1801.01489; Captum, arXiv:2009.07896"
    units = "mean change of the target when the feature of the layer comes from another case"

    cases: Sequence[Any] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.cases) < 2:
            raise UsageError(
                f"LayerFeaturePermutation exchanges features between cases, but cases has {len(self.cases)} entries: "
                "give at least two files or tensors, or use LayerFeatureAblation, which needs none"
            )

    @property
    def _passes_of_one(self) -> int:
        """With the feature, without it, and the other case."""
        return 3

    @property
    def _rounds(self) -> int:
        return len(self.cases)

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) for the C channels of the layer."""
        layer = check_layer(objective, self.layer)
        rounds, features = [], None
        for case in cases_of(objective, self.cases):

            def replace(batch: Batch, out: Tensor, case: Tensor = case) -> Tensor:
                with capture(objective.model.network, [layer]) as captured:
                    batch.forward(batch.cut(case))
                return captured[layer]

            drops, features = self._drops(objective, layer, replace)
            rounds.append(drops)
        stacked = torch.stack(rounds)
        return self._explained(objective, layer, stacked.mean(0), features, standard_deviation=stacked.std(0))


def _chosen(
    batch: Batch, objective: Objective, layer: str, values: Tensor, number: int, features: Features | None
) -> Tensor:
    """Return which units of a layer (n, …), bool, belong to a feature."""
    leaf = torch.zeros_like(values, requires_grad=True)
    with torch.enable_grad():
        on_grid = batch.unmirrored(spatial_map(leaf, objective, layer))
        wanted = torch.zeros_like(on_grid)
        for j, w in enumerate(batch.windows):
            if features is None:
                wanted[j, number] = 1
            else:
                wanted[j] = (_labels_of(objective, features, w, on_grid.shape[2:]) == number).to(wanted)
        return torch.autograd.grad(on_grid, leaf, wanted)[0] > 0


def _labels_of(objective: Objective, features: Features, window: int, positions: Sequence[int]) -> Tensor:
    """Return the feature at the centre of each position's cell in a window (*positions); −1 for none and in padding."""
    plan, labels = objective.plan, features.labels[0]
    inside = labels.new_ones((), dtype=torch.bool)
    for axis, (p, n, s, (lo, _)) in enumerate(zip(positions, plan.roi, plan.slices[window], plan.pads)):
        at = s.start - lo + (2 * torch.arange(p, device=labels.device) + 1) * n // (2 * p)
        length = plan.spatial_shape[axis]
        inside = inside.unsqueeze(-1) & (at >= 0) & (at < length)
        labels = labels.index_select(axis, at.clamp(0, length - 1))
    return torch.where(inside, labels, -1)


def _touches(objective: Objective, features: Features, window: int, positions: Sequence[int] | None = None) -> Tensor:
    """Return which features (n,), bool, have a position in a window; ``positions`` None: a voxel."""
    labels = _labels_of(objective, features, window, objective.plan.roi if positions is None else positions)
    counts = torch.bincount(labels.flatten() + 1, minlength=len(features) + 1)
    return counts[1:] > 0
