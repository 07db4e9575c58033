"""What a method will cost on a case, before it is run: window passes, time, memory; and when that is too much."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from esegeta_monai.errors import EsegetaError, MethodError, MethodTimeout
from esegeta_monai.methods.base import Method, run
from esegeta_monai.objective import Objective
from esegeta_monai.record import peak_memory, reset_peak_memory

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
        seconds: an estimate, from running the method for a moment on this machine.
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
    """The cost of a method on an objective that nothing has run on yet.

    Args:
        calibration: seconds that the method is run for. What is not done by then is extrapolated from the batches that
            are, backward passes included; what comes before the first one is not counted again.
    """
    name = str(method.name)
    passes, windows = method.passes(objective), len(objective.windows)
    predictions = method.predictions(objective)
    rounds = passes / windows if predictions is None else predictions + 1
    monitor, device = objective.monitor, objective.model.device
    batches: list[float] = []
    monitor.on_check = lambda: batches.append(_now(device))
    reset_peak_memory(device)
    began = _now(device)
    monitor.start(calibration)
    whole = False
    try:
        run(method, objective)
        whole = True
    except MethodTimeout:  # the rest is extrapolated
        pass
    except EsegetaError as error:
        return Cost(case, name, label, note=str(error))
    finally:
        monitor.on_check = None
    seconds = _now(device) - began
    done = monitor.passes
    if whole:
        passes = done
    elif done:
        seconds += (passes - done) * (batches[-1] - batches[0]) / done
    naive = round(rounds * len(objective.plan))
    exact = whole or (method.passes_exact and getattr(method, "layer", "") is not None)
    return Cost(case, name, label, passes, exact, naive, seconds, peak_memory(device))


def too_costly(method: Method, objective: Objective) -> MethodError | None:
    """The error of a method that would score more than `COSTLY` perturbations."""
    predictions = method.predictions(objective)
    if predictions is None or predictions <= COSTLY:
        return None
    return MethodError(
        f"{method.name} would score {predictions:,} perturbations, each in up to {len(objective.windows)} windows, and "
        f"more than {COSTLY:,} are not computed unasked: take larger occluders, strides or features, or insist with "
        "--yes (allow_costly=True in Python)"
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
                duration(c.seconds),
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
