"""Full gradients: the contributions of the image and of every bias to the target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_frames import network_roi, traced_layers, with_slice_axis
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained, Method, gaps
from esegeta_monai.methods.layer.scattered import LayerSum, Reduce
from esegeta_monai.utils.distributed import Summed

__all__ = ["FullGrad"]


@dataclass
class _Call:
    """One call of a module: its name, which call it is, its input and its output (a part of the graph)."""

    name: str
    number: int
    module: nn.Module
    input: Tensor
    output: Tensor


class FullGrad(Method):
    """``F(x) = Σ x · ∂F/∂x + Σ_l Σ b_l · ∂F/∂y_l``: the gradient at the image and at the bias b of every module l
    (Srinivas & Fleuret 2019).

    The bias of a module is ``b = y − J z``, J its Jacobian at its input z: the parameter ``bias`` of a convolution, the
    shift of a norm, and the implicit bias of a smooth activation; zero for ReLU, pooling and other homogeneous
    modules. A parametrised module (weight norm, spectral norm) counts as one module. Each call of a module that runs
    several times has its bias where the call lies in the window. Biases of layers without positions (a linear head), or
    whose positions are not known (with a warning), are in the record's ``booked``. Complete where all constants and non-linear functions
    are modules; attention and functional activations are not, and ``completeness_gap`` is the missing part. Linear
    targets only.

    Args:
        abs: True for the saliency map of the paper, the sum of the absolute values of all parts, each of the whole
            volume (a pass per module); False for the signed parts, which add up to F.
    """

    reference = "Srinivas & Fleuret, NeurIPS 2019, arXiv:1905.00780"
    produces = "input map"
    additive = False
    units = "target per voxel"
    full_precision = True
    needs_linear = True
    reads_image_value = True
    gap_advice = "gates, attention and functions outside modules contribute constants that belong to no module's bias"

    abs: bool = True

    @property
    def signed(self) -> bool:
        return not self.abs

    def passes(self, objective: Objective) -> int:
        """Count one pass, or one per module and one for the image."""
        rounds = len(_leaves(objective.model.network)) + 1 if self.abs else 1
        return len(objective.windows) * rounds

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial)."""
        layers = traced_layers(objective)
        leaves = _leaves(objective.model.network)
        groups = [[n] for n in leaves] if self.abs else [leaves]
        total = objective.new_maps(1)
        absorbed = objective.constants()
        padding = torch.zeros_like(absorbed)
        signed = torch.zeros_like(absorbed)
        unplaced: dict[str, None] = {}
        dims = len(network_roi(objective.plan))
        for names in [[], *groups] if self.abs else groups:
            maps = objective.new_maps()
            how: Reduce = "channels" if self.abs else "sum"
            # one part per call: a module that runs twice may have other channels the second time
            parts = {
                (n, i): LayerSum(objective, n, how)
                for n in names
                for i, frame in enumerate(layers[n].frames if n in layers else [])
                if frame is not None and max(frame.grid[1:]) > 1
            }

            def run(
                batch: Batch,
                names: list[str] = names,
                maps: Tensor = maps,
                parts: dict[tuple[str, int], LayerSum] = parts,
                padding: Tensor = padding,
            ) -> None:
                x = batch.image.detach().requires_grad_(True)
                with torch.enable_grad(), _recorded(objective.model.network, names) as calls:
                    out = batch.forward(x)
                gradients = batch.gradients(out, [x, *(c.output for c in calls)])
                if gradients[0] is not None and (not self.abs or not names):
                    padding.add_(objective.add(maps, batch, gradients[0] * x.detach()).sum(1).double().cpu())
                for call, gradient in zip(calls, gradients[1:]):
                    key = (call.name, call.number)
                    if gradient is None:
                        continue
                    product = gradient * _bias(call)
                    frame = layers[call.name].frames[call.number] if key in parts else None
                    if frame is not None and frame.fits(product, 2):
                        on_grid = frame.placed(frame.to_map(product, 2))
                        parts[key].add_map(batch, with_slice_axis(on_grid, objective.plan))
                    else:
                        absorbed.add_(product.flatten(1).sum(1).double().cpu())
                        if product.ndim >= dims + 3 and bool(product.any()):
                            unplaced[call.name] = None

            sums: list[Tensor | Summed] = [maps, padding, absorbed, *parts.values()]
            objective.each([(0, w) for w in objective.windows], run, sums=sums)
            biases = [p.result() for p in parts.values() if p.maps is not None]
            for values, lost in [(maps, torch.zeros_like(padding)), *biases]:
                signed = signed + values.flatten(1).sum(1).double().cpu()
                padding += lost.cpu()
                total += (values.abs() if self.abs else values).sum(1, keepdim=True)
        if unplaced:
            which = f"layers {', '.join(map(repr, list(unplaced)[:4]))}" + (" and others" if len(unplaced) > 4 else "")
            text = f"FullGrad: it is not known where the output of {which} lies, so their biases are in 'booked' only"
            objective.context.progress.warn(f"{text} and not in the map")
        sizes = total.flatten(1).abs().sum(1, dtype=torch.float64).cpu()
        notes = gaps(signed + absorbed + padding, sizes, objective.image_values())
        return Explained(total, {**notes, "booked": absorbed, "sum_in_padding": padding})


def _leaves(network: nn.Module) -> list[str]:
    """Return the modules without submodules; a parametrised module (weight norm, spectral norm) counts as one."""
    names = [n for n, m in network.named_modules() if n and all(c == "parametrizations" for c, _ in m.named_children())]
    return [n for n in names if "parametrizations" not in n.split(".")]


@contextmanager
def _recorded(network: nn.Module, names: list[str]) -> Iterator[list[_Call]]:
    """Record calls of modules with one input and one output tensor, as copies, which in-place calls cannot change."""
    calls: list[_Call] = []
    inputs: dict[int, Tensor] = {}
    counts: Counter[int] = Counter()
    handles = []

    def before(module: nn.Module, args: Any) -> Any:
        counts[id(module)] += 1
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].requires_grad:
            inputs[id(module)] = args[0].detach().clone()
            return (args[0].clone(),)
        inputs.pop(id(module), None)
        return None

    def after_of(name: str) -> Any:
        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if id(module) in inputs and isinstance(output, Tensor):
                calls.append(_Call(name, counts[id(module)] - 1, module, inputs.pop(id(module)), output))
                return output.clone()
            return None

        return after

    try:
        for name, module in network.named_modules():
            if name in names:
                handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after_of(name))]
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _bias(call: _Call) -> Tensor:
    """Return ``y − J z`` of one call, by two backward passes: Jᵀu is linear in u, and its derivative along z is J z."""
    with torch.enable_grad():
        z = call.input.requires_grad_(True)
        y = call.module(z.clone())
        u = torch.zeros_like(y).requires_grad_(True)
        (pulled,) = torch.autograd.grad(y, z, u, create_graph=True, materialize_grads=True)
        if not pulled.requires_grad:
            return y.detach()
        (pushed,) = torch.autograd.grad(pulled, u, z.detach(), allow_unused=True, materialize_grads=True)
    return (y - pushed).detach()
