"""What a method will cost on a case, before it is run: window passes, time, memory; and when that is too much."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esegeta_monai.engine.dry_run import Pace
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import EsegetaError, MethodError, MethodTimeout
from esegeta_monai.explain.record import peak_memory, reset_peak_memory
from esegeta_monai.methods.base import Method
from esegeta_monai.methods.run import run

__all__ = ["COSTLY", "Cost", "cost_of", "duration", "table", "too_costly"]

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
        seconds: an estimate, from running the method for a moment on this machine (`esegeta_monai.engine.dry_run`).
        peak_memory_bytes: of that moment; memory does not grow with the number of passes.
        note: why there is nothing to compute, or why it would be refused; None where it would run.
        at_least: whether ``seconds`` lacks what the method does after its last pass, since the moment did not come so
            far; else every part of it has been timed.
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
    at_least: bool = False


def cost_of(method: Method, objective: Objective, case: int, label: str, calibration: float) -> Cost:
    """The cost of a method on an objective that nothing has run on yet.

    Args:
        calibration: seconds that its passes over windows are run for: at least one batch of each kind of loop, and what
            it does before, between and after them. The rest of each loop is extrapolated from its own batches.
    """
    name = str(method.name)
    monitor, device = objective.monitor, objective.model.device
    reset_peak_memory(device)
    began = _now(device)
    monitor.start()
    pace = monitor.pace = Pace(calibration, lambda: _now(device), lambda: monitor.passes)
    ended = True
    try:
        run(method, objective)
    except Exception as error:
        if pace.whole and not isinstance(error, MethodTimeout):  # not of maps that mean nothing: it will fail
            if not isinstance(error, EsegetaError):
                raise
            return Cost(case, name, label, note=str(error))
        ended = False
    finally:
        monitor.pace = None
    stopped = pace.seconds()
    seconds, memory, measured = stopped - began, peak_memory(device), round(pace.passes())
    timed, alone = ended and (pace.whole or not method.steered), objective.ranks.size == 1
    if timed and alone:
        passes, exact = measured, pace.whole or method.passes_exact
    else:  # besides one or two by which a layer is found that is not named
        passes = method.passes(objective.apart())
        exact = method.passes_exact and getattr(method, "layer", "") is not None
    if not timed and measured and pace.first is not None:  # at the mean of what was seen
        seconds += max(0, passes / objective.ranks.size - measured) * (stopped - pace.first) / measured
    predictions, windows = method.predictions(objective), len(objective.windows)
    rounds = passes / windows if predictions is None else predictions + 1
    naive = round(rounds * len(objective.plan))
    return Cost(case, name, label, passes, exact, naive, seconds, memory, at_least=not ended)


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
        assert c.seconds is not None
        assert c.peak_memory_bytes is not None
        memory = f"{c.peak_memory_bytes / 2**30:.1f} GiB"
        rows.append(
            [
                case,
                c.target,
                c.method,
                f"{'' if c.exact else 'about '}{c.passes:,}",
                f"{c.naive_passes:,}",
                f"{'at least ' if c.at_least else ''}{duration(c.seconds)}",
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
