"""Summarise rows as means with intervals, and write the tables of `docs/known_cause.md`."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from metrics import FAITHFULNESS, LOCALISATION, metric_of
from scipy.stats import spearmanr

from esegeta_monai.metrics.base import bootstrap, wilson

__all__ = ["CONTROLS", "ORDER", "Cell", "Summary", "agreement_table", "by_cell", "experiment_table", "extremal_table"]
__all__ += ["method_table", "write_block", "write_csv"]

CONTROLS = ("control:random", "control:sobel", "control:constant")
ORDER = "relevance mass"
"""The metric that sorts the tables, and with which others are compared."""


@dataclass(frozen=True)
class Cell:
    """Key of a summary: a network, a method and a metric."""

    network: str
    method: str
    metric: str


@dataclass(frozen=True)
class Summary:
    """Mean over cases with its 95 % interval (None below three cases); ``values`` by seed."""

    mean: float
    low: float | None
    high: float | None
    values: Mapping[int, float]

    @property
    def n(self) -> int:
        return len(self.values)


def by_cell(rows: Sequence[Mapping[str, Any]]) -> dict[Cell, Summary]:
    """Return the mean of each cell over its cases; cells with an undefined value are left out."""
    values: dict[Cell, dict[int, float]] = defaultdict(dict)
    undefined = set()
    for row in rows:
        cell = Cell(row["network"], row["method"], row["metric"])
        if row["value"] == "":
            undefined.add(cell)
        else:
            values[cell][int(row["seed"])] = float(row["value"])
    return {cell: summary(by_seed, cell.metric) for cell, by_seed in values.items() if cell not in undefined}


def summary(values: Mapping[int, float], metric: str) -> Summary:
    """Summarise one cell, with Wilson's interval for yes or no per case, otherwise the bootstrap over cases."""
    numbers = np.array(list(values.values()))
    low: float | None
    high: float | None
    if metric != "seconds" and metric_of(metric).proportion:
        low, high = wilson(numbers.tolist()) if len(numbers) > 2 else (None, None)
    else:
        low, high = bootstrap(lambda drawn: drawn.mean(1), numbers)
    return Summary(float(numbers.mean()), low, high, dict(values))


def direction(metric: str) -> int:
    """Return 1 if higher is better, -1 if lower is, 0 if neither (the value only describes the map)."""
    higher = metric_of(metric).higher_is_better
    return 0 if higher is None else 1 if higher else -1


def gains(cells: Mapping[Cell, Summary], network: str, method: str, metric: str) -> list[np.ndarray]:
    """Return the advantage of a method over each control, one value per common case.

    The result is empty if a value is undefined or the metric has no direction. Controls for which the metric is
    undefined are left out.
    """
    own = cells.get(Cell(network, method, metric))
    if own is None or not direction(metric):
        return []
    differences = []
    for control in CONTROLS:
        of_control = cells.get(Cell(network, control, metric))
        if of_control is not None:
            common = sorted(set(own.values) & set(of_control.values))
            differences.append(
                np.array([direction(metric) * (own.values[seed] - of_control.values[seed]) for seed in common])
            )
    return differences


def beats_controls(cells: Mapping[Cell, Summary], network: str, method: str, metric: str) -> bool | None:
    """Return True if a method beats each control: the interval of the paired difference over cases excludes zero.

    None: undecidable (see `gains`; fewer than three cases).
    """
    lows = [bootstrap(lambda drawn: drawn.mean(1), gain)[0] for gain in gains(cells, network, method, metric)]
    if not lows or None in lows:
        return None
    return min(lows) > 0


def method_table(
    cells: Mapping[Cell, Summary],
    network: str,
    metrics: Sequence[str],
    judged: Sequence[str],
    intervals: bool = True,
) -> str:
    """Return a Markdown table with one row per method, sorted by `ORDER`; ``*``: beats all controls in that metric.

    "cases" counts the cases of the metrics in ``judged``, which get stars.
    """
    methods = {cell.method for cell in cells if cell.network == network and cell.metric == ORDER}
    ranked = sorted(methods, key=lambda name: (-cells[Cell(network, name, ORDER)].mean, name))
    lines = [f"| method | cases | {' | '.join(metrics)} |", f"|---|---|{'---|' * len(metrics)}"]
    for method in ranked:
        texts, n = [], 0
        for metric in metrics:
            summary = cells.get(Cell(network, method, metric))
            mark = metric in judged and method not in CONTROLS and beats_controls(cells, network, method, metric)
            texts.append("–" if summary is None else shown(summary, metric, intervals) + ("\\*" if mark else ""))
            n = max(n, summary.n) if summary is not None and metric in judged else n
        lines.append(f"| {f'*{method}*' if method in CONTROLS else method} | {n} | {' | '.join(texts)} |")
    return "\n".join(lines)


def shown(summary: Summary, metric: str, interval: bool = True) -> str:
    """Format a summary like ``0.52 (0.41–0.63)``."""
    digits = 3 if metric.endswith(("relevance mass", "relevance rank")) else 1 if metric == "distance" else 2
    text = f"{summary.mean:.{digits}f}"
    if summary.low is None or not interval:
        return text
    return f"{text} ({summary.low:.{digits}f}–{summary.high:.{digits}f})"


def agreement_table(cells: Mapping[Cell, Summary], networks: Sequence[str]) -> str:
    """Return a table with one row per metric: its agreement with `ORDER`, and methods above the controls, by network.

    Agreement is Spearman's correlation over methods between the metric's means (signed so that higher is better) and
    those of `ORDER` on the same cases; methods with equal values in every localisation metric count once. The second
    column is the number of methods whose mean is better than that of each control.
    """
    columns = [f"{network}: {what}" for network in networks for what in ("correlation", "above controls")]
    lines = [f"| metric | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for metric in (*LOCALISATION, *FAITHFULNESS):
        texts = []
        for network in networks:
            methods = {c.method for c in cells if c.network == network and c.metric == metric} - {*CONTROLS}
            better = [all(g.mean() > 0 for g in gains(cells, network, method, metric)) for method in methods]
            rho = correlation(cells, network, sorted(methods), metric)
            texts += ["–" if rho is None else f"{rho:+.2f}", f"{sum(better)} of {len(methods)}"]
        lines.append(f"| {metric} | {' | '.join(texts)} |")
    return "\n".join(lines)


def correlation(cells: Mapping[Cell, Summary], network: str, methods: Sequence[str], metric: str) -> float | None:
    """Return the agreement (see `agreement_table`); None if all values are equal or the metric has no direction."""
    pairs = {}
    for method in methods:
        summary = cells[Cell(network, method, metric)]
        mass = cells[Cell(network, method, ORDER)].values
        about = (cells.get(Cell(network, method, name)) for name in LOCALISATION)  # None: undefined in some case
        same = tuple(None if cell is None else round(cell.mean, 6) for cell in about)
        pairs[same] = (direction(metric) * summary.mean, np.mean([mass[seed] for seed in summary.values]))
    if len({value for value, _ in pairs.values()}) < 2:
        return None
    return float(spearmanr(*zip(*pairs.values())).statistic)


def experiment_table(results: Mapping[str, tuple[Sequence[bool], Sequence[Any]]]) -> str:
    """Return a table of the accuracy of each network, and how often each experiment flips a correct answer."""
    lines = ["| network | intervention | cases | answer flipped | margin before, after |", "|---|---|---|---|---|"]
    for name, (right, experiments) in results.items():
        low, high = wilson([float(r) for r in right])
        share = f"{np.mean(right):.3f} ({low:.3f} to {high:.3f}) right"
        lines.append(f"| {name} | none | {len(right)} | {share} | |")
        for experiment in experiments:
            flips = [float(f) for f in experiment.flipped]
            low, high = wilson(flips)
            margins = f"{np.mean(experiment.before):+.1f}, {np.mean(experiment.after):+.1f}"
            rate = f"{sum(flips):.0f} ({low:.2f} to {high:.2f})"
            lines.append(f"| {name} | {experiment.what} | {len(flips)} | {rate} | {margins} |")
    return "\n".join(lines)


def extremal_table(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table of `ExtremalPerturbation` by network: area, score kept with the mask, score without it, cost."""
    lines = [
        "| network | cases | area requested, reached | kept by the mask | left without it | seconds | memory, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, group in records.items():
        areas = [area for record in group for area in record["areas_found"]]
        asked, reached = areas[0]["area"], [area["area_reached"] for area in areas]
        kept, left = ([area[key] for area in areas] for key in ("kept", "left_without"))
        seconds = np.mean([record["seconds"] for record in group])
        memory = max(record["peak_memory_bytes"] for record in group) / 2**20
        lines.append(
            f"| {name} | {len(group)} | {asked:g}, {min(reached):.5f} to {max(reached):.5f} | {np.mean(kept):.2f} "
            f"({min(kept):.2f} to {max(kept):.2f}) | {np.mean(left):.2f} ({min(left):.2f} to {max(left):.2f}) "
            f"| {seconds:.0f} | {memory:.0f} |"
        )
    return "\n".join(lines)


def write_csv(cells: Mapping[Cell, Summary], file: Path) -> None:
    """Write all means, one row per network, method and metric."""
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["network", "method", "metric", "mean", "low", "high", "cases"])
        for cell in sorted(cells, key=lambda c: (c.network, c.metric, c.method)):
            summary = cells[cell]
            bounds = ["" if bound is None else f"{bound:.6g}" for bound in (summary.low, summary.high)]
            writer.writerow([cell.network, cell.method, cell.metric, f"{summary.mean:.6g}", *bounds, summary.n])


def write_block(page: Path, name: str, text: str) -> None:
    """Put ``text`` between the page's markers ``<!-- name -->`` and ``<!-- /name -->``."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    whole = page.read_text(encoding="utf-8")
    if start not in whole or end not in whole:
        raise ValueError(f"{page} has no block {start} … {end}")
    before, rest = whole.split(start, 1)
    page.write_text(f"{before}{start}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
