"""Rows to means with bootstrap intervals, and those to the tables of `docs/known_cause.md`."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from esegeta_monai.metrics.base import bootstrap, wilson

__all__ = ["CONTROLS", "Cell", "Summary", "by_cell", "experiment_table", "extremal_table", "method_table"]
__all__ += ["write_block", "write_csv"]

CONTROLS = ("control:random", "control:sobel", "control:constant")
LOWER_IS_BETTER = ("deletion", "infidelity", "seconds")


@dataclass(frozen=True)
class Cell:
    """What is summed up: a network, a method and a metric."""

    network: str
    method: str
    metric: str


@dataclass(frozen=True)
class Summary:
    """Mean over cases with its 95 % bootstrap interval (None below three cases); ``values`` by seed."""

    mean: float
    low: float | None
    high: float | None
    values: Mapping[int, float]

    @property
    def n(self) -> int:
        return len(self.values)


def by_cell(rows: Sequence[Mapping[str, Any]]) -> dict[Cell, Summary]:
    """The mean of each cell over its cases."""
    values: dict[Cell, dict[int, float]] = defaultdict(dict)
    for row in rows:
        if row["value"] != "":
            values[Cell(row["network"], row["method"], row["metric"])][int(row["seed"])] = float(row["value"])
    return {cell: summary(found) for cell, found in values.items()}


def summary(values: Mapping[int, float]) -> Summary:
    """Of one cell."""
    numbers = np.array(list(values.values()))
    low, high = bootstrap(lambda drawn: drawn.mean(1), numbers)
    return Summary(float(numbers.mean()), low, high, dict(values))


def beats_controls(cells: Mapping[Cell, Summary], network: str, method: str, metric: str) -> bool | None:
    """Whether a method is better than each control: the interval of the paired difference over cases leaves out zero.

    None where nothing can be said (fewer than three cases).
    """
    mine = cells.get(Cell(network, method, metric))
    if mine is None:
        return None
    sign = -1 if metric in LOWER_IS_BETTER else 1
    for control in CONTROLS:
        theirs = cells.get(Cell(network, control, metric))
        if theirs is None:
            return None
        common = sorted(set(mine.values) & set(theirs.values))
        difference = np.array([sign * (mine.values[seed] - theirs.values[seed]) for seed in common])
        low, _ = bootstrap(lambda drawn: drawn.mean(1), difference)
        if low is None:
            return None
        if low <= 0:
            return False
    return True


def method_table(
    cells: Mapping[Cell, Summary], network: str, metrics: Sequence[str], order: str, judged: Sequence[str] = ()
) -> str:
    """A Markdown table: a row a method, best first by `order`; ``*`` where it beats all controls in that metric."""
    methods = {cell.method for cell in cells if cell.network == network and cell.metric == order}
    sign = -1 if order in LOWER_IS_BETTER else 1
    ranked = sorted(methods, key=lambda name: (-sign * cells[Cell(network, name, order)].mean, name))
    lines = [f"| method | cases | {' | '.join(metrics)} |", f"|---|---|{'---|' * len(metrics)}"]
    for method in ranked:
        texts = []
        for metric in metrics:
            found = cells.get(Cell(network, method, metric))
            mark = metric in judged and method not in CONTROLS and beats_controls(cells, network, method, metric)
            texts.append("–" if found is None else shown(found, metric) + ("\\*" if mark else ""))
        n = cells[Cell(network, method, order)].n
        lines.append(f"| {f'*{method}*' if method in CONTROLS else method} | {n} | {' | '.join(texts)} |")
    return "\n".join(lines)


def shown(found: Summary, metric: str) -> str:
    """``0.52 (0.41–0.63)``."""
    digits = 3 if "mass" in metric or "rank" in metric or metric == "infidelity" else 2
    text = f"{found.mean:.{digits}f}"
    return text if found.low is None else f"{text} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def experiment_table(found: Mapping[str, tuple[Sequence[bool], Sequence[Any]]]) -> str:
    """Accuracy of each network, and how often each experiment flips a right answer."""
    lines = ["| network | what was done | cases | answer flipped | margin before, after |", "|---|---|---|---|---|"]
    for name, (right, experiments) in found.items():
        low, high = wilson([float(r) for r in right])
        share = f"{np.mean(right):.3f} ({low:.3f} to {high:.3f}) right"
        lines.append(f"| {name} | nothing | {len(right)} | {share} | |")
        for experiment in experiments:
            flips = [float(f) for f in experiment.flipped]
            low, high = wilson(flips)
            margins = f"{np.mean(experiment.before):+.1f}, {np.mean(experiment.after):+.1f}"
            rate = f"{sum(flips):.0f} ({low:.2f} to {high:.2f})"
            lines.append(f"| {name} | {experiment.what} | {len(flips)} | {rate} | {margins} |")
    return "\n".join(lines)


def extremal_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What `ExtremalPerturbation` reached on each network: area, what its mask keeps, what is left without it, cost."""
    lines = [
        "| network | cases | area asked, reached | kept by the mask | left without it | seconds | memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in records.items():
        areas = [area for record in found for area in record["areas_found"]]
        asked, reached = areas[0]["area"], [area["area_reached"] for area in areas]
        kept, left = ([area[key] for area in areas] for key in ("kept", "left_without"))
        seconds = np.mean([record["seconds"] for record in found])
        memory = max(record["peak_memory_bytes"] for record in found) / 2**20
        lines.append(
            f"| {name} | {len(found)} | {asked:g}, {min(reached):.5f} to {max(reached):.5f} | {np.mean(kept):.2f} "
            f"({min(kept):.2f} to {max(kept):.2f}) | {np.mean(left):.2f} ({min(left):.2f} to {max(left):.2f}) "
            f"| {seconds:.0f} | {memory:.0f} |"
        )
    return "\n".join(lines)


def write_csv(cells: Mapping[Cell, Summary], file: Path) -> None:
    """All means, tidy: one row a network, method and metric."""
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["network", "method", "metric", "mean", "low", "high", "cases"])
        for cell in sorted(cells, key=lambda c: (c.network, c.metric, c.method)):
            found = cells[cell]
            bounds = ["" if bound is None else f"{bound:.6g}" for bound in (found.low, found.high)]
            writer.writerow([cell.network, cell.method, cell.metric, f"{found.mean:.6g}", *bounds, found.n])


def write_block(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the page's markers ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = page.read_text()
    if start not in whole or end not in whole:
        raise ValueError(f"{page} has no block {start} … {end}")
    before, rest = whole.split(start, 1)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}")
