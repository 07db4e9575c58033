"""The result of a check, and the small window on which the checks of a network run."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.windows.plan import WindowPlan, last_axes

__all__ = ["CheckResult", "NetworkCheck", "Sample", "short_text", "small_sample"]

Verdict = Literal["passed", "handled", "warned", "refused", "not checked"]
Concerns = Literal["all", "gradient", "layer"]

EDGES = (16, 32, 64)
"""Edges in voxels of the windows that are tried before the whole window, each also with the last axis twice as long: a
network whose normalisation refuses a single position at its lowest resolution accepts two, at half the cost of the next
edge and less. Most networks accept one of them."""


@dataclass(frozen=True)
class CheckResult:
    """The result of a check.

    Attributes:
        name: the check: ``rows``, ``determinism``, ``derivative``, ``layers``, ``input``, ``layout``, ``head``,
            ``outputs``, ``geometry``, ``precision``, ``finite``, ``prediction`` or ``map``.
        verdict: ``passed``; ``handled``: the assumption does not hold and the computation takes care of it; ``warned``:
            maps may be wrong; ``refused``: no map is computed; ``not checked``: it cannot be checked here.
        text: what was found and what follows from it.
        value: the measured figure; None if there is none.
        concerns: the methods that a warning is for: all, those that use gradients, or those that read a layer.
        passes: small windows that the check sent through the network.
    """

    name: str
    verdict: Verdict
    text: str
    value: float | None = None
    concerns: Concerns = "all"
    passes: int = 0

    def entry(self) -> dict[str, Any]:
        """Return the entry of a record: ``check``, ``verdict``, ``text`` and, if there is one, ``value``."""
        entry: dict[str, Any] = {"check": self.name, "verdict": self.verdict, "text": self.text}
        return entry if self.value is None else {**entry, "value": self.value}


@dataclass
class Sample:
    """A network and one window on which its checks run.

    Attributes:
        model: the network, frozen (`esegeta_monai.engine.network.state.evaluating`).
        window: (1, C, *roi) with real content, on the network's device.
        slice_axis: see `esegeta_monai.engine.windows.plan.WindowPlan`.
        coordinates: coordinates of the window, if the network receives them.
        condition: MONAI's ``condition`` (1, C, *roi), or None.
        scale: standard deviation of the window, or 1 if it is constant.
        passes: windows that went through the network.
        unused: a copy of the network that no window has gone through, or None.
    """

    model: Model
    window: Tensor
    slice_axis: int | None = None
    coordinates: Any = None
    condition: Tensor | None = None
    passes: int = 0
    unused: nn.Module | None = None

    @property
    def scale(self) -> float:
        """Standard deviation of the window, or 1 if it is constant."""
        return float(self.window.std()) or 1.0

    def run(self, x: Tensor) -> Tensor:
        """Run the network on windows (n, C, *roi): (n, K, *out_roi)."""
        n = len(x)
        self.passes += n
        condition = None if self.condition is None else self.condition.expand(n, *self.condition.shape[1:])
        places = None if self.coordinates is None else [self.coordinates] * n
        return self.model(x, slice_axis=self.slice_axis, coordinates=places, condition=condition)

    def noise(self, seed: int) -> Tensor:
        """Return standard normal noise of the window's shape (1, C, *roi), the same for the same seed."""
        drawn = torch.randn(self.window.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return drawn.to(self.window)

    def cotangent(self, out: Tensor) -> Tensor:
        """Return fixed weights of the shape of an output (n, K, …): with them, the score of the checks is their sum
        of products."""
        drawn = torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return drawn.to(out).expand(out.shape)

    def of(self, model: Model, dtype: torch.dtype) -> Sample:
        """Return the same window for another model, in another precision."""
        condition = None if self.condition is None else self.condition.to(dtype)
        return replace(self, model=model, window=self.window.to(dtype), condition=condition, passes=0)


class NetworkCheck(ABC):
    """A check of one assumption on a network, by a few passes over one small window.

    Class attributes:
        name: see `CheckResult`.
        assumption: what the maps take for granted, in words.
    """

    name: ClassVar[str]
    assumption: ClassVar[str]

    @abstractmethod
    def measure(self, sample: Sample, known: dict[str, CheckResult]) -> CheckResult:
        """Check the assumption.

        Args:
            sample: network and window.
            known: results of the checks before this one, by name.
        """


def short_text(error: Exception) -> str:
    """Return the first 200 characters of an error's text on one line, or its class.

    >>> short_text(ValueError("no\\n such  axis")), short_text(KeyError())
    ('no such axis', 'KeyError')
    """
    return " ".join(str(error).split())[:200] or type(error).__name__


def small_sample(model: Model, image: Tensor, plan: WindowPlan, condition: Tensor | None = None) -> Sample:
    """Return the smallest of a few windows of an image that the network accepts.

    They have 16, 32 or 64 voxels along each axis, some twice as many along the last one, or the shape of the network's
    own window.

    Args:
        model: the network.
        image: (C, *spatial).
        plan: the windows of the image.
        condition: MONAI's ``condition`` volume (C, *spatial), or None.

    Raises:
        NetworkError: the network fails on its own window.
    """
    number = _with_content(image, plan)
    window = plan.cut(image, number)
    fixed = plan.with_coord or condition is not None or model.args or model.kwargs or model.inferer is not None
    for edge, last in () if fixed else itertools.product(EDGES, (1, 2)):
        part = _centre(window, [*[edge] * (window.ndim - 2), last * edge])[None].to(model.device)
        if part.shape[1:] == window.shape:
            break
        sample = Sample(model, part, plan.slice_axis)
        if _accepts(sample):
            sample.passes = 0
            return sample
    coordinates = plan.coordinates(number) if plan.with_coord else None
    cut = None if condition is None else plan.cut(condition, number)[None].to(model.device)
    return Sample(model, window[None].to(model.device), plan.slice_axis, coordinates, cut)


def _with_content(image: Tensor, plan: WindowPlan) -> int:
    """Return the window in the middle of the plan; if the image is constant there, the first one where it is not."""
    order: Iterator[int] = iter([len(plan) // 2, *range(len(plan))])
    for number in order:
        window = image[last_axes(plan.place(number))]
        if window.numel() and bool((window != window.flatten()[0]).any()):
            return number
    return len(plan) // 2


def _centre(window: Tensor, edges: Sequence[int]) -> Tensor:
    """Cut the centre of a window (C, *roi) with at most ``edges`` voxels along its axes."""
    starts = [max(n - edge, 0) // 2 for n, edge in zip(window.shape[1:], edges)]
    return window[last_axes(tuple(slice(start, start + edge) for start, edge in zip(starts, edges)))]


def _accepts(sample: Sample) -> bool:
    """Return True if the network runs on the window and gives a map of it, or a vector."""
    try:
        with torch.no_grad():
            out = sample.run(sample.window)
    except Exception:  # a network may raise anything for a size that it is not made for
        return False
    return out.ndim >= 2 and bool(torch.isfinite(out).all())
