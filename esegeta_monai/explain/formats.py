"""The choice of the memory format of a case, by rule, request or measurement, where the numbers stay the same."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.checks.base import Sample, small_sample
from esegeta_monai.engine.network.memory_format import (
    MEMORY_FORMATS,
    FormatChoice,
    MemoryFormat,
    faster,
    format_by_rule,
    same_numbers,
)
from esegeta_monai.engine.network.model import Model, is_scripted
from esegeta_monai.engine.network.state import evaluating, weights_hash
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import UsageError
from esegeta_monai.utils.distributed import Processes
from esegeta_monai.utils.files import read_json, versions, write_json

__all__ = ["STORE", "FormatStore", "choose_format", "format_of"]

logger = logging.getLogger("esegeta_monai")

STORE = "memory_format.json"
"""File of a run with the measured choices."""

_CHECKED: weakref.WeakKeyDictionary[nn.Module, dict[str, str | None]] = weakref.WeakKeyDictionary()


def format_of(value: Any) -> str | None:
    """Return the setting ``memory_format``.

    Raises:
        UsageError: it is another value.

    >>> format_of("auto"), format_of(None)
    ('auto', None)
    """
    if value is None or value in MEMORY_FORMATS:
        return value
    names = ", ".join(map(repr, MEMORY_FORMATS))
    raise UsageError(f"memory_format={value!r}: give {names}, or None for the rule")


class FormatStore:
    """Measured choices by network, shape, device and versions, in memory and in a file of the run.

    Args:
        path: the file; None: in memory only.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._known: dict[str, dict[str, str]] = {}

    def get(self, key: str) -> FormatChoice | None:
        """Return a stored choice, or None; a file that cannot be read holds none."""
        if key not in self._known and self.path is not None and self.path.is_file():
            self._known |= read_json(self.path) or {}
        return FormatChoice(**self._known[key]) if key in self._known else None  # type: ignore[arg-type]

    def set(self, key: str, choice: FormatChoice) -> None:
        """Store a choice."""
        self._known[key] = choice.entry()
        if self.path is not None:
            write_json(self.path, self._known)


def choose_format(
    asked: str | None,
    model: Model,
    image: Tensor,
    plan: WindowPlan,
    condition: Tensor | None,
    processes: Processes,
    store: FormatStore,
) -> FormatChoice:
    """Choose the memory format of a case; all processes use the choice of the first.

    Args:
        asked: ``"contiguous"``, ``"channels_last"``, ``"auto"``, or None for the rule.
        model: the network.
        image: (C, *spatial).
        plan: the windows of the image.
        condition: MONAI's ``condition`` volume (C, *spatial), or None.
        processes: those that compute the case together.
        store: of the run.
    """
    if asked == "contiguous":
        return FormatChoice("contiguous", "request", "as asked")
    by = {None: "rule", "auto": "measurement"}.get(asked, "request")
    if (why := _impossible(model, image)) is not None:
        return FormatChoice("contiguous", by, why)
    if asked is None:
        choice = format_by_rule(model.network, model.device, model.dtype, model.autocast_dtype is not None)
        if choice.used == "contiguous":
            return choice
    chosen = None
    if not processes.rank:
        chosen = _checked(asked, by, model, image, plan, condition, store)
    return next(c for c in processes.gather(chosen) if c is not None)


def _impossible(model: Model, image: Tensor) -> str | None:
    if is_scripted(model.network):
        return "TorchScript keeps its own order"
    if model.members:
        return "the members of an ensemble share one network"
    if image.ndim not in (3, 4):
        return "the image is neither 2D nor 3D"
    return None


def _checked(
    asked: str | None,
    by: str,
    model: Model,
    image: Tensor,
    plan: WindowPlan,
    condition: Tensor | None,
    store: FormatStore,
) -> FormatChoice:
    content = [weights_hash(model.network), list(plan.roi), str(model.device), str(model.autocast_dtype), versions()]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if asked == "auto" and (known := store.get(key)) is not None:
        return known
    done = _CHECKED.setdefault(model.network, {})
    if key not in done:
        sample = small_sample_of(model, image, plan, condition)
        done[key] = "no window passes through the network alone" if sample is None else _differs(sample)
    why = done[key]
    if why is not None:
        choice = FormatChoice("contiguous", by, why)
        if asked == "channels_last":
            logger.warning("memory_format='channels_last' is not used: %s", why)
    elif asked == "auto":
        gains, figure = _faster(model, image, plan, condition)
        choice = FormatChoice("channels_last" if gains else "contiguous", by, figure)
    else:
        text = "as asked" if asked else "convolutions of edge 3 on a CPU"
        choice = FormatChoice("channels_last", by, f"{text}; same numbers")
    if asked == "auto":
        store.set(key, choice)
    return choice


def small_sample_of(model: Model, image: Tensor, plan: WindowPlan, condition: Tensor | None) -> Sample | None:
    """Return the window on which formats are compared, None if the network accepts none alone.

    Args:
        model: the network.
        image: (C, *spatial).
        plan: the windows of the image.
        condition: (C, *spatial), or None.
    """
    model = copy.copy(model)
    model.inferer = None
    try:
        with evaluating(model.network, model.device):
            return small_sample(model, image, plan, condition)
    except Exception as error:  # a network may raise anything on a window that its inferer would not give it
        logger.debug("no window for the memory format: %s", error)
        return None


def _terms(sample: Sample, memory_format: MemoryFormat) -> list[Tensor]:
    """Return the terms of F (n,) and the gradient (1, C, *roi) on the window."""
    model = copy.copy(sample.model)
    model.memory_format = memory_format
    with evaluating(model.network, model.device, memory_format):
        x = sample.window.clone().requires_grad_(True)
        one = dataclasses.replace(sample, model=model)
        out = one.run(x)
        terms = out * one.cotangent(out)
        if not terms.requires_grad:
            return [terms.detach().flatten()]
        (gradient,) = torch.autograd.grad(terms.sum(), x, allow_unused=True)
    values = [terms.detach().flatten()]
    return values if gradient is None else [*values, gradient]


def _differs(sample: Sample) -> str | None:
    def exact() -> list[Tensor]:
        with evaluating(sample.model.network, sample.model.device):
            double = sample.of(sample.model.in_float64(), torch.float64)
        return _terms(double, "contiguous")

    return same_numbers(lambda kind: _terms(sample, kind), exact)


def _faster(model: Model, image: Tensor, plan: WindowPlan, condition: Tensor | None) -> tuple[bool, str]:
    """Measure both formats on the first windows of the image."""
    windows: Sequence[int] = range(min(len(plan), 1 if model.device.type == "cpu" else plan.batch_size))
    x = torch.stack([plan.cut(image, w) for w in windows]).to(model.device)
    cut = None if condition is None else torch.stack([plan.cut(condition, w) for w in windows]).to(model.device)
    coordinates = plan.coordinates(0) if plan.with_coord else None
    sample = Sample(model, x, plan.slice_axis, coordinates, cut)

    def synchronise() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    return faster(lambda kind: _terms(sample, kind), synchronise)
