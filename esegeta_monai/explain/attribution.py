"""What an explanation is: a map, what it explains, and its record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

from esegeta_monai.engine.score import Score
from esegeta_monai.methods.base import Method
from esegeta_monai.targets.base import Target

__all__ = ["Attribution", "like_image", "mask_on_image"]


@dataclass
class Attribution:
    """One map: what a method says about a target of a case.

    Attributes:
        map: MetaTensor (C, *spatial) on the grid of the image, raw values in the network's dtype; None where there is
            none (``record["status"]`` says why).
        method, target: the objects; a target that asks for several scores gives several attributions.
        case: index of the image in the batch.
        record: JSON-ready: status, parameters, sums, completeness gap, windows, seconds, memory, versions, warnings.
        label: the target's name with its class, for files and pictures.
        mask: bool MetaTensor (1, *spatial) of the target's voxels on the prediction's grid; None for class scores.
        input: name of the image input, where a network has several.
        error: the exception of a failed method.
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

    @property
    def status(self) -> str:
        """ok, zero, empty_target, failed or timeout."""
        return self.record["status"]


def like_image(values: Tensor, image: MetaTensor) -> MetaTensor:
    """A map with the image's place in the world and the trace of its preprocessing, but none of its other metadata."""
    like = MetaTensor(values.detach(), affine=image.affine.clone())
    keep = ("original_affine", "spatial_shape", "space", "filename_or_obj")
    like.meta.update({k: image.meta[k] for k in keep if k in image.meta})
    like.applied_operations = list(image.applied_operations)
    return like


def mask_on_image(score: Score | None, image: MetaTensor) -> MetaTensor | None:
    if score is None or not score.box:
        return None
    if any(b.stop > n for b, n in zip(score.box, image.shape[1:])) or len(score.box) != image.ndim - 1:
        return None
    mask = torch.zeros((1, *image.shape[1:]), dtype=torch.bool)
    mask[0][score.box] = score.mask.cpu()
    return like_image(mask, image)
