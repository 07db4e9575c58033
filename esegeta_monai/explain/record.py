"""The record of a map, and its entries: hashes, the inferer, the predicted class, peak memory."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.head import Head
from esegeta_monai.explain.case import CaseInput
from esegeta_monai.utils.registry import Configurable, json_ready

__all__ = [
    "DECIDES",
    "HOW_NOT_WHAT",
    "KINDS",
    "NUMBER",
    "Record",
    "described",
    "inputs_sha256",
    "peak_memory",
    "predicted_class",
    "reset_peak_memory",
    "tensor_hash",
]

logger = logging.getLogger("esegeta_monai")


ALWAYS: Final = {"always": True}
"""An entry that is written even if it is None."""
DECISIVE: Final = {"always": True, "decides": True}
"""Such an entry that determines the map."""
PLACE: Final = {"decides": True}
"""An entry that determines the map and is written once the case has been read."""


@dataclass
class Record:
    """The record of one map: `Attribution.record` in memory, the sidecar ``…_attr.json`` on disk.

    Attributes:
        status: ok, zero, incomplete, empty_target, failed or timeout; ``reason``: why there is no map.
        sum: of the map on the network's grid, in its ``units``. completeness_gap: its relative difference from the
            change of the score; completeness_gap_of_map: relative to the sum of the map's absolute values. value,
            baseline_value: F at the image and at the baseline.
        blend_deviation: largest difference of the blended windows from the prediction, relative to its largest value.
        predicted_class, predicted_class_name, predicted_probability: of a classification network.
        amp: dtype of autocast; amp_correlation: of the map with one in float32; amp_fallback: why float32 was used.
        float64_fallback: why float64 was used.
        windows_used, windows_total: windows that the targets see, and all. window_passes: windows that went through the
            network. window_batch: windows per forward pass. coverage: share of the voxels in a window, 0 to 1.
        seconds: wall time. peak_memory_bytes: see `peak_memory`. ranks: number of processes.
        passes_shared_with: methods that were computed in the same passes; seconds and passes are of all of them.
        method: class; method_name: as the user calls it; parameters: as given. produces, additive, signed, units,
            reference: see `esegeta_monai.methods.Method`.
        target, target_name, target_parameters: the same of the target. target_voxels: how many it has. class_index,
            class_name: its class.
        target_sha256, inputs_sha256, image_sha256, scan_sha256: of mask and box, of `inputs_sha256`, of the
            preprocessed image, of the scan's file.
        channel_names: of the image; channels: ``"all"`` where the map has one channel for all of them.
        label: number of the true class of the case, where its data has one under ``label``.
        input: name of the image input, where a network has several.
        seed, output: of the explainer; inferer, network: names and parameters.
        network_grid, network_affine: shape (*spatial) and affine (mm) of the preprocessed image.
        versions: of the packages. warnings: texts.
        checks: results of the checks, see `esegeta_monai.engine.checks.base.CheckResult.entry`.
        map_check: result of the check of the map, with ``checks="maps"``: ``"passed"``, ``"warned"`` (it contradicts an
            independent computation) or ``"none"``.
        agreement: how far the members of an ensemble and its mirrored views agree, see
            `esegeta_monai.explain.agreement.summary`; ``of``: what is compared. training_folds: for each fold, whether
            the case was in its training set.
        noise: standard deviation of F over repeated passes, in units of the target, where equal passes differ.
        memory_format: order of values in memory: what was ``used``, ``by`` what, and the ``reason``.
        layer_axes: axes of layers as the user has stated them, by name.
        head: the meaning of the output, with evidence and certainty, see `esegeta_monai.engine.head.Head`.
            value_units: units of the target, value and baseline_value.
        absorbed_share: share of F(x) that biases absorb, of methods that propagate relevance.
        layer_spacing: distance of the layer's positions per axis on the network's grid, in mm (in voxels without an
            affine), of maps of one layer.
        layer, channel, features, curve, intensity_range, place, distance_end: of methods that have them: layer name,
            channel number, feature table, optimisation curve, intensities of black and white, place of a synthesised
            image, final layer distance.
        sum_in_padding, sum_network_grid, sum_scan_grid: sums of additive maps in padding and on both grids.
        grid: of the map on disk or in memory: ``scan`` or ``network``.
        case: its name. result: target and method as ``run.json`` calls them. map, map_bytes, map_sha256: the file.
            display, picture: what the report and the PNG show.
        bundle, bundle_version, weights_sha256, configs_sha256, configs_used_sha256, overrides: provenance.
        intended_use, non_finite: see `esegeta_monai.utils.files.strict_json`.
        more: any other entry by name: notes of methods, entries of other versions.
    """

    status: str | None = field(default=None, metadata=ALWAYS)
    sum: float | None = field(default=None, metadata=ALWAYS)
    completeness_gap: float | None = field(default=None, metadata=ALWAYS)
    completeness_gap_of_map: float | None = field(default=None, metadata=ALWAYS)
    blend_deviation: float | None = field(default=None, metadata=ALWAYS)
    value: float | None = field(default=None, metadata=ALWAYS)
    baseline_value: float | None = field(default=None, metadata=ALWAYS)
    predicted_class: int | None = field(default=None, metadata=ALWAYS)
    predicted_class_name: str | None = field(default=None, metadata=ALWAYS)
    predicted_probability: float | None = field(default=None, metadata=ALWAYS)
    amp_correlation: float | None = field(default=None, metadata=ALWAYS)
    amp_fallback: str | None = field(default=None, metadata=ALWAYS)
    windows_used: int | None = field(default=None, metadata=ALWAYS)
    window_passes: int | None = field(default=None, metadata=ALWAYS)
    window_batch: int | None = field(default=None, metadata=ALWAYS)
    seconds: float | None = field(default=None, metadata=ALWAYS)
    peak_memory_bytes: int | None = field(default=None, metadata=ALWAYS)
    method: str | None = field(default=None, metadata=DECISIVE)
    method_name: str | None = field(default=None, metadata=ALWAYS)
    parameters: dict[str, Any] | None = field(default=None, metadata=DECISIVE)
    produces: str | None = field(default=None, metadata=ALWAYS)
    additive: bool | None = field(default=None, metadata=ALWAYS)
    signed: bool | None = field(default=None, metadata=ALWAYS)
    units: str | None = field(default=None, metadata=ALWAYS)
    reference: str | None = field(default=None, metadata=ALWAYS)
    target: str | None = field(default=None, metadata=DECISIVE)
    target_name: str | None = field(default=None, metadata=ALWAYS)
    target_parameters: dict[str, Any] | None = field(default=None, metadata=DECISIVE)
    target_voxels: int | None = field(default=None, metadata=ALWAYS)
    target_sha256: str | None = field(default=None, metadata=DECISIVE)
    inputs_sha256: str | None = field(default=None, metadata=DECISIVE)
    class_index: int | None = field(default=None, metadata=ALWAYS)
    class_name: str | None = field(default=None, metadata=ALWAYS)
    channel_names: list[str] | None = field(default=None, metadata=ALWAYS)
    coverage: float | None = field(default=None, metadata=ALWAYS)
    windows_total: int | None = field(default=None, metadata=ALWAYS)
    amp: str | None = field(default=None, metadata=DECISIVE)
    seed: int | None = field(default=None, metadata=DECISIVE)
    inferer: dict[str, Any] | None = field(default=None, metadata=DECISIVE)
    output: int | str | None = field(default=None, metadata=DECISIVE)
    network: dict[str, Any] | None = field(default=None, metadata=DECISIVE)
    network_grid: list[int] | None = field(default=None, metadata=PLACE)
    network_affine: list[list[float]] | None = field(default=None, metadata=PLACE)
    image_sha256: str | None = field(default=None, metadata=PLACE)
    warnings: list[str] = field(default_factory=list, metadata=ALWAYS)
    versions: dict[str, str] | None = field(default=None, metadata=ALWAYS)
    reason: str | None = None
    float64_fallback: str | None = None
    absorbed_share: float | None = None
    checks: list[dict[str, Any]] | None = None
    map_check: str | None = None
    agreement: dict[str, Any] | None = None
    training_folds: dict[str, str] | None = None
    noise: float | None = None
    head: dict[str, Any] | None = None
    layer_axes: dict[str, str] | None = field(default=None, metadata={"decides": True})
    memory_format: dict[str, str] | None = None
    value_units: str | None = None
    channels: str | None = None
    label: int | None = None
    input: str | None = None
    ranks: int | None = None
    passes_shared_with: list[str] | None = None
    layer: Any = None
    layer_spacing: list[float] | None = None
    channel: Any = None
    features: Any = None
    curve: list[float] | None = None
    intensity_range: Any = None
    place: Any = None
    distance_end: Any = None
    sum_in_padding: float | None = None
    sum_network_grid: float | None = None
    sum_scan_grid: float | None = None
    grid: str | None = None
    case: str | None = None
    scan_sha256: str | None = None
    result: dict[str, str] | None = None
    map: str | None = None
    map_bytes: int | None = None
    map_sha256: str | None = None
    display: dict[str, Any] | None = None
    picture: dict[str, Any] | None = None
    bundle: str | None = None
    bundle_version: str | None = None
    weights_sha256: str | None = None
    configs_sha256: dict[str, str] | None = None
    configs_used_sha256: dict[str, str] | None = None
    overrides: dict[str, Any] | None = None
    intended_use: str | None = None
    non_finite: dict[str, str] | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Record:
        """Read a record of any version: unknown entries are kept in ``more``, missing ones have their defaults.

        Types are not checked, see `KINDS`.
        """
        record = cls()
        record.update({"class_name" if name == "class" else name: value for name, value in content.items()})
        return record

    def update(self, values: Mapping[str, Any]) -> None:
        """Set entries by name; those without an attribute, and optional ones that are None, go to ``more``."""
        for name, value in values.items():
            if name in _ATTRIBUTES and (value is not None or name in _ALWAYS):
                setattr(self, name, [] if name == "warnings" and value is None else value)
            else:
                self.more[name] = value

    def to_json(self) -> dict[str, Any]:
        """Return the entries by name: those that are always written, and the optional ones that are set."""
        entries = {name: getattr(self, name) for name in _ATTRIBUTES}
        return {k: v for k, v in entries.items() if v is not None or k in _ALWAYS} | self.more

    def decisive(self) -> dict[str, Any]:
        """Return the entries that determine the map; all are known before the method runs."""
        return {name: getattr(self, name) for name in DECIDES}


_ATTRIBUTES = tuple(f.name for f in fields(Record) if f.name != "more")
_ALWAYS = frozenset(f.name for f in fields(Record) if f.metadata.get("always"))

DECIDES = tuple(f.name for f in fields(Record) if f.metadata.get("decides"))
"""Entries that, with provenance and scan, determine a map. The hash of the preprocessed image covers the whole
preprocessing; that of further inputs covers files and data that parameters only name."""

NUMBER: Final = (int, float)
_IN_FILES = {"class_name": "class"}
_TYPES: dict[str, Any] = {"str": str, "bool": bool, "int": NUMBER, "float": NUMBER, "dict": dict, "list": list}
_UNCHECKED = ("case", "status", "more")
KINDS: dict[str, Any] = {
    _IN_FILES.get(f.name, f.name): _TYPES[kind]
    for f in fields(Record)
    if (kind := str(f.type).removesuffix(" | None").partition("[")[0]) in _TYPES and f.name not in _UNCHECKED
}
"""The type of each entry of a sidecar, for readers of files that may have been edited. ``case`` and ``status`` are not
checked, because they distinguish a sidecar from other files."""

HOW_NOT_WHAT = ("progress", "sw_batch_size", "sw_device", "device", "cpu_thresh", "buffer_steps", "buffer_dim")
"""Parameters of MONAI's inferers that change where and how fast a prediction is computed, not what it is."""


def predicted_class(
    prediction: Tensor, names: Mapping[int, str], head: Head | None = None, activation: str = "auto"
) -> dict[str, Any]:
    """Return predicted class and probability of a classification output (K,) or (K, 1, …).

    Args:
        prediction: raw output.
        names: class number to name. With two names and one output, the output is the evidence for class 1.
        head: the meaning of the output; None: unknown.
        activation: that of the target.

    Returns:
        {} for predictions with voxels, outputs that are no scores of classes, and a single number that nothing shows
        to be the score of a class. If labels do not exclude each other, the class is the most probable one that is
        predicted, or None.
    """
    head, k = head or Head(), prediction.shape[0]
    if (prediction.ndim > 1 and prediction[0].numel() > 1) or head.kind == "raw":
        return {}
    binary = k == 1 and max(names, default=0) == 1
    if k == 1 and not binary and not head.certain:
        return {}
    flat = prediction.flatten().double()
    if head.inside:
        probabilities = flat.exp() if head.values == "log_probability" else flat
    else:
        probabilities = torch.sigmoid(flat) if head.activation(activation, k) == "sigmoid" else torch.softmax(flat, 0)
    best = int(flat.argmax())
    probability, above = float(probabilities[best]), bool(head.above(flat, best))
    if binary:
        best, probability = int(above), probability if above else 1 - probability
    elif not above and not head.exclusive(activation, k):
        return {"predicted_class": None, "predicted_class_name": None, "predicted_probability": None}
    return {
        "predicted_class": best,
        "predicted_class_name": names.get(best),
        "predicted_probability": probability,
    }


def described(inferer: Any) -> dict[str, Any]:
    """Describe an inferer by its class and the parameters that affect the prediction, JSON-ready."""
    values = {k: v for k, v in vars(inferer).items() if not k.startswith("_")} if hasattr(inferer, "__dict__") else {}
    shaping = {
        name: tensor_hash(value) if isinstance(value, Tensor) and value.ndim else value
        for name, value in values.items()
        if name not in HOW_NOT_WHAT and not callable(value)
    }
    return {"name": getattr(inferer, "__name__", type(inferer).__name__), **json_ready(shaping)}


def tensor_hash(values: Tensor, *more: Any) -> str:
    """Return the SHA-256 of the shape, dtype and bytes of a tensor of any shape, and of ``more``."""
    plain = torch.as_tensor(values).as_subclass(Tensor).detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(plain.shape)}{plain.dtype}{more}".encode())
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def inputs_sha256(method: Configurable, case: CaseInput) -> str | None:
    """Return the SHA-256 of data that determine a map but are not in its record; None if there are none.

    These are tensors, files and entries of the case's data that the method's parameters contain or name (also nested
    and in text), and the network's further inputs.
    """
    if id(method) not in case.hashes:
        hashes: list[str] = []
        _collect_hashes(method, case.data, hashes)
        _collect_hashes([case.condition, *case.args, *case.kwargs.items()], {}, hashes)
        case.hashes[id(method)] = hashlib.sha256(" ".join(hashes).encode()).hexdigest() if hashes else None
    return case.hashes[id(method)]


def _collect_hashes(value: Any, data: Mapping[str, Any], hashes: list[str]) -> None:
    if isinstance(value, (Tensor, np.ndarray)):
        hashes.append(tensor_hash(torch.as_tensor(value)))
    elif isinstance(value, Configurable):
        _collect_hashes([getattr(value, p, None) for p in value.parameter_names()], data, hashes)
    elif isinstance(value, Mapping):
        _collect_hashes(list(value.values()), data, hashes)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect_hashes(item, data, hashes)
    elif isinstance(value, (str, Path)):
        for name in dict.fromkeys([str(value), *WORDS.findall(str(value))]):
            key = name.removeprefix("key:")
            if key in data:
                _collect_hashes(data[key], {}, hashes)
            elif "." in name and Path(name).is_file():
                stat = Path(name).stat()
                hashes.append(_file_hash(name, stat.st_size, stat.st_mtime_ns))


WORDS = re.compile(r"[^\s'\"()\[\]{},=]+|(?<=')[^']+(?=')|(?<=\")[^\"]+(?=\")")
"""Candidates for file names and keys in the text of a parameter, such as ``supervoxels(mask='body.nii.gz')``."""


@functools.lru_cache(maxsize=64)
def _file_hash(name: str, size: int, changed: int) -> str:
    """Return the SHA-256 of a file, cached by its size and modification time."""
    return hashlib.sha256(Path(name).read_bytes()).hexdigest()


def reset_peak_memory(device: torch.device) -> None:
    """Reset the counter of `peak_memory`, if the device or the operating system can (CUDA, Linux).

    The counter belongs to the process, so the reset affects all its readers.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets VmHWM, the peak memory of this process
    except OSError as error:  # not Linux, or /proc is read-only: the counter covers the whole process
        logger.debug("the counter of peak memory is not reset: %s", error.strerror)


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes.

    On an accelerator, it is the memory of tensors since `reset_peak_memory`. On the CPU, it is the resident memory of
    the whole process: since `reset_peak_memory` on Linux, since the start of the process elsewhere.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration) as error:
        logger.debug("no VmHWM (%s): using the peak since the start of the process", type(error).__name__)
    try:
        import resource
    except ImportError:  # Windows has no such counter
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
