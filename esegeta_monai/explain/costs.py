"""What a method will cost on a case, before it is run: window passes, time, memory; and when that is too much."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esegeta_monai.engine.default_layer import default_layer
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.progress import Progress
from esegeta_monai.engine.run_context import RunContext, SampleComplete
from esegeta_monai.errors import EsegetaError, MethodError, MethodTimeout
from esegeta_monai.explain.record import peak_memory, reset_peak_memory
from esegeta_monai.methods.base import Method
from esegeta_monai.methods.precision import SAMPLED
from esegeta_monai.methods.run import run

__all__ = ["COSTLY", "Cost", "cost_of", "duration", "table", "too_costly"]

logger = logging.getLogger("esegeta_monai")

COSTLY = 100_000
"""More perturbations than that are not computed unless the user says so."""


@dataclass(frozen=True)
class Cost:
    """What one method needs for one target of a case, run alone.

    Attributes:
        case: index of the image in the batch.
        method, target: their names.
        passes: windows that go through the network: what the record will have as ``window_passes``.
        exact: whether ``passes`` is exact; else it depends on what the run finds (an adaptive path, say).
        naive_passes: windows of a computation that predicts the whole image for each perturbation, or that looks at all
            windows whatever the target sees.
        seconds: an estimate, right within a factor of 2; None where no pass could be timed.
        peak_memory_bytes: of that moment; memory does not grow with the number of passes.
        note: why there is nothing to compute, or why it would be refused; None where it would run.
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


def cost_of(method: Method, objective: Objective, case: int, label: str, calibration: float) -> Cost:
    """Estimate the cost of a method on an objective with one target: known passes times a measured time per pass.

    The method is run for ``calibration`` seconds. If it ends in time, its cost is known. Otherwise a cheap copy of it
    (`Method.cheap_copy`) is timed on the first windows that the target sees: it makes every kind of pass that the
    method makes.

    Args:
        method: the method.
        objective: the case; nothing is computed or stored on it.
        case, label: index of the case and label of the target, for the result.
        calibration: seconds.
    """
    name, device = str(method.name), objective.model.device
    processes = objective.context.processes
    context = RunContext(Progress(silent=True), processes, window_batch=objective.window_batch)
    trial, progress = objective.derive(context=context), context.progress
    reset_peak_memory(device)
    seconds: float | None
    try:
        seconds, whole = _time(method, trial, calibration), True
        passes = sum(processes.gather(progress.passes))
    except MethodTimeout:
        passes, whole = method.passes(objective.derive(context=context)), False
        if trial.knows("default layer"):
            progress.start()
            default_layer(objective.derive(context=context))
            passes += progress.passes
        timed = _seconds_per_pass(method, objective)
        seconds = None if timed is None else timed[0] + passes / processes.size * timed[1]
    except EsegetaError as error:
        return Cost(case, name, label, note=str(error))
    predictions, windows = method.predictions(objective), len(objective.windows)
    rounds = passes / windows if predictions is None else predictions + 1
    naive = round(rounds * len(objective.plan))
    return Cost(case, name, label, passes, whole or method.passes_exact, naive, seconds, peak_memory(device))


def _time(method: Method, objective: Objective, limit: float | None) -> float:
    """Run a method and return the seconds it took."""
    device = objective.model.device
    began = _now(device)
    objective.context.progress.start(limit)
    run(method, objective)
    return _now(device) - began


def _seconds_per_pass(method: Method, objective: Objective) -> tuple[float, float] | None:
    """Time a cheap copy of a method on the first batch of windows that the target sees.

    Returns:
        Seconds before the first pass, and seconds per window pass; None where the copy makes no pass.
    """
    context = objective.context.for_sample(SAMPLED, objective.window_batch)
    first = objective.derive(first_windows=objective.window_batch, context=context)
    device, progress = objective.model.device, context.progress
    began = _now(device)
    progress.start()
    try:
        run(method.cheap_copy(), first)
    except SampleComplete:  # enough perturbations were scored
        pass
    except EsegetaError as error:  # the first windows alone may have nothing to explain
        logger.debug("%s: the timed copy ended early: %s", method.name, error)
    if not progress.passes or progress.first_check is None:
        return None
    return progress.first_check - began, (_now(device) - progress.first_check) / progress.passes


def too_costly(method: Method, objective: Objective) -> MethodError | None:
    """The error of a method that would score more than `COSTLY` perturbations."""
    predictions = method.predictions(objective)
    if predictions is None or predictions <= COSTLY:
        return None
    return MethodError(
        f"{method.name} would score {predictions:,} perturbations, each in up to {len(objective.windows)} windows, and "
        f"more than {COSTLY:,} are not computed unasked: take larger occluders, strides or features, or fewer samples, "
        "or insist with --yes (allow_costly=True in Python, --explain_handler#allow_costly true with the overlay)"
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


def table(costs: Sequence[tuple[str, Cost]]) -> list[str]:
    """Lines of text, a line a cost, each with the name of its case."""
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
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    return ["  ".join([f"{v:<{w}}" for v, w in zip(row, widths)] + row[7:]).rstrip() for row in rows]


def duration(seconds: float) -> str:
    """Seconds in words.

    >>> duration(2.34), duration(75), duration(9000)
    ('2.3 s', '1 min 15 s', '2 h 30 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
