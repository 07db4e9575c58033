"""What methods request from one sweep over the windows."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from esegeta_monai.engine.batch import Batch, Gradient

if TYPE_CHECKING:
    from esegeta_monai.engine.objective import Objective


__all__ = ["InputGradient", "Request", "View"]


@dataclass
class View:
    """What a `Request` sees of one window batch in a sweep.

    Attributes:
        batch: the windows.
        out: network output (n, R, *out_roi).
        activations: layer name to (n, …).
        gradients: layer name to (k, n, …); absent where no target sees the windows or depends on the layer.
        input_gradient: (k, n, C, *roi) where some request wants it.
        seen: whether some target sees these windows (else this is a forward pass only).
    """

    batch: Batch
    out: Tensor
    activations: dict[str, Tensor]
    gradients: dict[str, Tensor]
    input_gradient: Tensor | None
    seen: bool


class Request:
    """Something that a method wants gathered in one sweep over the windows; equal keys are gathered once.

    Attributes:
        layers: layers whose activations (and gradients) it looks at.
        input_gradient: whether it looks at the gradient at the input.
        everywhere: all windows, not just those that the targets see (these come without gradients).
        before_gradient: it looks at activations, and a gradient is asked for next: what other methods want to know of
            gradients can wait for that sweep.
        summed: names of attributes that add up over windows, tensors that are zero (or None) after `begin`: what
            several processes bring together. None: each process looks at all windows.
    """

    layers: tuple[str, ...] = ()
    input_gradient: bool = False
    backward: bool = True
    everywhere: bool = False
    before_gradient: bool = False
    summed: tuple[str, ...] | None = None

    @property
    def key(self) -> Hashable:
        """Requests of equal key share their result."""
        return id(self)

    @property
    def parts(self) -> list[Any] | None:
        """What holds the sums, see `esegeta_monai.utils.distributed.Summed`; None: each process looks at all
        windows."""
        return None if self.summed is None else [self]

    def begin(self, objective: Objective) -> None:
        """Called before the first window."""

    def see(self, view: View) -> None:
        """Called for each window batch."""
        raise NotImplementedError

    def result(self) -> Any:
        """Called after the last window."""
        raise NotImplementedError


class InputGradient(Request):
    """``∂F/∂x`` at the image, as a `Gradient` with m = 1."""

    input_gradient = True
    summed = ("maps", "padding", "values")

    @property
    def key(self) -> Hashable:
        return "input gradient"

    def begin(self, objective: Objective) -> None:
        self.objective = objective
        self.maps = objective.new_maps()
        self.padding = self.maps.new_zeros(self.maps.shape[:2])
        self.values = torch.zeros(objective.n_targets, dtype=torch.float64)

    def see(self, view: View) -> None:
        assert view.input_gradient is not None
        self.padding += self.objective.add(self.maps, view.batch, view.input_gradient)
        self.values += view.batch.scores(view.out).sum(1).cpu()

    def result(self) -> Gradient:
        objective = self.objective
        values = self.values + objective.constants() if objective.linear else objective.image_values().cpu()
        return Gradient(self.maps[:, None], values[:, None], self.padding[:, None])
