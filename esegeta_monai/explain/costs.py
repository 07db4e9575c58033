"""Estimate the window passes, time and memory of a method on a case before it runs, and refuse costly methods."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from esegeta_monai.engine.default_layer import default_layer, layer_shapes
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.progress import Progress
from esegeta_monai.engine.run_context import RunContext, SampleComplete
from esegeta_monai.errors import EsegetaError, MethodError, MethodTimeout, named_reason
from esegeta_monai.explain.agreement import compared, part_passes
from esegeta_monai.explain.record import peak_memory, reset_peak_memory
from esegeta_monai.methods.base import Method
from esegeta_monai.methods.precision import SAMPLED
from esegeta_monai.methods.run import run

__all__ = ["COSTLY", "Cost", "check_cost", "cost_of", "costs_of", "duration", "table", "with_agreement"]

logger = logging.getLogger("esegeta_monai")

MOST_PASSES = 64
"""Passes per window after which a timed copy is stopped."""

TRIALS = 6.0
"""Seconds that the trials of all methods take together, without their timed copies."""

FEW = 4
"""Perturbations of a copy that is timed quickly."""

SHORT = 0.1
"""Seconds of a trial that is short enough to be made for each target."""

COSTLY = 100_000
"""Largest number of perturbations that a method computes unless ``allow_costly`` is set."""


@dataclass(frozen=True)
class Cost:
    """The cost of one method for one target of a case, run alone.

    Attributes:
        case: index of the image in the batch.
        method, target: their names.
        passes: windows that pass through the network, as ``window_passes`` of the record.
        exact: True if ``passes`` is exact; otherwise it depends on intermediate results (an adaptive path, say).
        naive_passes: window passes of an implementation that predicts the whole image for each perturbation, including
            windows that the target does not see.
        seconds: estimate, correct within a factor of 2; None if no pass could be timed.
        peak_memory_bytes: peak of the timed passes; memory does not grow with the number of passes.
        note: why there is nothing to compute or why the method would be refused; None if it would run.
        statement: what the method can find on this case, see `Method.foreseen`.
        whole: the trial ran to its end.
    """

    case: int
    method: str
    target: str
    passes: int = 0
    exact: bool = True
    naive_passes: int = 0
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    note: str | None = None
    statement: str | None = None
    whole: bool = False


def cost_of(
    method: Method, objective: Objective, case: int, label: str, calibration: float, *, quick: bool = False
) -> Cost:
    """Estimate the cost of a method on an objective with one target: known passes times a measured time per pass.

    The method runs for at most ``calibration`` seconds. If it ends in time, its cost is known. Otherwise a cheap copy
    (`Method.cheap_copy`), which makes every kind of pass that the method makes, is timed on a few windows.

    Args:
        method: the method.
        objective: the objective; nothing is computed or stored on it.
        case, label: index of the case and label of the target, for the result.
        calibration: time limit of the trial in seconds; several processes make no trial.
        quick: time one copy of few passes, where many methods are estimated: the time that a method takes once counts
            as time of its passes.
    """
    name, device, processes = str(method.name), objective.model.device, objective.context.processes
    local = objective.context.local
    context = RunContext(Progress(silent=True), processes, window_batch=objective.window_batch, local=local)
    trial, progress = objective.derive(context=context), context.progress
    reset_peak_memory(device)
    # several processes would reach a limit at different places and wait for each other: they all stop at once
    progress.start(calibration if processes.size == 1 else 0.0)
    began = _now(device)
    seconds: float | None
    try:
        run(method, trial)
        seconds, whole = _now(device) - began, True
        passes = progress.passes
    except MethodTimeout:
        tried = _now(device) - began, progress.passes
        whole, fresh = False, objective.derive(context=context)
        searched = 0
        if hasattr(method, "layer"):
            fresh.memo("layer shapes", lambda: {shape.name: shape for shape in layer_shapes(fresh)})
        if trial.knows("default layer"):
            progress.start()
            default_layer(fresh)
            searched = progress.passes
        passes = method.passes(fresh) + searched
        seconds = _extrapolated(method, objective, passes / processes.size, tried, quick)
    except EsegetaError as error:
        return Cost(case, name, label, note=str(error))
    exact, memory, foreseen = whole or method.passes_exact, peak_memory(device), method.foreseen(objective)
    naive = _naive(method, objective, passes)
    return Cost(case, name, label, passes, exact, naive, seconds, memory, statement=foreseen, whole=whole)


def _naive(method: Method, objective: Objective, passes: int) -> int:
    """Return the window passes of an implementation that predicts the whole image for each perturbation."""
    predictions, windows = method.predictions(objective), len(objective.windows)
    rounds = passes / windows if predictions is None else predictions + 1
    return round(rounds * len(objective.plan))


def costs_of(
    method: Method,
    objectives: Sequence[Objective],
    case: int,
    labels: Sequence[str],
    calibration: float,
    *,
    quick: bool = False,
) -> list[Cost]:
    """Estimate the costs of a method on several targets of a case, with one trial where it is enough for all.

    The trial is made for the target that is seen by most windows (`cost_of`). The time of another target is its known
    passes times the time per pass. A target has a trial of its own if its passes are not known, or are of other kinds,
    or if the trial was short.

    Args:
        method: the method.
        objectives: one for each target.
        case: index of the case.
        labels: labels of the targets.
        calibration: time limit of a trial in seconds.
        quick: see `cost_of`.
    """
    most = max(range(len(objectives)), key=lambda k: len(objectives[k].windows))
    first = cost_of(method, objectives[most], case, labels[most], calibration, quick=quick)
    known = first.note is None and first.seconds is not None and first.passes > 0 and method.passes_exact
    known = known and not (first.whole and first.seconds is not None and first.seconds < SHORT)
    costs = []
    for k, (objective, label) in enumerate(zip(objectives, labels)):
        if k == most:
            costs.append(first)
        elif known and objective.linear == objectives[most].linear:
            costs.append(_scaled(first, method, objective, label))
        else:
            costs.append(cost_of(method, objective, case, label, calibration, quick=quick))
    return costs


def _scaled(cost: Cost, method: Method, objective: Objective, label: str) -> Cost:
    """Return the cost for another target, from the time per pass of the first one."""
    processes = objective.context.processes
    context = RunContext(Progress(silent=True), processes, window_batch=objective.window_batch)
    try:
        passes = method.passes(objective.derive(context=context))
    except EsegetaError as error:
        return Cost(cost.case, cost.method, label, note=str(error))
    assert cost.seconds is not None
    return replace(
        cost,
        target=label,
        passes=passes,
        naive_passes=_naive(method, objective, passes),
        seconds=cost.seconds * passes / cost.passes,
        statement=method.foreseen(objective),
    )


def _extrapolated(
    method: Method, objective: Objective, passes: float, tried: tuple[float, int] = (0.0, 0), quick: bool = False
) -> float | None:
    """Extrapolate the seconds of ``passes`` window passes from a cheap copy, timed on one and two batches of windows.

    Two sizes separate the time per pass from the time that the method takes once. On a CPU a batch is one window,
    since a window takes as long alone as in a batch. On a busy machine their difference can be next to nothing, and
    then the estimate of thousands of passes too; so a pass counts at least half of what it took in the trial.

    Args:
        method, objective: see `cost_of`.
        passes: passes of this process.
        tried: seconds and passes of the trial that was ended.
        quick: see `cost_of`.
    """
    batch = 1 if objective.model.device.type == "cpu" else objective.window_batch
    samples = FEW if quick else SAMPLED
    small = _timed(method, objective, batch, samples)
    large = small if quick else _timed(method, objective, 2 * batch, samples)
    if large[2] is not None:
        why = named_reason(large[2])
        logger.warning("%s: its time is a rough estimate or unknown: it fails on a few windows: %s", method.name, why)
    if not large[1]:
        return None
    rate = (large[0] - small[0]) / (large[1] - small[1]) if large[1] > small[1] else 0.0
    if tried[1]:
        rate = max(rate, (tried[0] - small[0]) / tried[1] / 2)
    if rate <= 0:  # shorter than the noise of the timing, or the target sees a single window
        return passes * large[0] / large[1]
    return max(0.0, large[0] - rate * large[1]) + rate * passes


def _timed(method: Method, objective: Objective, windows: int, samples: int) -> tuple[float, int, Exception | None]:
    """Time a cheap copy of a method on the first windows that the target sees.

    Returns:
        Seconds, window passes, and the error that ended it early; None for a limit.
    """
    context = RunContext.for_sample(samples, objective.window_batch, local=objective.context.local)
    first, device = objective.derive(first_windows=windows, context=context), objective.model.device
    context.progress.start(pass_limit=MOST_PASSES * windows)
    began = _now(device)
    failure: Exception | None = None
    try:
        run(method.cheap_copy(), first)
    except (SampleComplete, MethodTimeout) as limit:
        logger.debug("%s: the timed copy has done enough: %s", method.name, limit)
    except Exception as error:  # the method fails on few windows, but maybe not on all
        failure = error
    return _now(device) - began, context.progress.passes, failure


def with_agreement(cost: Cost, method: Method, objective: Objective) -> Cost:
    """Return the cost with the passes and the time of the maps of each member and each view alone.

    Args:
        cost: that of `cost_of`.
        method, objective: see `cost_of`.
    """
    kinds = compared(objective.plan)
    if cost.note is not None or not kinds:
        return cost
    further = sum(part_passes(method, objective, kind) for kind in kinds)
    seconds = cost.seconds
    if seconds is not None and cost.passes:
        seconds *= 1 + further / cost.passes
    return replace(
        cost,
        passes=cost.passes + further,
        exact=cost.exact and method.passes_exact,
        naive_passes=cost.naive_passes * (1 + len(kinds)),
        seconds=seconds,
    )


def check_cost(method: Method, objective: Objective) -> None:
    """Check that a method scores at most `COSTLY` perturbations.

    Raises:
        MethodError: it would score more.
    """
    predictions = method.predictions(objective)
    if predictions is None or predictions <= COSTLY:
        return
    raise MethodError(
        f"{method.name} would score {predictions:,} perturbations, each in up to {len(objective.windows)} windows, and "
        f"more than {COSTLY:,} are computed only on request: use larger occluders, strides or features, or fewer "
        "samples, or allow it by --yes (allow_costly=True in Python, --explain_handler#allow_costly true with the "
        "overlay)"
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def table(costs: Sequence[tuple[str, Cost]]) -> list[str]:
    """Format costs as lines of text: a header, then one line per cost with the name of its case."""
    rows: list[list[str]] = [["case", "target", "method", "passes", "naive passes", "time", "peak memory"]]
    for case, c in costs:
        if c.note is not None:
            rows.append([case, c.target, c.method, "-", "-", "-", "-", c.note])
            continue
        assert c.peak_memory_bytes is not None
        memory = f"{c.peak_memory_bytes / 2**30:.1f} GiB"
        rows.append(
            [
                case,
                c.target,
                c.method,
                f"{'' if c.exact else 'about '}{c.passes:,}",
                f"{c.naive_passes:,}",
                "unknown" if c.seconds is None else duration(c.seconds),
                memory,
                *([] if c.statement is None else [c.statement]),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    return ["  ".join([f"{v:<{w}}" for v, w in zip(row, widths)] + row[7:]).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """Format seconds for reading.

    >>> duration(2.34), duration(75), duration(9000)
    ('2.3 s', '1 min 15 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
