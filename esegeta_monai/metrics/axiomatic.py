"""Axioms: agreement of the map with the properties that its method guarantees."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.metrics.base import Metric, MetricCost, MetricInput, MetricResult
from esegeta_monai.metrics.removal import blind, value_of
from esegeta_monai.metrics.robustness import CONSTANT, explained
from esegeta_monai.utils.registry import json_ready

__all__ = ["Completeness", "Conservation", "InputInvariance", "shifted"]


class Completeness(Metric):
    """The gap ``|Σ a − (F(x) − F(x₀))| / |F(x) − F(x₀)|`` (Sundararajan et al. 2017).

    Args:
        baseline: x₀; None: that of the method, or ``"auto"`` if it has none.
    """

    group = "axiomatic"
    reference = "Sundararajan et al., ICML 2017, arXiv:1703.01365"
    meaning = "Relative gap between the map's sum and the target's difference to the baseline; 0: complete."
    higher_is_better = False
    needs = frozenset({"objective"})

    baseline: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline is not None:
            baseline_for(self.baseline)

    def cost(self, objective: Objective) -> MetricCost:
        """The image and the baseline."""
        return MetricCost(shared=2)

    def measure(self, subject: MetricInput) -> MetricResult:
        """0 or more; a zero map has 1; undefined where the target does not change."""
        objective = subject.need_objective()
        spec = self.baseline if self.baseline is not None else getattr(subject.method, "baseline", None)
        baseline = baseline_for("auto" if spec is None else spec)

        def there() -> Tensor:
            return objective.value(baseline.draw(objective, objective.generator())[None])[:, 0].cpu()

        by = id(spec) if isinstance(spec, Tensor) else repr(json_ready(spec))
        at_baseline = float(subject.once(("baseline value", by), there)[subject.target])
        value, total = value_of(subject), float(subject.map.sum(dtype=torch.float64))
        if blind(subject, at_baseline - value):
            return MetricResult.undefined("the target is the same at image and baseline: choose another baseline")
        notes = {"sum": total, "value": value, "baseline_value": at_baseline, "baseline": json_ready(baseline.record())}
        return MetricResult(abs(total - (value - at_baseline)) / abs(value - at_baseline), notes=notes)


class Conservation(Metric):
    """The gap ``|Σ a − F(x)| / |F(x)|`` (Bach et al. 2015): relevance is neither created nor lost.

    Relevance absorbed by biases or padding is not in the map, so it counts as a gap here.
    """

    group = "axiomatic"
    reference = "Bach et al., PLOS ONE 2015, https://doi.org/10.1371/journal.pone.0130140"
    meaning = "Relative gap between the map's sum and the target itself; 0: conserved."
    higher_is_better = False
    needs = frozenset({"objective"})

    def cost(self, objective: Objective) -> MetricCost:
        """The image."""
        return MetricCost(shared=1)

    def measure(self, subject: MetricInput) -> MetricResult:
        """0 or more; a zero map has 1; undefined where the target is zero."""
        value, total = value_of(subject), float(subject.map.sum(dtype=torch.float64))
        if value == 0:
            return MetricResult.undefined("the target is zero at the image")
        return MetricResult(abs(total - value) / abs(value), notes={"sum": total, "value": value})


class InputInvariance(Metric):
    """``‖a'(x + c) − a(x)‖ / ‖a(x)‖``, a' being the map of a network that first subtracts c from its input, so that
    its predictions are the same (Kindermans et al. 2019).

    Args:
        shift: c, in units of the image's standard deviation; not 0.
    """

    group = "axiomatic"
    reference = "Kindermans et al. 2019, arXiv:1711.00867"
    meaning = "Relative change of the map when image and network are shifted alike, which changes no prediction."
    higher_is_better = False
    needs = frozenset({"objective", "method"})
    compared = False

    shift: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift == 0:
            raise UsageError("InputInvariance: shift=0 changes nothing: give another number")

    def cost(self, objective: Objective) -> MetricCost:
        """The explanations of the image and of the shifted image, and the predictions of both."""
        return MetricCost(shared=2, explanations=2)

    def measure(self, subject: MetricInput) -> MetricResult:
        """0 or more; undefined for a zero map, and for a constant image, whose standard deviation is 0."""
        objective, k = subject.need_objective(), subject.target
        base = subject.once(("explained", id(subject.method)), lambda: explained(subject, objective))
        if not bool(base[k].any()):
            return MetricResult.undefined("the map is zero everywhere")
        constant = self.shift * float(objective.image.std())
        if constant == 0:
            return MetricResult.undefined(CONSTANT)

        def there() -> tuple[Tensor, Tensor]:
            with shifted(objective, constant) as other:
                return explained(subject, other), other.image_values().cpu()

        maps, values = subject.once(("shifted", id(subject.method), self.shift), there)
        change = float((maps[k] - base[k]).norm() / base[k].norm())
        return MetricResult(
            change, notes={"shift": constant, "value": value_of(subject), "value_shifted": float(values[k])}
        )


@contextmanager
def shifted(objective: Objective, constant: float) -> Iterator[Objective]:
    """Provide the objective at ``x + c``, whose network subtracts c from every image; remove the hook afterwards."""
    plan = dataclasses.replace(objective.plan, cval=objective.plan.cval + constant)
    other = objective.derive(image=objective.image + constant, plan=plan, grid=objective.grid)
    names = list(objective.model.inputs)[1:]

    def take_off(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        moved = {n: v - constant if n in names else v for n, v in kwargs.items()}
        return (args[0] - constant, *args[1:]), moved

    handle = objective.model.network.register_forward_pre_hook(take_off, with_kwargs=True)
    try:
        yield other
    finally:
        handle.remove()
