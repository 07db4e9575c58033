"""The settings of an explainer: network, inferer, devices, precision, names and limits."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from esegeta_monai.engine.head import HEADS, Declared, Postprocessing
from esegeta_monai.engine.network.model import check_network, is_scripted
from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.explain.formats import FormatStore, format_of
from esegeta_monai.explain.record import described
from esegeta_monai.methods.base import Method
from esegeta_monai.targets.base import Target
from esegeta_monai.targets.classes import PredictedClasses
from esegeta_monai.targets.regions import OutputValue
from esegeta_monai.utils.distributed import Processes
from esegeta_monai.utils.types import flag

__all__ = ["DEFAULT_METHODS", "Checks", "InputsAs", "OnError", "Settings", "checks_of", "default_targets"]

DEFAULT_METHODS = ("Saliency", "GradCam")
"""Methods that run where none are chosen, in all interfaces."""

OnError = Literal["raise", "record"]
Checks = bool | Literal["once", "maps"]
InputsAs = Literal["dict", "list"]


def checks_of(value: Any) -> Checks:
    """Return the setting ``checks``; shells and configs pass booleans as text.

    Raises:
        UsageError: it is another value.

    >>> checks_of("false"), checks_of("maps")
    (False, 'maps')
    """
    if value in ("once", "maps"):
        return value
    try:
        return flag("checks", value)
    except UsageError:
        raise UsageError(f"checks={value!r}: give True, False, 'once' or 'maps'") from None


def default_targets(declared: Declared | None) -> list[Target]:
    """Return the targets where none are chosen: every predicted class except background, or a regression's first value.

    Args:
        declared: meaning of the output, where metadata state it.

    >>> [type(target).__name__ for target in default_targets("regression")]
    ['OutputValue']
    """
    return [OutputValue()] if declared == "regression" else [PredictedClasses()]


@dataclass(frozen=True, eq=False)
class Settings:
    """Settings that all cases of an explainer share; `dataclasses.replace` varies them.

    Attributes:
        network: the module itself, without wrappers.
        inferer: predicts a volume, as the user's own prediction does.
        device: device on which windows are computed; that of the network.
        volume_device: device that stores volumes.
        amp: autocast for methods that allow it, with the keywords ``amp_kwargs``.
        output: key or index of the output that is explained; None: the only one.
        class_names: class number to name.
        channel_names: names of the image's channels.
        window_batch: windows per forward pass; None: the inferer's ``sw_batch_size``.
        seed: seed of every random draw.
        progress: show progress bars.
        time_limit: seconds per method; None: no limit.
        allow_costly: run methods that score more than `esegeta_monai.explain.costs.COSTLY` perturbations.
        processes: the processes that compute each case together.
        on_error: ``"raise"``, or ``"record"`` failures in attributions without a map.
        checks: check what maps take for granted (`esegeta_monai.engine.checks`); ``"once"``: check the network once,
            also if its weights change, as during a training; ``"maps"``: check each finished map as well.
        head: what the network's output is, as the user states it; None: it is found out.
        postprocessing: what a bundle does with the network's output.
        inputs_as: how several image inputs are passed: ``"dict"``, ``"list"``, or None: separately.
        layer_axes: axes of layers where they cannot be found out, by the layer's name.
        agreement: also compute the maps of the members of an ensemble and of its mirrored views alone.
        local: compute perturbed windows in parts where that saves work, see `esegeta_monai.engine.local.passes`.
        memory_format: order of values in memory: ``"contiguous"``, ``"channels_last"``, ``"auto"``, or None: by rule.
        formats: measured choices of the memory format.
        constant_images: explain images whose voxels are all equal, as metrics make them; else they are refused.
        inferer_record: name and parameters of the inferer as it was given.

    Raises:
        NetworkError: half-precision weights, or a network built under ``inference_mode``.
        UsageError: another value of ``on_error``, ``head`` or ``inputs_as``.
    """

    network: nn.Module
    inferer: Any
    device: torch.device
    volume_device: torch.device
    amp: bool = False
    amp_kwargs: Mapping[str, Any] = field(default_factory=dict)
    output: int | str | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)
    channel_names: Sequence[str] = ()
    window_batch: int | None = None
    seed: int = 0
    progress: bool = False
    time_limit: float | None = None
    allow_costly: bool = False
    processes: Processes = field(default_factory=Processes)
    on_error: OnError = "raise"
    checks: Checks = True
    head: str | None = None
    postprocessing: Postprocessing = field(default_factory=Postprocessing)
    inputs_as: InputsAs | None = None
    layer_axes: Mapping[str, str] = field(default_factory=dict)
    agreement: bool = False
    local: bool = True
    memory_format: str | None = None
    formats: FormatStore = field(default_factory=FormatStore)
    constant_images: bool = False
    inferer_record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.inferer_record:  # now, since SliceInferer changes its roi_size when it runs
            object.__setattr__(self, "inferer_record", getattr(self.inferer, "record", None) or described(self.inferer))
        check_network(self.network)
        if any(p.is_inference() for p in self.network.parameters()):
            raise NetworkError(
                "the network was built inside torch.inference_mode(), so its flags cannot be set and restored: build "
                "it outside, or under torch.no_grad()"
            )
        places = {p.device for p in self.network.parameters()}
        if any(p.type != self.device.type for p in places):
            raise NetworkError(
                f"the network is on {', '.join(sorted(map(str, places)))}, but device={str(self.device)!r}: move it "
                f"first, network.to({str(self.device)!r})"
            )
        if self.on_error not in ("raise", "record"):
            raise UsageError(f"on_error={self.on_error!r}: give 'raise' or 'record'")
        object.__setattr__(self, "checks", checks_of(self.checks))
        format_of(self.memory_format)
        if self.head is not None and self.head not in HEADS:
            raise UsageError(f"head={self.head!r}: give {', '.join(map(repr, HEADS))}, or None to find out")
        if self.inputs_as not in (None, "dict", "list"):
            raise UsageError(f"inputs_as={self.inputs_as!r}: give 'dict' or 'list', or None for separate inputs")

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The entries that the records of all maps share; of the autocast dtype, those of methods that allow it.

        The hash of the network's printed structure, without object addresses, covers what the weights do not show, such
        as the slope of a LeakyReLU.
        """
        structure = re.sub(r" at 0x\w+", "", repr(self.network)).encode()
        default = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return {
            "seed": self.seed,
            "inferer": dict(self.inferer_record),
            "output": self.output,
            "network": {
                "name": type(self.network).__name__,
                "structure_sha256": hashlib.sha256(structure).hexdigest(),
            },
            "amp": str(self.amp_kwargs.get("dtype", default)) if self.amp else None,
            **({"layer_axes": dict(self.layer_axes)} if self.layer_axes else {}),
        }

    def refused(self, methods: Sequence[Method]) -> dict[int, Exception]:
        """Return the error of each method (by id) that does not support this network."""
        if not is_scripted(self.network):
            return {}
        need = [m for m in methods if m.needs_gradient or m.produces in ("layer map", "activation")]
        error = NetworkError(
            f"{', '.join(str(m.name) for m in need)}: gradients or layers are needed, which a TorchScript or TensorRT "
            "network does not give; load the plain PyTorch network, or use a perturbation method such as Occlusion"
        )
        return {id(m): error for m in need}
