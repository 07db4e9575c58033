"""Explain a task of TotalSegmentator: its own crop, resampling and final file, and the windows of the model it needs.

TotalSegmentator's function ``nnUNet_predict_image`` prepares the scan, calls nnU-Net for each model of the task, joins
the segmentations and brings them back to the scan. Here the same function runs, and only its call of nnU-Net is
replaced, by a predictor that gives the same segmentation and keeps the logits.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientation, Resize, SpatialCrop
from torch import Tensor

from esegeta_monai.bundle.nnunet.files import PROPERTIES
from esegeta_monai.bundle.nnunet.prediction import NnunetPrediction
from esegeta_monai.bundle.nnunet.preprocessing import NnunetPreprocessd
from esegeta_monai.bundle.nnunet.reader import NnunetReader
from esegeta_monai.bundle.nnunet.totalsegmentator_parts import (
    Part,
    PartWindows,
    join_images,
    join_predictions,
    parts_of,
    parts_of_files,
)
from esegeta_monai.bundle.nnunet.totalsegmentator_run import (
    Crop,
    SegmentingModel,
    box_of,
    crop_of,
    nearest_labels,
    run_task,
    values_of,
)
from esegeta_monai.bundle.nnunet.totalsegmentator_task import (
    ENDING,
    Mode,
    TotalSegmentatorTask,
    totalsegmentator_module,
)
from esegeta_monai.bundle.nnunet.windows import NnunetWindows
from esegeta_monai.engine.resampled import OutputMasks, Resampling
from esegeta_monai.errors import InputError, NetworkError
from esegeta_monai.files.scans import read_scan

__all__ = ["TotalSegmentatorReader"]

SCAN = "totalsegmentator_scan"
"""Key of the `_Scan` of a case in its data dictionary."""


@dataclass(frozen=True)
class _Scan:
    """A scan on its way to the network.

    Attributes:
        image: the scan as nibabel reads it.
        crop: the crop; None: the whole scan.
        box: the crop in voxels of the scan.
        shape: shape of the cropped scan in canonical order.
        resampled: content of the file that the network reads, of its parts together where it is split.
        parts: the parts along the last axis of ``resampled``; empty: it is not split.
        properties: nnU-Net's properties of the parts.
    """

    image: Any
    crop: Crop | None
    box: tuple[slice, ...]
    shape: tuple[int, ...]
    resampled: np.ndarray
    parts: tuple[Part, ...]
    properties: tuple[Any, ...]


class TotalSegmentatorReader(NnunetReader):
    """A task of TotalSegmentator; the model that predicts the given classes is explained.

    TotalSegmentator crops and resamples the scan, and its final file gives the masks. It resamples labels to the scan
    by nearest neighbours, which is the argmax of logits that are resampled so: R in ``F(x) = Σ_v m(v) (R P)(c, v)`` is
    this resampling, after nnU-Net's own.

    Args:
        task: name of the task, such as ``"total"``.
        classes: classes to explain; they choose the model. None are needed for a task of one model.
        mode: ``"fast"``: the model of 3 mm, where the task has one.
        device: device of the network.
        weights: folder of the weights; None: where TotalSegmentator keeps them.

    Raises:
        UsageError: TotalSegmentator or its weights are missing, there is no such task or class, or the classes are in
            different models.
        NetworkError: see `NnunetReader`.

    Example::

        reader = TotalSegmentatorReader("total", ["liver"])
        data = reader.preprocessing({"image": "scan.nii.gz"})
        given = reader.case_arguments(data["image"], data)
        explainer = Explainer(reader.network, reader.inferer, class_names=reader.class_names)
        maps = list(explainer(data["image"][None], ["Saliency"], ["MultiClassMask('liver')"], **given))
    """

    def __init__(
        self,
        task: str,
        classes: Sequence[str] = (),
        mode: Mode = "default",
        device: str | torch.device = "cpu",
        weights: str | Path | None = None,
    ) -> None:
        self.total_task = TotalSegmentatorTask.read(task, mode, weights)
        self.part = self.total_task.part_of(classes)
        super().__init__(self.part.folder, self.total_task.config["folds"], False, device, self.total_task.step)

    @cached_property
    def preprocessing(self) -> Compose:
        """TotalSegmentator's crop and resampling and nnU-Net's preprocessing, with the way back to the scan."""
        return Compose([_Preprocessd(self.image_key, self)])

    @property
    def provenance(self) -> dict[str, Any]:
        """See `NnunetReader.provenance`; with task, mode, model and version of TotalSegmentator."""
        own = {
            "task": self.total_task.name,
            "mode": self.total_task.mode,
            "model": self.part.number,
            "version": totalsegmentator_module("totalsegmentator.config").get_version(),
        }
        return {**super().provenance, "totalsegmentator": own}

    def predict(self, image: Tensor, data: Any, path: Path | None = None) -> NnunetPrediction:
        """Predict all models of the task and write TotalSegmentator's final file.

        Args:
            image: the preprocessed image (C, *spatial).
            data, path: see `NnunetReader.predict`.

        Raises:
            NetworkError: TotalSegmentator prepares another image than before, or see `NnunetReader.predict`.
        """
        scan: _Scan = data[SCAN]
        own: list[NnunetPrediction] = []

        def predict(number: int, files: list[tuple[Path, Path]]) -> None:
            if number != self.part.number:
                self._of(number).segment(files)
            else:
                own.append(self._own(image, data, files))

        final = run_task(self.total_task, scan.image, scan.crop, self.device, self.total_task.step, predict)
        labels = np.asarray(final.dataobj).astype(np.int64)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(final, f"{path}{ENDING}")
        segmentation = torch.as_tensor(labels)
        masks = self._masks(own[0].masks, segmentation, scan, data[PROPERTIES])
        return replace(own[0], segmentation=segmentation.permute(2, 1, 0), masks=masks)

    def _own(self, image: Tensor, data: Any, files: list[tuple[Path, Path]]) -> NnunetPrediction:
        """Predict by the model that is explained.

        Raises:
            NetworkError: see `predict`.
        """
        scan: _Scan = data[SCAN]
        whole = Part(slice(0, scan.resampled.shape[2]), slice(0, scan.resampled.shape[2]))
        parts = scan.parts or (whole,)
        if len(files) != len(parts) or not all(
            np.array_equal(values_of(file), scan.resampled[:, :, part.read]) for (file, _), part in zip(files, parts)
        ):
            raise NetworkError("TotalSegmentator prepared another image than for the network: predict again")
        if not scan.parts:
            return super().predict(image, data, files[0][1])
        axis, plain = self.split_axis, torch.as_tensor(image).as_subclass(Tensor)
        predictions = [
            super(TotalSegmentatorReader, self).predict(
                plain.narrow(axis + 1, part.read.start, part.read.stop - part.read.start), {**data, PROPERTIES: p}, out
            )
            for part, p, (_, out) in zip(parts, scan.properties, files)
        ]
        return join_predictions(predictions, parts, axis, self.model, data[PROPERTIES])

    @property
    def split_axis(self) -> int:
        """The axis of the network's image along which TotalSegmentator splits a very large scan."""
        return self._axes.index(2)

    @property
    def several(self) -> bool:
        """True if the task has several models: TotalSegmentator splits very large scans only for these."""
        return isinstance(self.total_task.config["task_id"], list)

    def _windows(self, patch: tuple[int, ...]) -> NnunetWindows:
        return PartWindows(patch, self.step, self.split_axis, self.several)

    def _of(self, number: int) -> SegmentingModel:
        (part,) = (part for part in self.total_task.parts if part.number == number)
        return SegmentingModel(part, self.total_task, self.device)

    def _masks(self, own: OutputMasks, segmentation: Tensor, scan: _Scan, properties: Any) -> OutputMasks:
        """Return the masks of the final file on the grid of the cropped scan, in the order of the network's axes."""
        label_of = {name: label for label, name in self.total_task.classes.items()}
        order = self._axes
        turn = nib.orientations.io_orientation(scan.image.affine)

        def mask(channel: int) -> Tensor:
            label = 0 if channel == 0 else label_of.get(self.part.classes.get(channel, ""), -1)
            values = (segmentation == label)[scan.box].numpy()
            canonical = nib.orientations.apply_orientation(values, turn)
            return torch.as_tensor(np.ascontiguousarray(canonical.transpose(order)))

        resampling = None
        if own.resampling is not None:
            box = properties["bbox_used_for_cropping"]
            matrices, spacing = [], self.total_task.config["resample"]
            for axis, (inner, edges) in enumerate(zip(own.resampling.matrices, box)):
                nearest = nearest_labels(scan.resampled.shape, scan.shape, order[axis], spacing)
                matrices.append(nearest[:, edges[0] : edges[1]] @ inner)
            resampling = Resampling(tuple(matrices))
        return OutputMasks(mask, own.exclusive, resampling, {**own.record, "masks": "TotalSegmentator's file"})

    @property
    def _axes(self) -> list[int]:
        return [2 - axis for axis in self.plans.transpose_forward]  # nnU-Net reads (z, y, x)

    def _metadata(self) -> dict[str, Any]:
        content = super()._metadata()
        names = dict(enumerate(self.model.class_names)) | self.part.classes
        content["network_data_format"]["outputs"]["pred"]["channel_def"] = names
        mode = "" if self.total_task.mode == "default" else f"_{self.total_task.mode}"
        return {**content, "name": f"totalsegmentator_{self.total_task.name}{mode}_{self.part.number}"}


class _Preprocessd(NnunetPreprocessd):
    """TotalSegmentator's preparation of a scan, then nnU-Net's preprocessing."""

    def __init__(self, keys: str, reader: TotalSegmentatorReader) -> None:
        super().__init__(keys, reader.model)
        self.reader = reader

    def _preprocess(self, files: list[str], scan: MetaTensor | None = None) -> tuple[MetaTensor, dict[str, Any]]:
        if len(files) != 1 or not files[0].endswith((".nii", ".nii.gz")):
            raise InputError("TotalSegmentator reads one NIfTI file (.nii or .nii.gz): convert the scan first")
        task, device = self.reader.total_task, self.reader.device
        image: Any = nib.load(files[0])
        if len(image.shape) != 3:
            raise InputError(f"{Path(files[0]).name} has the shape {tuple(image.shape)}; give a 3D scan")
        crop = crop_of(task, image, device)
        way: Any = (read_scan(files[0]) if scan is None else scan)[:1].clone()
        box = tuple(slice(0, n) for n in image.shape)
        if crop is not None:
            box = box_of(image, crop)
            way = SpatialCrop(roi_start=[part.start for part in box], roi_end=[part.stop for part in box])(way)
        way = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(way)
        shape = tuple(int(n) for n in way.shape[1:])
        with tempfile.TemporaryDirectory() as folder:
            kept: list[Path] = []

            def keep(_: int, files: list[tuple[Path, Path]]) -> None:
                kept.extend(Path(shutil.move(file, Path(folder) / file.name)) for file, _ in files)
                raise _PreparedError

            with contextlib.suppress(_PreparedError):
                run_task(task, image, crop, device, task.step, keep)
            values = [values_of(file) for file in kept]
            parts = parts_of_files([v.shape for v in values], self.reader.several)
            resampled = values[0]
            if parts:
                resampled = np.concatenate([v[:, :, part.inner] for v, part in zip(values, parts)], 2)
            if resampled.shape != shape:
                # ndimage.zoom keeps the centres of the outermost voxels
                way = Resize(resampled.shape, mode="trilinear", align_corners=True)(way)
            prepared = [self._prepared([str(file)]) for file in kept]
        properties = tuple(more[PROPERTIES] for _, more in prepared)
        network_image, more = prepared[0]
        if parts:
            network_image, whole = join_images([i for i, _ in prepared], properties, parts, self.reader.split_axis)
            more = {PROPERTIES: whole}
        elif parts_of(network_image.shape[1:], self.reader.split_axis, self.reader.several):
            raise InputError(
                f"TotalSegmentator does not split this scan of {resampled.shape}, and nnU-Net resamples it to "
                f"{tuple(network_image.shape[1:])}, which the window plan takes for a scan in parts: crop the scan"
            )
        at = _Scan(image, crop, box, shape, resampled, parts, properties)
        return self._traced(network_image, more[PROPERTIES], way), {**more, SCAN: at}


class _PreparedError(Exception):
    """The scan is prepared, and its file moved: TotalSegmentator need not go on."""
