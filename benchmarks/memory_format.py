"""Compare explanations by the rule of memory formats with a bare loop over contiguous windows.

    python benchmarks/memory_format.py [--edge 48] [--along 4] [--repeats 3] [--only UNet]

The bare loop makes the passes of the method, forward and backward, over contiguous windows, with parameters that need
no gradient. All loops of a network take turns; each figure is the least of several rounds, in seconds of the processor
with one thread, so that other programs hardly count. The passes are counted, and the loop makes as many.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.inferers import SlidingWindowInferer
from monai.networks import nets
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.methods import keep_freed_memory
from esegeta_monai import Explainer

BATCH = 2


def networks(edge: int) -> dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...], str]]:
    """Return for each of the seven main networks how to build it, its channels, window, and target."""
    cube = (edge,) * 3
    mask, score = "MultiClassMask(1)", "ClassScore(1)"
    spleen = ((16, 32, 64, 128, 256), (2, 2, 2, 2))
    return {
        "UNet": (lambda: nets.UNet(3, 1, 2, *spleen, num_res_units=2, norm="batch"), 1, cube, mask),
        "SegResNet": (lambda: nets.SegResNet(3, 8, 4, 3), 4, cube, mask),
        "DynUNet": (
            lambda: nets.DynUNet(3, 1, 2, [3] * 4, [1, 2, 2, 2], [2] * 3, filters=[16, 32, 64, 128]),
            1,
            cube,
            mask,
        ),
        "UNETR": (
            lambda: nets.UNETR(1, 2, cube, feature_size=8, hidden_size=192, mlp_dim=768, num_heads=6),
            1,
            cube,
            mask,
        ),
        "SwinUNETR": (lambda: nets.SwinUNETR(1, 2, feature_size=12), 1, (32 * (edge // 32 or 1),) * 3, mask),
        "ResNet18": (lambda: nets.resnet18(spatial_dims=3, n_input_channels=1, num_classes=2), 1, cube, score),
        "DenseNet121 (2D)": (lambda: nets.DenseNet121(2, 1, 2), 1, (4 * edge, 4 * edge), score),
    }


def loop(network: nn.Module, windows: Tensor, forward: int, backward: int) -> Callable[[], None]:
    """Return a function that makes passes over contiguous windows (n, C, *roi), without and with a backward pass."""

    def call() -> None:
        for _ in range(forward):
            with torch.inference_mode():
                network(windows)
        for _ in range(backward):
            x = windows.clone().requires_grad_(True)
            out = network(x)
            torch.autograd.grad(out, x, torch.ones_like(out))

    return call


def measured(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Return the least processor seconds of each call over rounds in which all take turns, after one to warm up."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(repeats + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if number:
                best[name] = min(best[name], time.process_time() - began)
    return best


class Counted(nn.Module):
    """A network that counts the images that it gets without and with a backward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.images, self.backward = network, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            self.backward += len(x)
        else:
            self.images += len(x)
        return self.network(x)


def compare(
    name: str,
    build: Callable[[], nn.Module],
    channels: int,
    roi: tuple[int, ...],
    target: str,
    repeats: int,
    along: int,
) -> list[str]:
    """Return the row of a network: format, and the ratios of each method to the bare loop."""
    torch.manual_seed(0)
    network = build().eval().requires_grad_(False)
    whole = target.startswith("Class")
    image = torch.rand(1, channels, *(roi if whole else (roi[0] * along, *roi[1:])))
    inferer = None if whole else SlidingWindowInferer(roi, BATCH, 0.0)
    windows = 1 if whole else BATCH
    with torch.no_grad():
        prediction = network(image) if inferer is None else inferer(image, network)
    methods = ["Saliency", "IntegratedGradients(n_steps=4, baseline='zero')"]
    if not whole:
        methods.append(f"Occlusion(window={roi[0] // 2}, stride={roi[0] // 2})")
    cells, used = [], ""
    for method in methods:
        counted = Counted(network)
        explainer = Explainer(network, inferer, checks=False, window_batch=windows)

        def ours(explainer: Explainer = explainer, method: str = method) -> None:
            nonlocal used
            (attribution,) = explainer(image, [method], [target], prediction=prediction)
            assert attribution.map is not None, attribution.record["reason"]
            used = attribution.record["memory_format"]["used"]

        Explainer(counted, inferer, checks=False, window_batch=windows, memory_format="contiguous")(
            image, [method], [target], prediction=prediction
        )[0]
        forward, backward = -(-counted.images // windows), -(-counted.backward // windows)
        batch = torch.rand(windows, channels, *roi)
        took = measured({"ours": ours, "bare": loop(network, batch, forward, backward)}, repeats)
        cells.append(f"{took['ours'] / took['bare']:.2f} ({counted.images} + {counted.backward})")
    return [name, "x".join(map(str, roi)), used, *cells, *["–"] * (3 - len(cells))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edge", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--along", type=int, default=4, help="windows of a volume, a multiple of 2")
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "memory_format.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = []
    for name, network in networks(args.edge).items():
        if args.only in name:
            rows.append(compare(name, *network, args.repeats, args.along))
            print(" | ".join(rows[-1]), flush=True)
    head = ["network", "window", "format by the rule", "Saliency", "IntegratedGradients, 4 steps", "Occlusion"]
    lines = ["| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]]
    text = (
        "# Memory format against the bare contiguous loop\n\n`python benchmarks/memory_format.py`\n\n"
        f"Processor seconds over those of a bare loop of as many passes over contiguous windows, parameters\n"
        "without gradients, in brackets the passes without a backward pass and with one;\n"
        f"one thread, torch {torch.__version__}, {platform.machine()}.\n\n"
    )
    args.output.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
