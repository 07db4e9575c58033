"""Every map against the known cause: localisation and faithfulness, with the control maps beside the methods."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from causes import Cause, Example
from maps import TARGET, read_map
from torch import Tensor

from esegeta_monai.metrics import METRICS, Subject, controls
from esegeta_monai.network import Model, frozen
from esegeta_monai.objective import Objective
from esegeta_monai.targets import Case
from esegeta_monai.windows import as_inferer, plan_windows

__all__ = ["FAITHFULNESS", "LOCALISATION", "Row", "measure"]

#: Of the positive part of a map: what speaks for a lesion. Maps without a sign are positive everywhere.
LOCALISATION = {
    "pointing game": "PointingGame(sign='positive')",
    "pointing game, 8 mm": "PointingGame(sign='positive', tolerance_mm=8)",
    "relevance mass": "RelevanceMass(sign='positive')",
    "relevance rank": "RelevanceRank(sign='positive')",
    "AUC": "LocalisationAUC(sign='positive')",
}
FAITHFULNESS = {
    "deletion": "Deletion",
    "insertion": "Insertion",
    "infidelity": "Infidelity",
}
SPACING_MM = (4.0, 4.0, 4.0)
Row = dict[str, Any]


def measure(cause: Cause, example: Example, files: Mapping[str, Path], faithful: bool) -> list[Row]:
    """Rows of all methods and controls for one example; what is on disk already is read."""
    table = cause.folder / "measured" / cause.name / f"{example.seed}.csv"
    done = _read(table)
    seen = {(row["method"], row["metric"]) for row in done}
    with frozen(cause.network):
        objective = _objective(cause, example)
        maps: list[tuple[str, Tensor | None, dict[str, Any]]] = []
        for name, path in files.items():
            found = read_map(path)
            maps.append((name, found["map"], found["record"]))
        maps += [(control.name, control.map(example.image, example.seed), {}) for control in controls()]
        new: list[Row] = []
        for name, values, record in maps:
            new += _about(name, values, record, example, objective, faithful, seen)
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
) -> list[Row]:
    labels = {"": example.truth, **({"other: ": example.other} if example.other.any() else {})}
    asked: list[tuple[str, str, Tensor]] = []
    for prefix, label in labels.items():
        asked += [(prefix + metric, text, label) for metric, text in LOCALISATION.items()]
    if faithful:
        asked += [(metric, text, example.truth) for metric, text in FAITHFULNESS.items()]
    rows: list[Row] = []
    for metric, text, label in asked:
        if (name, metric) in seen:
            continue
        value: float | None = None
        if values is not None:
            subject = Subject(values, objective, label=label[0], spacing=SPACING_MM)
            value = METRICS.create(text).update(subject).value
        elif metric.removeprefix("other: ") in LOCALISATION:
            value = 0.0  # no map points nowhere
        rows.append({"method": name, "metric": metric, "value": "" if value is None else value})
    if ("seconds" in record) and (name, "seconds") not in seen:
        rows.append({"method": name, "metric": "seconds", "value": record["seconds"]})
    return rows


def _objective(cause: Cause, example: Example) -> Objective:
    with torch.no_grad():
        prediction = cause.network(example.image[None])[0]
    plan = plan_windows(as_inferer(None), tuple(example.image.shape[1:]))
    scores = TARGET.bind(prediction, Case())
    objective = Objective(
        Model(cause.network, torch.device("cpu")), example.image, plan, scores, prediction, seed=example.seed
    )
    objective.window_batch = 8
    return objective


def _read(table: Path) -> list[Row]:
    if not table.exists():
        return []
    with table.open(newline="") as file:
        return [{**row, "value": float(row["value"]) if row["value"] else ""} for row in csv.DictReader(file)]
