"""nnU-Net's resampling from the network's grid to that of the scan, as matrices, so that its transpose is exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.bundle.nnunet.model import NnunetModel
from esegeta_monai.engine.resampled import Resampling

__all__ = ["cropped", "inserted", "linear_resampling", "own_resampling", "why_not_linear"]


def own_resampling(model: NnunetModel, properties: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    """Return nnU-Net's function from logits (K, *spatial) and a shape to logits of this shape, as its export calls it.

    Args:
        model: the model folder.
        properties: nnU-Net's properties of the case.
    """
    scan = [properties["spacing"][i] for i in model.plans.transpose_forward]
    own = list(model.configuration.spacing)
    current = own if len(own) == len(properties["shape_after_cropping_and_before_resampling"]) else [scan[0], *own]
    function = model.configuration.resampling_fn_probabilities
    return lambda values, shape: function(values, shape, current, scan)


def why_not_linear(model: NnunetModel) -> str | None:
    """Return why nnU-Net's resampling of logits is not known to be linear; None: it is linear.

    Interpolation of an order above 1 is clipped to the range of its input, which is not linear.
    """
    function = model.configuration.resampling_fn_probabilities
    name = getattr(getattr(function, "func", function), "__name__", str(function))
    options: dict[str, Any] = {
        "order": 3,
        "order_z": 0,
        "mode": "linear",
        "aniso_axis_mode": "nearest-exact",
        "is_seg": False,
    }
    options |= getattr(function, "keywords", {})
    if name == "no_resampling_data_or_seg_to_shape":
        return None
    if name == "resample_data_or_seg_to_shape":
        high = max(int(options["order"]), int(options["order_z"]))
        return f"{name} has order {high}, whose result is clipped" if high > 1 else None
    if name == "resample_torch_fornnunet":
        modes = {str(options["mode"]), str(options["aniso_axis_mode"])}
        return None if modes <= {"linear", "nearest", "nearest-exact"} else f"{name} has the modes {sorted(modes)}"
    return f"{name} is no resampling function of nnU-Net that is known to be linear"


def linear_resampling(model: NnunetModel, properties: Mapping[str, Any], size: tuple[int, ...]) -> Resampling:
    """Return nnU-Net's linear resampling of logits from the network's grid to that of the cropped scan.

    The matrix of an axis is what nnU-Net's function makes of the unit vectors along this axis, so that nothing about
    its interpolation is assumed except that it is linear and separable.

    Args:
        model: the model folder.
        properties: nnU-Net's properties of the case.
        size: shape of the network's grid.
    """
    resample = own_resampling(model, properties)
    target = [int(n) for n in properties["shape_after_cropping_and_before_resampling"]]
    matrices = []
    for axis, (before, after) in enumerate(zip(size, target)):
        shape = [1] * len(size)
        shape[axis] = after
        units = torch.eye(before, dtype=torch.float64).reshape(
            before, *(before if i == axis else 1 for i in range(len(size)))
        )
        moved = torch.as_tensor(resample(units, shape)).double().reshape(before, after)
        matrices.append(moved.T.contiguous())
    return Resampling(tuple(matrices))


def inserted(values: Tensor, model: NnunetModel, properties: Mapping[str, Any]) -> Tensor:
    """Return values (*cropped) in the grid of the scan as nnU-Net reads it (z, y, x), with zeros outside the crop."""
    whole = values.new_zeros(tuple(int(n) for n in properties["shape_before_cropping"]))
    whole[_box(properties)] = values
    return whole.permute(*model.plans.transpose_backward)


def cropped(values: Tensor, model: NnunetModel, properties: Mapping[str, Any]) -> Tensor:
    """Return values on the scan's grid (z, y, x) as nnU-Net transposes and crops them: the transpose of `inserted`."""
    return values.permute(*model.plans.transpose_forward)[_box(properties)]


def _box(properties: Mapping[str, Any]) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in properties["bbox_used_for_cropping"])
