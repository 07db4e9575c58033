"""Layer attributions along a straight path from a baseline to the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for, choice_passes, describe_baseline
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.network.hooks import capture, replaced
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, completeness
from esegeta_monai.methods.layer.activation import LayerMethod
from esegeta_monai.methods.layer.scattered import LayerSum
from esegeta_monai.methods.path.integrated_gradients import Rule, check_steps, of_factor, quadrature
from esegeta_monai.utils.distributed import Summed

__all__ = ["InternalInfluence", "LayerConductance", "LayerIntegratedGradients", "along_path", "layer_pass"]


class _PathMethod(LayerMethod):
    """A layer method that follows a path of ``n_steps`` from a baseline."""

    baseline: Any = "auto"
    n_steps: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.n_steps)


class _Quadrature(_PathMethod):
    """A path method that integrates by a quadrature rule."""

    method: Rule = "gausslegendre"

    def __post_init__(self) -> None:
        super().__post_init__()
        quadrature(self.method, 2)


class LayerConductance(_PathMethod):
    """``∫₀¹ ∂F/∂A_c · dA_c/dα dα`` along ``x₀ + α (x − x₀)``: the part of F's change that flows through each unit
    (Dhamdhere et al. 2019).

    Complete where all paths lead through the layer: the sum is then ``F(x) − F(x₀)``. ``share_through_layer`` in the
    record is the sum divided by that difference; skip connections around the layer carry the rest.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
        n_steps: segments of the path.
        rule: ``"trapezoid"``: the change of A over a segment times the mean of the gradients at its ends;
            ``"left"``: times the gradient at its start, as Captum does.
    """

    reference = "Dhamdhere et al., ICLR 2019, arXiv:1805.12233"
    additive = True
    units = "target per voxel"

    rule: Literal["trapezoid", "left"] = "trapezoid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rule not in ("trapezoid", "left"):
            raise UsageError(f"rule={self.rule!r}: give trapezoid or left")

    def passes(self, objective: Objective) -> int:
        """Count the ends of all segments, F at the baseline, and a forward pass for each if a target is non-linear."""
        points = (self.n_steps + 1) * (1 if objective.linear else 2) + 1
        return points * len(objective.windows) + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        baseline = baseline_for(self.baseline)
        x0 = baseline.draw(objective, objective.generator())
        total = LayerSum(objective, layer, self.reduce)
        last: tuple[Tensor, Tensor] | None = None

        def see(batch: Batch, x: Tensor) -> None:
            nonlocal last
            a, g = layer_pass(batch, x, layer)
            before, gradient = last or (a[:1], g[:, :1])
            before, gradient = torch.cat([before, a[:-1]]), torch.cat([gradient, g[:, :-1]], 1)
            inside = torch.tensor([j > 0 for j in batch.sources], device=a.device).reshape(-1, *(1,) * (a.ndim - 1))
            mean = (gradient + g) / 2 if self.rule == "trapezoid" else gradient
            total.add(batch, torch.where(inside, mean * (a - before), 0.0))
            last = a[-1:], g[:, -1:]

        along_path(objective, x0, [j / self.n_steps for j in range(self.n_steps + 1)], see, [total])
        maps, padding = total.result()
        start = objective.value(x0[None])[:, 0]
        notes: dict[str, Any] = {"layer": layer, "sum_in_padding": padding, **describe_baseline(baseline, start)}
        if self.reduce == "sum":
            notes["share_through_layer"] = total.share(objective.image_values() - start)
        return Explained(maps, notes)


class InternalInfluence(_Quadrature):
    """``∫₀¹ ∂F/∂A_c dα`` along ``x₀ + α (x − x₀)`` (Leino et al. 2018).

    The derivative at a position of the layer is spread over the voxels of its cell, so that the sum over voxels is the
    sum over positions: at a layer of half the resolution in 3D, a voxel has about an eighth of the derivative.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
        n_steps: number of gradients.
        method: the quadrature rule, in Captum's names.
    """

    reference = "Leino et al. 2018, arXiv:1802.03788"
    additive = False
    units = "target per unit of activation and voxel"

    def passes(self, objective: Objective) -> int:
        """Count one pass per step, and a forward pass for each if a target is non-linear."""
        points = self.n_steps * (1 if objective.linear else 2)
        return points * len(objective.windows) + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        baseline = baseline_for(self.baseline)
        nodes, weights = quadrature(self.method, self.n_steps)
        total = LayerSum(objective, layer, self.reduce)

        def see(batch: Batch, x: Tensor) -> None:
            _, g = layer_pass(batch, x, layer)
            share = torch.tensor([weights[nodes[j]] for j in batch.sources], dtype=g.dtype, device=g.device)
            total.add(batch, g * share.reshape(-1, *(1,) * (g.ndim - 2)))

        along_path(objective, baseline.draw(objective, objective.generator()), nodes, see, [total])
        maps, padding = total.result()
        return Explained(maps, {"layer": layer, "sum_in_padding": padding, "baseline": baseline.record()})


class LayerIntegratedGradients(_Quadrature):
    """``(A − A₀) · ∫₀¹ ∂F/∂A (A₀ + α (A − A₀)) dα``: integrated gradients with the layer's output as the input,
    A = A(x), A₀ = A(x₀), everything beside the layer computed from x.

    Complete: the sum is ``F(x) − F(x with A₀ in the layer)``, up to the error of the quadrature.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        baseline: x₀, see `esegeta_monai.engine.baselines`.
        n_steps: number of gradients.
        method: the quadrature rule, in Captum's names.
        multiply_by_inputs: False: the mean gradient, without the factor ``A − A₀``, as in Captum.
    """

    reference = "Sundararajan et al., ICML 2017, arXiv:1703.01365"
    additive = True
    gap_advice = "take more steps (n_steps)"

    multiply_by_inputs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        of_factor(self)

    @property
    def units(self) -> str:
        return "target per voxel" if self.multiply_by_inputs else "target per unit of activation and voxel"

    def passes(self, objective: Objective) -> int:
        """Count image and baseline once per step (twice for non-linear targets), and once at the start."""
        points = 2 * self.n_steps * (1 if objective.linear else 2) + 2
        return points * len(objective.windows) + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        baseline = baseline_for(self.baseline)
        x0 = baseline.draw(objective, objective.generator())
        nodes, weights = quadrature(self.method, self.n_steps)
        total = LayerSum(objective, layer, self.reduce)
        for alpha in nodes:

            def run(batch: Batch, alpha: float = alpha) -> None:
                with torch.enable_grad(), _mixed(objective, layer, alpha) as mixed:
                    out = _both(batch, x0)
                (g,) = batch.gradients(out, [mixed["leaf"]])
                if g is None:
                    raise MethodError(_unreached(layer))
                factor = mixed["end"] - mixed["start"] if self.multiply_by_inputs else 1.0
                total.add(batch, weights[alpha] * g * factor)

            predictions = None if objective.linear else self._predict(objective, layer, alpha, x0)
            objective.each([(0, w) for w in objective.windows], run, predictions=predictions, sums=[total])
        start = torch.stack(
            [s.value(p.double())[0] for s, p in zip(objective.scores, self._predict(objective, layer, 0.0, x0))]
        )
        maps, padding = total.result()
        notes: dict[str, Any] = {"layer": layer, "sum_in_padding": padding}
        if self.reduce == "sum" and self.multiply_by_inputs:
            notes |= completeness(maps, (objective.image_values() - start).cpu(), padding)
        return Explained(maps, {**notes, **describe_baseline(baseline, start)})

    def _predict(self, objective: Objective, layer: str, alpha: float, x0: Tensor) -> list[Tensor]:
        """Return the cropped prediction of each score, (1, channels, *box), with ``A₀ + α (A − A₀)`` in the layer."""
        blended = objective.new_predictions(1)

        def run(batch: Batch) -> None:
            with torch.no_grad(), _mixed(objective, layer, alpha):
                objective.blend(blended, batch, _both(batch, x0))

        objective.each([(0, w) for w in objective.windows], run, with_cotangents=False, sums=blended)
        return blended


def _both(batch: Batch, x0: Tensor) -> Tensor:
    """Run the image's windows and the baseline's in one batch, and return the output of the image's.

    Raises:
        MethodError: the network mixes the images of a batch.
    """
    if batch.network.model.mixes_rows:
        raise MethodError(
            "image and baseline go through the network together, and it mixes the images of a batch: use "
            "IntegratedGradients, or LayerGradientXActivation"
        )
    x = torch.cat([batch.image, batch.cut(x0)])
    return batch.network.run(x, [*batch.windows, *batch.windows])[: len(batch)]


@contextmanager
def _mixed(objective: Objective, layer: str, alpha: float) -> Iterator[dict[str, Tensor]]:
    """Replace the layer's output for the image's half of the batch by ``A₀ + α (A − A₀)``, a leaf of the graph."""
    kept: dict[str, Tensor] = {}

    def edit(values: Tensor) -> Tensor:
        kept["end"], kept["start"] = values.detach().chunk(2)
        leaf = torch.lerp(kept["start"], kept["end"], alpha)
        kept["leaf"] = leaf.requires_grad_(torch.is_grad_enabled())
        return torch.cat([kept["leaf"], values[len(leaf) :]])

    with replaced(objective.model.network, layer, edit):
        yield kept
        if not kept:
            raise MethodError(f"layer {layer!r} is not used in the forward pass: choose another")


def along_path(
    objective: Objective,
    x0: Tensor,
    nodes: list[float],
    see: Callable[[Batch, Tensor], None],
    sums: Sequence[Tensor | Summed],
) -> None:
    """Call ``see(batch, x)`` with the windows x of ``x₀ + α (image − x₀)`` for all windows that the targets see and
    all α in ``nodes`` (``batch.sources`` has their indices); the nodes of a window are consecutive. ``see`` adds to
    ``sums``.

    The batch's cotangents are those of the prediction at that α. Memory: per node the voxels that the scores read.
    """
    predictions: list[Tensor] | None = None
    if not objective.linear:
        at = [objective.predict((x0 + alpha * (objective.image - x0))[None]) for alpha in nodes]
        predictions = [torch.cat(parts) for parts in zip(*at)]

    def run(batch: Batch) -> None:
        start, end = batch.cut(x0), batch.image
        alphas = torch.tensor([nodes[j] for j in batch.sources], dtype=start.dtype, device=start.device)
        see(batch, start + alphas.reshape(-1, *(1,) * x0.ndim) * (end - start))

    jobs = [(j, w) for w in objective.windows for j in range(len(nodes))]
    objective.each(jobs, run, predictions=predictions, sums=sums, whole_windows=True)


def layer_pass(batch: Batch, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
    """Return activations (n, …) and gradients (k, n, …) of a layer at windows x (n, C, *roi).

    Raises:
        MethodError: no target depends on the layer.
    """
    with torch.enable_grad(), capture(batch.network.model.network, [layer], leaves=True) as captured:
        out = batch.forward(x.detach())
    if layer not in captured or not captured[layer].requires_grad:
        raise MethodError(_unreached(layer))
    (gradient,) = batch.gradients(out, [captured[layer]])
    if gradient is None:
        raise MethodError(_unreached(layer))
    return captured[layer].detach(), gradient


def _unreached(layer: str) -> str:
    return f"the target does not depend on layer {layer!r} by a differentiable path: choose another"
