"""Measure the cost of evaluation: window passes of every metric against a naive computation, and minutes.

    python benchmarks/evaluate.py [--table benchmarks/results/evaluate.md] [--methods ...] [--full]

*Passes* are windows that go through the network. The naive computation predicts the whole image for each perturbation,
and explains all windows whenever a metric recomputes a map, separately for each map and metric. Both are counted on a
quarter of the grid of the brain tissue bundle with windows of a quarter of the size (the same number, at the same
places) and a network with a receptive field of one voxel; ``--count`` stops here. Then five methods and the three
control maps are evaluated on the MNI152 template with the tissue bundle, with every metric that needs no second network
and no further channels, for a box in the cerebellum. Times are of this machine, whose load is stated. With ``--full``
the target is the whole white matter.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import esegeta_monai.engine.perturbation.scoring
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.cases import Preprocessor, find_cases
from esegeta_monai.engine.objective import Objective
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.methods import METHODS
from esegeta_monai.metrics import METRICS, controls, masking
from esegeta_monai.metrics import removal as features
from esegeta_monai.targets import Box

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "brain_tissue_segmentation"
FIVE = ["Saliency", "InputXGradient", "GuidedBackprop", "GradCam", "LRP"]
GRID, WINDOW, WINDOWS = (18, 22, 19), 16, 8
WHOLE, SMALL = Box(2, (0, 0, 0), GRID), Box(2, (8, 4, 1), (11, 6, 3))
CEREBELLUM = Box(2, (30, 14, 3), (42, 24, 13))
#: Metrics that need second weights or several channels, which the demo does not have.
LEFT_OUT = ("DataRandomisation", "ModalityImportance", "MSFI")


class Naive:
    """Counter of the window passes of a naive computation.

    It computes all windows of the image and of each perturbation. Our other passes (recomputed maps, values) are scaled
    by the ratio of all windows to the windows that we used.
    """

    def __init__(self) -> None:
        self.predictions = self.inside = self.windows = 0

    def passes(self, ours: int) -> int:
        """Return the passes of a naive computation, given ``ours``."""
        return self.predictions * WINDOWS + (ours - self.inside) * WINDOWS // max(self.windows, 1)

    @contextmanager
    def counting(self) -> Iterator[None]:
        change = esegeta_monai.engine.perturbation.scoring.score_changes
        places = (esegeta_monai.engine.perturbation.scoring, features, masking)

        def counted(objective: Objective, perturbations: Any) -> Any:
            self.predictions += len(perturbations) + (not self.predictions)
            self.windows = len(objective.windows)
            before = objective.context.progress.passes
            changes = change(objective, perturbations)
            self.inside += objective.context.progress.passes - before
            return changes

        for module in places:
            module.score_changes = counted  # type: ignore[attr-defined]
        try:
            yield
        finally:
            for module in places:
                module.score_changes = change  # type: ignore[attr-defined]


def image() -> MetaTensor:
    return MetaTensor(torch.rand(1, *GRID, generator=torch.Generator().manual_seed(0)) + 0.1)


def explainer_of(network: nn.Module) -> Explainer:
    return Explainer(network, SlidingWindowInferer((WINDOW,) * 3, 2, 0.5, "gaussian"))


def voxel_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 1), nn.ReLU(), nn.Conv3d(4, 3, 1)).eval()


def metrics() -> list[Any]:
    return [METRICS.create(cls) for cls in METRICS if cls.__name__ not in LEFT_OUT]


def counted(target: Box, seen: int, method: str) -> list[list[str]]:
    """Return one row per metric: passes for one map, naive passes, and passes for five maps and three controls.

    Args:
        seen: number of windows that overlap the target.
    """
    label = torch.zeros(GRID)
    label[5:8, 10:13, 10:13] = 1
    alone: dict[str, tuple[int, int]] = {}
    for metric in metrics():
        naive = Naive()
        naive.windows = seen
        with naive.counting():
            result = Evaluator(explainer_of(voxel_network()), [metric], with_controls=False)(
                image(), [method], [target], label=label
            )
        (row,) = result.rows
        assert row["status"] in ("ok", "undefined", "not applicable"), row
        alone[row["metric"]] = (row["passes"], naive.passes(row["passes"]))
    together: dict[str, int] = defaultdict(int)
    everything = Evaluator(explainer_of(voxel_network()), metrics())(image(), FIVE, [target], label=label)
    for row in everything.rows:
        together[row["metric"]] += row["passes"]
    maps = len(FIVE) + len(controls())
    rows = []
    for name, (passes, naive_passes) in alone.items():
        if naive_passes or passes:
            ratio = f"{naive_passes / passes:.1f}" if passes else "-"
            rows.append([name, str(passes), str(naive_passes), ratio, f"{together[name] / maps:.0f}"])
    passes, naive_passes = (sum(column) for column in zip(*alone.values()))
    rows.append(["sum", str(passes), str(naive_passes), "", f"{sum(together.values()) / maps:.0f}"])
    return rows


def whole(methods: list[str], target: Box | str) -> tuple[list[list[str]], str]:
    """Evaluate on the template; return one row per group of metrics, and a sentence."""
    reader = BundleReader(BUNDLE, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory() as folder, reader.importable():
        file = importlib.import_module("scripts.anatomy").template_case(Path(folder))["image"]
        _, scan, data = Preprocessor(reader)(find_cases([str(file)])[0])
    explainer = Explainer(reader.network, reader.inferer, reader.device, class_names=reader.class_names)
    began, processor = time.monotonic(), time.process_time()
    result = Evaluator(explainer, metrics())(scan, methods, [target], data=data)
    minutes, busy = (time.monotonic() - began) / 60, (time.process_time() - processor) / 60
    for what, why in result.failed.items():
        print("failed:", what, why)
    passes: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    count: dict[str, set[str]] = defaultdict(set)
    for row in result.rows:
        passes[row["group"]] += row["passes"]
        seconds[row["group"]] += row["seconds"]
        count[row["group"]].add(row["metric"])
    rows = [[g, str(len(count[g])), str(passes[g]), f"{seconds[g] / 60:.1f}"] for g in passes]
    failures = [r for r in result.rows if r["status"] == "failed"]
    sentence = (
        f"{', '.join(METHODS.create(m).name for m in methods)} and three control maps, {sum(map(len, count.values()))} "
        f"metrics: **{minutes:.1f} minutes** ({busy:.1f} of processor time), {sum(passes.values())} window passes of "
        f"metrics, {len(result.rows)} values, {len(failures)} failures."
    )
    return rows, sentence


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results" / "evaluate.md")
    parser.add_argument("--methods", nargs="+", default=FIVE)
    parser.add_argument("--count", action="store_true", help="count passes only")
    parser.add_argument("--full", action="store_true", help="explain the whole white matter")
    args = parser.parse_args()
    head = ["metric", "passes of one map", "naive", "ratio", "passes per map, eight maps together"]
    small, large = counted(SMALL, 2, "InputXGradient"), counted(WHOLE, WINDOWS, "InputXGradient")
    text = [
        "# Cost of evaluation",
        "",
        "`python benchmarks/evaluate.py`. The demo's 8 windows; map: `InputXGradient`, one pass per window.",
        "Metrics without passes (localisation, complexity) are left out. In the last column metrics and maps share",
        "explanations and scores, as in `evaluate`: five methods and three controls.",
        "",
        "## A small target in 2 of 8 windows",
        "",
        table(head, small),
        "",
        "## A target in all windows",
        "",
        table(head, large),
        "",
    ]
    print("\n".join(text))
    if not args.count:
        rows, sentence = whole(args.methods, "MultiClassMask(class_index=2)" if args.full else CEREBELLUM)
        load = ", ".join(f"{v:.1f}" for v in os.getloadavg())
        box = "a box of 12 x 10 x 10 voxels in the cerebellum (2 of 8 windows)"
        text += [
            f"## The demo's scan, {'white matter' if args.full else box}",
            "",
            f"{sentence} torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores "
            f"({platform.machine()}), load {load}.",
            "",
            table(["group", "metrics", "passes", "minutes"], rows),
            "",
        ]
    args.table.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text[-5:]))


if __name__ == "__main__":
    main()
