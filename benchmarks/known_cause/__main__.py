"""Evaluate every method on three networks with a known cause; write the tables of docs/known_cause.md.

    python benchmarks/known_cause [--cases 24] [--expensive-cases 12] [--experiments 100] [--networks lesion,shortcut]

The networks of the bundle `brain_lesion_classification` use a planted lesion, a mark in a corner (shortcut), and a
lesion in the presence of a distractor. Experiments prove this first: only the object is removed or added. Then every
method of the registry and three controls (noise, Sobel edges, constant) are measured on cases unseen in training. Maps
and measurements are kept in `--work`, so that an interrupted run continues and a new metric needs no new maps.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from causes import CAUSES, ROOT, Cause
from interventions import Experiment, experiments
from maps import compute_maps, read_map
from measure import Row, measure
from methods import chosen_methods, is_expensive
from metrics import FAITHFULNESS, LOCALISATION, OTHER
from picture import draw
from table import (
    ORDER,
    agreement_table,
    by_cell,
    experiment_table,
    extremal_table,
    method_table,
    write_block,
    write_csv,
)

EXPERIMENT_SEEDS = 7_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=24, help="examples a network")
    parser.add_argument("--expensive-cases", type=int, default=12, help="examples for methods of many passes")
    parser.add_argument("--faithful-cases", type=int, default=8, help="examples for faithfulness")
    parser.add_argument("--experiments", type=int, default=100, help="cases for the experiments on the cause")
    parser.add_argument("--networks", default=",".join(cause.name for cause in CAUSES))
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "known_cause", help="folder of maps and results")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "known_cause.md")
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results" / "known_cause.csv")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "known_cause.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    wanted = args.networks.split(",")
    if unknown := set(wanted) - {cause.name for cause in CAUSES}:
        parser.error(f"no network {', '.join(sorted(unknown))}: choose of {', '.join(c.name for c in CAUSES)}")
    causes = [cause for cause in CAUSES if cause.name in wanted]
    tried: dict[str, tuple[list[bool], list[Experiment]]] = {}
    rows: list[Row] = []
    extremal: dict[str, list[dict[str, Any]]] = {}
    for cause in causes:
        cause.folder = args.work
        tried[cause.name] = _experiments(cause, args.experiments)
        measured, extremal[cause.name] = _measured(cause, args.cases, args.expensive_cases, args.faithful_cases)
        rows += measured
    cells = by_cell(rows)
    write_csv(cells, args.table)
    write_block(args.page, "experiments", experiment_table(tried))
    write_block(args.page, "extremal", extremal_table(extremal))
    write_block(args.page, "agreement", agreement_table(cells, [cause.name for cause in causes]))
    for cause in causes:
        other = [OTHER + ORDER] if cause.other else []
        table = method_table(cells, cause.name, [*LOCALISATION, *other], list(LOCALISATION))
        write_block(args.page, f"localisation {cause.name}", table)
        if args.faithful_cases:
            table = method_table(cells, cause.name, [*FAITHFULNESS, "seconds"], list(FAITHFULNESS), intervals=False)
            write_block(args.page, f"faithfulness {cause.name}", table)
    draw([(cause, next(cause.examples(1))) for cause in causes], args.picture)
    print(f"written: {args.page}, {args.table}, {args.picture}")


def _experiments(cause: Cause, n: int) -> tuple[list[bool], list[Experiment]]:
    """Run the experiments on the cause, or read their results from disk."""
    file = cause.folder / "experiments" / f"{cause.name}_{n}.json"
    if not file.exists():
        right, results = experiments(cause, range(EXPERIMENT_SEEDS, EXPERIMENT_SEEDS + n))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"right": right, "experiments": [vars(e) for e in results]}), encoding="utf-8")
    kept = json.loads(file.read_text(encoding="utf-8"))
    return kept["right"], [Experiment(**e) for e in kept["experiments"]]


def _measured(cause: Cause, n: int, n_expensive: int, n_faithful: int) -> tuple[list[Row], list[dict[str, Any]]]:
    """Return the rows of all examples, and the records of `ExtremalPerturbation`."""
    methods = chosen_methods(cause)
    rows: list[Row] = []
    records: list[dict[str, Any]] = []
    for i, example in enumerate(cause.examples(n)):
        start = time.perf_counter()
        now = [method for method in methods if i < n_expensive or not is_expensive(method)]
        files = dict(compute_maps(cause, example, now))
        rows += measure(cause, example, files, faithful=i < n_faithful)
        if "ExtremalPerturbation" in files:
            records.append(read_map(files["ExtremalPerturbation"])["record"])
        print(f"{cause.name} {i + 1}/{n}: {time.perf_counter() - start:.0f} s", flush=True)
    return rows, records


if __name__ == "__main__":
    main()
