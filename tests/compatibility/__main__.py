"""``python -m tests.compatibility``: measure the cells that are missing or out of date, and write the table.

    --whose ours captum monai     columns (default: ours and the libraries that are installed)
    --networks, --rows, --dims    only these
    --again                       also cells that are valid
    --table                       measure nothing, only write docs/compatibility.md
    --store FILE                  file of the cells (default: tests/compatibility/cells.csv)

It can be stopped and started again at any time. One thread is enough: networks are small.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from tests.compatibility import table
from tests.compatibility.checks import ROWS, Figure, NotApplicable, Row, measure
from tests.compatibility.peers import PEERS, measure_peer
from tests.compatibility.sight import Sight
from tests.compatibility.store import STORE, Cell, Store
from tests.networks import NAMES


def measured(whose: str, row: Row, network: str, dims: int, measure: Callable[[], Figure]) -> Cell:
    """Measure one cell; an exception is a result."""
    verdict, text, note = "error", "", ""
    try:
        figure = measure()
        verdict = "green" if figure.green else "capped" if figure.capped else "red"
        text, note = f"{figure.value:.1e}", figure.note
    except NotApplicable as answer:
        verdict, note = "none", str(answer)
    except Exception as error:  # an exception is a result of the table
        note = f"{type(error).__name__}: {error}".replace("\n", " ")[:160]
    return Cell(whose, row.name, network, dims, row.version(whose), verdict, text, note)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.compatibility", description=__doc__)
    parser.add_argument(
        "--whose", nargs="+", default=["ours", *(name for name, peer in PEERS.items() if peer.installed)]
    )
    parser.add_argument("--networks", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--rows", nargs="+", default=[row.name for row in ROWS])
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3], choices=[2, 3])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--store", type=Path, default=STORE)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    store = Store(args.store)
    rows = [row for row in ROWS if row.name in args.rows]
    for dims in args.dims if not args.table else ():
        for network in args.networks:
            sight = cache(partial(Sight, network, dims))
            for whose in args.whose:
                for row in rows:
                    if whose != "ours" and (row.name not in PEERS[whose].maps or dims not in PEERS[whose].dims):
                        continue
                    if store.has(whose, row.name, network, dims, row.version(whose)) and not args.again:
                        continue
                    start = time.process_time()
                    work = (
                        (lambda r=row, s=sight: measure(r, s(True, r.neuron)))
                        if whose == "ours"
                        else (lambda r=row, s=sight, w=whose: measure_peer(PEERS[w], r, s(False, r.neuron)))
                    )
                    cell = measured(whose, row, network, dims, work)
                    store.add(cell)
                    if whose == "zennit" or (whose != "ours" and (cell.verdict == "error" or "LRP" in row.name)):
                        sight.cache_clear()  # some libraries leave their hooks and rules in the network
                    seconds = time.process_time() - start
                    print(f"{seconds:7.2f} s", *cell.key, cell.verdict, cell.figure, cell.note, flush=True)
    if not args.table:
        store.tidy(row.name for row in ROWS)
    print(table.write(store))


if __name__ == "__main__":
    main()
