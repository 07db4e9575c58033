"""Base class, input and result of metrics.

A metric takes a `MetricInput` (a map, its objective, and further data of the case) and returns a `MetricResult` (a
number with its meaning and its confidence interval). `Metric.update` validates and measures one map; `summarise`
combines the results of several maps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.methods.base import Method
from esegeta_monai.utils.registry import Configurable, Registry, json_ready
from esegeta_monai.utils.tensors import all_finite
from esegeta_monai.utils.types import check_stated

__all__ = [
    "METRICS",
    "Group",
    "Metric",
    "MetricCost",
    "MetricInput",
    "MetricResult",
    "Need",
    "Sign",
    "better",
    "bootstrap",
    "magnitude",
    "mean_interval",
    "summarise",
    "wilson",
]

Group = Literal["faithfulness", "robustness", "localisation", "complexity", "randomisation", "axiomatic", "modality"]
Need = Literal["objective", "method", "label", "spacing"]
Sign = Literal["absolute", "positive", "negative"]

T = TypeVar("T")

CONFIDENCE = 0.95
"""Confidence level of all intervals."""


@dataclass
class MetricInput:
    """One map, and the data that metrics may need to judge it.

    Attributes:
        map: (C, *spatial) on the network's grid, raw values with their sign. C is the image's number of channels, or 1.
        objective: the explained objective; for metrics that run the network.
        target: index of the explained score in the objective.
        method: the method of the map; for metrics that explain again.
        label: bool (*spatial), the region of the cause.
        body: bool (*spatial), the voxels of the patient; None: unknown.
        spacing: voxel size in mm along each spatial axis; None: unknown.
        shared: intermediate results that several metrics need (explanations of perturbed images), by key. Use one
            dictionary for all subjects of an objective.

    Raises:
        MetricError: shapes do not fit, or the map has values that are not finite.
    """

    map: Tensor
    objective: Objective | None = None
    target: int = 0
    method: Method | None = None
    label: Tensor | None = None
    body: Tensor | None = None
    spacing: Sequence[float] | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.map = torch.as_tensor(self.map).detach().as_subclass(Tensor)
        shape = tuple(self.map.shape[1:])
        if len(shape) not in (2, 3):
            raise MetricError(f"a map is (C, *spatial) in 2D or 3D, got shape {tuple(self.map.shape)}")
        if not all_finite(self.map):
            bad = int((~torch.isfinite(self.map)).sum())
            raise MetricError(f"the map has {bad} of {self.map.numel()} values that are not finite: explain again")
        for what in ("label", "body"):
            mask = getattr(self, what)
            if mask is None:
                continue
            mask = torch.as_tensor(mask).as_subclass(Tensor) > 0
            mask = mask[0] if mask.ndim == len(shape) + 1 and len(mask) == 1 else mask
            if tuple(mask.shape) != shape:
                raise MetricError(
                    f"the {what} mask has shape {tuple(mask.shape)}, the map {shape}: bring it to the map's grid"
                )
            setattr(self, what, mask)
        if self.spacing is not None:
            self.spacing = tuple(float(s) for s in self.spacing)
            if len(self.spacing) != len(shape) or min(self.spacing) <= 0:
                raise MetricError(f"spacing={self.spacing} does not fit a map of {len(shape)} axes")
        if self.objective is not None and shape != tuple(self.objective.plan.spatial_shape):
            raise MetricError(f"the map has shape {shape}, the image {tuple(self.objective.plan.spatial_shape)}")

    def need_objective(self) -> Objective:
        """Return the objective of a subject that was validated to have one."""
        assert self.objective is not None
        return self.objective

    @property
    def alone(self) -> Objective:
        """Return the objective with this subject's target only, so that only windows that it sees are run."""
        objective = self.need_objective()
        if objective.n_targets == 1:
            return objective
        return self.once(("alone", self.target), lambda: objective.derive(scores=[objective.scores[self.target]]))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of ``make``, computed once for all subjects with the same `shared`."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    @property
    def per_channel(self) -> Tensor:
        """Return the map with the image's channels (C, *spatial), float64; a single channel is divided equally."""
        values = self.map.double()
        n = self.need_objective().image.shape[0]
        if len(values) == n:
            return values
        if len(values) == 1:
            return values.expand(n, *values.shape[1:]) / n
        raise MetricError(
            f"the map has {len(values)} channels and the image {n}: a layer's channels cannot be judged by what "
            "happens to the image; choose a method that gives an input map, or one channel"
        )


@dataclass
class MetricResult:
    """The result of a metric.

    Attributes:
        value: None where the metric is undefined for this map (``notes["undefined"]`` is the reason): such a map never
            beats another.
        low, high: the 95 % confidence interval over the samples; None for a single sample.
        n: number of samples.
        meaning: one sentence.
        curve: lists of equal length by name, the first one the abscissa, if the value summarises a curve.
        notes: further results, JSON-ready.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 1
    meaning: str = ""
    curve: dict[str, list[float]] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def undefined(cls, why: str, **more: Any) -> MetricResult:
        """Return a result without a value, with the reason ``why``."""
        return cls(None, n=0, notes={"undefined": why}, **more)

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        fields: dict[str, Any] = {"value": self.value, "low": self.low, "high": self.high, "n": self.n}
        fields["meaning"] = self.meaning
        if self.curve is not None:
            fields["curve"] = self.curve
        return {**fields, **({"notes": json_ready(self.notes)} if self.notes else {})}


@dataclass(frozen=True)
class MetricCost:
    """How often a metric runs the network for the maps of a case, at most: what several maps share is computed once.

    Attributes:
        shared: predictions of a changed image, for all maps and targets together.
        each: predictions of a changed image, for each map of each target.
        explanations: explanations by the map's method, for each method.
        group: metrics with the same name share predictions and explanations; None: they share none.
    """

    shared: int = 0
    each: int = 0
    explanations: int = 0
    group: str | None = None


class Metric(Configurable, ABC):
    """A measure of the quality of an explanation. Subclasses become dataclasses; fields are parameters.

    Every class states ``group``, ``higher_is_better`` and ``meaning``, or inherits them from a family base; they are
    checked when the class is defined.

    Class attributes:
        group: the property that it measures.
        reference: the paper.
        higher_is_better: True or False; None: the number only describes the map.
        needs: fields of the `MetricInput` that it needs besides the map.
        meaning: one sentence that explains the value to a reader of the report.
        compared: True if a map should beat the control maps. False where controls are perfect by construction: a
            constant is perfectly stable, an edge detector is sparse.
        proportion: True if the value is 0 or 1 per map, so that `summarise` uses Wilson's interval.

    Example:
        >>> from esegeta_monai.metrics import PointingGame
        >>> metric = PointingGame()
        >>> label = torch.tensor([[0, 1], [0, 0]])
        >>> hit = metric.update(MetricInput(torch.tensor([[[0.1, 3.0], [0.0, 0.0]]]), label=label))
        >>> miss = metric.update(MetricInput(torch.tensor([[[5.0, 3.0], [0.0, 0.0]]]), label=label))
        >>> hit.value, miss.value, summarise(metric, [hit, miss]).value
        (1.0, 0.0, 0.5)
    """

    group: ClassVar[Group]
    reference: ClassVar[str] = ""
    higher_is_better: ClassVar[bool | None]
    needs: ClassVar[frozenset[Need]] = frozenset()
    meaning: ClassVar[str]
    compared: ClassVar[bool] = True
    proportion: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_stated(cls, {"group": Group, "higher_is_better": bool | None, "meaning": str})
        if not set(cls.needs) <= set(get_args(Need)):
            raise UsageError(
                f"{cls.__name__}.needs={cls.needs!r}: give a set of {', '.join(map(repr, get_args(Need)))}"
            )
        if cls.__module__.startswith("esegeta_monai.") and not cls.__name__.startswith("_"):
            METRICS.register(cls, *cls.__dict__.get("aliases", ()))

    @abstractmethod
    def measure(self, subject: MetricInput) -> MetricResult:
        """Measure one map that `validate` has accepted; state the range of the value here."""

    def cost(self, objective: Objective) -> MetricCost | None:
        """Return how often it runs the network, for estimates; None: unknown. No pass of the network is made here."""
        return None if self.needs & {"objective", "method"} else MetricCost()

    def validate(self, subject: MetricInput) -> None:
        """Refuse a subject that lacks a field that the metric needs.

        Raises:
            MetricError: a field is missing; it is named.
        """
        for what in sorted(self.needs):
            if getattr(subject, what) is None:
                raise MetricError(f"{self.name} needs {HOW_TO_GIVE[what]}")
        if subject.label is not None and "label" in self.needs and not bool(subject.label.any()):
            raise MetricError(f"{self.name}: the label is empty, so the map cannot be compared with it")

    def update(self, subject: MetricInput) -> MetricResult:
        """Validate and measure one map.

        Raises:
            MetricError: see `validate`.
        """
        self.validate(subject)
        with asking(subject.objective):
            result = self.measure(subject)
        result.meaning = result.meaning or self.meaning
        return result


HOW_TO_GIVE = {
    "objective": "the network and the image (an objective), not the map alone",
    "method": "the method of the map, to explain again",
    "label": "a label of the cause",
    "spacing": "the voxel size in mm (a map with an affine)",
}

METRICS: Registry[Metric] = Registry("metric", Metric, "esegeta_monai.metrics")


@contextmanager
def asking(objective: Objective | None) -> Iterator[None]:
    """Set the state in which the network is run, and restore the caller's state afterwards."""
    if objective is None:
        yield
        return
    with evaluating(objective.model.network, objective.model.device):
        yield


def better(metric: Metric | type[Metric], a: float | None, b: float | None) -> bool:
    """True if the value ``a`` is better than ``b``; an undefined value (None) is worse than any other."""
    if a is None or metric.higher_is_better is None:
        return False
    return b is None or (a > b if metric.higher_is_better else a < b)


def summarise(metric: Metric | type[Metric], results: Sequence[MetricResult]) -> MetricResult:
    """Average a metric's results over maps, with the 95 % confidence interval over the maps; a single one is returned.

    Undefined results are left out of the mean and counted in ``notes["undefined"]``.

    Raises:
        MetricError: no results.
    """
    if not results:
        raise MetricError("there are no results to summarise: measure a map with Metric.update first")
    if len(results) == 1:
        return results[0]
    values = [r.value for r in results if r.value is not None]
    notes = {"undefined": len(results) - len(values)} if len(values) < len(results) else {}
    if not values:
        return MetricResult(None, n=0, meaning=metric.meaning, notes=notes)
    interval = wilson(values) if metric.proportion else mean_interval(values)
    return MetricResult(float(np.mean(values)), *interval, n=len(values), meaning=metric.meaning, notes=notes)


def magnitude(values: Tensor, sign: Sign = "absolute") -> Tensor:
    """Sum absolute values over the channels of a map: ``Σ_c |a_c|``, or of the positive (negative) part only.

    Args:
        values: the map (C, *spatial), in any units.
        sign: part of the map that is used.

    Returns:
        (*spatial), float64, in the map's units, >= 0.

    Raises:
        UsageError: an unknown ``sign``.
    """
    values = values.double()
    if sign == "absolute":
        return values.abs().sum(0)
    if sign not in ("positive", "negative"):
        raise UsageError(f"sign={sign!r}: give absolute, positive or negative")
    return (values if sign == "positive" else -values).clamp(min=0).sum(0)


def mean_interval(samples: Any) -> tuple[float | None, float | None]:
    """Compute Student's interval of the mean of samples (n,); (None, None) for fewer than two.

    >>> low, high = mean_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    from scipy.stats import t

    values = np.asarray(samples, dtype=np.float64).ravel()
    if len(values) < 2:
        return None, None
    half = float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def wilson(outcomes: Sequence[float]) -> tuple[float, float]:
    """Compute Wilson's interval of a proportion, from outcomes (n,) in [0, 1].

    >>> [round(v, 3) for v in wilson([1.0] * 8 + [0.0] * 2)]
    [0.49, 0.943]
    """
    from scipy.stats import norm

    n, p, z = len(outcomes), float(np.mean(outcomes)), float(norm.ppf(0.5 + CONFIDENCE / 2))
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def bootstrap(statistic: Any, *samples: np.ndarray, seed: int = 0, draws: int = 1000) -> tuple[Any, Any]:
    """Compute the bootstrap percentile interval of ``statistic(*samples)`` for paired samples; (None, None) for n < 3.

    Args:
        statistic: maps arrays (draws, n), one for each of ``samples`` (n,), to (draws,).
    """
    n = len(samples[0])
    if n < 3:
        return None, None
    chosen = np.random.default_rng(seed).integers(0, n, (draws, n))
    drawn = statistic(*[np.asarray(s, dtype=np.float64)[chosen] for s in samples])
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < draws // 2:
        return None, None
    low, high = np.quantile(drawn, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)
