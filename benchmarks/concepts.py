"""Passes and time of concept methods beside their naive computation; writes benchmarks/results/concept_cost.md.

    python benchmarks/concepts.py [--output FILE]

A U-Net on noise of 96x80x80 voxels in windows of 48x48x48, one thread, float32. "Naive" is what one would write without
this package: one pass of MONAI's inferer for each question.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.explain.concept_cases import case_activations, objectives_of
from esegeta_monai.explain.concept_discovery import case_units, concept_effects, find_concepts
from esegeta_monai.methods import ConceptRelevance, RegionTest
from esegeta_monai.methods.run import run
from esegeta_monai.targets import MultiClassMask

SHAPE, ROI, LAYER, TARGET = (96, 80, 80), (48, 48, 48), "model.0", MultiClassMask(1)
ROOT = Path(__file__).parents[1]


class Counted(nn.Module):
    """A network that counts the windows that it has seen."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.windows = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.windows += len(x)
        out: Tensor = self.network(x)
        return out


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, 3, (8, 16, 32), (2, 2), norm="batch").eval()


def timed(work: Callable[[], int]) -> tuple[int, float]:
    """Return what ``work`` counted, and its seconds."""
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "concept_cost.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    net, inferer = network(), SlidingWindowInferer(ROI, 2, 0.25, "gaussian")
    image = torch.randn(1, 1, *SHAPE, generator=torch.Generator().manual_seed(0))
    explainer = Explainer(net, inferer, checks=False)
    mask = torch.zeros(SHAPE)
    mask[40:50, 30:40, 30:40] = 1
    rows: list[tuple[str, int, float, str, int, float]] = []

    def objective_passes(work: Callable[[], int], prediction: int) -> tuple[int, float]:
        passes, seconds = timed(work)
        return passes + prediction, seconds

    counted = Counted(net)
    with torch.no_grad():
        inferer(image, counted)
    once = counted.windows

    # TCAV: 208 regions and the derivative; naive: the blended map of the layer, and a pass for each vector
    def tcav() -> int:
        body = torch.ones(SHAPE)
        (row,) = case_activations(explainer, image, "a", [TARGET], [LAYER], {"c": mask}, randoms=207, body=body)
        return row.passes

    def naive_tcav() -> int:
        counted.windows = 0
        kept: list[Tensor] = []

        def layer(x: Tensor) -> Tensor:
            handle = net.get_submodule(LAYER).register_forward_hook(lambda m, i, o: kept.append(o))
            counted(x)
            handle.remove()
            return F.interpolate(kept.pop(), size=x.shape[2:], mode="trilinear")

        with torch.no_grad():
            blended = inferer(image, layer)[0]
            blended[:, mask > 0].mean(1)
        for _ in range(5):  # of 200 vectors: one pass forward and backward for each
            t = torch.zeros((), requires_grad=True)
            handle = net.get_submodule(LAYER).register_forward_hook(lambda m, i, o, t=t: o + t)
            out = inferer(image, counted)
            handle.remove()
            torch.autograd.grad(out[0, 1].sum(), t)
        return counted.windows

    ours = objective_passes(tcav, once)
    passes, seconds = timed(naive_tcav)
    rows.append(
        ("TCAV, 200 vectors, 208 regions", *ours, "a pass per vector", once + (passes - once) * 40, seconds * 200 / 5)
    )

    units = [case_units(explainer, image, f"c{i}", [TARGET], LAYER, "grid(size=16)") for i in range(4)]
    concepts = find_concepts(units, "CRAFT", 4)

    def craft() -> int:
        (effect,) = concept_effects(explainer, image, "a", [TARGET], LAYER, concepts, n_samples=4)
        return effect.passes

    def naive_units() -> int:
        counted.windows = 0
        with torch.no_grad():
            for _ in range(5):  # of 180 parts: each cut out and enlarged to the window, as published
                counted(F.interpolate(image[..., :16, :16, :16], size=ROI, mode="trilinear"))
        return counted.windows

    parts = len(units[0].parts)
    ours = objective_passes(lambda: case_passes(explainer, image), once)
    passes, seconds = timed(naive_units)
    rows.append(
        (
            f"ACE, CRAFT: activations of {parts} parts",
            *ours,
            "each part enlarged to a window",
            parts,
            seconds * parts / 5,
        )
    )
    ours = objective_passes(craft, once)

    def naive_craft() -> int:
        counted.windows = 0
        with torch.no_grad():
            for _ in range(3):  # of 25 designs
                inferer(image, counted)
        return counted.windows

    designs = 1 + 4 + 4 + 16
    passes, seconds = timed(naive_craft)
    rows.append(
        (
            f"CRAFT: effects, {designs} designs",
            *ours,
            "the volume for each design",
            passes * designs // 3,
            seconds * designs / 3,
        )
    )

    objective, _ = objectives_of(explainer, image, [TARGET])
    for name, method, naive in (
        ("ConceptRelevance, one channel", ConceptRelevance(LAYER, 0), 0),
        (
            "RegionTest, 4 donors",
            RegionTest([torch.randn(1, *SHAPE) for _ in range(4)], "grid(size=48)", seam_control=False),
            1,
        ),
    ):
        before = objective.context.progress.passes

        def explain(method=method, before=before) -> int:  # type: ignore[no-untyped-def]
            with frozen(net):
                run(method, objective)
            return objective.context.progress.passes - before

        ours = objective_passes(explain, once)
        if naive:
            regions = 2 * 2 * 2
            passes, seconds = timed(naive_craft)
            count = regions * 4 + 1
            rows.append((name, *ours, "the volume for each region and donor", once * count, seconds / 3 * count))
        else:
            rows.append((name, *ours, "none through windows", 0, 0.0))
    lines = [
        "# Cost of concept methods",
        "",
        "`python benchmarks/concepts.py`: a U-Net on noise of 96x80x80 voxels, windows of 48x48x48, one thread of a",
        "busy machine. Passes are those of windows and include the prediction. Naive computations of many equal passes",
        "were timed on some of them and multiplied. The naive passes of CRAFT's effects only run the network; ours",
        "also solve for the weights of the concepts at each position of the layer, here at full resolution.",
        "",
        "| method | passes | seconds | naive | passes | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for what, passes, seconds, naive_name, naive_passes, naive_seconds in rows:
        compared = f"{naive_passes} | {naive_seconds:.1f}" if naive_passes else "– | –"
        lines.append(f"| {what} | {passes} | {seconds:.1f} | {naive_name} | {compared} |")
    args.output.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(f"written: {args.output}")


def case_passes(explainer: Explainer, image: Tensor) -> int:
    """Compute the activations of all parts of a case and the derivatives; return the window passes."""
    from esegeta_monai.engine.feature_masks import features_for
    from esegeta_monai.engine.layer_regions import PooledActivations, SummedGradients, regions_of
    from esegeta_monai.engine.sweep import sweep

    objective, _ = objectives_of(explainer, image, [TARGET])
    features = features_for("grid(size=16)").of(objective)
    with frozen(objective.model.network):
        sweep(
            objective, [PooledActivations(LAYER, regions_of(features.labels[0], len(features))), SummedGradients(LAYER)]
        )
    return objective.context.progress.passes


if __name__ == "__main__":
    main()
