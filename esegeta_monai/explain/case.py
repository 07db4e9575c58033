"""The inputs of one call, and its cases: each image with its own metadata, prediction and further inputs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor, decollate_batch
from torch import Tensor

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.network.outputs import OutputChoice, batch_first, choose_output, select_output
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.utils.images import check_dense

__all__ = ["BatchInputs", "CaseInput", "cases_of", "joined_inputs", "of_case", "to_device"]


@dataclass
class BatchInputs:
    """The inputs of one call of an explainer: a batch of images and the data that belong to them.

    Args:
        image, data, prediction, network_args, network_kwargs: see `esegeta_monai.Explainer.__call__`.

    Raises:
        InputError: the image is not a tensor (B, C, *spatial) in 2D or 3D, or image inputs have different grids.
    """

    image: Tensor | Mapping[str, Tensor]
    data: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
    prediction: Any = None
    network_args: Sequence[Any] = ()
    network_kwargs: Mapping[str, Any] | None = None
    joined: Tensor = field(init=False)
    """All image inputs (B, C, *spatial), concatenated along the channels."""
    channels: dict[str, int] = field(init=False)
    """Number of channels of each named image input; empty for a network with a single one."""

    def __post_init__(self) -> None:
        inputs = dict(self.image) if isinstance(self.image, Mapping) else {}
        joined = joined_inputs(inputs) if inputs else self.image
        if not isinstance(joined, Tensor) or joined.ndim not in (4, 5) or 0 in joined.shape[1:]:
            given = f"shape {tuple(joined.shape)}" if isinstance(joined, Tensor) else type(joined).__name__
            remedy = ""
            if isinstance(joined, np.ndarray):
                remedy = ": convert it, torch.from_numpy(image)"
            elif isinstance(joined, (str, os.PathLike)):
                remedy = ": read the file first, with the network's preprocessing (LoadImaged, ...)"
            raise InputError(f"image must be a tensor (B, C, *spatial) in 2D or 3D, got {given}{remedy}")
        self.joined, self.channels = joined, {name: value.shape[1] for name, value in inputs.items()}

    def cases(self, output: int | str | None, preferred: Sequence[str] = ()) -> Iterator[CaseInput]:
        """Yield the cases of the batch.

        Args:
            output: key or index of the explained output of the network; None: it is chosen.
            preferred: keys of outputs that a bundle's postprocessing reads.

        Raises:
            UsageError: ``data`` has another length than the batch.
            InputError: ``prediction`` has another length than the batch.
        """
        n, kwargs = len(self.joined), self.network_kwargs or {}
        choice, prediction = None, None
        if self.prediction is not None:
            if output is None and not isinstance(self.prediction, Tensor):
                choice = choose_output(self.prediction, preferred)
                output = choice.key
            prediction = batch_first(select_output(self.prediction, output, self.joined.ndim), n)
        data = list(self.data) if isinstance(self.data, Sequence) else [self.data or {}] * n
        condition = kwargs.get("condition")
        if len(data) != n:
            raise UsageError(f"data has {len(data)} entries for {n} images")
        if prediction is not None and prediction.ndim and len(prediction) != n:
            raise InputError(
                f"the prediction has shape {tuple(prediction.shape)} for {n} image(s): give (B, K, ...) with one entry "
                "per image"
            )
        for i, image in enumerate(cases_of(self.joined)):
            yield CaseInput(
                i,
                image,
                None if prediction is None else prediction[i],
                data[i],
                None if condition is None else torch.as_tensor(condition[i]).as_subclass(Tensor),
                [of_case(a, i, n) for a in self.network_args],
                {k: of_case(v, i, n) for k, v in kwargs.items() if k != "condition"},
                self.channels,
                choice,
            )


@dataclass
class CaseInput:
    """One case of a batch, on the network's grid."""

    index: int
    image: MetaTensor
    prediction: Tensor | None
    data: Mapping[str, Any]
    condition: Tensor | None = None
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    channels: dict[str, int] = field(default_factory=dict)
    """Number of channels of each named image input, see `BatchInputs`."""
    choice: OutputChoice | None = None
    """The output that ``prediction`` is, if the network returns several and the user names none."""
    record: dict[str, Any] = field(default_factory=dict)
    """The entries that the records of all its maps share."""
    checks: list[CheckResult] = field(default_factory=list)
    """The results of the checks of the case and its network; their texts are in the records of all its maps."""
    hashes: dict[int, str | None] = field(default_factory=dict)
    """Cached hashes of further inputs by method (id), see `esegeta_monai.explain.record.inputs_sha256`."""


def cases_of(image: Tensor) -> list[MetaTensor]:
    """Split a batch (B, C, *spatial) into images (C, *spatial), each with its own metadata and trace.

    Raises:
        InputError: the batch is sparse.
    """
    check_dense(image)
    if not isinstance(image, MetaTensor):
        return [MetaTensor(case) for case in image]
    if not image.is_batch and image.affine.ndim == 2:
        return [MetaTensor(case, meta=image.meta, applied_operations=image.applied_operations) for case in image]
    return list(decollate_batch(_batch_like(image.as_tensor(), image)))


def joined_inputs(inputs: Mapping[str, Tensor]) -> Tensor:
    """Concatenate image inputs (B, C_i, *spatial) along the channels to one tensor (B, C, *spatial).

    Raises:
        InputError: the inputs differ in batch or grid, or one is sparse.
    """
    first = next(iter(inputs.values()))
    for name, value in inputs.items():
        check_dense(value, f"image input {name!r}")
        if value.shape[2:] != first.shape[2:] or len(value) != len(first):
            raise InputError(
                f"image input {name!r} has shape {tuple(value.shape)}, the first one {tuple(first.shape)}: image "
                "inputs must share batch and grid; pass others by network_kwargs"
            )
    joined = torch.cat([torch.as_tensor(v).as_subclass(Tensor).to(first.device) for v in inputs.values()], 1)
    return _batch_like(joined, first) if isinstance(first, MetaTensor) else joined


def _batch_like(values: Tensor, batch: MetaTensor) -> MetaTensor:
    """Return a batch with another's metadata and ``is_batch`` set, which engines with ``compile=True`` lose."""
    batched = MetaTensor(values)
    batched.meta, batched.applied_operations = batch.meta, batch.applied_operations
    batched.is_batch = batch.is_batch or batch.affine.ndim == 3
    return batched


def of_case(value: Any, index: int, n: int) -> Any:
    """Slice a batched further input (n, …) to case ``index``; return anything else unchanged."""
    return value[index : index + 1] if isinstance(value, Tensor) and value.ndim and len(value) == n else value


def to_device(value: Any, device: torch.device) -> Any:
    """Move a tensor of any shape to a device; return anything else unchanged."""
    return value.to(device) if isinstance(value, Tensor) else value
