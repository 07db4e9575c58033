"""nnU-Net's own prediction and segmentation, beside sums of the same windows in float32."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from esegeta_monai.bundle.nnunet.files import nnunet_module
from esegeta_monai.bundle.nnunet.model import NnunetModel
from esegeta_monai.bundle.nnunet.resampling import (
    cropped,
    inserted,
    linear_resampling,
    own_resampling,
    why_not_linear,
)
from esegeta_monai.engine.resampled import OutputMasks, Resampling
from esegeta_monai.errors import NetworkError

__all__ = ["NnunetPrediction", "predict_case"]

AGREES = 1e-3
"""Largest difference of the matrices from nnU-Net's resampling, relative to the largest logit; more: not linear."""


@dataclass(frozen=True)
class NnunetPrediction:
    """A case as nnU-Net predicts it.

    Attributes:
        logits: (K, *spatial) on the network's grid, float32, summed in float32 from the windows of nnU-Net's predictor.
        own_logits: the same as nnU-Net sums them, in float16.
        segmentation: (z, y, x) on the scan's grid, the content of nnU-Net's file.
        masks: masks of the classes on the grid of the scan, cropped and transposed as nnU-Net does.
    """

    logits: Tensor
    own_logits: Tensor
    segmentation: Tensor
    masks: OutputMasks


def predict_case(
    model: NnunetModel,
    network: nn.Module,
    image: Tensor,
    properties: Mapping[str, Any],
    *,
    device: torch.device,
    mirroring: bool = True,
    step: float = 0.5,
    path: Path | None = None,
) -> NnunetPrediction:
    """Predict with nnU-Net's own predictor, and write its segmentation as ``nnUNetv2_predict`` does.

    Args:
        model: the model folder.
        network: network of its architecture; a copy gets the weights of the folds.
        image: the preprocessed image (C, *spatial), with the first stage's segmentation for a cascade.
        properties: nnU-Net's properties of the case.
        device, mirroring, step: see `esegeta_monai.bundle.NnunetReader`.
        path: file name of the segmentation without extension, which is that of the data set; None: write nothing.

    Raises:
        NetworkError: nnU-Net's predictor passes other windows than this version knows.
    """
    predictor = _predictor(model, network, device, mirroring, step)
    own = predictor.predict_logits_from_preprocessed_data(torch.as_tensor(image).as_subclass(Tensor).cpu())
    logits = predictor.sums / len(model.members)
    export = nnunet_module("nnunetv2.inference.export_prediction")
    array = export.convert_predicted_logits_to_segmentation_with_correct_shape(
        own.clone(), model.plans, model.configuration, model.labels, dict(properties)
    )
    segmentation = np.asarray(array)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = model.plans.image_reader_writer_class()
        writer.write_seg(segmentation, str(path) + model.dataset["file_ending"], dict(properties))
    whole = torch.as_tensor(segmentation.astype(np.int64))
    masks = _Masks(model, properties, own, whole)
    return NnunetPrediction(logits, own.float(), whole, masks.output(logits))


class _Masks:
    """Masks of the classes of one case, from nnU-Net's file, or of its regions from its logits."""

    def __init__(self, model: NnunetModel, properties: Mapping[str, Any], own: Tensor, segmentation: Tensor) -> None:
        self.model, self.properties, self.own = model, properties, own
        self.segmentation = segmentation
        self.resample = own_resampling(model, properties)
        self.shape = [int(n) for n in properties["shape_after_cropping_and_before_resampling"]]

    def mask(self, channel: int) -> Tensor:
        """Return the mask (*cropped scan) of an output channel.

        A region is where its own sigmoid exceeds 0.5: in the file, later regions overwrite earlier ones.
        """
        if not self.model.labels.has_regions:
            return cropped(self.segmentation, self.model, self.properties) == channel
        return _region(self.resample(self.own[channel : channel + 1].clone(), self.shape))

    def output(self, logits: Tensor) -> OutputMasks:
        """Return the masks with the resampling to their grid, and how far float32 and nnU-Net's float16 sums differ."""
        reason = why_not_linear(self.model)
        resampling = None if reason else linear_resampling(self.model, self.properties, tuple(logits.shape[1:]))
        if resampling is not None:
            expected = torch.as_tensor(self.resample(logits[:1].clone(), self.shape)).float()
            off = float((resampling(logits[:1]) - expected).abs().max()) / max(float(expected.abs().max()), 1e-30)
            if not off <= AGREES:
                reason, resampling = f"nnU-Net's resampling is not separable here (difference {off:.2g})", None
        ours = inserted(self._segmented(logits, resampling), self.model, self.properties)
        difference = (logits - self.own.float()).abs()
        order = self.model.dataset.get("regions_class_order")
        record = {
            "masks": "nnU-Net's file"
            if order is None
            else f"each region's own sigmoid > 0.5; the file: labels {order}",
            "mask_grid": "scan" if resampling is not None else f"network, because {reason}",
            "voxels": ours.numel(),
            "voxels_of_another_class": int(torch.count_nonzero(ours != self.segmentation)),
            "median_logit_difference": float(difference.flatten().median()),
            "largest_logit_difference": float(difference.max()),
            "largest_logit": float(logits.abs().max()),
        }
        return OutputMasks(self.mask, not self.model.labels.has_regions, resampling, record)

    def _segmented(self, logits: Tensor, resampling: Resampling | None) -> Tensor:
        """Return the labels (*cropped scan) of logits (K, *spatial), one channel in memory at a time."""

        def moved(channel: int) -> Tensor:
            values = logits[channel : channel + 1]
            result = resampling(values) if resampling is not None else self.resample(values.clone(), self.shape)
            return torch.as_tensor(result)[0]

        labels = torch.zeros(self.shape, dtype=torch.int64)
        if self.model.labels.has_regions:
            for channel, label in enumerate(self.model.dataset["regions_class_order"]):
                labels[_region(moved(channel)[None])] = int(label)
            return labels
        largest = moved(0)
        for channel in range(1, len(logits)):
            values = moved(channel)
            above = values > largest
            labels[above] = channel
            largest = torch.where(above, values, largest)
        return labels


def _region(logits: Any) -> Tensor:
    """Return the mask (*spatial) of a region of logits (1, *spatial), computed as nnU-Net does."""
    return torch.sigmoid(torch.as_tensor(logits).float())[0] > 0.5


def _predictor(model: NnunetModel, network: nn.Module, device: torch.device, mirroring: bool, step: float) -> Any:
    """Return nnU-Net's predictor, which also sums its windows in float32."""
    base = nnunet_module("nnunetv2.inference.predict_from_raw_data").nnUNetPredictor
    gaussian_of = nnunet_module("nnunetv2.inference.sliding_window_prediction").compute_gaussian

    class SummingPredictor(base):  # type: ignore[misc, valid-type]  # the class of an optional package
        """nnU-Net's predictor; `sums` is the sum of the folds' blended logits (K, *spatial), in float32."""

        sums: Any = 0

        def _internal_predict_sliding_window_return_logits(
            self, data: Tensor, slicers: Any, do_on_device: bool = True
        ) -> Any:
            self.places: Iterator[Any] = iter(slicers)  # anew, also where nnU-Net tries again on the CPU
            where = self.device if do_on_device else torch.device("cpu")
            heads, shape = self.label_manager.num_segmentation_heads, data.shape[1:]
            self.gaussian = gaussian_of(model.patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=where).float()
            self.total = torch.zeros((heads, *shape), device=where)
            self.weight = torch.zeros(tuple(shape), device=where)
            result = super()._internal_predict_sliding_window_return_logits(data, slicers, do_on_device)
            if next(self.places, None) is not None:
                raise NetworkError("nnU-Net's predictor left out windows: this version of nnunetv2 is not supported")
            return result

        def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Any:
            out = super()._internal_maybe_mirror_and_predict(x)
            place = next(self.places, None)
            if place is None:
                raise NetworkError("nnU-Net's predictor added windows: this version of nnunetv2 is not supported")
            self.total[place] += out[0].to(self.total.device).float() * self.gaussian
            self.weight[place[1:]] += self.gaussian
            return out

        def predict_sliding_window_return_logits(self, input_image: Tensor) -> Any:
            result = super().predict_sliding_window_return_logits(input_image)
            blended = (self.total / self.weight).cpu()
            del self.total, self.weight
            for axis, size in enumerate(result.shape[1:], 1):  # nnU-Net pads both sides
                blended = blended.narrow(axis, (blended.shape[axis] - size) // 2, size)
            self.sums = self.sums + blended
            return result

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it chooses
        predictor = SummingPredictor(step, True, mirroring, device.type == "cuda", device, allow_tqdm=False)
    predictor.manual_initialization(
        copy.deepcopy(network),
        model.plans,
        model.configuration,
        list(model.members),
        model.dataset,
        model.trainer,
        model.mirror_axes or None if mirroring else None,
    )
    return predictor
