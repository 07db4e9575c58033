"""The result of an explanation: a map, the target it explains, and its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai.engine.score import Score
from esegeta_monai.explain.agreement import AgreementMaps
from esegeta_monai.methods.base import Method
from esegeta_monai.targets.base import Target

__all__ = ["Attribution", "like_image", "mask_on_image"]


@dataclass
class Attribution:
    """The map of one method for one target of a case.

    Attributes:
        map: MetaTensor (C, *spatial) on the grid of the image, raw values in the network's dtype, or in float64 if it
            was computed again (``record["float64_fallback"]``); None if there is none (see ``record["status"]``).
        method, target: the objects; a target with several scores gives several attributions.
        case: index of the image in the batch.
        record: JSON-ready: status, parameters, sums, completeness gap, windows, seconds, memory, versions, warnings.
        label: the target's name with its class, for files and pictures.
        mask: bool MetaTensor (1, *spatial) of the target's voxels on the prediction's grid; None for class scores.
        input: name of the image input, if the network has several.
        error: the exception of a failed method.
        agreement: the maps of the members of an ensemble and of its mirrored views, if they were asked for.
    """

    map: MetaTensor | None
    method: Method
    target: Target
    case: int
    record: dict[str, Any]
    label: str
    mask: MetaTensor | None = None
    input: str | None = None
    error: Exception | None = None
    agreement: AgreementMaps | None = None

    @property
    def status(self) -> str:
        """ok, zero, incomplete, empty_target, failed or timeout."""
        return self.record["status"]


def like_image(values: Tensor, image: MetaTensor) -> MetaTensor:
    """Return a map (C, *spatial) with the image's affine and preprocessing trace, without its other metadata."""
    like = MetaTensor(values.detach(), affine=image.affine.clone())
    keep = ("original_affine", "spatial_shape", "space", "filename_or_obj")
    like.meta.update({k: image.meta[k] for k in keep if k in image.meta})
    like.applied_operations = list(image.applied_operations)
    return like


def mask_on_image(score: Score | None, image: MetaTensor) -> MetaTensor | None:
    """Return the target's voxels as a bool mask (1, *spatial) on the image's grid; None if they have no place there."""
    if score is None or not score.box:
        return None
    if any(b.stop > n for b, n in zip(score.box, image.shape[1:])) or len(score.box) != image.ndim - 1:
        return None
    mask = torch.zeros((1, *image.shape[1:]), dtype=torch.bool)
    mask[0][score.box] = score.shown.cpu()
    return like_image(mask, image)
