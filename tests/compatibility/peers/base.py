"""The maps of other libraries for the rows of the table, on one window, since they do not support windows.

They get the target as a module (`TargetWrapper`), float64 where they would round to float32, our noise and our draws,
and interpolation is done for them as we do it: only their mathematics is measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.methods import LRP
from esegeta_monai.targets import TargetWrapper
from tests.compatibility.checks import Answer, Check, Figure, Row, _of, draws, equals
from tests.compatibility.sight import Sight, target_of
from tests.support.objectives import explain

__all__ = ["Map", "Peer", "installed", "measure_peer", "our_relevance", "relu_first", "wrapped"]

Map = Callable[..., Tensor]
MANY_STEPS = 256


@dataclass(frozen=True)
class Peer:
    """Another library.

    Attributes:
        title: name in the table.
        maps: row -> function of the sight and the check's parameters that gives the map (C, *spatial).
        checks: own checks of rows where it follows another, equally valid convention.
        installed: True if it is installed.
        dims: numbers of spatial dimensions that it supports.
    """

    title: str
    maps: Mapping[str, Map]
    checks: Mapping[str, Check] = field(default_factory=dict)
    installed: bool = True
    dims: tuple[int, ...] = (2, 3)


def wrapped(sight: Sight) -> TargetWrapper:
    """Return the network with the target as its last layer."""
    target = target_of(sight.case, sight.class_index)
    return TargetWrapper(sight.network, target, output=sight.s.output).freeze(sight.image[None]).eval()


def measure_peer(peer: Peer, row: Row, sight: Sight) -> Figure:
    """Measure one cell of another library by the same check."""

    def ask(sight: Sight, **parameters: Any) -> Answer:
        with fair(sight):
            values = peer.maps[row.name](sight, **_of({**row.parameters, **parameters}, sight))
        return Answer(values.detach(), {"steps": MANY_STEPS})

    return peer.checks.get(row.name, row.check)(sight, ask)


@contextmanager
def fair(sight: Sight) -> Iterator[None]:
    """Keep float64 (Captum rounds step sizes by ``.float()``, an error of 1e-8) and use our noise and draws."""
    default = torch.get_default_dtype()
    noises: list[Tensor] = []

    def normal(mean: Any, std: Any, *args: Any, size: Any = None, **kwargs: Any) -> Tensor:
        if size is None and not bool(std.any()):
            return torch.zeros_like(std)
        if size is None:  # Captum: all samples at once
            return torch.stack(noise(sight, len(std)))
        if not noises:  # MONAI: one after the other
            noises.extend(noise(sight, 3))
        return noises.pop(0)[None]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.enter_context(mock.patch.object(torch, "normal", normal))
        stack.enter_context(mock.patch.object(np.random, "uniform", lambda low, high, n: np.array(draws(sight, n))))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def noise(sight: Sight, n: int) -> list[Tensor]:
    """Return the noise that `SmoothGrad` adds to the image."""
    return [x - sight.image for x in sight.noisy(n, 0.15)]


def relu_first(sight: Sight) -> Tensor:
    """Grad-CAM as the paper has it, ReLU before the map is interpolated; over windows it can only come last."""
    a, g = sight.at_image
    weights = g.flatten(2).mean(2)
    return sight.upsampled(torch.einsum("nc,nc...->n...", weights, a).relu())


def our_relevance(composite: str, prepare: Callable[[Sight], None] = lambda sight: None) -> Check:
    """Compare with the map of our rules, which have own tests: for libraries without a record of absorbed relevance."""

    def truth(sight: Sight) -> Tensor:
        clean = Sight(sight.name, sight.dims, windows=False)  # some leave their rules in the network
        prepare(clean)
        return explain(LRP(composite), clean.s.objective).maps[0]

    return equals(truth, 1e-8)


def installed(name: str) -> bool:
    """Return True if a package can be imported here."""
    return importlib.util.find_spec(name) is not None
