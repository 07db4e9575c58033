"""TotalSegmentator's three parts of a very large scan, as places of one window plan.

Above a number of voxels TotalSegmentator cuts the scan into three parts along its last axis, which overlap, and
predicts each by itself: nnU-Net preprocesses each part, and places and blends its windows in it. The prediction of a
part is kept in one third of the scan. So a window counts only in the third that its part owns:

    P(v) = Σ_{w in part p} ĝ_w(v) · f(x_w)(v)        for v in the third of p,        ĝ_w = g_w / Σ_{w in part p} g_w
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.bundle.nnunet.model import NnunetModel
from esegeta_monai.bundle.nnunet.prediction import NnunetPrediction
from esegeta_monai.bundle.nnunet.resampling import inserted
from esegeta_monai.bundle.nnunet.windows import NnunetWindows
from esegeta_monai.engine.resampled import OutputMasks, Resampling
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import InputError, NetworkError

__all__ = ["Part", "PartWindows", "join_images", "join_predictions", "parts_of", "parts_of_files"]

SPLIT_ABOVE, SPLIT_LENGTH, MARGIN = 512 * 512 * 900, 200, 20
"""TotalSegmentator's constants: voxels and slices above which it splits, and voxels by which parts overlap a third."""


@dataclass(frozen=True)
class Part:
    """A part along the split axis.

    Attributes:
        read: the voxels that it has.
        owned: the voxels where its prediction is kept.
    """

    read: slice
    owned: slice

    @property
    def inner(self) -> slice:
        """`owned`, counted from the first voxel of the part."""
        return slice(self.owned.start - self.read.start, self.owned.stop - self.read.start)


def parts_of(shape: Sequence[int], axis: int, several: bool) -> tuple[Part, ...]:
    """Return TotalSegmentator's parts of a resampled scan; empty: it is not split.

    Args:
        shape: shape of the scan.
        axis: the axis of its slices, along which it is split.
        several: the task has several models; others are not split.

    >>> [(p.read.start, p.read.stop, p.owned.start, p.owned.stop) for p in parts_of((600, 600, 901), 2, True)]
    [(0, 320, 0, 300), (281, 620, 300, 600), (581, 901, 600, 901)]
    """
    n = int(shape[axis])
    if not several or math.prod(shape) <= SPLIT_ABOVE or n <= SPLIT_LENGTH:
        return ()
    third = n // 3
    reads = (slice(0, third + MARGIN), slice(third + 1 - MARGIN, 2 * third + MARGIN), slice(2 * third + 1 - MARGIN, n))
    owned = (slice(0, third), slice(third, 2 * third), slice(2 * third, n))
    return tuple(Part(read, own) for read, own in zip(reads, owned))


def parts_of_files(shapes: Sequence[tuple[int, ...]], several: bool) -> tuple[Part, ...]:
    """Return the parts of a scan from the files that TotalSegmentator wrote.

    Args:
        shapes: shape of each file.
        several: see `parts_of`.

    Raises:
        NetworkError: they are not the parts of the window plan.

    >>> len(parts_of_files([(600, 600, 320), (600, 600, 339), (600, 600, 320)], True))
    3
    """
    first, lengths = shapes[0], [shape[2] for shape in shapes]
    whole = lengths[0]
    if len(shapes) > 1:  # the middle part is a third and its margins
        third = lengths[1] - (2 * MARGIN - 1)
        whole = 2 * third + lengths[-1] - (MARGIN - 1)
    parts = parts_of((*first[:2], whole), 2, several)
    expected = [part.read.stop - part.read.start for part in parts] or [whole]
    if lengths != expected:
        raise NetworkError(
            f"this version of TotalSegmentator splits the scan into parts of {lengths} slices, and not {expected}: "
            "install the version that the extra [totalsegmentator] names"
        )
    return parts


class PartWindows(NnunetWindows):
    """nnU-Net's windows, in each part by itself where TotalSegmentator splits the scan.

    Args:
        patch, step: see `NnunetWindows`.
        axis: the axis of the slices of the scan, along which it is split.
        several: see `parts_of`.
    """

    def __init__(self, patch: Sequence[int], step: float, axis: int, several: bool) -> None:
        super().__init__(patch, step)
        self.axis, self.several = int(axis), bool(several)

    def declared_windows(self, spatial_shape: Sequence[int], dtype: torch.dtype) -> WindowPlan:
        """Return the windows of all parts.

        Raises:
            NetworkError: a part is shorter than a window.
        """
        shape, axis = tuple(int(n) for n in spatial_shape), self.axis
        parts = parts_of(shape, axis, self.several)
        if not parts:
            return super().declared_windows(shape, dtype)
        slices, owned, plan = [], [], None
        for part in parts:
            length = part.read.stop - part.read.start
            plan = super().declared_windows([length if i == axis else n for i, n in enumerate(shape)], dtype)
            if any(plan.pads[axis]):
                raise NetworkError(
                    f"TotalSegmentator splits this scan into parts of {length} slices, which nnU-Net pads to windows "
                    f"of {plan.roi[axis]}: that is not supported; crop the scan in the other axes, so that it is not "
                    "split"
                )
            for place in plan.slices:
                at = place[axis]
                moved = slice(at.start + part.read.start, at.stop + part.read.start)
                slices.append((*place[:axis], moved, *place[axis + 1 :]))
                box = [slice(0, n) for n in plan.padded_shape]
                box[axis] = part.owned
                owned.append(tuple(box))
        assert plan is not None
        return replace(plan, spatial_shape=shape, slices=tuple(slices), owned=tuple(owned))


def join_images(
    images: Sequence[Tensor], properties: Sequence[Mapping[str, Any]], parts: Sequence[Part], axis: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return the image of the whole scan (C, *spatial), and nnU-Net's properties of it.

    Args:
        images: the preprocessed parts.
        properties: nnU-Net's properties of each part.
        parts: the parts along ``axis`` of the network's axes.

    Raises:
        InputError: nnU-Net prepares the parts in ways that do not fit into one image: it crops or resamples them, or
            normalises each by values of its own, so that a voxel that two parts have is two different numbers.
    """
    cause = "TotalSegmentator splits a scan of this size into three parts, and nnU-Net "
    way_out = ": crop the scan, so that it is not split"
    for number, (image, own, part) in enumerate(zip(images, properties, parts), 1):
        before, after = tuple(own["shape_before_cropping"]), tuple(own["shape_after_cropping_and_before_resampling"])
        if before != after:
            raise InputError(
                f"{cause}crops part {number} to its voxels that are not 0, which changes the places of its windows; "
                "fill what is 0 outside of the body with the value of air, or crop the scan, so that it is not split"
            )
        if tuple(image.shape[1:]) != after or image.shape[axis + 1] != part.read.stop - part.read.start:
            raise InputError(f"{cause}resamples part {number} to a grid of its own{way_out}")
    whole = torch.cat([image.narrow(axis + 1, *_span(part.inner)) for image, part in zip(images, parts)], axis + 1)
    for image, part in zip(images, parts):
        if not torch.equal(image, whole.narrow(axis + 1, *_span(part.read))):
            raise InputError(
                f"{cause}normalises each part by the intensities in this part, so that the voxels which two parts "
                f"have are not the same numbers in both and no single image is explained{way_out}"
            )
    shape = tuple(whole.shape[1:])
    full = {
        "shape_before_cropping": shape,
        "shape_after_cropping_and_before_resampling": shape,
        "bbox_used_for_cropping": [[0, n] for n in shape],
    }
    return whole, {**properties[0], **full}


def join_predictions(
    predictions: Sequence[NnunetPrediction], parts: Sequence[Part], axis: int, model: NnunetModel, properties: Any
) -> NnunetPrediction:
    """Return the prediction of the whole scan: each voxel from the part that owns it.

    Args:
        predictions: those of the parts.
        parts, axis: see `join_images`.
        model: the model folder.
        properties: those of the whole scan, see `join_images`.

    Raises:
        NetworkError: nnU-Net resamples the logits of a part, though it does not resample the image.
    """
    resamplings = [prediction.masks.resampling for prediction in predictions]
    for resampling in resamplings:
        if resampling is not None and not all(torch.equal(m, torch.eye(len(m)).to(m)) for m in resampling.matrices):
            raise NetworkError("nnU-Net resamples the logits of a part of the scan to another grid: not supported")

    def joined(values: Sequence[Tensor], along: int) -> Tensor:
        return torch.cat([v.narrow(along, *_span(part.inner)) for v, part in zip(values, parts)], along)

    logits = joined([p.logits for p in predictions], axis + 1)
    own = joined([p.own_logits for p in predictions], axis + 1)
    segmentation = joined([p.segmentation for p in predictions], 0)  # (z, y, x)
    ours = inserted(logits.argmax(0), model, properties)
    difference = (logits - own).abs()
    masks, reasons = predictions[0].masks, [p.masks.record["mask_grid"] for p in predictions]
    linear = all(resampling is not None for resampling in resamplings)
    record = {
        **masks.record,
        "mask_grid": "scan" if linear else next(reason for reason in reasons if reason != "scan"),
        "voxels": ours.numel(),
        "voxels_of_another_class": int(torch.count_nonzero(ours != segmentation)),
        "median_logit_difference": float(difference.flatten().median()),
        "largest_logit_difference": float(difference.max()),
        "largest_logit": float(logits.abs().max()),
        "parts": [[part.read.start, part.read.stop, part.owned.start, part.owned.stop] for part in parts],
    }
    matrices = tuple(torch.eye(n, dtype=torch.float64) for n in logits.shape[1:])
    return NnunetPrediction(
        logits,
        own,
        segmentation,
        OutputMasks(masks.masks, masks.exclusive, Resampling(matrices) if linear else None, record),
    )


def _span(part: slice) -> tuple[int, int]:
    return part.start, part.stop - part.start
