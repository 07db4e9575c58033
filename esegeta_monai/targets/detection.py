"""Boxes of a detector: the class logit, or a box coordinate, at the anchor that became a detected box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from monai.apps.detection.utils.box_coder import BoxCoder
from monai.data.box_utils import box_iou, clip_boxes_to_image, non_max_suppression
from torch import Tensor, nn

from esegeta_monai.engine.score import Case, Score, WeightedScore
from esegeta_monai.errors import TargetError, UsageError
from esegeta_monai.targets.base import Target, need_map

__all__ = ["DetectedBox", "Detection", "DetectorMap"]


class DetectorMap(nn.Module):
    """A detector's network with one map as output, for `DetectedBox`: all class logits, then all box codes.

    The network gives ``{cls_key: [one map per level], box_key: […]}``, as MONAI's `RetinaNet` does. Coarser levels are
    enlarged by repetition to the grid of the first one, so that windows can be blended; the values stay the same.

    Args:
        network: the detector's network, without anchors and non-maximum suppression.
        cls_key, box_key: names of its outputs.

    Example:
        >>> network = nn.Conv2d(1, 6, 2, stride=2)
        >>> class Levels(nn.Module):
        ...     def forward(self, x):
        ...         return {"classification": [network(x)[:, :2]], "box_regression": [network(x)[:, 2:]]}
        >>> DetectorMap(Levels())(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 6, 4, 4])
    """

    def __init__(self, network: nn.Module, cls_key: str = "classification", box_key: str = "box_regression") -> None:
        super().__init__()
        self.network, self.cls_key, self.box_key = network, cls_key, box_key

    def forward(self, x: Tensor) -> Tensor:
        """Map images (n, C, *spatial) to (n, Σ levels (logits + codes), *grid of the first level).

        Raises:
            TargetError: the network has other outputs, or the grid of a level does not divide that of the first.
        """
        out = self.network(x)
        if not isinstance(out, dict) or not {self.cls_key, self.box_key} <= set(out):
            raise TargetError(f"DetectorMap: the network gives no {self.cls_key!r} and {self.box_key!r}")
        maps = [m for key in (self.cls_key, self.box_key) for m in out[key]]
        grid = maps[0].shape[2:]
        for m in maps:
            if any(g % n for g, n in zip(grid, m.shape[2:])):
                raise TargetError(
                    f"DetectorMap: a level has the grid {tuple(m.shape[2:])}, which does not divide {tuple(grid)}: "
                    "give windows whose sides are multiples of the coarsest stride"
                )
        return torch.cat([_repeated(m, grid) for m in maps], 1)


def _repeated(values: Tensor, grid: Sequence[int]) -> Tensor:
    for axis, n in enumerate(grid, 2):
        values = values.repeat_interleave(n // values.shape[axis], axis)
    return values


@dataclass(frozen=True)
class Detection:
    """A box that a detector keeps.

    Attributes:
        box: corners (low of each axis, then high), in voxels of the network's grid.
        score: probability of its class.
        label: class.
        level, anchor, position: where its anchor is.
        suppressed: boxes of the same class that non-maximum suppression removed for it: (score, corners).
    """

    box: tuple[float, ...]
    score: float
    label: int
    level: int
    anchor: int
    position: tuple[int, ...]
    suppressed: tuple[tuple[float, tuple[float, ...]], ...] = ()


class DetectedBox(Target):
    """The class logit of a detected box at its anchor, which is frozen: ``s(P) = P(class, anchor, position)``.

    The boxes are decoded from the unperturbed prediction of a `DetectorMap`; the number of the anchor is carried
    through the choice of the best candidates and non-maximum suppression. The suppression itself is not part of the
    score, which is linear: every method applies, through windows, and gives the exact map of that logit. The record has
    ``box``, ``box_score`` and ``suppressed_boxes``, the boxes that were removed for it.

    Args:
        which: number of the kept box, 0 for that of the highest score.
        n_classes: number of classes.
        anchors: shapes of the anchors in voxels, for each level a list of shapes.
        strides: stride of each level in voxels.
        value: ``"class"``: the logit; ``"centre"`` or ``"size"``: the box code of the ``axis``: the centre's offset in
            anchor sides, or the logarithm of the side in anchor sides.
        axis: axis of the coordinate.
        score_threshold, candidates, nms_threshold, kept: as MONAI's `BoxSelector`: least probability, candidates of a
            level, greatest overlap, boxes of an image.

    Example:
        >>> DetectedBox(0, 1, anchors=[[[6, 6]]], strides=[4]).parameters["which"]
        0
    """

    which: int
    n_classes: int
    anchors: Sequence[Sequence[Sequence[float]]]
    strides: Sequence[int]
    value: Literal["class", "centre", "size"] = "class"
    axis: int = 0
    score_threshold: float = 0.05
    candidates: int = 1000
    nms_threshold: float = 0.5
    kept: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.anchors) != len(self.strides) or not self.anchors or len({len(a) for a in self.anchors}) > 1:
            raise UsageError(
                f"DetectedBox: anchors of {len(self.anchors)} levels, {len(self.strides)} strides: give as many, and "
                "as many shapes for each level"
            )
        if self.which < 0 or self.n_classes < 1 or any(s % self.strides[0] for s in self.strides):
            raise UsageError(
                f"DetectedBox: which={self.which} must not be negative, n_classes={self.n_classes} positive, strides="
                f"{list(self.strides)!r} multiples of the first"
            )

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        """Return one score; ``prediction`` is the output of `DetectorMap`, (channels, *grid).

        Raises:
            TargetError: the prediction has other channels, or fewer boxes are detected.
        """
        need_map(prediction, self)
        boxes = self.detections(prediction)
        if self.which >= len(boxes):
            raise TargetError(
                f"DetectedBox: which={self.which}, but {len(boxes)} boxes are detected above score_threshold="
                f"{self.score_threshold}"
            )
        box, dims = boxes[self.which], prediction.ndim - 1
        if not 0 <= self.axis < dims:
            raise TargetError(f"DetectedBox: axis={self.axis}: the image has {dims} axes")
        shapes, levels = len(self.anchors[0]), len(self.strides)
        if self.value == "class":
            channel = (box.level * shapes + box.anchor) * self.n_classes + box.label
        else:
            code = self.axis + dims * (self.value == "size")
            channel = levels * shapes * self.n_classes + (box.level * shapes + box.anchor) * 2 * dims + code
        mask = torch.zeros(prediction.shape[1:], dtype=torch.bool, device=prediction.device)
        mask[tuple(p * (self.strides[box.level] // self.strides[0]) for p in box.position)] = True
        score = WeightedScore(mask, channel, prediction.shape[0], label=self.given_name or self._label(box))
        score.class_index = score.class_name = None
        suppressed = [{"score": s, "box": list(b)} for s, b in box.suppressed]
        score.notes = {"box": list(box.box), "box_score": box.score, "suppressed_boxes": suppressed}
        return [score]

    def _label(self, box: Detection) -> str:
        what = f"class{box.label}" if self.value == "class" else f"{self.value}{self.axis}"
        return f"DetectedBox-{self.which}-{what}"

    def detections(self, prediction: Tensor) -> list[Detection]:
        """Return the boxes that the detector keeps, by descending score.

        Args:
            prediction: (channels, *grid), output of `DetectorMap`.

        Raises:
            TargetError: the prediction has other channels.
        """
        grid, dims = prediction.shape[1:], prediction.ndim - 1
        shapes, levels = len(self.anchors[0]), len(self.strides)
        per_level = shapes * self.n_classes, shapes * 2 * dims
        if prediction.shape[0] != levels * sum(per_level):
            raise TargetError(
                f"DetectedBox: the prediction has {prediction.shape[0]} channels; {levels} levels of {shapes} anchors, "
                f"{self.n_classes} classes and {2 * dims} box codes have {levels * sum(per_level)}: explain a "
                "DetectorMap of the network"
            )
        logits = prediction[: levels * per_level[0]].split(per_level[0])
        codes = prediction[levels * per_level[0] :].split(per_level[1])
        extent = [n * self.strides[0] for n in grid]
        candidates: list[Detection] = []
        for level, (of_level, code) in enumerate(zip(logits, codes)):
            candidates += self._candidates(level, of_level, code, extent)
        if not candidates:
            return []
        boxes = torch.tensor([c.box for c in candidates])
        scores = torch.tensor([c.score for c in candidates])
        labels = torch.tensor([c.label for c in candidates])
        kept: list[int] = []
        for label in labels.unique():
            own = (labels == label).nonzero().flatten()
            chosen = non_max_suppression(boxes[own], scores[own], self.nms_threshold)
            kept += own[chosen].tolist()
        kept = sorted(kept, key=lambda i: -float(scores[i]))[: self.kept]
        result = []
        for i in kept:
            overlaps = box_iou(boxes[i : i + 1], boxes)[0]
            beaten = (overlaps > self.nms_threshold) & (labels == labels[i]) & (scores <= scores[i])
            beaten[i] = False
            lost = tuple((float(scores[j]), tuple(boxes[j].tolist())) for j in beaten.nonzero().flatten())
            result.append(replace(candidates[i], suppressed=lost))
        return result

    def _candidates(self, level: int, logits: Tensor, codes: Tensor, extent: Sequence[int]) -> list[Detection]:
        """Return the best candidates of a level with the numbers of their anchors."""
        stride, shapes, dims = self.strides[level], self.anchors[level], len(extent)
        every = (slice(None), *(slice(None, None, stride // self.strides[0]) for _ in extent))
        logits, codes = logits[every].cpu(), codes[every].cpu()
        grid = logits.shape[1:]
        # (position, anchor, class), as MONAI orders them
        flat = logits.reshape(len(shapes), self.n_classes, -1).permute(2, 0, 1).float().sigmoid().flatten()
        above = (flat > self.score_threshold).nonzero().flatten()
        best, order = flat[above].topk(min(self.candidates, len(above)))
        chosen = above[order]
        anchors = chosen // self.n_classes
        position = torch.stack(torch.unravel_index(anchors // len(shapes), grid), 1)
        half = (torch.tensor(shapes, dtype=torch.float32) / 2).round()[anchors % len(shapes)].reshape(-1, dims)
        centre = position * stride + stride // 2
        reference = torch.cat([centre - half, centre + half], 1)  # whole voxels, as MONAI's anchors
        relative = codes.reshape(len(shapes), 2 * dims, -1).permute(2, 0, 1).reshape(-1, 2 * dims)[anchors].float()
        decoded = BoxCoder(weights=(1.0,) * (2 * dims)).decode_single(relative, reference)
        clipped: Any = clip_boxes_to_image(decoded, extent, remove_empty=True)
        boxes, inside = clipped
        return [
            Detection(
                tuple(box.tolist()),
                float(best[i]),
                int(chosen[i] % self.n_classes),
                level,
                int(anchors[i] % len(shapes)),
                tuple(position[i].tolist()),
            )
            for box, i in zip(boxes, inside.nonzero().flatten().tolist())
        ]
