"""The layers of a network as they run on one window: names, shapes, times; and the output of one of them."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.network.hooks import capture
from esegeta_monai.engine.network.model import is_scripted
from esegeta_monai.engine.network.state import frozen, unwrap
from esegeta_monai.engine.window_loop import WindowedNetwork
from esegeta_monai.errors import UsageError

__all__ = ["LayerRow", "cell_of", "central_window", "layer_output", "network_layers"]


@dataclass
class LayerRow:
    """A module as it ran on one window.

    Attributes:
        name: dotted name.
        type: name of its class.
        shape: shape of its output without the axis of windows.
        seconds: time of all its calls, without the modules inside it.
        calls: how often it ran.
        parameters: number of its own parameters, without those of the modules inside it.
        has_map: True if the output is (C, *positions) with as many axes of positions as the window has.
        main: True for convolutions, pooling, upsampling, vectors, and modules that combine the outputs of others (sums,
            concatenations); False for norms, activations, layers of tokens, and modules that return what the last
            module inside them has returned.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    seconds: float
    calls: int
    parameters: int
    has_map: bool
    main: bool


def central_window(network: WindowedNetwork, voxel: Sequence[int]) -> int:
    """Return the window whose centre is next to a voxel of the image's grid, of those that hold it."""
    plan = network.plan
    box = tuple(slice(v, v + 1) for v in voxel)

    def distance(window: int) -> float:
        place = plan.place(window)
        return max(abs(v + 0.5 - (p.start + p.stop) / 2) / (p.stop - p.start) for v, p in zip(voxel, place))

    return min(plan.touched(box), key=distance)


def network_layers(network: WindowedNetwork, window: int) -> list[LayerRow]:
    """Run a network twice on a window, and describe its modules in the order in which they end.

    The first run is not timed, because memory is allocated in it. Modules whose output is no tensor are left out.

    Args:
        network: it, with image and windows, see `esegeta_monai.explain.prediction.Prediction.objective`.
        window: number of a window of its plan.

    Raises:
        UsageError: the network is TorchScript, whose modules take no hooks, or has no modules inside.

    Example:
        >>> from monai.inferers import SimpleInferer
        >>> from esegeta_monai.engine.network.model import Model
        >>> from esegeta_monai.engine.windows.inferers import plan_windows
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU())
        >>> image, plan = torch.zeros(1, 8, 8), plan_windows(SimpleInferer(), (8, 8))
        >>> rows = network_layers(WindowedNetwork(Model(net, image.device), image, plan), 0)
        >>> [(row.name, row.type, row.shape, row.main) for row in rows]
        [('0', 'Conv2d', (4, 4, 4), True), ('1', 'ReLU', (4, 4, 4), False)]
    """
    inner = unwrap(network.model.network)
    if is_scripted(inner):
        raise UsageError("the network is TorchScript, whose layers cannot be listed: load it from its Python class")
    names = {module: name for name, module in inner.named_modules() if name}
    if not names:
        raise UsageError(f"the network is one {type(inner).__name__} without layers inside: wrap it in a module")
    dims = len(network.plan.roi) - (network.plan.slice_axis is not None)
    x = network.window(window)
    with frozen(inner), torch.no_grad():
        network.run(x, [window], all_channels=True)
        timer = _Timer(names, dims)
        handles = [h for module in names for h in timer.hooks(module)]
        try:
            network.run(x, [window], all_channels=True)
        finally:
            for handle in handles:
                handle.remove()
    return list(timer.rows.values())


class _Timer:
    """Hooks that describe modules and take their times."""

    def __init__(self, names: dict[nn.Module, str], dims: int) -> None:
        self.names, self.dims = names, dims
        self.rows: dict[str, LayerRow] = {}
        self._stack: list[tuple[float, float]] = []
        """Start of each running module, and the time that modules inside it took."""
        self._last: Callable[[], Tensor | None] = lambda: None
        """The output of the module that ended last; weak, since all of them together may not fit into memory."""

    def hooks(self, module: nn.Module) -> list[Any]:
        return [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        _synchronise(inputs)
        self._stack.append((time.perf_counter(), 0.0))

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        _synchronise(output)
        began, inside = self._stack.pop()
        spent = time.perf_counter() - began
        if self._stack:
            start, others = self._stack.pop()
            self._stack.append((start, others + spent))
        if not isinstance(output, Tensor) or output.ndim < 2:
            return
        name, own = self.names[module], max(0.0, spent - inside)
        passed_on = self._last() is output
        self._last = weakref.ref(output)
        if name in self.rows:
            row = self.rows[name]
            row.seconds, row.calls = row.seconds + own, row.calls + 1
            return
        weights = list(module.parameters(recurse=False))
        has_map = output.ndim == self.dims + 2
        leaf = next(module.children(), None) is None
        kind = type(module).__name__
        if leaf:
            works = any(w.ndim > 2 for w in weights) or any(
                word in kind for word in ("Pool", "Upsample", "PixelShuffle")
            )
            main = (has_map and works) or (output.ndim == 2 and any(w.ndim == 2 for w in weights))
        else:
            main = has_map and not passed_on
        shape, count = tuple(output.shape[1:]), sum(w.numel() for w in weights)
        self.rows[name] = LayerRow(name, kind, shape, own, 1, count, has_map, main)


def _synchronise(values: Any) -> None:
    """Wait for an accelerator, which runs operations later than they are called."""
    first = values[0] if isinstance(values, tuple) and values else values
    if isinstance(first, Tensor) and first.is_cuda:
        torch.cuda.synchronize(first.device)


def layer_output(network: WindowedNetwork, layer: str, window: int) -> Tensor:
    """Return what a layer gives for a window: (C, *positions) in the window's frame, or (C,); of its first call.

    Raises:
        UsageError: no such layer, or its output has no axis of channels before one axis of positions per axis of the
            window.
    """
    inner, plan = unwrap(network.model.network), network.plan
    with frozen(inner), torch.no_grad(), capture(inner, [layer]) as captured:
        network.run(network.window(window), [window], all_channels=True)
    if not captured.each.get(layer):
        raise UsageError(f"the layer {layer!r} did not run on this window")
    output = captured.each[layer][0][0]
    dims = len(plan.roi) - (plan.slice_axis is not None)
    if output.ndim == 1:
        return output.float()
    if output.ndim != dims + 1:
        shape = "x".join(map(str, output.shape))
        raise UsageError(f"the layer {layer!r} gives {shape}, which is no picture of the window for each channel")
    call = plan.call(window)
    output = call.undo(output[None], dims)[0] if call.turned else output
    if plan.slice_axis is not None:
        output = output.unsqueeze(1 + plan.slice_axis)
    return output.float()


def cell_of(voxel: Sequence[int], network: WindowedNetwork, window: int, positions: Sequence[int]) -> tuple[int, ...]:
    """Return the position of a layer whose cell holds a voxel of the image's grid.

    Args:
        positions: shape of the layer's positions.

    >>> from esegeta_monai.engine.network.model import Model
    >>> from esegeta_monai.engine.windows.inferers import plan_windows
    >>> from monai.inferers import SimpleInferer
    >>> image, plan = torch.zeros(1, 8, 8), plan_windows(SimpleInferer(), (8, 8))
    >>> network = WindowedNetwork(Model(nn.Conv2d(1, 1, 1), image.device), image, plan)
    >>> cell_of((5, 7), network, 0, (4, 2))
    (2, 1)
    """
    plan = network.plan
    starts = [w.start - lo for w, (lo, _) in zip(plan.slices[window], plan.pads)]
    return tuple(
        min(n - 1, max(0, math.floor((v - start + 0.5) * n / size)))
        for v, start, n, size in zip(voxel, starts, positions, plan.roi)
    )
