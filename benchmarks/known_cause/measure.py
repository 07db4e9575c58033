"""Evaluate every map and the control maps against the known cause: localisation and faithfulness."""

from __future__ import annotations

import csv
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from causes import Cause, Example
from maps import TARGET, read_map
from metrics import FAITHFULNESS, LOCALISATION, OTHER, metric_of
from torch import Tensor

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.metrics import MetricInput, controls
from esegeta_monai.targets import Case

__all__ = ["Row", "measure"]

SPACING_MM = (4.0, 4.0, 4.0)
Row = dict[str, Any]


def measure(cause: Cause, example: Example, files: Mapping[str, Path], faithful: bool) -> list[Row]:
    """Return the rows of all methods and controls for one example; existing rows are read from disk."""
    table = cause.folder / "measured" / cause.name / f"{example.seed}.csv"
    done = _read(table)
    seen = {(row["method"], row["metric"]) for row in done}
    with frozen(cause.network):
        objective = _objective(cause, example)
        maps: list[tuple[str, Tensor | None, dict[str, Any]]] = []
        for name, path in files.items():
            saved = read_map(path)
            maps.append((name, saved["map"], saved["record"]))
        maps += [(control.name, control.map(example.image, example.seed), {}) for control in controls()]
        new: list[Row] = []
        shared: dict[Hashable, Any] = {}
        for name, values, record in maps:
            new += _about(name, values, record, example, objective, faithful, seen, shared)
    if new:
        table.parent.mkdir(parents=True, exist_ok=True)
        part = table.with_suffix(".part")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["method", "metric", "value"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(done + new)
        part.replace(table)
    return [{"network": cause.name, "seed": example.seed, **row} for row in done + new]


def _about(
    name: str,
    values: Tensor | None,
    record: dict[str, Any],
    example: Example,
    objective: Objective,
    faithful: bool,
    seen: set[tuple[str, str]],
    shared: dict[Hashable, Any],
) -> list[Row]:
    # no map counts as a zero map
    map_ = torch.zeros_like(example.image) if values is None else values
    here = MetricInput(map_, objective, label=example.truth[0], spacing=SPACING_MM, shared=shared)
    asked = [(metric, here) for metric in (*LOCALISATION, *(FAITHFULNESS if faithful else ()))]
    if example.other.any():
        there = replace(here, label=example.other[0])
        asked += [(OTHER + metric, there) for metric in LOCALISATION]
    rows: list[Row] = []
    for metric, subject in asked:
        if (name, metric) not in seen:
            value = metric_of(metric).update(subject).value
            rows.append({"method": name, "metric": metric, "value": "" if value is None else value})
    if ("seconds" in record) and (name, "seconds") not in seen:
        rows.append({"method": name, "metric": "seconds", "value": record["seconds"]})
    return rows


def _objective(cause: Cause, example: Example) -> Objective:
    with torch.no_grad():
        prediction = cause.network(example.image[None])[0]
    plan = plan_windows(as_inferer(None), tuple(example.image.shape[1:]))
    scores = TARGET.bind(prediction, Case())
    model, context = Model(cause.network, torch.device("cpu")), RunContext(window_batch=8)
    return Objective(model, example.image, plan, scores, prediction, seed=example.seed, context=context)


def _read(table: Path) -> list[Row]:
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return [{**row, "value": float(row["value"]) if row["value"] else ""} for row in csv.DictReader(file)]
