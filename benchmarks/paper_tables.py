"""Repeat the paper's comparison on synthetic data: infidelity, sensitivity and randomisation for vessel segmentation.

The paper is Chatterjee et al., arXiv:2110.08429: three networks that segment vessels, and maps while the weights are
randomised from the output on.

    python benchmarks/paper_tables.py [--steps 200] [--cases 2] [--table FILE] [--picture FILE]

The networks are a small U-Net, attention U-Net and U-Net with multi-scale supervision. Each is trained in a minute or
two on synthetic volumes: bright tubes are vessels, equally bright balls are not. docs/paper_tables.md lists the
differences from the paper.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.losses import DiceCELoss
from monai.networks.nets import AttentionUnet, DynUNet, UNet
from scipy.interpolate import CubicSpline
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from esegeta_monai import Explainer
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.methods import METHODS
from esegeta_monai.metrics.randomisation import execution_order, randomised, similarity
from esegeta_monai.targets import MultiClassMask

ROOT = Path(__file__).parents[1]
PATCH, VOLUME = 24, 36
TARGET = MultiClassMask(1)
#: Name, method, and True if the map has shares of F, False if it is a gradient.
TABLE = [
    ("Saliency", "Saliency", False),
    ("VanillaBackprop", "VanillaBackprop", False),
    ("GuidedBackprop", "GuidedBackprop", False),
    ("Deconvolution", "Deconvolution", False),
    ("SmoothGrad", "SmoothGrad(method='VanillaBackprop', n_samples=6)", False),
    ("InputXGradient", "InputXGradient", True),
    ("IntegratedGradients", "IntegratedGradients(n_steps=12)", True),
    ("GradientShap", "GradientShap(n_samples=8)", True),
    ("DeepLift", "DeepLift", True),
    ("GradCam", "GradCam", True),
    ("GuidedGradCam", "GuidedGradCam", True),
    ("FeatureAblation", "FeatureAblation(feature_mask='grid(size=9)')", True),
    ("Occlusion", "Occlusion(window=9, stride=9)", True),
]
PICTURED = ["VanillaBackprop", "GuidedBackprop", "InputXGradient", "DeepLift", "GradCam"]


def networks() -> dict[str, nn.Module]:
    """Return the three architectures, untrained."""
    torch.manual_seed(0)
    return {
        "U-Net": UNet(3, 1, 2, (8, 16, 32), (2, 2), num_res_units=1, norm="batch", act="relu"),
        "Attention U-Net": AttentionUnet(3, 1, 2, (8, 16, 32), (2, 2)),
        "U-Net MSS": DynUNet(
            3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], [8, 16, 32], norm_name="batch", deep_supervision=True,
            deep_supr_num=1,
        ),
    }  # fmt: skip


def drawn(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a volume (size³) and its vessel mask: tubes along smooth curves, equally bright balls, noise."""
    line = np.ones((size,) * 3, dtype=bool)
    for _ in range(generator.integers(2, 4)):
        points = generator.uniform(0, size, (4, 3))
        points[0, generator.integers(3)], points[3, generator.integers(3)] = 0, size - 1
        at = CubicSpline(np.arange(4), points)(np.linspace(0, 3, 8 * size))
        at = np.round(at[((at >= 0) & (at <= size - 1)).all(1)]).astype(int)
        line[tuple(at.T)] = False
    vessels = distance_transform_edt(line) <= generator.uniform(1.0, 1.6)
    grid = np.indices((size,) * 3)
    balls = np.zeros_like(vessels)
    for _ in range(generator.integers(2, 4)):
        centre, radius = generator.uniform(3, size - 3, 3), generator.uniform(2.5, 3.5)
        balls |= ((grid - centre[:, None, None, None]) ** 2).sum(0) <= radius**2
    image = (vessels | balls) + generator.normal(0, 0.2, vessels.shape)
    return image.astype(np.float32), vessels & ~balls


def batch(n: int, size: int, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
    pairs = [drawn(size, generator) for _ in range(n)]
    return tuple(torch.from_numpy(np.stack(p)[:, None].astype(np.float32)) for p in zip(*pairs))  # type: ignore[return-value]


def trained(network: nn.Module, steps: int) -> float:
    """Train in place; return the Dice coefficient of the vessels over eight unseen volumes."""
    loss, optimiser = DiceCELoss(to_onehot_y=True, softmax=True), torch.optim.Adam(network.parameters(), 5e-3)
    generator = np.random.default_rng(1)
    network.train()
    for _ in range(steps):
        image, label = batch(4, PATCH, generator)
        out = network(image)
        outs = out.unbind(1) if out.ndim == 6 else [out]  # the deeper outputs of the multi-scale network have full size
        optimiser.zero_grad()
        sum(loss(o, label) / 2**i for i, o in enumerate(outs)).backward()  # type: ignore[union-attr]
        optimiser.step()
    network.eval()
    image, label = batch(8, VOLUME, np.random.default_rng(2))
    with torch.no_grad():
        predicted = inferer()(image, network).argmax(1, keepdim=True) == 1
    return float(2 * (predicted & (label > 0)).sum() / (predicted.sum() + (label > 0).sum()))


def inferer() -> SlidingWindowInferer:
    return SlidingWindowInferer((PATCH,) * 3, 4, 0.5, "gaussian")


def judged(network: nn.Module, images: list[Tensor]) -> dict[tuple[str, str], list[float]]:
    """Return values by method and metric, one per case."""
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for multiplied in (True, False):
        chosen = [(name, METHODS.create(spec)) for name, spec, kind in TABLE if kind is multiplied]
        metrics = [
            f"Infidelity(n_samples=40, size=6, multiplied={multiplied}, name='infidelity')",
            "MaxSensitivity(n_samples=4, name='sensitivity')",
            "CascadingRandomisation(stages=4, n_samples=1, name='cascade')",
        ]
        evaluator = Evaluator(Explainer(network, inferer(), on_error="record"), metrics, with_controls=multiplied)
        for image in images:
            result = evaluator(MetaTensor(image), [m for _, m in chosen], [TARGET])
            for what, why in result.failed.items():
                print("failed:", what, why, flush=True)
            for row in result.rows:
                if row["value"] is not None:
                    values[row["method"], row["metric"]].append(row["value"])
    return values


def cascade_picture(network: nn.Module, image: Tensor, path: Path) -> None:
    """Draw maximum projections of maps of the trained network and with increasingly many random layers."""
    methods = [METHODS.create(spec) for name, spec, _ in TABLE if name in PICTURED]
    explainer = Explainer(network, inferer())
    (judge,) = Explainer(network, inferer()).judge(MetaTensor(image)[None], [TARGET])
    assert judge.objective is not None
    order = execution_order(judge.objective)[::-1]
    parts = np.array_split(np.array(order), 4)
    # the target's voxels stay those of the trained network
    mask = (inferer()(image[None], network).argmax(1) == 1)[0]
    frozen_target = "LabelMask('mask', 1, class_index=1)"
    columns = [[], *[[n for p in parts[: i + 1] for n in p.tolist()] for i in range(4)]]
    figure, axes = plt.subplots(len(methods), 6, figsize=(10.5, 1.8 * len(methods)))
    truth: dict[int, Tensor] = {}
    for j, layers in enumerate(columns):
        with randomised(network, layers, 1):
            attributions = list(
                explainer(MetaTensor(image)[None], methods, [frozen_target], data=[{"mask": mask[None]}])
            )
        for attribution in attributions:  # in order of completion: methods that share passes first
            i = next(i for i, method in enumerate(methods) if method is attribution.method)
            axis = axes[i, j + 1]
            assert attribution.map is not None, attribution.record
            values = attribution.map.as_tensor()
            truth.setdefault(i, values)
            axis.imshow(values.abs().sum(0).amax(0).numpy(), cmap="magma", origin="lower")
            title = "trained" if not j else f"{j} of 4 random"
            axis.set_title(f"{title}: {similarity(truth[i], values):.2f}", fontsize=8)
    for i, method in enumerate(methods):
        axes[i, 0].imshow((image[0].amax(0) if i else mask.float().amax(0)).numpy(), cmap="gray", origin="lower")
        axes[i, 0].set_title("prediction" if not i else "image", fontsize=8)
        axes[i, 0].set_ylabel(method.name, fontsize=9)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200, help="number of training steps")
    parser.add_argument("--cases", type=int, default=2)
    parser.add_argument("--table", type=Path, default=ROOT / "benchmarks" / "results" / "paper_tables.md")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "paper_cascade.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images, _ = batch(args.cases, VOLUME, np.random.default_rng(3))
    values, lines = {}, []
    for name, network in networks().items():
        began = time.monotonic()
        dice = trained(network, args.steps)
        middle = time.monotonic()
        values[name] = judged(network, list(images))
        lines.append(f"{name}: {sum(p.numel() for p in network.parameters()):,} weights, Dice {dice:.2f}")
        print(lines[-1], f"trained in {middle - began:.0f} s, tested in {time.monotonic() - middle:.0f} s", flush=True)
        if name == "U-Net":
            cascade_picture(network, images[0], args.picture)
    text = ["# Three networks, the methods of the paper", "", "`python benchmarks/paper_tables.py`", ""]
    text += [f"{'; '.join(lines)} (8 unseen volumes). Means over {args.cases} cases.", ""]
    for metric, title in (
        ("infidelity", "Infidelity (0: best, 1: as good as no map)"),
        ("sensitivity", "Max-sensitivity (0: best)"),
        ("cascade", "Similarity to the trained network's map over four stages of random weights (1: fails)"),
    ):
        text += [f"## {title}", "", "| method | " + " | ".join(values) + " |", "|---" * (1 + len(values)) + "|"]
        names = [n for n, _, _ in TABLE]
        if metric != "sensitivity":  # undefined for maps that ignore the network
            names += ["control:random", "control:sobel", "control:constant"]
        for method in names:
            cells = [values[n].get((method, metric), []) for n in values]
            text.append(f"| {method} | " + " | ".join(f"{np.mean(c):.3f}" if c else "–" for c in cells) + " |")
        text.append("")
    args.table.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
