"""Run TotalSegmentator's own function on a scan, with another predictor in place of its call of nnU-Net."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from esegeta_monai.bundle.nnunet.reader import NnunetReader
from esegeta_monai.bundle.nnunet.totalsegmentator_task import (
    ENDING,
    PartModel,
    TotalSegmentatorTask,
    totalsegmentator_module,
)
from esegeta_monai.errors import InputError, NetworkError

__all__ = ["Crop", "Predict", "SegmentingModel", "box_of", "crop_of", "nearest_labels", "run_task", "values_of"]

Predict = Callable[[int, list[tuple[Path, Path]]], None]
"""Function of the number of a model and its files: input, and output without extension. A split scan has three."""


@dataclass(frozen=True)
class Crop:
    """Crop of a task.

    Attributes:
        mask: the structures to which the scan is cropped.
        margin: mm on each side.
        outside: structures; the final file is set to background outside them; None: it is not.
    """

    mask: Any
    margin: Sequence[float]
    outside: Any


class SegmentingModel:
    """A model that gives a segmentation only."""

    def __init__(self, part: PartModel, task: TotalSegmentatorTask, device: torch.device) -> None:
        self.reader = NnunetReader(part.folder, task.config["folds"], False, device, task.step)

    def segment(self, files: list[tuple[Path, Path]]) -> None:
        """Write the segmentation of each file, see `Predict`."""
        for file, out in files:
            data = self.reader.preprocessing({"image": [str(file)]})
            self.reader.predict(data["image"], data, out)


def run_task(
    task: TotalSegmentatorTask, image: Any, crop: Crop | None, device: torch.device, step: float, predict: Predict
) -> Any:
    """Run TotalSegmentator's own function, with ``predict`` in place of its call of nnU-Net; return the final image.

    For a very large scan ``predict`` gets three files, the parts that TotalSegmentator cuts it into.

    Raises:
        NetworkError: this version of TotalSegmentator calls nnU-Net in another way.
    """
    module, config = totalsegmentator_module("totalsegmentator.nnunet"), task.config

    def instead(dir_in: Any, dir_out: Any, number: int, *_: Any, tta: bool = False, **options: Any) -> None:
        inputs = sorted(Path(dir_in).glob(f"*_0000{ENDING}"))
        if tta or options.get("step_size") != step:
            raise NetworkError(
                f"this version of TotalSegmentator predicts with step {options.get('step_size')} and mirroring {tta}, "
                f"not with step {step}: install the version that the extra [totalsegmentator] names"
            )
        predict(number, [(file, Path(dir_out) / file.name.removesuffix(f"_0000{ENDING}")) for file in inputs])

    known = module.nnUNetv2_predict
    module.nnUNetv2_predict = instead
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            final, _, _ = module.nnUNet_predict_image(
                image,
                None,
                config["task_id"],
                model=config["model"],
                folds=config["folds"],
                trainer=config["trainer"],
                plans=config["plans"],
                tta=False,
                multilabel_image=True,
                resample=config["resample"],
                crop=None if crop is None else crop.mask,
                crop_addon=None if crop is None else crop.margin,
                task_name=task.name,
                nr_threads_saving=1,
                quiet=True,
                device=str(device),
                remove_outside_mask=None if crop is None else crop.outside,
                remove_outside_dilation=None if crop is None else config.get("remove_outside_dilation"),
            )
    finally:
        module.nnUNetv2_predict = known
    return final


def crop_of(task: TotalSegmentatorTask, image: Any, device: torch.device) -> Crop | None:
    """Return the crop of a task, from the segmentation of its rough model.

    Raises:
        InputError: the rough model finds none of the structures.
    """
    rough = task.rough
    if rough is None:
        return None

    def predict(number: int, files: list[tuple[Path, Path]]) -> None:
        (part,) = (part for part in rough.parts if part.number == number)
        SegmentingModel(part, rough, device).segment(files)

    final = run_task(rough, image, crop_of(rough, image, device), device, rough.step, predict)
    labels = np.asarray(final.dataobj)
    label_of = {name: label for label, name in rough.classes.items()}

    def structures(names: Sequence[str]) -> Any:
        values = np.isin(labels, [label_of[name] for name in names]).astype(np.uint8)
        return nib.Nifti1Image(values, final.affine)

    names, outside = task.config["crop"], task.config.get("remove_outside")
    mask = structures(names)
    if not np.asarray(mask.dataobj).any():
        raise InputError(
            f"TotalSegmentator crops to {', '.join(names)}, and its rough model finds none in the scan: its "
            "segmentation is empty, and there is nothing to explain"
        )
    margin = [20, 20, 20] if task.config.get("crop_model") is None else task.config["crop_addon"]
    return Crop(mask, margin, None if outside is None else structures(outside))


def values_of(file: Path) -> np.ndarray:
    """Return the content of a NIfTI file (x, y, z)."""
    image: Any = nib.load(file)
    return np.asarray(image.dataobj)


def box_of(image: Any, crop: Crop) -> tuple[slice, ...]:
    """Return the part of an image that TotalSegmentator crops it to."""
    cut = totalsegmentator_module("totalsegmentator.nnunet").crop_to_mask
    _, edges = cut(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), crop.mask, addon=crop.margin)
    return tuple(slice(int(a), int(b)) for a, b in edges)


def nearest_labels(before: Sequence[int], after: Sequence[int], axis: int, resample: Any) -> Tensor:
    """Return TotalSegmentator's resampling of labels along an axis as a matrix (m, n), for m labels from n."""
    n, m = before[axis], after[axis]
    if resample is None or n == m:
        return torch.eye(n, dtype=torch.float64)
    change = totalsegmentator_module("totalsegmentator.nnunet").change_spacing
    places = nib.Nifti1Image(np.arange(n, dtype=np.float64).reshape(n, 1, 1), np.eye(4))
    read = change(places, [1.0, 1.0, 1.0], (m, 1, 1), order=0, dtype=np.int32).get_fdata().reshape(m)
    return torch.nn.functional.one_hot(torch.as_tensor(read).long(), n).double()
