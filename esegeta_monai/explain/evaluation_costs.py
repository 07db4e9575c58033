"""Estimate how long the evaluation of a case takes before it begins, and show how far it has come."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.progress import Progress
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.errors import EsegetaError
from esegeta_monai.explain.costs import duration
from esegeta_monai.methods.base import Method
from esegeta_monai.metrics.base import Metric, MetricCost, asking

__all__ = ["EvaluationCost", "Steps", "cost_of_evaluation", "evaluation_table", "steps_of"]

logger = logging.getLogger("esegeta_monai")

EVERY_SECONDS = 10.0
"""Time between two lines of progress without a terminal."""


@dataclass(frozen=True)
class EvaluationCost:
    """The estimated cost of evaluating the maps of a case.

    Attributes:
        targets, maps, metrics: their numbers; maps include those of the controls, for each target.
        map_passes: windows that pass through the network to compute the maps; 0 if they are given.
        metric_passes: the same of the metrics, at most: where a metric changes a part of the image only, windows that
            it does not touch are not computed.
        seconds: estimate of the whole, at most, from the time of one pass.
        unknown: metrics that state no cost.
    """

    targets: int
    maps: int
    metrics: int
    map_passes: int
    metric_passes: int
    seconds: float
    unknown: tuple[str, ...] = ()

    def __str__(self) -> str:
        beside = f", beside {', '.join(self.unknown)} (unknown)" if self.unknown else ""
        return (
            f"{self.metrics} metrics of {self.maps} maps, {self.map_passes:,} window passes for maps and at most "
            f"{self.metric_passes:,} for metrics, at most about {duration(self.seconds)}{beside}"
        )


def cost_of_evaluation(
    metrics: Sequence[Metric], objective: Objective, methods: Sequence[Method], maps: int, computed: Sequence[Method]
) -> EvaluationCost:
    """Estimate the cost; a single batch of windows passes through the network, to take its time.

    Args:
        metrics: the metrics.
        objective: that of all targets of the case.
        methods: the methods of the maps, without controls.
        maps: number of maps for each target, with controls.
        computed: the methods whose maps are computed; [] if all maps are given.
    """
    windows, targets = len(objective.windows), len(objective.scores)
    costs = {str(metric.name or type(metric).__name__): metric.cost(objective) for metric in metrics}
    groups: dict[str, MetricCost] = {}
    for name, cost in costs.items():
        if cost is None:
            continue
        before = groups.get(key := cost.group or name, MetricCost())
        groups[key] = MetricCost(
            max(before.shared, cost.shared),
            max(before.each, cost.each),
            max(before.explanations, cost.explanations),
        )
    predictions = sum(cost.shared + cost.each * maps * targets for cost in groups.values())
    explanations = sum(cost.explanations for cost in groups.values())
    # the scores of the unperturbed windows are computed once, and one pass is recorded to compute others in parts
    changed = (predictions + bool(predictions)) * windows + bool(predictions and objective.context.local)
    once, seconds_once = _explanation(methods, objective)
    first, seconds_first = _explanation(computed, objective)
    work = changed + explanations * seconds_once + seconds_first
    seconds = _seconds_of_a_pass(objective) * work if work else 0.0
    unknown = tuple(name for name, cost in costs.items() if cost is None)
    return EvaluationCost(targets, maps * targets, len(metrics), first, changed + explanations * once, seconds, unknown)


def _explanation(methods: Sequence[Method], objective: Objective) -> tuple[int, int]:
    """Return the window passes of methods, and how many forward passes take their time: a backward pass for each target
    takes about as long as a forward pass."""
    passes = time_of = 0
    silent = objective.derive(
        context=RunContext(Progress(silent=True), objective.context.processes, local=objective.context.local)
    )
    for method in methods:
        try:
            needed = method.passes(silent)
        except EsegetaError as error:  # the run reports it beside the method
            logger.debug("no estimate for %s: %s", method.name, error)
            continue
        passes += needed
        time_of += needed * (1 + len(objective.scores) if method.needs_gradient else 1)
    return passes, time_of


def _seconds_of_a_pass(objective: Objective) -> float:
    """Time a forward pass of one batch; return the seconds of a window."""
    windows = list(objective.windows[: objective.window_batch])
    images = torch.cat([objective.window(w) for w in windows])
    device = objective.model.device
    with asking(objective), torch.inference_mode():
        if device.type == "cuda":
            objective.run(images, windows)  # the first pass on a device includes its start
            torch.cuda.synchronize(device)
        began = time.monotonic()
        objective.run(images, windows)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return (time.monotonic() - began) / len(windows)


def evaluation_table(costs: Sequence[tuple[str, EvaluationCost]]) -> list[str]:
    """Format costs as lines of text: a header, and one line for each case."""
    rows: list[tuple[str, ...]] = [
        ("case", "targets", "maps", "metrics", "passes: maps", "metrics, at most", "time, at most")
    ]
    for case, c in costs:
        figures = (str(c.targets), str(c.maps), str(c.metrics), f"{c.map_passes:,}", f"{c.metric_passes:,}")
        unknown = f"without {', '.join(c.unknown)}: they state no cost" if c.unknown else ""
        rows.append((case, *figures, duration(c.seconds), unknown))
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    return ["  ".join([f"{v:<{w}}" for v, w in zip(row, widths)] + list(row[7:])).rstrip() for row in rows]


@dataclass
class Steps:
    """Progress of the evaluation of a case, in values of metrics.

    Attributes:
        total: number of values.
        bar: a progress bar with ``update``; None: lines in the log, at most one in `EVERY_SECONDS`.
        done: number of values so far.
    """

    total: int
    bar: object = None
    done: int = 0
    _began: float = field(default_factory=time.monotonic)
    _shown: float = field(default_factory=time.monotonic)

    def measured(self, what: str) -> None:
        """Note that a value was measured.

        Args:
            what: target, method and metric of the value.
        """
        self.done += 1
        if self.bar is not None:
            self.bar.update()  # type: ignore[attr-defined]
            return
        now = time.monotonic()
        if now - self._shown >= EVERY_SECONDS:
            self._shown = now
            logger.info("%d of %d values after %s: %s", self.done, self.total, duration(now - self._began), what)


@contextmanager
def steps_of(total: int, *, progress: bool) -> Iterator[Steps]:
    """Show the progress of ``total`` values: as a bar on the standard error, or as lines in the log."""
    if not progress:
        yield Steps(total)
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="metrics", unit="value", file=sys.stderr) as bar:
        yield Steps(total, bar)
