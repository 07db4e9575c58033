"""Explanation function for Quantus (Hedström et al., JMLR 2023, arXiv:2202.06861).

It takes and returns NumPy arrays, so Quantus is not a dependency.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from esegeta_monai.engine.network.state import unwrap
from esegeta_monai.errors import MethodError
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.targets.base import TARGETS

__all__ = ["quantus_explain_func"]


def quantus_explain_func(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    *,
    method: Any = "Saliency",
    target: str = "ClassScore",
    target_parameters: dict[str, Any] | None = None,
    **options: Any,
) -> np.ndarray:
    """Compute the maps of a batch by one of our methods, as ``explain_func`` of Quantus.

    Quantus evaluates functions of class scores. `esegeta_monai.targets.TargetWrapper` turns a segmentation network
    into one; ``targets`` are then column numbers of the wrapper.

    Args:
        model: the network, or a wrapper of it.
        inputs: images (B, C, *spatial) in 2D or 3D, an array or tensor.
        targets: class number of each image (B,).
        method: instance, name with parameters, or config.
        target: name of the target class that gets the number as its ``class_index``.
        target_parameters: further parameters of the target, such as ``{"output": "probability"}``.
        options: options of `esegeta_monai.Explainer`, such as ``inferer``, ``device``, ``seed``.

    Returns:
        Raw maps with their sign (B, C or 1, *spatial), in the dtype of the inputs.

    Raises:
        MethodError: an image has no map because its target is empty.
        EsegetaError: what the method raises.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> quantus_explain_func(network, np.ones((3, 1, 4, 4), np.float32), [0, 1, 1], method="InputXGradient").shape
        (3, 1, 4, 4)

    With Quantus installed::

        quantus.MaxSensitivity()(model=network, x_batch=images, y_batch=classes, a_batch=None,
                                 explain_func=quantus_explain_func,
                                 explain_func_kwargs={"method": "IntegratedGradients(n_steps=16)"})
    """
    explainer = Explainer(model, **options)
    explainer.settings = replace(explainer.settings, constant_images=True)  # metrics replace whole images
    images = torch.as_tensor(inputs)
    dtype = next((p.dtype for p in unwrap(model).parameters()), images.dtype)
    maps: list[np.ndarray] = []
    for image, number in zip(images.to(explainer.settings.device, dtype), np.asarray(targets).reshape(-1).tolist()):
        config = {"_target_": target, "class_index": int(number), **(target_parameters or {})}
        (attribution,) = explainer(image[None], [method], [TARGETS.create(config)])
        if attribution.map is None:
            raise MethodError(f"image {len(maps)} has no map for Quantus: {attribution.record.get('reason')}")
        maps.append(attribution.map.as_tensor().cpu().to(images.dtype).numpy())
    return np.stack(maps)
