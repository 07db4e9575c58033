"""Measure time and memory on an accelerator against bare passes: the BraTS bundle's SegResNet, 240x240x160 voxels.

    python benchmarks/accelerator.py [--size 240 240 160] [--steps 80] [--table benchmarks/results/accelerator.md]

The network is that of the Model Zoo's ``brats_mri_segmentation``: four input contrasts, three overlapping output
regions. It is trained briefly on spheres in noise, so that its maps have content. It is explained in the bundle's own
window of the whole volume, and in windows of 128³ with Gaussian blending, in float32 and under bfloat16 autocast.

The *bare pass* is the network's forward pass, or forward and backward to the input, on one batch of such windows, after
a warm-up pass. The ratio is the method's seconds divided by (its passes times the bare pass). Memory is the peak of
tensors on the device, including the volume. float32 is IEEE float32, as in methods. Bare passes are also measured with
torch's default TF32, together with the deviation of its gradient from float32.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.amp import correlation, figure
from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import own_modes
from esegeta_monai.explain.record import peak_memory, reset_peak_memory
from esegeta_monai.methods import GradCam, IntegratedGradients, Method, Occlusion, Saliency
from esegeta_monai.targets import ThresholdMask

REGIONS = {0: "tumor core", 1: "whole tumor", 2: "enhancing tumor"}
RADII = (0.5, 1.0, 0.3)
"""Radii of the regions relative to the whole."""

WITH_GRADIENT, FORWARD = "forward and backward", "forward"


@dataclass
class Row:
    """Result of one method for one window setting and one precision.

    Attributes:
        seconds: time of the method; ``whole`` includes hashing, checks and the target.
        ratio: time relative to its number of bare passes.
        gigabytes: peak memory on the device.
        alike: correlation with the float32 map.
    """

    windows: str
    precision: str
    method: str
    passes: int
    seconds: float
    whole: float
    ratio: float
    gigabytes: float
    alike: float | None
    fallback: str | None

    def __str__(self) -> str:
        figures = f"{self.seconds:.3f} | {self.ratio:.2f} | {self.whole:.3f} | {self.gigabytes:.2f}"
        return (
            f"| {self.windows} | {self.precision} | {self.method} | {self.passes} | {figures} | "
            f"{figure(self.alike)} | {self.fallback or ''} |"
        )


def scan(size: list[int], seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Return four contrasts of noise (4, *size) with a sphere of three shells of rising brightness, and its regions."""
    draw = torch.Generator().manual_seed(seed)
    centre = [n * (0.35 + 0.3 * float(torch.rand(1, generator=draw))) for n in size]
    axes = torch.meshgrid(*[torch.arange(n, device=device, dtype=torch.float32) for n in size], indexing="ij")
    distance = sum((a - c).square() for a, c in zip(axes, centre)).sqrt()
    radius = min(size) * (0.15 + 0.1 * float(torch.rand(1, generator=draw)))
    regions = torch.stack([distance < radius * share for share in RADII]).float()
    noise = torch.randn(4, *size, generator=torch.Generator(device).manual_seed(seed), device=device)
    shells = torch.stack([regions[1], regions[1] + regions[0], 2 * regions[2] + regions[0], -regions[1]])
    return (0.7 * noise + shells)[None], regions[None]


def trained(device: str, steps: int, edge: int) -> nn.Module:
    """Return the bundle's network after some training steps on spheres."""
    torch.manual_seed(0)
    network = SegResNet(
        blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1), init_filters=16, in_channels=4, out_channels=3, dropout_prob=0.2
    ).to(device)
    optimiser = torch.optim.Adam(network.parameters(), 1e-3)
    network.train()
    for step in range(steps):
        image, regions = scan([edge] * 3, step, device)
        loss = nn.functional.binary_cross_entropy_with_logits(network(image), regions)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


def waited(device: str) -> float:
    """Return the time after all work on the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bare(network: nn.Module, batch: Tensor, dtype: torch.dtype | None, gradient: bool) -> Callable[[], Tensor]:
    """Return a function for one bare pass of a batch: the output, or the gradient of the sum of a channel."""

    def call() -> Tensor:
        with torch.autocast(batch.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            x = batch.detach().requires_grad_(gradient)
            with torch.set_grad_enabled(gradient):
                out = network(x)
        return torch.autograd.grad(out[:, 1].float().sum(), x)[0] if gradient else out

    return call


def least(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Return the least seconds of a call, after a warm-up call."""
    call()
    times = []
    for _ in range(repeats):
        began = waited(device)
        call()
        times.append(waited(device) - began)
    return min(times)


def methods(size: list[int]) -> list[tuple[Method, str]]:
    """Return the measured methods, each with the kind of its passes."""
    occluder = max(1, max(size) // 4)
    return [
        (Saliency(), WITH_GRADIENT),
        (IntegratedGradients(n_steps=8, baseline="zero"), WITH_GRADIENT),
        (GradCam(relu=False), WITH_GRADIENT),
        (Occlusion(window=occluder), FORWARD),
    ]


def measured(network: nn.Module, image: Tensor, roi: list[int], device: str, repeats: int) -> Iterator[Row | str]:
    """Yield the rows of one window setting, and lines with the time of the bare passes."""
    whole = roi == list(image.shape[2:])
    inferer = SlidingWindowInferer(roi, 1, 0.5, "constant" if whole else "gaussian")
    windows = "one window" if whole else "x".join(map(str, roi))
    target = ThresholdMask(0.5, 1)
    with torch.no_grad():
        prediction = inferer(image, network)
    batch = image[(..., *(slice(0, n) for n in roi))]
    single: dict[str, Tensor] = {}
    for precision, dtype in (("float32", None), ("TF32", None), ("bfloat16", torch.bfloat16)):
        loop = {}
        for kind, gradient in ((FORWARD, False), (WITH_GRADIENT, True)):
            reset_peak_memory(image.device)
            call = bare(network, batch, dtype, gradient)
            with nullcontext() if precision == "TF32" else own_modes(device):
                loop[kind] = least(call, device, repeats)
                held = peak_memory(image.device) / 1e9
                single.setdefault(kind, output := call())
            alike = figure(correlation(output, single[kind]))
            yield f"| {windows} | {precision} | bare: {kind} | 1 | {loop[kind]:.3f} | | | {held:.2f} | {alike} | |"
        if precision == "TF32":  # methods do not use it
            continue
        amp = {} if dtype is None else {"amp": True, "amp_kwargs": {"dtype": dtype}}
        for method, kind in methods(list(image.shape[2:])):
            explainer = Explainer(network, inferer, device, **amp)
            took, whole_call = float("inf"), float("inf")
            for _ in range(1 if isinstance(method, Occlusion | IntegratedGradients) else 2):
                began = waited(device)
                (attribution,) = explainer(image, [method], [target], prediction=prediction)
                whole_call = min(whole_call, waited(device) - began)
                took = min(took, attribution.record["seconds"])
            assert attribution.map is not None, attribution.record["reason"]
            name, record = str(method.name), attribution.record
            single.setdefault(name, attribution.map)
            yield Row(
                *(windows, precision, name, record["window_passes"], took, whole_call),
                took / (record["window_passes"] * loop[kind]),
                record["peak_memory_bytes"] / 1e9,
                correlation(attribution.map, single[name]),
                record.get("amp_fallback"),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[240, 240, 160])
    parser.add_argument("--window", type=int, default=128, help="window edge in the second setting")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=80, help="of training")
    parser.add_argument("--repeats", type=int, default=3, help="of a bare pass")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    logging.getLogger("esegeta_monai").setLevel(logging.ERROR)
    network = trained(args.device, args.steps, min(96, *args.size))
    image, _ = scan(args.size, 10_000, args.device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    lines = [
        "# On an accelerator",
        "",
        f"`python benchmarks/accelerator.py` on {where}, torch {torch.__version__}: the BraTS bundle's SegResNet, "
        f"{'x'.join(map(str, args.size))}, after {args.steps} steps of training on spheres; target "
        f"{REGIONS[1]}. *Ratio*: seconds over passes times the bare pass. *Whole call*: with hashes, checks and the "
        "target, without the prediction. *Alike*: correlation with the float32 map.",
        "",
        "| windows | precision | method | passes | seconds | ratio | whole call | GB | alike | fallback |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for roi in (args.size, [args.window] * 3):
        for row in measured(network, image, roi, args.device, args.repeats):
            row = str(row)
            lines.append(row)
            print(row, flush=True)
            if args.table:
                args.table.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
