"""What a record says beside the results of a method: hashes, the inferer, the predicted class, peak memory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.configurable import json_ready

__all__ = [
    "HOW_NOT_WHAT",
    "MEASURED",
    "described",
    "peak_memory",
    "predicted_class",
    "reset_peak_memory",
    "tensor_hash",
]

MEASURED = (
    *("status", "sum", "completeness_gap", "blend_deviation", "value", "baseline_value"),
    *("predicted_class", "predicted_class_name", "predicted_probability"),
    *("amp_correlation", "amp_fallback"),
    *("windows_used", "window_passes", "window_batch", "seconds", "peak_memory_bytes"),
)
"""What a record has besides what is known beforehand; None where the method, or the network, has no such thing."""

HOW_NOT_WHAT = ("progress", "sw_batch_size", "sw_device", "device", "cpu_thresh", "buffer_steps", "buffer_dim")
"""Parameters of MONAI's inferers that change where and how fast a prediction is computed, not what it is."""


def predicted_class(prediction: Tensor, names: Mapping[int, str]) -> dict[str, Any]:
    """Predicted class and its probability, for a classification network."""
    if prediction.ndim > 1 and prediction[0].numel() > 1:
        return {}
    flat = prediction.flatten().double()
    probabilities = torch.sigmoid(flat) if len(flat) == 1 else torch.softmax(flat, 0)
    best = int(flat.argmax())
    return {
        "predicted_class": best,
        "predicted_class_name": names.get(best),
        "predicted_probability": float(probabilities[best]),
    }


def described(inferer: Any) -> dict[str, Any]:
    """An inferer by its class and the parameters that shape the prediction, JSON-ready."""
    values = {k: v for k, v in vars(inferer).items() if not k.startswith("_")} if hasattr(inferer, "__dict__") else {}
    described: dict[str, Any] = {}
    for name, value in values.items():
        if name in HOW_NOT_WHAT or callable(value):
            continue
        described[name] = tensor_hash(value) if isinstance(value, Tensor) and value.ndim else json_ready(value)
    return {"name": getattr(inferer, "__name__", type(inferer).__name__), **described}


def tensor_hash(values: Tensor, *more: Any) -> str:
    """Of a tensor's shape, type and bytes, and of what else belongs to it."""
    plain = torch.as_tensor(values).as_subclass(Tensor).detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(plain.shape)}{plain.dtype}{more}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the method on an accelerator, of the process so far on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows has no such count
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
