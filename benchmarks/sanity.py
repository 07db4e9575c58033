"""Run the sanity checks of Adebayo et al. 2018: does a map change if the network's weights are randomised?

    python benchmarks/sanity.py [--images 8] [--seeds 3] [--volumes 3] [--picture docs/images/sanity.png]

Weights are randomised from the output to the input, one more convolution or linear layer (with its norm) per step.
After each step every method explains the same class of the same image again. Similarity to the map of the trained
network is measured by Spearman's rank correlation and SSIM of the absolute maps (`esegeta_monai.metrics`; 0 for a zero
map), and by Spearman's correlation over the voxels where Grad-CAM is positive for both networks. The reason for the
latter: random weights reverse the sign of Grad-CAM's weights about half of the time. ReLU then keeps another part of
the image, and products with Grad-CAM can only be compared in the common part.

Networks with ReLU: pneumonia2d_cnn on chest X-rays (2D; needs ESEGETA_SHARED_DATA), and the bundle
brain_lesion_classification on heads with a planted lesion (3D; needs the extra `demo`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

sys.path.insert(0, str(Path(__file__).parents[1]))

from esegeta_monai import Explainer
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.methods import LRP, GradCam, GuidedBackprop, GuidedGradCam, Method, Saliency
from esegeta_monai.metrics.randomisation import randomised, similarity
from esegeta_monai.targets import ClassScore
from tests.support import real

ROOT = Path(__file__).parents[1]
METHODS: list[Method] = [
    Saliency(),
    GradCam(),
    GuidedBackprop(),
    GuidedGradCam(),
    LRP("EpsilonPlus"),
]
CAM = 1
MEASURES = ("Spearman", "SSIM", "Spearman inside both Grad-CAMs")
COLOURS = ["#1f77b4", "#2ca02c", "#d62728", "#ff7f0e", "#8c564b"]


def stages(network: nn.Module) -> list[list[str]]:
    """Return names of the layers with weights from output to input, each with the norms after it."""
    groups: list[list[str]] = []
    for name, module in network.named_modules():  # both networks define their layers in order of execution
        if isinstance(module, (_ConvNd, nn.Linear)):
            groups.append([name])
        elif isinstance(module, _BatchNorm):
            groups[-1].append(name)
    return groups[::-1]


def maps_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return maps (methods, images, 1, *spatial) of images (images, 1, *spatial); zero if a method gives none."""
    explainer = Explainer(network)
    maps = torch.zeros(len(METHODS), *images.shape)
    for attribution in explainer(images, METHODS, [ClassScore(1)]):
        i = next(i for i, method in enumerate(METHODS) if method is attribution.method)
        if attribution.map is not None:
            maps[i, attribution.case] = attribution.map.as_tensor()
    return maps


def cascade(network: nn.Module, images: Tensor, seeds: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """Return names of the steps, and similarity (methods, steps, samples, `MEASURES`).

    Step 0 compares the trained network with itself. NaN: too few voxels to compare.
    """
    trained = maps_of(network, images)
    order = stages(network)
    result = np.ones((len(METHODS), 1 + len(order), len(seeds), len(images), len(MEASURES)))
    for draw, seed in enumerate(seeds):
        for step in range(1, len(order) + 1):
            with randomised(network, [name for stage in order[:step] for name in stage], seed):
                maps = maps_of(network, images)
            for i, j in np.ndindex(len(METHODS), len(images)):
                both = trained[i, j], maps[i, j]
                seen = (trained[CAM, j] > 0) & (maps[CAM, j] > 0)
                enough = float(seen.float().mean()) >= 0.05
                inside = similarity(*(m[seen][None] for m in both), "spearman") if enough else np.nan
                result[i, step, draw, j] = similarity(*both, "spearman"), similarity(*both, "ssim"), inside
    return ["trained", *(stage[0] for stage in order)], result.reshape(*result.shape[:2], -1, len(MEASURES))


def chest(n: int) -> tuple[nn.Module, Tensor]:
    """Return the 2D network, and X-rays with pneumonia that it classifies correctly."""
    network = real.pneumonia_cnn()
    images, labels = real.chest_images()
    with torch.no_grad():
        right = (network(images).argmax(1) == labels) & (labels == 1)
    return network, images[right][:n]


def lesions(n: int, folder: Path) -> tuple[nn.Module, Tensor]:
    """Return the 3D network, and heads with a lesion that it classifies correctly."""
    reader = BundleReader(ROOT / "bundles" / "brain_lesion_classification")
    network = reader.network
    with reader.importable():
        from scripts.anatomy import template_case
        from scripts.lesions import LesionCases

        cases = LesionCases(template_case(folder), seeds=range(2_000_000, 2_000_000 + 6 * n))
        images = torch.stack([torch.as_tensor(cases[i]["image"]).float() for i in range(len(cases))])
        labels = torch.tensor([int(cases[i]["label"]) for i in range(len(cases))])
    with torch.no_grad():
        right = (network(images).argmax(1) == labels) & (labels == 1)
    return network, images[right][:n]


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error over the samples (axis 1), without NaN."""
    n = np.isfinite(values).sum(1)
    return np.nanmean(values, 1), np.nanstd(values, 1) / np.sqrt(n)


def table(title: str, names: list[str], values: np.ndarray) -> None:
    """Print a Markdown table: each measure after the first, half of the, and all steps, mean ± standard error."""
    steps = [1, (len(names) - 1) // 2 + 1, len(names) - 1]
    print(f"\n{title}; {values.shape[2]} maps per cell (images x draws)\n")
    print("| method | " + " | ".join(f"{what}, {names[s]}" for what in MEASURES for s in steps) + " |")
    print("|---" * (1 + len(MEASURES) * len(steps)) + "|")
    for method, of_method in zip(METHODS, values):
        mean, error = mean_and_error(of_method)
        cells = [f"{mean[s, k]:.2f} ± {error[s, k]:.2f}" for k in range(len(MEASURES)) for s in steps]
        print(f"| `{method.name}` | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=16, help="images for the 2D network")
    parser.add_argument("--volumes", type=int, default=3, help="volumes for the 3D network; 0 leaves it out")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the random weights")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "images" / "sanity.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    network, images = chest(args.images)
    runs.append((f"Chest X-rays, 2D, {len(images)} images", *cascade(network, images, range(args.seeds))))
    table(*runs[-1])
    if args.volumes:
        with tempfile.TemporaryDirectory() as folder:
            network, images = lesions(args.volumes, Path(folder))
        runs.append((f"Planted lesions, 3D, {len(images)} heads", *cascade(network, images, range(args.seeds))))
        table(*runs[-1])
    figure, axes = plt.subplots(len(runs), len(MEASURES), figsize=(13, 3.3 * len(runs)), squeeze=False, sharey=True)
    for row, (title, names, values) in zip(axes, runs):
        for which, (axis, what) in enumerate(zip(row, MEASURES)):
            for method, of_method, colour in zip(METHODS, values, COLOURS):
                mean, error = mean_and_error(of_method[..., which])
                error = 1.96 * error
                axis.plot(mean, "o-", color=colour, label=method.name, markersize=3)
                axis.fill_between(range(len(mean)), mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)
            axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
            axis.set_title(f"{title}: {what}", fontsize=8)
            axis.grid(alpha=0.3)
            axis.set_xlabel("random weights from the output down to …", fontsize=8)
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=90)
    print(f"\n{args.picture}")


if __name__ == "__main__":
    main()
