"""Measure the cost of the checks of the network: in a run with Saliency and GradCam, and in one with Occlusion.

    python benchmarks/checks.py [--repeats 3] [--table benchmarks/results/checks.md]

Times are CPU seconds of the process with one thread (independent of other load), the minimum of several rounds in which
runs with and without checks take turns. Each run has its own copy of the network, because a network is checked once;
a second case costs nothing more. Both runs predict the image and find the layer of GradCam; *without* means
``checks=False``.
"""

from __future__ import annotations

import argparse
import copy
import logging
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import DenseNet121, SwinUNETR
from monai.transforms import GaussianSmooth
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from esegeta_monai import Explainer
from esegeta_monai.bundle import BundleReader
from esegeta_monai.engine.checks.network import check_network_once
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.windows.inferers import as_inferer, plan_windows
from esegeta_monai.methods import GradCam, Method, Occlusion, Saliency
from esegeta_monai.targets import ClassScore, MultiClassMask, Target

BUNDLE = Path(__file__).parents[1] / "bundles" / "brain_tissue_segmentation"
CPU = torch.device("cpu")


@dataclass
class Subject:
    """A network and an image.

    Attributes:
        name: name in the table.
        network: the network.
        inferer: its inferer.
        image: (1, C, *spatial).
        target: the explained score.
        occluder: edge of the occluder in voxels.
    """

    name: str
    network: nn.Module
    inferer: Any
    image: Tensor
    target: Target
    occluder: int


def volume(size: int) -> Tensor:
    """Return smooth noise (1, 1, size, size, size) in [0, 1]."""
    drawn = torch.rand((1, size, size, size), generator=torch.Generator().manual_seed(0))
    smooth = torch.as_tensor(GaussianSmooth(3.0)(drawn))
    return ((smooth - smooth.min()) / (smooth.max() - smooth.min()))[None]


def subjects() -> Iterator[Subject]:
    """Yield the networks, each on an image of one window: with more windows, runs take longer and checks do not."""
    reader = BundleReader(BUNDLE)
    edge = max(as_inferer(reader.inferer).roi_size)
    inferer = SlidingWindowInferer(edge, sw_batch_size=2, overlap=0.25)
    name = f"UNet of brain_tissue_segmentation, {edge}³"
    yield Subject(name, reader.network, inferer, volume(edge), MultiClassMask(1), edge // 2)
    torch.manual_seed(0)
    dense = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2).eval()
    yield Subject("DenseNet121 in 3D, 64³", dense, SimpleInferer(), volume(64), ClassScore(1), 32)
    swin = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=3).eval()
    windows = SlidingWindowInferer(64, sw_batch_size=2, overlap=0.25)
    yield Subject("SwinUNETR (feature size 12), 64³", swin, windows, volume(64), MultiClassMask(1), 32)


@contextmanager
def counted(network: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """Collect the shape of each window that goes through a network."""
    shapes: list[tuple[int, ...]] = []
    hook = network.register_forward_pre_hook(lambda _, args: shapes.extend([tuple(args[0].shape[2:])] * len(args[0])))
    try:
        yield shapes
    finally:
        hook.remove()


def seconds_of(subject: Subject, method: list[Method], checks: bool) -> float:
    """Return the CPU seconds of a run with a fresh copy of the network."""
    explainer = Explainer(copy.deepcopy(subject.network), subject.inferer, checks=checks)
    start = time.process_time()
    for attribution in explainer(subject.image, method, [subject.target]):
        assert attribution.map is not None
    return time.process_time() - start


def check_alone(subject: Subject) -> tuple[float, list[tuple[int, ...]]]:
    """Return the CPU seconds of the checks of the network, and the windows that they pass.

    The derivative is checked on a copy in float64, whose windows count too.
    """
    network = copy.deepcopy(subject.network).eval()
    plan = plan_windows(as_inferer(subject.inferer), subject.image.shape[2:], torch.float32)
    start = time.process_time()
    with counted(network) as shapes:
        results = check_network_once(Model(network, CPU), subject.image[0], plan)
    seconds = time.process_time() - start
    return seconds, [shapes[-1]] * sum(result.passes for result in results)


def rows(subject: Subject, repeats: int) -> Iterator[str]:
    """Yield the table's rows of a network."""
    seconds_of(subject, [Saliency()], checks=False)  # warm up
    alone = [check_alone(subject) for _ in range(repeats)]
    windows = alone[0][1]
    checks = min(seconds for seconds, _ in alone)
    runs: dict[str, list[Method]] = {
        "Saliency, GradCam": [Saliency(), GradCam()],
        f"Occlusion({subject.occluder})": [Occlusion(window=subject.occluder)],
    }
    for name, methods in runs.items():
        with_checks, without = [], []
        for _ in range(repeats):
            without.append(seconds_of(subject, methods, checks=False))
            with_checks.append(seconds_of(subject, methods, checks=True))
        a, b = min(with_checks), min(without)
        cells = [subject.name, f"{len(windows)} of {'x'.join(map(str, windows[0]))}", f"{checks:.2f}", name]
        cells += [f"{b:.2f}", f"{a:.2f}", f"{100 * checks / (b + checks):.0f} %", f"{a / b:.2f}"]
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--table", type=Path, help="write the table to this file, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("esegeta_monai").setLevel(logging.ERROR)
    lines = [
        "# The cost of the checks of the network",
        "",
        f"`python benchmarks/checks.py`. torch {torch.__version__}, one thread, {platform.machine()}; CPU seconds, "
        f"minimum of {args.repeats}. The checks run once per network, not per case or method.",
        "",
        "| network | passes of the checks | s | run of one case | s without checks | s with checks | share | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for subject in subjects():
        for line in rows(subject, args.repeats):
            print(line, flush=True)
            lines.append(line)
    text = "\n".join(lines) + "\n"
    print(text)
    if args.table:
        args.table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
