"""What a record says beside the results of a method: hashes, the inferer, the predicted class, peak memory."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.explain.case import CaseInput
from esegeta_monai.utils.registry import Configurable, json_ready

__all__ = [
    "DECIDES",
    "HOW_NOT_WHAT",
    "MEASURED",
    "decisive",
    "described",
    "inputs_sha256",
    "peak_memory",
    "predicted_class",
    "reset_peak_memory",
    "tensor_hash",
]

logger = logging.getLogger("esegeta_monai")

MEASURED = (
    *("status", "sum", "completeness_gap", "blend_deviation", "value", "baseline_value"),
    *("predicted_class", "predicted_class_name", "predicted_probability"),
    *("amp_correlation", "amp_fallback"),
    *("windows_used", "window_passes", "window_batch", "seconds", "peak_memory_bytes"),
)
"""What a record has besides what is known beforehand; None where the method, or the network, has no such thing."""

DECIDES = (
    *("method", "parameters", "target", "target_parameters", "target_sha256", "seed", "amp", "output"),
    *("inferer", "network", "network_grid", "network_affine", "image_sha256", "inputs_sha256"),
)
"""What of an attribution's record, beside provenance and scan, decides what its map is. The hash of the image that the
network saw stands for the whole preprocessing, that of further inputs for what parameters only name: files and data."""

HOW_NOT_WHAT = ("progress", "sw_batch_size", "sw_device", "device", "cpu_thresh", "buffer_steps", "buffer_dim")
"""Parameters of MONAI's inferers that change where and how fast a prediction is computed, not what it is."""


def decisive(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a record that decides what the map is, see `DECIDES`; known before the method runs."""
    return {name: record.get(name) for name in DECIDES}


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


def inputs_sha256(method: Configurable, case: CaseInput) -> str | None:
    """Of what decides a map but stands in no record as it is: tensors, files and entries of the case's data that the
    method's parameters hold or name (also inside others and in text), and the network's further inputs; None: nothing.
    """
    if id(method) not in case.hashes:
        hashes: list[str] = []
        _look(method, case.data, hashes)
        _look([case.condition, *case.args, *case.kwargs.items()], {}, hashes)
        case.hashes[id(method)] = hashlib.sha256(" ".join(hashes).encode()).hexdigest() if hashes else None
    return case.hashes[id(method)]


def _look(value: Any, data: Mapping[str, Any], hashes: list[str]) -> None:
    if isinstance(value, (Tensor, np.ndarray)):
        hashes.append(tensor_hash(torch.as_tensor(value)))
    elif isinstance(value, Configurable):
        _look([getattr(value, p, None) for p in value.parameter_names()], data, hashes)
    elif isinstance(value, Mapping):
        _look(list(value.values()), data, hashes)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _look(one, data, hashes)
    elif isinstance(value, (str, Path)):
        for name in dict.fromkeys([str(value), *WORDS.findall(str(value))]):
            key = name.removeprefix("key:")
            if key in data:
                _look(data[key], {}, hashes)
            elif "." in name and Path(name).is_file():
                stat = Path(name).stat()
                hashes.append(_file_hash(name, stat.st_size, stat.st_mtime_ns))


WORDS = re.compile(r"[^\s'\"()\[\]{},=]+|(?<=')[^']+(?=')|(?<=\")[^\"]+(?=\")")
"""What may be a file or a key in the text of a parameter, such as ``supervoxels(mask='body.nii.gz')``."""


@functools.lru_cache(maxsize=64)
def _file_hash(name: str, size: int, changed: int) -> str:
    """Of a file's bytes; looked at once while its size and time stay."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def reset_peak_memory(device: torch.device) -> None:
    """Begins the count of `peak_memory` anew, where the device or the operating system can (CUDA, Linux).

    The count is the process' own: whoever else reads it sees it begin anew too.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the process' own count of its peak, VmHWM
    except OSError as error:  # no Linux, or /proc is read-only: the count goes on from the start of the process
        logger.debug("the count of peak memory stays: %s", error.strerror)


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on an accelerator what tensors held since `reset_peak_memory`; on the CPU the resident
    memory of the process, all that it held before included, since then on Linux, else since it was started."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration) as error:
        logger.debug("no VmHWM (%s): the peak since the process was started is taken", type(error).__name__)
    try:
        import resource
    except ImportError:  # Windows has no such count
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
