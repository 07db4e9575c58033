"""``python -m tests.odd``: measure the cells that are missing or out of date, and write docs/limits.md.

    --kinds, --methods   only these
    --again              also cells that are valid
    --table              measure nothing, only write the table
    --stale              measure nothing, only count the cells that are missing or out of date

It can be stopped and started again at any time: every cell is stored at once.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from typing import Any

import torch

from tests.compatibility.store import Cell
from tests.odd import CASES, KINDS, table
from tests.odd.measure import METHOD_NAMES, Outcome, measure, version
from tests.odd.table import key_of, opened


def cell_of(name: str, kind: str, case: str, outcome: Outcome) -> Cell:
    """Return the outcome of a method on a case as a cell of the store."""
    figure = "" if outcome.figure is None else f"{outcome.figure:.0e}"
    note = " ".join(outcome.note.split())[:200]
    return Cell(*key_of(name, kind, case), version(kind), outcome.verdict, figure, note)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.odd", description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--methods", nargs="+", default=METHOD_NAMES, choices=METHOD_NAMES)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--stale", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    store, start = opened(), time.process_time()
    todo = 0
    for case in (c for c in CASES if c.kind in args.kinds and not args.table):
        truths: dict[str, Any] = {}
        for name in (m for m in args.methods if case.methods is None or m in case.methods):
            if store.has(*key_of(name, case.kind, case.name), version(case.kind)) and not args.again:
                continue
            todo += 1
            if not args.stale:
                store.add(cell_of(name, case.kind, case.name, measure(name, case, truths)))
        if truths:
            print(f"{time.process_time() - start:7.1f} s {case.kind}: {case.name}", flush=True)
    print(f"{todo} cells {'are missing or out of date' if args.stale else 'measured'}")
    if not args.stale:
        print(table.write(store))


if __name__ == "__main__":
    main()
