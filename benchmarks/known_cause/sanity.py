"""Run the sanity check of Adebayo et al. for every method: does the map change with random weights?

    python benchmarks/known_cause/sanity.py [--cases 6] [--draws 2]

The weights of the lesion network are randomised, first those of the last layer, then all. Each method explains the same
class of the same case again, and its map is compared with that of the trained network (Spearman's rank correlation and
SSIM of the magnitudes, `esegeta_monai.metrics`). A method **fails** if the rank correlation is `FAILS` or more with all
weights random. (Maps that are mostly zero have a high SSIM for that reason alone.) The maps of the trained network are
shared with `python benchmarks/known_cause` (`--work`). The script writes a table of docs/known_cause.md.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from causes import CAUSES, ROOT, Cause, Example
from maps import TARGET, compute_maps, read_map
from methods import chosen_methods, is_expensive
from table import write_block
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai.methods import Method
from esegeta_monai.metrics.randomisation import randomised, similarity

FAILS = 0.5
Likeness = dict[tuple[str, str], list[tuple[float, float]]]


def redrawn(cause: Cause, example: Example, methods: list[Method], layers: list[str], draw: int) -> dict[str, Tensor]:
    """Return maps by method of the network with random weights in ``layers``."""
    maps: dict[str, Tensor] = {}
    with randomised(cause.network, layers, draw):
        explainer = Explainer(cause.network, on_error="record", window_batch=8)
        for attribution in explainer(example.image[None], methods=methods, targets=[TARGET]):
            zero = torch.zeros_like(example.image)
            plain = zero if attribution.map is None else attribution.map.as_subclass(Tensor).float()
            maps[str(attribution.method.name)] = plain
    return maps


def likeness(cause: Cause, cases: int, draws: int) -> Likeness:
    """Return (Spearman, SSIM) of each method with random last layer and with all layers random, per case and draw."""
    methods = chosen_methods(cause)
    own = [n for n, m in cause.network.named_modules() if any(True for _ in m.parameters(recurse=False))]
    result: Likeness = defaultdict(list)
    for example in cause.examples(cases):
        trained = {name: read_map(path)["map"] for name, path in compute_maps(cause, example, methods)}
        for draw in range(draws):
            now = [method for method in methods if not (draw and is_expensive(method))]
            for what, layers in (("last", own[-1:]), ("all", own)):
                for name, values in redrawn(cause, example, now, layers, draw).items():
                    if trained[name] is not None:
                        both = trained[name], values
                        result[name, what].append((similarity(*both, "spearman"), similarity(*both, "ssim")))
        print(f"{cause.name}, case {example.seed}", flush=True)
    return result


def table(likeness: Likeness) -> str:
    """Return a table sorted by similarity, failing methods first; brackets: least and greatest over cases and draws."""
    rows = []
    for name in dict.fromkeys(name for name, _ in likeness):
        (last, last_ssim), (gone, gone_ssim) = (np.mean(likeness[name, what], 0) for what in ("last", "all"))
        each = [spearman for spearman, _ in likeness[name, "all"]]
        cells = f"{last:.2f} | {last_ssim:.2f} | {gone:.2f} ({min(each):.2f} to {max(each):.2f}) | {gone_ssim:.2f}"
        rows.append((-gone, f"| {name} | {cells} | {'**fails**' if gone >= FAILS else 'passes'} |"))
    head = "| method | last layer: Spearman | SSIM | all layers: Spearman | SSIM | |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(line for _, line in sorted(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--draws", type=int, default=2, help="draws of the weights; one for methods of many passes")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "known_cause")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "known_cause.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cause = CAUSES[0]
    cause.folder = args.work
    write_block(args.page, "sanity", table(likeness(cause, args.cases, args.draws)))


if __name__ == "__main__":
    main()
