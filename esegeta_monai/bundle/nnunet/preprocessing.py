"""nnU-Net's preprocessing as a transform."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from monai.data import MetaTensor
from monai.transforms import MapTransform, Orientation, Resize, SpatialCrop
from torch import Tensor

from esegeta_monai.bundle.nnunet.cascade import PREVIOUS
from esegeta_monai.bundle.nnunet.files import PROPERTIES, nnunet_module
from esegeta_monai.bundle.nnunet.model import NnunetModel
from esegeta_monai.errors import InputError
from esegeta_monai.files.scans import read_scan

__all__ = ["NnunetPreprocessd"]

_RAS = (("L", "R"), ("P", "A"), ("I", "S"))


class NnunetPreprocessd(MapTransform):
    """nnU-Net's own reading and preprocessing, with a trace that brings maps back to the scan's grid.

    Args:
        keys: the key of the file names, one per channel; it becomes the image (C, *spatial).
        model: the model folder, such as `NnunetReader.model`.
        previous: for the second stage of a cascade: returns the first stage's segmentation of the case's files; it may
            write into the given folder, which is temporary.
    """

    def __init__(
        self, keys: str, model: NnunetModel, previous: Callable[[list[str], Path], Path] | None = None
    ) -> None:
        super().__init__(keys)
        self.model, self.previous = model, previous

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Preprocess the files of one case.

        Raises:
            InputError: nnU-Net cannot read them, or its grid is not that of the scan.
        """
        result = dict(data)
        for key in self.key_iterator(result):
            files = [str(f) for f in ([data[key]] if isinstance(data[key], (str, Path)) else data[key])]
            result[key], more = self._preprocess(files)
            result.update(more)
        return result

    def _preprocess(self, files: list[str], scan: MetaTensor | None = None) -> tuple[MetaTensor, dict[str, Any]]:
        """Return the image (C, *spatial) and further entries of the data dictionary.

        Args:
            files: one file per channel.
            scan: (1, *spatial) the first one with the trace of what was done before; None: it is read.
        """
        image, more = self._prepared(files)
        return self._traced(image, more[PROPERTIES], read_scan(files[0]) if scan is None else scan), more

    def _prepared(self, files: list[str]) -> tuple[Tensor, dict[str, Any]]:
        """Return the image (C, *spatial) without trace, and further entries of the data dictionary."""
        model = self.model
        wanted = len(model.channel_names)
        if len(files) != wanted:
            names = ", ".join(model.channel_names.values())
            raise InputError(f"{len(files)} file(s) for {wanted} channel(s) ({names}): give one file for each")
        preprocessor = model.configuration.preprocessor_class(verbose=False)
        with tempfile.TemporaryDirectory() as folder:
            file = None if self.previous is None else str(self.previous(files, Path(folder)))
            values, labels, properties = preprocessor.run_case(
                files, file, model.plans, model.configuration, model.dataset
            )
        more = {PROPERTIES: properties}
        if file is not None:
            one_hot = nnunet_module("nnunetv2.utilities.label_handling.label_handling").convert_labelmap_to_one_hot
            more[PREVIOUS] = torch.as_tensor(one_hot(labels[0], model.labels.foreground_labels, values.dtype)).float()
        return torch.as_tensor(values).float(), more

    def _traced(self, image: Tensor, properties: Mapping[str, Any], scan: MetaTensor) -> MetaTensor:
        """Return the image with the trace of nnU-Net's transpose, crop and resampling, from the scan's grid."""
        way: Any = scan[:1].clone()
        order = [2 - axis for axis in self.model.plans.transpose_forward]  # nnU-Net reads (z, y, x)
        if "Reorient" in self.model.plans.image_reader_writer_class.__name__:
            codes: tuple[str, ...] = ("R", "A", "S")
        else:
            codes = nib.aff2axcodes(way.affine.numpy())
        way = Orientation(axcodes="".join(codes[axis] for axis in order), labels=_RAS)(way)
        if tuple(way.shape[1:]) != tuple(properties["shape_before_cropping"]):
            raise InputError(
                f"nnU-Net reads the scan as {tuple(properties['shape_before_cropping'])}, and its axes give "
                f"{tuple(way.shape[1:])}: the axes of the file are ambiguous (an affine with shears); resample it"
            )
        box = properties["bbox_used_for_cropping"]
        way = SpatialCrop(roi_start=[b[0] for b in box], roi_end=[b[1] for b in box])(way)
        way = Resize(image.shape[1:], mode="trilinear", align_corners=False)(way)
        return MetaTensor(image, meta=way.meta, applied_operations=way.applied_operations)
