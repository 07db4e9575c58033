"""Attributions to the image that flow through one unit, or one channel, of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for, choice_passes, describe_baseline
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.layer_frames import spatial_map
from esegeta_monai.engine.layer_maps import check_one_member
from esegeta_monai.engine.network.hooks import capture
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.layer.path import along_path
from esegeta_monai.methods.path.integrated_gradients import Rule, check_steps, of_factor, quadrature

__all__ = ["NeuronConductance"]


class NeuronConductance(Method):
    """``(x − x₀) · ∫₀¹ Σ_u ∂F/∂A_u · ∂A_u/∂x dα`` along ``x₀ + α (x − x₀)``: the part of integrated gradients that
    leads through the units u of a layer (Dhamdhere et al. 2019).

    Summed over all units of a layer that no path bypasses, it equals `IntegratedGradients`. To explain the unit itself
    instead of a target, use any input method with the target `LayerNeuron`.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        channel: channel of the units; None: all channels.
        index: voxel on the network's grid; selects the unit whose cell contains it, in each window; None: all units.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
        n_steps: number of gradients.
        method: the quadrature rule, in Captum's names.
        multiply_by_inputs: False: the mean gradient through the units, without the factor ``x − x₀``, as in Captum.
    """

    reference = "Dhamdhere et al., ICLR 2019, arXiv:1805.12233"
    produces = "input map"
    additive = True

    layer: str | None = None
    channel: int | None = None
    index: Sequence[int] | None = None
    baseline: Any = "auto"
    n_steps: int = 32
    method: Rule = "gausslegendre"
    multiply_by_inputs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        of_factor(self)
        check_steps(self.n_steps)
        quadrature(self.method, 2)

    @property
    def units(self) -> str:
        return "target per voxel" if self.multiply_by_inputs else "target per unit of image intensity"

    def passes(self, objective: Objective) -> int:
        """Count one pass per step, F at the baseline, and a forward pass for each if a target is non-linear."""
        points = self.n_steps * (1 if objective.linear else 2) + 1
        return points * len(objective.windows) + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        layer = check_layer(objective, self.layer)
        if self.channel is not None:
            check_one_member(objective)
        shape = objective.plan.spatial_shape
        if self.index is not None and (
            len(self.index) != len(shape) or any(not 0 <= i < n for i, n in zip(self.index, shape))
        ):
            raise UsageError(f"index={tuple(self.index)} is outside the image {shape}")
        baseline = baseline_for(self.baseline)
        x0 = baseline.draw(objective, objective.generator())
        nodes, weights = quadrature(self.method, self.n_steps)
        maps = objective.new_maps()

        def see(batch: Batch, x: Tensor) -> None:
            x = x.detach().requires_grad_(True)
            with torch.enable_grad(), capture(objective.model.network, [layer]) as captured:
                out = batch.forward(x)
            values = captured[layer]
            if not values.requires_grad:
                raise MethodError(f"layer {layer!r} is not on a differentiable path from the image: choose another")
            (gradient,) = batch.gradients(out, [values])
            if gradient is None:
                raise MethodError(f"the target does not depend on layer {layer!r} by a differentiable path")
            chosen = self._units(values, objective, layer, batch)
            share = torch.tensor([weights[nodes[j]] for j in batch.sources], dtype=x.dtype, device=x.device)
            step = (batch.image - batch.cut(x0) if self.multiply_by_inputs else 1.0) * share.reshape(
                -1, *(1,) * (x.ndim - 1)
            )
            through = [torch.autograd.grad(values, x, g * chosen, retain_graph=True)[0] for g in gradient]
            objective.add(maps, batch, torch.stack(through) * step)

        along_path(objective, x0, nodes, see, [maps])
        start = objective.value(x0[None])[:, 0]
        return Explained(maps, {"layer": layer, **describe_baseline(baseline, start)})

    def _units(self, values: Tensor, objective: Objective, layer: str, batch: Batch) -> Tensor:
        """Return a mask in the layer's own shape: 1 at the chosen units, 0 elsewhere."""
        leaf = values.detach().requires_grad_(True)
        with torch.enable_grad():
            on_grid = batch.unmirrored(spatial_map(leaf, objective, layer))
        channels, positions = on_grid.shape[1], on_grid.shape[2:]
        if self.channel is not None and not 0 <= self.channel < channels:
            raise UsageError(f"channel={self.channel}: layer {layer!r} has {channels} channels")
        chosen = torch.zeros_like(on_grid)
        rows: Any = slice(None) if self.channel is None else self.channel
        plan = objective.plan
        for j, w in enumerate(batch.windows):
            place: list[Any] = [slice(None)] * len(positions)
            if self.index is not None:
                if not all(p.start <= i < p.stop for i, p in zip(self.index, plan.place(w))):
                    continue
                inside = [i + lo - s.start for i, (lo, _), s in zip(self.index, plan.pads, plan.slices[w])]
                place = [(2 * i + 1) * p // (2 * n) for i, p, n in zip(inside, positions, plan.roi)]
            unit: tuple[Any, ...] = (j, rows, *place)
            chosen[unit] = 1
        return torch.autograd.grad(on_grid, leaf, chosen)[0]
