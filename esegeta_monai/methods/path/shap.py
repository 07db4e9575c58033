"""Expected gradients: integrated gradients whose path and baseline are drawn at random."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for, choice_passes, describe_baseline, noise_like
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.default_layer import check_layer
from esegeta_monai.engine.network.hooks import capture
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods.base import Explained, Method, completeness
from esegeta_monai.methods.layer.activation import LayerMethod
from esegeta_monai.methods.layer.path import layer_pass
from esegeta_monai.methods.layer.scattered import LayerSum
from esegeta_monai.methods.path.integrated_gradients import of_factor
from esegeta_monai.methods.stopping import RunningMean, check_tolerance

__all__ = ["ExpectedGradients", "GradientShap", "LayerGradientShap"]


@dataclass
class _Draw:
    """One sample: the (noisy) image, the baseline, and the position between them."""

    x: Tensor
    x0: Tensor
    alpha: float

    @property
    def point(self) -> Tensor:
        return torch.lerp(self.x0, self.x, self.alpha)


class _ExpectedGradients(Method):
    """A method that averages over random baselines, noisy images, and positions between them."""

    reference = "Erion et al., Nature Machine Intelligence 2021, arXiv:1906.10670"
    additive = True
    reads_image_value = True

    baseline: Any = "auto"
    n_samples: int = 32
    std: float = 0.0
    multiply_by_inputs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        of_factor(self)
        if self.n_samples < 2 or self.std < 0:
            needed = f"n_samples={self.n_samples} must be at least 2 (for the standard error)"
            raise UsageError(f"{needed}, std={self.std} not negative")

    @property
    def units(self) -> str:
        return "target per voxel" if self.multiply_by_inputs else "target per unit of image intensity"

    @property
    def _most(self) -> int:
        """The largest number of draws."""
        return self.n_samples

    def _draws(self, objective: Objective) -> Iterator[_Draw]:
        generator, baseline = objective.generator(), baseline_for(self.baseline)
        for _ in range(self._most):
            x = objective.image
            if self.std:
                x = x + noise_like(x, self.std, generator)
            yield _Draw(x, baseline.draw(objective, generator), float(torch.rand((), generator=generator)))


class GradientShap(_ExpectedGradients):
    """``a = E[(x' − x₀) · ∂F/∂x(x₀ + α (x' − x₀))]`` over baselines x₀, α uniform on [0, 1] and noisy images x' (Erion
    et al. 2021; Lundberg & Lee 2017).

    Complete in expectation. The record has the gap and ``completeness_error``, the gap's standard error over the
    samples, in the same units: a gap above about three standard errors is significant.

    Args:
        baseline: the distribution of x₀, see `esegeta_monai.engine.baselines`.
        n_samples: number of draws.
        std: standard deviation of the noise added to the image, in units of each channel's standard deviation.
        multiply_by_inputs: False: the mean gradient, without the factor ``x' − x₀``, as in Captum.
        tolerance, max_samples: draw until the map has a stated precision, see `SmoothGrad`.

    Example:
        >>> GradientShap(baseline="noise", n_samples=16).parameters["std"]
        0.0
    """

    produces = "input map"
    aliases = ("ExpectedGradients",)
    gap_advice = "take more draws (n_samples); completeness_error is its standard error"

    tolerance: float | None = None
    max_samples: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tolerance(self)

    @property
    def completeness_bound(self) -> float:
        return self.gap_bound

    @property
    def passes_data_dependent(self) -> bool:
        return self.tolerance is not None

    @property
    def _most(self) -> int:
        return self.n_samples if self.tolerance is None else self.max_samples

    def passes(self, objective: Objective) -> int:
        """Count per draw a gradient, F at the baseline and at the noisy image, and one more for non-linear targets."""
        each = (2 + bool(self.std) + (not objective.linear)) * len(objective.windows)
        return self._most * each + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        baseline = baseline_for(self.baseline)
        maps, misses, ends, starts = objective.new_maps(), [], [], []
        shares = maps if self.multiply_by_inputs else torch.zeros_like(maps)
        running = None if self.tolerance is None else RunningMean(self._most, self.tolerance)
        for draw in self._draws(objective):
            mean = objective.gradient(draw.point[None]).maps[:, 0]
            one = mean * (draw.x - draw.x0)
            start = objective.value(draw.x0[None])[:, 0]
            end = objective.value(draw.x[None])[:, 0] if self.std else objective.image_values()
            misses.append(one.flatten(1).sum(1, dtype=torch.float64).cpu() - (end - start).cpu())
            ends.append(end)
            starts.append(start)
            shares += one
            if not self.multiply_by_inputs:
                maps += mean
            if running is not None and running.add(one if self.multiply_by_inputs else mean):
                break
        n = len(misses)
        maps /= n
        if not self.multiply_by_inputs:
            shares /= n
        first, last = torch.stack(starts).mean(0), torch.stack(ends).mean(0)
        errors = torch.stack(misses).std(0) / math.sqrt(n)
        change = (last - first).abs().cpu()
        error = [float(e / c) if c != 0 else None for e, c in zip(errors, change)]
        notes: dict[str, Any] = {**completeness(shares, last - first), "completeness_error": error}
        notes.update({"n_samples": n} if running is None else running.notes())
        return Explained(maps, {**notes, **describe_baseline(baseline, first)})


ExpectedGradients = GradientShap


class LayerGradientShap(_ExpectedGradients, LayerMethod):
    """``E[(A(x') − A(x₀)) · ∂F/∂A(x₀ + α (x' − x₀))]`` at a layer, with the symbols of `GradientShap`.

    Args:
        layer: dotted name; None: the default layer, named in the record.
        reduce: ``"channels"``, ``"sum"``, ``"mean"``, ``"abs"`` or ``"positive"``, see `LayerActivation`.
        baseline, n_samples, std, multiply_by_inputs: see `GradientShap`.
    """

    @property
    def units(self) -> str:
        return "target per voxel" if self.multiply_by_inputs else "target per unit of activation and voxel"

    def passes(self, objective: Objective) -> int:
        """Count per draw a gradient, the layer at image and baseline, and one more for non-linear targets."""
        each = ((3 if self.multiply_by_inputs else 1) + (not objective.linear)) * len(objective.windows)
        return self.n_samples * each + choice_passes(self.baseline, objective)

    def attribute(self, objective: Objective) -> Explained:
        """(k, C or 1, *spatial)."""
        layer = check_layer(objective, self.layer)
        baseline = baseline_for(self.baseline)
        total = LayerSum(objective, layer, self.reduce)
        for draw in self._draws(objective):

            def run(batch: Batch, draw: _Draw = draw) -> None:
                _, g = layer_pass(batch, batch.cut(draw.point), layer)
                if self.multiply_by_inputs:
                    g = g * (_activation(batch, draw.x, layer) - _activation(batch, draw.x0, layer))
                total.add(batch, g)

            predictions = None if objective.linear else objective.predict(draw.point[None])
            objective.each([(0, w) for w in objective.windows], run, predictions=predictions, sums=[total])
        total.scale(1 / self.n_samples)
        maps, padding = total.result()
        notes = {"layer": layer, "sum_in_padding": padding, "n_samples": self.n_samples}
        return Explained(maps, {**notes, "baseline": baseline.record()})


def _activation(batch: Batch, volume: Tensor, layer: str) -> Tensor:
    with torch.no_grad(), capture(batch.network.model.network, [layer]) as captured:
        batch.forward(batch.cut(volume))
    return captured[layer]
