"""Influence, detection and attention on networks whose answer is known; writes benchmarks/results/known_answers.md.

    python benchmarks/known_answers.py [--output FILE]

One thread, float32, about two minutes on the CPU. Each row has its control in the same table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet, ViT
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.parameter_gradients import parameter_gradients, parameters_of
from esegeta_monai.explain.influence import TracIn, Trak
from esegeta_monai.targets import DetectedBox, DetectorMap, MultiClassMask
from tests.support.influence import auc, flipped_labels
from tests.support.objectives import objective_of

ROOT = Path(__file__).parents[1]
CASES = 20


def inside(attribution: Tensor, mask: Tensor) -> float:
    """Share of a map's absolute sum inside a mask."""
    values = torch.as_tensor(attribution).as_subclass(Tensor).double().abs().sum(0)
    return float(values[mask].sum() / values.sum())


TEXT = """\
# Influence, detection and attention on networks with a known answer

`python benchmarks/known_answers.py`; one thread, float32, the CPU.

## Influence

Classifiers trained by plain SGD on 200 cases, 5 % with the wrong label (`tests/support/influence.py`), two checkpoints.
AUC: share of pairs (flipped, other) in which the flipped one ranks higher. *First*: flipped labels among as many cases
at the head of the list. Here the loss alone finds them too.

{influence}

## Detection

Detectors built by hand: the logit of a box is the mean intensity in its anchor; the second also adds half of that of a
mark in the corner, so that a third of its map belongs there. Mean share of the absolute map of `DetectedBox(0)` over 5
images: inside the box, inside another, less bright object, and inside the mark.

{detection}

## Attention

Vision transformers with a class token. A bright or a dark patch decides the class, a checkered one does not. Mean share
of the absolute map inside each over {cases} test images; *chance* is the patch's share of the image.

{attention}

## Cost of gradients with respect to the weights

A U-Net on 64³ voxels in windows of 32³ (overlap 0.5, two a batch), the logit of a class under its mask; median of three
interleaved runs. *Naive*: autograd through the whole inferer. MiB: the most that was kept for a backward pass. A
training case costs one forward and one backward pass of each of its patches at each checkpoint.

{cost}
"""

# -- influence ------------------------------------------------------------------------------------------------------


def influence_rows() -> Iterator[list[str]]:
    """AUC with which flipped labels lead the list, and controls."""
    for dims in (2, 3):
        chance = []
        for method in (TracIn(), Trak(512)):
            result, wrong = flipped_labels(dims, method)
            rng = np.random.default_rng(0)
            chance = [auc(rng.random(len(wrong)), wrong) for _ in range(200)]
            first = int(wrong[np.argsort(-result.self_influence)[: wrong.sum()]].sum())
            name = type(method).__name__
            yield [
                f"{dims}D",
                f"self-influence, {'TRAK' if name == 'Trak' else name}",
                f"{auc(result.self_influence, wrong):.3f}",
                f"{first} of {wrong.sum()}",
            ]
        first = int(wrong[np.argsort(-result.losses)[: wrong.sum()]].sum())
        yield [f"{dims}D", "control: loss alone", f"{auc(result.losses, wrong):.3f}", f"{first} of {wrong.sum()}"]
        low, high = np.percentile(chance, (2.5, 97.5))
        yield [
            f"{dims}D",
            "control: random order",
            f"{np.mean(chance):.3f} ({low:.2f} to {high:.2f})",
            f"{0.05 * wrong.sum():.1f} expected",
        ]


# -- detection ------------------------------------------------------------------------------------------------------

ANCHOR, MARK = 6, 4


class KnownDetector(nn.Module):
    """The logit of a box is the mean intensity in its anchor minus 0.5, plus ``shortcut`` times that of the mark in the
    first corner."""

    def __init__(self, dims: int, shortcut: float) -> None:
        super().__init__()
        conv = (nn.Conv2d, nn.Conv3d)[dims - 2]
        self.mean = conv(1, 1, ANCHOR, 2, ANCHOR // 2 - 1, bias=False)
        nn.init.constant_(self.mean.weight, 6 / ANCHOR**dims)
        self.dims, self.shortcut = dims, shortcut

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        corner = x[(slice(None), slice(None), *[slice(0, MARK)] * self.dims)].flatten(1).mean(1)
        scores = self.mean(x) - 3 + self.shortcut * 6 * corner.reshape(-1, *[1] * (self.dims + 1))
        return {
            "classification": [scores],
            "box_regression": [scores.new_zeros(len(x), 2 * self.dims, *scores.shape[2:])],
        }


def detection_rows() -> Iterator[list[str]]:
    """Share of the map of the best box inside the box, inside another object, inside the mark, and of random maps."""
    methods = ["InputXGradient", "IntegratedGradients(baseline='zero', n_steps=8)", "Occlusion(window=2, baseline=0)"]
    for dims in (2, 3):
        for shortcut in (0.0, 0.5):
            shares: dict[str, list[list[float]]] = {m: [] for m in [*methods, "control: random map"]}
            for case in range(5):
                rng = np.random.default_rng(case)
                image = torch.from_numpy(rng.random((1, *[24] * dims)) * 0.1).float()
                first, second, corner = (torch.zeros(image.shape[1:], dtype=torch.bool) for _ in range(3))
                first[(slice(6, 12), *[slice(10, 16)] * (dims - 1))] = True
                second[(slice(16, 22), *[slice(2, 8)] * (dims - 1))] = True
                corner[(slice(0, MARK),) * dims] = True
                image[0, first] += 1.0
                image[0, second] += 0.9
                image[0, corner] += 1.0
                network = DetectorMap(KnownDetector(dims, shortcut).eval())
                target = DetectedBox(
                    0, 1, [[[ANCHOR] * dims]], [2], score_threshold=0.5, candidates=50, nms_threshold=0.2, kept=5
                )
                explainer = Explainer(network, checks=False, head="raw")
                for method in methods:
                    (a,) = explainer(image[None], [method], [target])
                    if a.map is None:
                        raise RuntimeError(a.record.get("reason"))
                    shares[method].append([inside(a.map, m) for m in (first, second, corner)])
                random = torch.from_numpy(rng.normal(size=image.shape))
                shares["control: random map"].append([inside(random, m) for m in (first, second, corner)])
            name = "box and mark" if shortcut else "box alone"
            for method, values in shares.items():
                yield [f"{dims}D, {name}", method, *(f"{v:.3f}" for v in np.mean(values, 0))]


# -- attention ------------------------------------------------------------------------------------------------------

PATCH = 4


def patches(count: int, dims: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Noise with a bright or dark patch, whose sign is the class, and a checkered patch that decides nothing."""
    rng = np.random.default_rng(seed)
    size = (16, 12)[dims - 2]
    images = rng.normal(0, 0.3, (count, 1, *[size] * dims))
    cells = np.array(list(np.ndindex(*[size // PATCH] * dims)))
    masks = np.zeros((2, count, *[size] * dims), dtype=bool)
    classes = rng.integers(0, 2, count)
    checkers = np.indices([PATCH] * dims).sum(0) % 2 * 2.0 - 1
    for n in range(count):
        for which, cell in enumerate(cells[rng.choice(len(cells), 2, replace=False)]):
            box = tuple(slice(i * PATCH, (i + 1) * PATCH) for i in cell)
            masks[(which, n, *box)] = True
            images[(n, 0, *box)] += checkers * 1.5 if which else (1.5 if classes[n] else -1.5)
    return torch.from_numpy(images).float(), torch.from_numpy(classes), *torch.from_numpy(masks)


class Classifier(nn.Module):
    """A vision transformer that reads its class token."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        size = (16, 12)[dims - 2]
        self.vit = ViT(
            1, (size,) * dims, (PATCH,) * dims, hidden_size=16, mlp_dim=32, num_layers=2, num_heads=2,
            classification=True, num_classes=2, post_activation="none", spatial_dims=dims,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.vit(x)[0]
        return out


def attention_rows() -> Iterator[list[str]]:
    """Share of the map inside the patch that decides and inside the one that does not, trained and untrained."""
    methods = ["AttentionRollout", "AttentionRelevance", "LeGrad", "InputXGradient"]
    for dims in (2, 3):
        torch.manual_seed(0)
        network, untrained = Classifier(dims), Classifier(dims).eval()
        images, classes, *_ = patches(400, dims, 0)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(300):
            rows = torch.randint(len(images), (32,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[rows]), classes[rows]).backward()
            optimizer.step()
        network.eval()
        test, answer, deciding, other = patches(CASES, dims, 1)
        with torch.no_grad():
            right = float((network(test).argmax(1) == answer).double().mean())
        chance = float(deciding[0].double().mean())
        for name, model in ((f"trained ({100 * right:.0f} % right)", network), ("control: untrained", untrained)):
            for method in methods:
                shares = []
                for n in range(CASES):
                    (a,) = Explainer(model, checks=False)(test[n : n + 1], [method], [f"ClassScore({int(answer[n])})"])
                    shares.append([inside(a.map, m) for m in (deciding[n], other[n])])
                yield [f"{dims}D, {name}", method, *(f"{v:.3f}" for v in np.mean(shares, 0)), f"{chance:.3f}"]


# -- cost -----------------------------------------------------------------------------------------------------------


def _measured(work: Callable[[], Any]) -> tuple[float, int, int]:
    """Return processor seconds, windows that the network saw, and the most bytes kept for a backward pass."""
    kept, most = 0, 0

    class Held:
        def __init__(self, value: Tensor) -> None:
            nonlocal kept, most
            self.value, self.size = value, value.numel() * value.element_size()
            kept += self.size
            most = max(most, kept)

        def __del__(self) -> None:
            nonlocal kept
            kept -= self.size

    start = time.process_time()
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.value):
        windows = work()
    return time.process_time() - start, windows, most


def cost_rows() -> Iterator[list[str]]:
    """Gradients of the weights: windows one batch at a time, and naive autograd through the whole inferer."""
    torch.manual_seed(0)
    network = UNet(3, 1, 3, (8, 16, 32), (2, 2), norm="batch").eval()
    inferer = SlidingWindowInferer((32, 32, 32), 2, 0.5, "gaussian")
    image = torch.rand(1, 64, 64, 64)
    objective = objective_of(network, image, [MultiClassMask(1)], inferer)
    seen = [0]
    network.register_forward_pre_hook(lambda _, x: seen.__setitem__(0, seen[0] + len(x[0])))

    def counted(work: Callable[[], Any]) -> Callable[[], int]:
        def run() -> int:
            seen[0] = 0
            work()
            return seen[0]

        return run

    def ours() -> None:
        with evaluating(network, "cpu"):
            parameter_gradients(objective, parameters_of(network))

    def naive() -> None:
        score = objective.scores[0]
        prediction = inferer(image[None], network)[0]
        torch.autograd.grad(score.value(score.crop(prediction)), list(network.parameters()))

    runs: dict[str, list[tuple[float, int, int]]] = {"ours": [], "naive": []}
    for _ in range(3):
        for name, work in (("ours", ours), ("naive", naive)):
            runs[name].append(_measured(counted(work)))
    for name, values in runs.items():
        seconds = float(np.median([v[0] for v in values]))
        yield [name, str(values[0][1]), f"{seconds:.2f}", f"{values[0][2] / 2**20:.0f}"]


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "known_answers.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    influence = table(["network", "order", "AUC", "first"], influence_rows())
    detection = table(["network", "method", "box", "other object", "mark"], detection_rows())
    attention = table(["network", "method", "deciding", "other", "chance"], attention_rows())
    cost = table(["computation", "windows", "processor seconds", "MiB kept"], cost_rows())
    text = TEXT.format(influence=influence, detection=detection, attention=attention, cost=cost, cases=CASES)
    args.output.write_text(text, encoding="utf-8")
    print(args.output)


if __name__ == "__main__":
    main()
