"""Batches of windows: cut them, run them, score and differentiate them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esegeta_monai.engine.window_loop import WindowedNetwork
from esegeta_monai.engine.windows.plan import Call
from esegeta_monai.errors import MethodError

__all__ = ["NO_PATH", "Batch", "Gradient"]


class Batch:
    """n windows of one or several volumes, with the cotangents of the targets.

    Attributes:
        network: the network, which sees the image through windows.
        windows: numbers of the windows in the plan.
        sources: for each window, the number of the volume that `cut` cuts it from, if it is given several.
        cotangents: per target ``ĝ_w · ∂s/∂P`` on the windows (n, R, *out_roi); None if the target sees none of them.
            R is the number of output channels that some target reads.
        first: True for the first batch of a loop.
    """

    def __init__(
        self,
        network: WindowedNetwork,
        windows: Sequence[int],
        sources: Sequence[int],
        cotangents: list[Tensor | None],
        *,
        first: bool = True,
    ) -> None:
        self.network, self.windows, self.sources, self.cotangents = network, windows, sources, cotangents
        self.first = first

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def call(self) -> Call:
        """How the network is called on these windows, which share one call."""
        return self.network.plan.call(self.windows[0])

    def unmirrored(self, values: Tensor) -> Tensor:
        """Return a layer's map (*leading axes, *positions) in the frame of the volume, the call's view undone."""
        return self.call.undo(values, len(self.network.plan.roi))

    @property
    def image(self) -> Tensor:
        """The windows of the case's image (n, C, *roi)."""
        return self.cut(self.network.image)

    def cut(self, volume: Tensor) -> Tensor:
        """Cut the windows (n, C, *roi) from one volume (C, *spatial) or several (m, C, *spatial).

        Returns:
            The windows on the network's device.
        """
        plan, several = self.network.plan, volume.ndim == len(self.network.plan.spatial_shape) + 2
        parts = [plan.cut(volume[s] if several else volume, w) for w, s in zip(self.windows, self.sources)]
        return torch.stack(parts).to(self.network.model.device)

    def forward(self, x: Tensor) -> Tensor:
        """Run the network on windows (n, C, *roi); return the channels that targets read, (n, R, *out_roi).

        Differentiable.
        """
        return self.network.run(x, self.windows)

    @property
    def forwards(self) -> list[Callable[[Tensor], Tensor]]:
        """`forward` of each single window, x (1, C, *roi): a network may receive its window's coordinates or a
        condition."""
        return [functools.partial(self.network.run, windows=[w]) for w in self.windows]

    @property
    def compare(self) -> bool | Callable[[Tensor], Tensor]:
        """For rules that check their output: a function from windows (n, C, *roi) to the plain output of the first one
        (1, R, *out_roi), in a loop's first batch only, since the network does the same in all; else False."""
        return self._plain if self.first else False

    @property
    def compares(self) -> list[bool | Callable[[Tensor], Tensor]]:
        """`compare` for windows (1, C, *roi) that run one by one."""
        return [self.compare, *(False for _ in self.windows[1:])]

    def _plain(self, x: Tensor) -> Tensor:
        return self.network.run(x[:1], self.windows[:1])

    def scores(self, out: Tensor) -> Tensor:
        """Compute ``F_w = <c_w, f(x_w)>`` (k, n) from network output (n, R, *out_roi), summed in float64."""
        rows = []
        for cotangent in self.cotangents:
            if cotangent is None:
                rows.append(out.new_zeros(len(self), dtype=torch.float64))
            else:
                rows.append((out * cotangent).flatten(1).sum(1, dtype=torch.float64))
        return torch.stack(rows)

    def stacked_cotangents(self) -> Tensor:
        """Return the cotangents of all targets as one tensor (k, n, R, *out_roi), zero where a target sees nothing."""
        present = next(c for c in self.cotangents if c is not None)
        return torch.stack([torch.zeros_like(present) if c is None else c for c in self.cotangents])

    def gradients(self, out: Tensor, inputs: Sequence[Tensor], *, retain: bool = False) -> list[Tensor | None]:
        """Compute the vector-Jacobian product of every target with each input.

        Args:
            out: the network's output (n, R, *out_roi).
            inputs: tensors that it was computed from.
            retain: keep the graph for another call.

        Returns:
            Per input a tensor (k, *input.shape); None if no target depends on it by a differentiable path.

        Raises:
            MethodError: the output has no differentiable path to anything, or an operation has no derivative.
        """
        active = [k for k, c in enumerate(self.cotangents) if c is not None]
        results: list[Tensor | None] = [None] * len(inputs)
        if not out.requires_grad or not inputs:
            raise MethodError(NO_PATH)
        for k in active:
            cotangent = self.cotangents[k]
            assert cotangent is not None
            grads = self.network.vjp(out, inputs, cotangent, retain=retain or k != active[-1])
            for i, (x, g) in enumerate(zip(inputs, grads)):
                if g is None:
                    continue
                if len(self.cotangents) == 1:
                    results[i] = g[None]
                    continue
                product = results[i]
                if product is None:
                    product = results[i] = x.new_zeros((len(self.cotangents), *x.shape))
                product[k] = g
        return results

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``∂F/∂x_w`` (k, n, C, *roi) at windows x (n, C, *roi).

        Returns:
            The gradient, and the network's output (n, R, *out_roi).

        Raises:
            MethodError: there is no differentiable path from the input to the output.
        """
        x = x.detach().requires_grad_(True)
        with torch.enable_grad():
            out = self.forward(x)
        (gradient,) = self.gradients(out, [x])
        if gradient is None:
            raise MethodError(NO_PATH)
        return gradient, out.detach()


NO_PATH = (
    "the network's output does not depend on its input by a differentiable path (an operation such as argmax, round or "
    ".detach() cuts it, or the network is compiled for inference): use a perturbation method such as Occlusion"
)


@dataclass
class Gradient:
    """Gradients at m points.

    Attributes:
        maps: ``∂F/∂x`` (k, m, C, *spatial).
        values: F at the points (k, m), float64.
        padding: sum of the gradient on constant padding (k, m, C).
    """

    maps: Tensor
    values: Tensor
    padding: Tensor
