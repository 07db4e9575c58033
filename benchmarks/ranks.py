"""Measure the speed-up of several processes that explain one volume together, each with one thread.

    torchrun --nproc_per_node 2 benchmarks/ranks.py [--settings small,real] [--table FILE.md]

*Small* is the worst case, a small U-Net whose windows take 20 ms each. *Real* is the network of the Model Zoo's
``brats_mri_segmentation``, an untrained SegResNet with four input contrasts and three output regions. Each repeat has
three parts: one process alone while the others wait; all together on one volume; each process on the whole volume, all
at the same time. The least seconds of the repeats count.

The third part gives the *ceiling* of the machine: cores share memory and caches, and if two processes slow each other
down, no division of the work can be twice as fast. The machine must have an idle core for each process, otherwise
seconds are meaningless, and processor seconds are of limited use.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.accelerator import scan, trained
from esegeta_monai import Explainer
from esegeta_monai.methods import METHODS
from esegeta_monai.targets import MultiClassMask, Target, ThresholdMask
from esegeta_monai.utils.distributed import Processes, process_group

GOAL = 1.8


@dataclass
class Setting:
    """A network, a volume, and the methods measured on them."""

    title: str
    network: nn.Module
    image: Tensor
    inferer: SlidingWindowInferer
    target: Target
    methods: tuple[str, ...]
    repeats: int


def small(args: argparse.Namespace) -> Setting:
    torch.manual_seed(0)
    network = UNet(3, 1, 3, channels=(16, 32, 64), strides=(2, 2), norm="batch").eval()
    image = torch.rand(1, 1, *[args.size] * 3, generator=torch.Generator().manual_seed(0))
    inferer = SlidingWindowInferer([args.window] * 3, 2, 0.25, "gaussian")
    title = f"Small: U-Net (16, 32, 64), {args.size}³ voxels, windows of {args.window}³ with overlap 0.25, two per pass"
    tried = methods(args.size // 4, "model.1.submodule.1")
    return Setting(title, network, image, inferer, MultiClassMask(1), tried, args.repeats)


def real(args: argparse.Namespace) -> Setting:
    size, window = args.real_size, args.real_window
    image, _ = scan([size] * 3, 0, "cpu")
    inferer = SlidingWindowInferer([window] * 3, 1, 0.25, "gaussian")
    title = (
        f"Real: SegResNet as in the BraTS bundle (16 filters, 4 channels in, 3 out), {size}³ voxels, windows of "
        f"{window}³ with overlap 0.25, one per pass"
    )
    network = trained("cpu", 0, size)
    tried = methods(size // 2, "down_layers.3")
    return Setting(title, network, image, inferer, ThresholdMask(0.5, 1), tried, args.real_repeats)


def methods(occluder: int, layer: str) -> tuple[str, ...]:
    """Return the methods; Grad-CAM twice: it finds its layer (in every process), or the layer is given."""
    return (
        "Saliency",
        "IntegratedGradients(n_steps=4, baseline='zero')",
        "GradCam(relu=False)",
        f"GradCam('{layer}', relu=False)",
        f"Occlusion(window={occluder})",
    )


@dataclass
class Took:
    """The fastest of several runs: wall-clock and processor seconds, the method's record, its map."""

    seconds: float = float("inf")
    processor: float = float("inf")
    record: dict[str, Any] = field(default_factory=dict)
    map: Tensor = field(default_factory=lambda: torch.zeros(0))

    def run(self, explainer: Explainer, setting: Setting, method: str) -> None:
        clock, processor = time.perf_counter(), time.process_time()
        (attribution,) = explainer(setting.image, METHODS.create_all(method), [setting.target])
        self.seconds = min(self.seconds, time.perf_counter() - clock)
        self.processor = min(self.processor, time.process_time() - processor)
        assert attribution.map is not None, attribution.record["reason"]
        self.record, self.map = attribution.record, attribution.map.as_tensor()


@dataclass
class Row:
    """Result of one method.

    Attributes:
        windows: number of windows that overlap the target; passes: all window passes except the prediction's.
        one, together, beside: seconds of one process alone, of all together, and of the slowest if each explains
            the whole volume.
        busy: processor seconds over seconds of the process alone; below one if others use its core.
        processor: processor seconds of one process alone over the largest of a rank.
        difference: largest difference of the maps relative to the largest value.
    """

    method: str
    windows: int
    passes: int
    one: float
    together: float
    beside: float
    busy: float
    processor: float
    difference: float
    ranks: int

    @property
    def ratio(self) -> float:
        return self.one / self.together

    @property
    def ceiling(self) -> float:
        return self.ranks * self.one / self.beside

    def cells(self) -> list[str]:
        return [
            *(f"`{self.method}`", str(self.windows), str(self.passes), f"{self.one:.2f}", f"{self.together:.2f}"),
            *(f"{self.ratio:.2f}", f"{self.ceiling:.2f}", f"{self.ratio / self.ceiling:.2f}"),
            *(f"{self.processor:.2f}", f"{self.busy:.2f}", f"{self.difference:.1e}"),
        ]


HEADER = ["method", "windows", "passes", "one (s)", "together (s)", "ratio", "ceiling", "ratio / ceiling"]
HEADER += ["processor ratio", "busy", "difference"]


def measured(setting: Setting, method: str, ranks: Processes) -> Row | None:
    """Measure a method; return the row on the first rank."""
    alone, together, beside = Took(), Took(), Took()
    for _ in range(setting.repeats):
        if ranks.rank == 0:
            alone.run(Explainer(setting.network, setting.inferer), setting, method)
        ranks.gather(None)
        together.run(Explainer(setting.network, setting.inferer, distributed=True), setting, method)
        ranks.gather(None)
        beside.run(Explainer(setting.network, setting.inferer), setting, method)
        ranks.gather(None)
    of_all = ranks.gather((together.seconds, together.processor, beside.seconds))
    if ranks.rank:
        return None
    seconds, processor, whole = (max(column) for column in zip(*of_all))
    difference = float((together.map - alone.map).abs().max() / alone.map.abs().max())
    record = together.record
    return Row(
        *(method, record["windows_used"], record["window_passes"], alone.seconds, seconds, whole),
        *(alone.processor / alone.seconds, alone.processor / processor, difference, ranks.size),
    )


def table(rows: Sequence[Row]) -> str:
    lines = [HEADER, ["---"] * len(HEADER), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load() -> str:
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


NOTES = """\
Seconds are of the whole call, including the prediction, the target, hashes and checks, which *passes* leaves out.
*Ceiling*: the number of processes times the time of one alone, divided by that of the slowest if each explains the
whole volume at the same time. *Processor ratio*: processor seconds of one process alone divided by the largest of a
rank, which excludes waiting. *Busy*: processor seconds of the process alone divided by its seconds; below 0.95 it had
no core of its
own, and the ratio of seconds is meaningless. *Difference*: of the maps, relative to the largest value."""


def verdict(rows: Sequence[Row]) -> str:
    """Summarise the rows in words."""
    reached = [f"`{r.method}`" for r in rows if r.ratio >= GOAL]
    missed = [f"`{r.method}` ({r.ratio:.2f}, ceiling {r.ceiling:.2f})" for r in rows if r.ratio < GOAL]
    shares = [r.ratio / r.ceiling for r in rows]
    text = f"{len(reached)} of {len(rows)} methods are at least {GOAL} times as fast: {', '.join(reached) or 'none'}."
    if missed:
        text += f" Below it: {', '.join(missed)}."
    text += f" They reach {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the ceiling."
    n, ranks = rows[0].windows, rows[0].ranks
    if n % ranks:
        most = -(-n // ranks)
        text += f" {n} windows cannot be divided evenly: with {most} on one process the limit is {n / most:.2f}."
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default="small,real")
    parser.add_argument("--size", type=int, default=96, help="edge of the small setting's volume in voxels")
    parser.add_argument("--window", type=int, default=48, help="edge of its windows in voxels")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--real-size", type=int, default=112)
    parser.add_argument("--real-window", type=int, default=64)
    parser.add_argument("--real-repeats", type=int, default=2)
    parser.add_argument("--table", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        parser.error("start it by torchrun --nproc_per_node 2")
    torch.set_num_threads(1)
    logging.getLogger("esegeta_monai").setLevel(logging.ERROR)
    began, before = time.perf_counter(), load()
    known = {"small": small, "real": real}
    parts = []
    with process_group("gloo") as ranks:
        for name in args.settings.split(","):
            setting, rows = known[name](args), []
            for method in setting.methods:
                row = measured(setting, method, ranks)
                if row is not None:
                    rows.append(row)
                    print(*row.cells(), sep="  ", flush=True)
            if rows:
                title = f"{setting.title}, the least of {setting.repeats} runs."
                parts.append(f"{title}\n\n{table(rows)}\n\n{verdict(rows)}")
        if ranks.rank == 0:
            text = (
                "# Several processes on one volume\n\n"
                f"`torchrun --nproc_per_node {ranks.size} benchmarks/ranks.py`: {ranks.size} processes with one thread "
                f"each against one, {os.cpu_count()} {platform.machine()} cores, torch {torch.__version__}, gloo. Load "
                f"average before: {before}; after {(time.perf_counter() - began) / 60:.0f} minutes: {load()}.\n\n"
                + "\n\n".join(parts)
                + f"\n\n{NOTES}\n"
            )
            print(f"\n{text}")
            if args.table:
                args.table.parent.mkdir(parents=True, exist_ok=True)
                args.table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
