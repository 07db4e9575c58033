"""Reference values of one network, one volume and one score, computed naively: the whole volume through MONAI's own
inferer, with autograd. Nothing of `esegeta_monai.methods` is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai.engine.baselines import noise_like
from esegeta_monai.engine.default_layer import layer_shapes
from esegeta_monai.engine.network.model import select_output
from esegeta_monai.engine.windows.inferers import as_inferer
from esegeta_monai.targets import ClassScore, LayerNeuron, MultiClassMask, Target
from tests.compatibility.graph import count_paths, modified_gradient
from tests.compatibility.patterns import Patterned
from tests.networks import CLASSIFICATION, NetworkCase, build
from tests.support.layers import UP, Setting, setting
from tests.support.objectives import objective_of
from tests.support.tensors import DOUBLE

__all__ = ["Sight", "tail", "target_of"]


class Sight:
    """A network of `tests.networks`, a volume of three gaussian windows (one for a classifier), the mean logit of class
    1 under its frozen mask.

    Args:
        name, dims: of the network.
        windows: False: a volume of one window, for libraries that do not support windows.
        neuron: the target is a unit of the inner layer instead.

    Attributes:
        image, x0: (C, *spatial), the volume and a reference with another content.
        layer: an inner layer.
    """

    def __init__(self, name: str, dims: int, windows: bool = True, neuron: bool = False) -> None:
        self.name, self.dims, self.windows, self.neuron = name, dims, windows, neuron
        self.case: NetworkCase = build(name, dims)
        self.class_index = _class_that_speaks(name, dims)
        target = target_of(self.case, self.class_index)
        self.s = setting(name, dims, target) if windows else _one_window(self.case, target)
        self.network, self.layer, self.image = self.s.network, self.s.layer, self.s.image
        self.network.requires_grad_(False)
        half = self.image.shape[-1] - self.case.roi[-1]
        self.x0 = torch.cat([self.case.reference, self.case.image[..., :half]], -1)[0]
        self.kept: dict[Any, Any] = {}

    @property
    def target(self) -> Target:
        """The target that is explained."""
        if self.neuron:
            return LayerNeuron(self.layer, self.channel, index=self.unit)
        return target_of(self.case, self.class_index)

    @cached_property
    def wide(self) -> Sight:
        """A classifier on a larger volume, so that its last layers keep more than one position."""
        other = Sight(self.name, self.dims, windows=False)
        other.s = _one_window(other.case, other.target, 2 if self.case.roi[-1] > 16 else 3)
        other.image = other.s.image
        return other

    @cached_property
    def single(self) -> Sight:
        """The same network on a volume of one window: enough for what takes hundreds of steps."""
        return Sight(self.name, self.dims, windows=False, neuron=self.neuron) if self.windows else self

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Compute a value that several rows compare with once."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    # -- F and its gradients ------------------------------------------------------------------------------------

    def score(self, prediction: Tensor) -> Tensor:
        """Return the score of a prediction (K, *spatial)."""
        score = self.s.objective.scores[0]
        return score.value(score.crop(prediction))

    def F(self, x: Tensor) -> Tensor:  # noqa: N802 - its name in all formulas
        """Return F at a volume (C, *spatial), differentiable, through MONAI's inferer."""
        if self.neuron:
            return self._unit_value(x)
        return self.score(self.s.inferer(x[None], self.s.model)[0])

    def value(self, x: Tensor) -> float:
        """Return F at a volume."""
        with torch.no_grad():
            return float(self.F(x))

    def gradient(self, x: Tensor) -> Tensor:
        """Return ∂F/∂x by autograd through the whole inferer."""
        x = x.detach().clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self.F(x), x)
        return gradient

    @cached_property
    def plain(self) -> Tensor:
        """The gradient at the image."""
        return self.gradient(self.image)

    @cached_property
    def change(self) -> float:
        """F(x) − F(x₀)."""
        return self.value(self.image) - self.value(self.x0)

    def noisy(self, n: int, std: float) -> list[Tensor]:
        """Return the image under the run's noise."""
        generator = self.s.objective.generator()
        return [self.image + noise_like(self.image, std, generator) for _ in range(n)]

    def modified(self, rule: str) -> Tensor:
        """Return the guided backpropagation or deconvolution map, by hooks on autograd's graph."""
        return self.once(rule, lambda: modified_gradient(self.network, self.F, self.image, rule))

    @property
    def cases(self) -> list[Tensor]:
        """The volumes that patterns are fitted on."""
        return [self.image, self.x0]

    @cached_property
    def patterned(self) -> Patterned:
        """The network with patterns fitted on the windows that MONAI's inferer cuts from the cases."""
        fitted = Patterned(self.network, self.case_output)
        for case in self.cases:
            self.s.inferer(case[None], fitted.see)
        return fitted.fit()

    def signal(self, way: str) -> Tensor:
        """Return the signal at the image with patterns in place of weights, through the whole inferer."""
        x = self.image.clone().requires_grad_(True)
        prediction = self.s.inferer(x[None], lambda window: self.patterned.signal(window, way))[0]
        (arriving,) = torch.autograd.grad(self.score(prediction), x)
        return arriving

    # -- a layer ------------------------------------------------------------------------------------------------

    def at(self, x: Tensor, layer: str | None = None) -> tuple[Tensor, Tensor]:
        """Return activations and gradients of all windows at a layer, (W, C, *positions), for any volume."""
        image, own, self.s.image, self.s.layer = self.s.image, self.s.layer, x, layer or self.layer
        try:
            return self.s.pass_()
        finally:
            self.s.image, self.s.layer = image, own

    @cached_property
    def at_image(self) -> tuple[Tensor, Tensor]:
        """Activations and gradients at the layer."""
        return self.at(self.image)

    @cached_property
    def shares(self) -> Tensor:
        """ĝ_w averaged over each position's cell, (W, *positions), from MONAI's importance map."""
        plan, grid = self.s.objective.plan, self.at_image[0].shape[2:]
        if plan.whole:
            return torch.ones(1, *grid, dtype=DOUBLE)
        count = torch.zeros(plan.padded_shape, dtype=DOUBLE)
        for place in plan.slices:
            count[place] += plan.importance
        cells = [n // g for n, g in zip(plan.roi, grid)]
        pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(grid)]
        return torch.stack([pool((plan.importance / count[p])[None], cells)[0] for p in plan.slices])

    @property
    def positions(self) -> float:
        """Number of the layer's positions in the volume."""
        plan, (_, g) = self.s.objective.plan, self.at_image
        volume, window = (torch.Size(n).numel() for n in (plan.padded_shape, plan.roi))
        return g[0, 0].numel() * volume / window

    @cached_property
    def cut_layer(self) -> str:
        """An inner layer that no path bypasses: all paths of autograd's graph pass its node.

        Not one with a class token beside its grid: the flow through the token has no position in a map.
        """
        shapes = {s.name: s for s in layer_shapes(self.s.objective) if s.name and s.grid and s.calls == 1}
        useful = [
            name
            for name, s in shapes.items()
            if torch.Size(s.grid[1:]).numel() > 1 and torch.Size(s.shape).numel() == torch.Size(s.grid).numel()
        ]
        inner = self.cuts(useful)
        return inner[len(inner) // 2]

    def cuts(self, names: list[str]) -> list[str]:
        """Return those of some layers, in their order, that no path from image to output bypasses."""
        ends: dict[str, Any] = {}
        handles = []
        for name in names:
            module = self.network.get_submodule(name)
            handles.append(module.register_forward_hook(lambda m, i, o, n=name: ends.update({n: _node(i, o)})))
        window = tuple(slice(0, n) for n in self.s.roi)
        x = self.image[(slice(None), *window)][None].clone().requires_grad_(True)
        output = select_output(self.network(x), self.s.output)
        for handle in handles:
            handle.remove()
        paths = count_paths(output, x)
        total = paths[output.grad_fn][1]
        cutting = [n for n in names if ends[n] in paths and paths[ends[n]][0] * paths[ends[n]][1] == total]
        return [n for n in cutting if ends[n] is not output.grad_fn] or cutting

    def window_cotangents(self) -> tuple[Tensor, Tensor]:
        """Return windows (W, C, *roi) and ∂F/∂(network output) of each, by autograd through the inferer."""
        windows, outputs = [], []

        def model(x: Tensor) -> Tensor:
            windows.append(x.detach())
            outputs.append(self.s.model(x).detach().requires_grad_(True))
            return outputs[-1].clone()

        cotangents = torch.autograd.grad(self.score(self.s.inferer(self.image[None], model)[0]), outputs)
        return torch.cat(windows), torch.cat(cotangents)

    def case_output(self, window: Tensor) -> Tensor:
        """Return the network's output for windows, the entry that is explained."""
        return select_output(self.network(window), self.s.output)

    def record(self, x: Tensor, layer: str) -> list[Tensor]:
        """Return the layer's own outputs, one per call of the network."""
        kept: list[Tensor] = []
        handle = self.network.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        with torch.no_grad():
            self.s.inferer(x[None], self.s.model)
        handle.remove()
        return kept

    def replaced(self, layer: str, values: list[Tensor]) -> Tensor:
        """Return F at the image with other outputs of a layer, one per call of the network; differentiable."""
        given = iter(values)
        handle = self.network.get_submodule(layer).register_forward_hook(lambda m, i, o: next(given).clone())
        try:
            return self.score(self.s.inferer(self.image[None], self.s.model)[0])
        finally:
            handle.remove()

    # -- a unit -------------------------------------------------------------------------------------------------

    @property
    def unit(self) -> tuple[int, ...]:
        """The voxel whose unit is the neuron: in several windows."""
        last = self.image.shape[-1] - (self.image.shape[-1] - self.case.roi[-1]) - 2
        return (*(n // 2 - 1 for n in self.image.shape[1:-1]), last)

    @cached_property
    def channel(self) -> int:
        """The layer's channel that is most active at the unit: after a ReLU others may be zero."""
        with torch.enable_grad():
            channels = range(self.at_image[0].shape[1])
        with torch.no_grad():
            values = [self._unit_value(self.image, c) for c in channels]
        return int(torch.stack(values).argmax())

    def _unit_value(self, x: Tensor, channel: int | None = None) -> Tensor:
        """Return ``Σ_w ĝ_w(v) A_w(c, p(v))``: the layer on a window's voxels (nearest neighbour), blended."""
        module = self.network.get_submodule(self.layer)

        def layer(window: Tensor) -> Tensor:
            kept: list[Tensor] = []
            handle = module.register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
            self.s.model(window)
            handle.remove()
            return F.interpolate(self.s.as_map(kept[0]), size=self.s.roi, mode="nearest")

        return self.s.inferer(x[None], layer)[0][(self.channel if channel is None else channel, *self.unit)]

    def upsampled(self, small: Tensor) -> Tensor:
        """Interpolate a layer's map (C, *positions) to the grid of a volume of one window."""
        return F.interpolate(small[None], self.image.shape[1:], mode=UP[self.dims])[0]


def target_of(case: NetworkCase, class_index: int) -> Target:
    """Return a logit, or its mean under the frozen mask of its class."""
    if case.kind == CLASSIFICATION:
        return ClassScore(class_index)
    return MultiClassMask(class_index, reduction="mean")


@cache
def _class_that_speaks(name: str, dims: int) -> int:
    """Return class 1, unless the guided rules remove its whole signal (its head has negative weights only)."""
    case = build(name, dims)
    case.network.requires_grad_(False)
    for index in (1, 2, 0):
        gradient = modified_gradient(case.network, lambda x, i=index: case.score(x, i).sum(), case.image, "guided")
        if bool(gradient.any()):
            return index
    raise ValueError(f"{name} in {dims}D: guided backpropagation is zero for every class")


def _one_window(case: NetworkCase, target: Target, scale: int = 1) -> Setting:
    image, inferer = F.interpolate(case.image, scale_factor=scale)[0], as_inferer(None)
    objective = objective_of(case.network, image, [target], inferer, case.output)
    return Setting(case.network, image, inferer, objective, case.cam_layer, case.output)


def _node(inputs: tuple[Any, ...], output: Any) -> Any:
    """Return the node of a layer's output; None if it returns its input, whose node is not its own."""
    return None if any(output is i for i in inputs) else getattr(output, "grad_fn", None)


def tail(
    network: nn.Module, layer: str, x: Tensor, z: Tensor, output: str | int | None
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return the network as a function of a window x and a layer's output z, which replaces the layer's own output, and
    that pair as one vector, (1, x and z). The layer is then a second input, and all parallel paths still see x."""

    def forward(pair: Tensor) -> Tensor:
        image, inside = pair.split([x.numel(), z.numel()], 1)
        inside = inside.reshape(z.shape).clone()  # a network may work on it in place
        handle = network.get_submodule(layer).register_forward_hook(lambda m, i, o: inside)
        try:
            return select_output(network(image.reshape(x.shape).clone()), output)
        finally:
            handle.remove()

    return forward, torch.cat([x.flatten(), z.flatten()])[None]
