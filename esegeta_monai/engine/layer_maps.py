"""Maps of a layer on the image's grid, blended or scattered.

*Blended* maps are activations: the map of each window is interpolated to the window and averaged with weights ĝ_w.
*Scattered* maps are gradients, which already contain ĝ_w: the map of each window is spread so that its sum is kept, and
windows are added.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.engine.layer_frames import map_of_layer
from esegeta_monai.engine.network.hooks import capture, find_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request, View
from esegeta_monai.engine.windows.grid import OutputGrid
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.engine.windows.resize import area_matrix, interpolate, line_matrix
from esegeta_monai.errors import MethodError

__all__ = ["BlendedActivations", "LayerOutput", "spread"]
__all__ += ["check_one_member", "to_window"]


def to_window(values: Tensor, plan: WindowPlan) -> Tensor:
    """Interpolate (n, C, *positions) linearly to the window (n, C, *roi)."""
    if tuple(values.shape[2:]) == plan.roi:
        return values
    return interpolate(values, [line_matrix(0, n, p, n, values.dtype) for p, n in zip(values.shape[2:], plan.roi)])


def spread(values: Tensor, plan: WindowPlan) -> Tensor:
    """Spread (n, C, *positions) over the window (n, C, *roi) without changing the sum.

    ``out = U v``, where U is the linear interpolation, or the mean over a cell if the layer is finer than the window,
    with columns divided by their sums.
    """
    positions, roi = tuple(values.shape[2:]), plan.roi
    if positions == roi:
        return values
    if any(p > n for p, n in zip(positions, roi)):
        matrices = [area_matrix(n, p, torch.float64) for p, n in zip(positions, roi)]
    else:
        matrices = [line_matrix(0, n, p, n, torch.float64) for p, n in zip(positions, roi)]
    return interpolate(values, [m / m.sum(0) for m in matrices])


class BlendedActivations(Request):
    """Activations of a layer on the image's grid: ``Σ_w ĝ_w · up(Σ_c α_c A_w,c)``.

    Args:
        layer: dotted name.
        weights: α (k, C), or (views, k, C) for several views (a layer that runs several times, members, mirrored
            windows); None: each channel separately; ``"sum"`` or ``"mean"``: one map of all channels. Views of one
            call are added with weights α, else averaged; calls count with their shares in the prediction.
        last: True: those of the last call of the layer only.

    The result is (k, 1, *spatial) with weights α, else (C or 1, *spatial).
    """

    everywhere = True
    backward = False
    summed = ("maps",)

    def __init__(
        self, layer: str, weights: Tensor | Literal["sum", "mean"] | None = None, *, last: bool = False
    ) -> None:
        self.layers, self.weights, self.last = (layer,), weights, last
        self.maps: Tensor | None = None

    @property
    def key(self) -> Hashable:
        return self if isinstance(self.weights, Tensor) else ("activations", self.layers, self.weights, self.last)

    def begin(self, objective: Objective) -> None:
        self.objective = objective
        self.grid = input_grid(objective)
        if self.weights is None:
            check_one_member(objective)

    def see(self, view: View) -> None:
        plan = self.objective.plan
        views = view.maps(self.layers[0], last=self.last)
        first = view.of_call(len(views)).start
        up = torch.stack([self._reduced(values, first + i) for i, values in enumerate(views)]).sum(0)
        if not isinstance(self.weights, Tensor):
            call = view.batch.call  # members that are kept apart are averaged here
            up = up * (plan.share(call) / call.weight / len(views))
        if self.maps is None:
            self.maps = torch.zeros(
                (up.shape[1], *plan.spatial_shape), dtype=up.dtype, device=self.objective.image.device
            )
        whole = tuple(slice(0, n) for n in plan.spatial_shape)
        for window, window_map in zip(view.batch.windows, up):
            self.grid.blend(self.maps, whole, window, window_map)

    def _reduced(self, values: Tensor, number: int) -> Tensor:
        """Return the activations of one view (n, C, *positions) as (n, k, C or 1, *roi)."""
        if isinstance(self.weights, str):
            values = values.sum(1, keepdim=True) if self.weights == "sum" else values.mean(1, keepdim=True)
        elif self.weights is not None:
            weights = self.weights if self.weights.ndim == 2 else self.weights[number]
            values = torch.einsum("kc,nc...->nk...", weights.to(values.device, values.dtype), values)
        return to_window(values.to(self.objective.image.dtype), self.objective.plan)

    def result(self) -> Tensor:
        assert self.maps is not None
        return self.maps[:, None] if isinstance(self.weights, Tensor) else self.maps


def check_one_member(objective: Objective) -> None:
    """Check that the channels of a layer are those of one network.

    Raises:
        MethodError: the objective is that of an ensemble, whose members have other channels under the same numbers.
    """
    if objective.plan.member_count > 1:
        raise MethodError(
            "the members of an ensemble have different channels: use a map of all channels (reduce='sum'), or explain "
            "one member"
        )


def input_grid(objective: Objective) -> OutputGrid:
    """Return the blending weights on the image's own grid, whatever the network's output grid is."""
    if objective.grid.out_roi == objective.plan.roi:
        return objective.grid
    return OutputGrid(objective.plan, objective.plan.roi, objective.image.dtype, objective.image.device)


def position_weights(objective: Objective, window: int, positions: Sequence[int]) -> Tensor:
    """Return ĝ_w on a layer's positions (*positions): the mean over each cell; 1 for a volume of one window."""
    weight = input_grid(objective).weight(window)[None]
    return F.interpolate(weight[None], size=tuple(positions), mode="area")[0, 0]


class LayerOutput(nn.Module):
    """A network whose output is one of its layers, for targets of a layer.

    The output is the layer's map at the resolution of the window, where each voxel has the value of the cell that
    contains it; or a vector, if the layer returns one. Layers keep their names in the network.

    Args:
        network: the network.
        layer: dotted name.
        read: function applied to the layer's map (n, C, *positions), or vector (n, C), before it is resized to the
            window; None: no function.
        axes: axes of layers where they cannot be found out, by name.

    Raises:
        UsageError: no such layer.
    """

    def __init__(
        self,
        network: nn.Module,
        layer: str,
        read: Callable[[Tensor], Tensor] | None = None,
        axes: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.axes = dict(axes or {})
        self.network, self.layer, self.read = network, layer, read
        find_layer(network, layer)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map windows (n, channels, *roi) to the layer's output (n, C, *roi), or (n, C).

        Raises:
            MethodError: the layer does not run, or its output is no spatial map.
        """
        with capture(self.network, [self.layer]) as captured:
            self.network(x, *args, **kwargs)
        if self.layer not in captured:
            raise MethodError(f"layer {self.layer!r} is not used in the forward pass: choose another")
        values = captured[self.layer]
        if values.ndim > 2:
            values = map_of_layer(self.network, self.layer, values, x, args, kwargs, self.axes)
        values = values if self.read is None else self.read(values)
        return values if values.ndim == 2 else F.interpolate(values, size=x.shape[2:], mode="nearest-exact")

    def get_submodule(self, target: str) -> nn.Module:
        """Return a layer by its name in the network."""
        return self.network.get_submodule(target)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the network's modules with their names in it; the root is this module."""
        yield "", self
        for name, module in self.network.named_modules(*args, **kwargs):
            if name:
                yield name, module
