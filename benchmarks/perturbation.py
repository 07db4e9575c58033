"""Compare every perturbation method with its counterpart in another library, in one run.

    python benchmarks/perturbation.py [--size middle] [--threads 1] [--methods Occlusion,Lime] [--table FILE.md]

Peers: Captum (`Occlusion`, `FeatureAblation`, `ShapleyValueSampling`, `KernelShap`, `Lime`) around MONAI's own inferer,
and MONAI's `OcclusionSensitivity` on a classification network. For each, the script reports

* window passes (exact) and seconds of processor time (ours: the least of several runs), and their ratios;
* our time relative to the network's passes in the same run, so that other load affects both;
* the largest difference of the maps relative to the largest value (if both draw their own samples: of either from exact
  Shapley values, or the correlation);
* the growth of the memory of the process.

These windows are tiny. The second table has the overhead of the engine for windows of 64³ and a U-Net of common width.
The last one counts (without running them) the passes on a 240 x 240 x 155 scan with 96³ windows.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captum.attr
import torch
from captum._utils.models.linear_model import SkLearnRidge
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import DenseNet, UNet
from monai.visualize import OcclusionSensitivity
from torch import Tensor, nn

from esegeta_monai.engine.feature_masks import Grid
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import RunContext
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.methods import FeatureAblation, KernelShap, Lime, Method, Occlusion, ShapleyValueSampling, run
from esegeta_monai.targets import Box, Case, ClassScore, MultiClassMask, Score, Target


class Counted(nn.Module):
    """A network that counts its windows, and the processor time that they take."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.windows, self.seconds, self.scoring = network, 0, 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        self.windows += len(x)
        start = time.process_time()
        out = self.network(x)
        self.seconds += time.process_time() - start
        return out

    def time(self, score: Score) -> None:
        """Measure the time of a target's own formula: softmax and logarithm at its voxels."""
        terms = score.terms

        def timed(contrast: Tensor) -> Tensor:
            start = time.process_time()
            result = terms(contrast)
            self.scoring += time.process_time() - start
            return result

        score.terms = timed  # type: ignore[method-assign]


class Measured:
    """Processor time, its ratio to that of the passes, window passes, and growth of the resident memory (sampled)."""

    def __init__(self, network: Counted) -> None:
        self.network = network

    def __enter__(self) -> Measured:
        self._done = threading.Event()
        self._peak = self._before = _resident()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self.network.windows, self.network.seconds, self.network.scoring = 0, 0.0, 0.0
        self._start = time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.passes = time.process_time() - self._start, self.network.windows
        self.over_passes = self.seconds / self.network.seconds
        self.over_both = self.seconds / (self.network.seconds + self.network.scoring)
        self._done.set()
        self._thread.join()
        self.megabytes = (self._peak - self._before) / 2**20

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, _resident())


def _resident() -> int:
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Work:
    """A network, an image and its windows."""

    network: Counted
    image: Tensor
    inferer: Any

    def objective(self, target: Target) -> Objective:
        with torch.no_grad():
            prediction = self.inferer(self.image[None], self.network)[0]
        plan = plan_windows(self.inferer, self.image.shape[1:])
        model, scores = Model(self.network, torch.device("cpu")), target.bind(prediction, Case())
        context = RunContext(window_batch=4 if plan.whole else None)
        return Objective(model, self.image, plan, scores, prediction, context=context)

    def score(self, objective: Objective) -> Callable[[Tensor], Tensor]:
        """F of a batch of images by MONAI's inferer, for Captum."""
        score = objective.scores[0]

        def of(x: Tensor) -> Tensor:
            return torch.stack([score.value(score.crop(self.inferer(one[None], self.network)[0])) for one in x])

        return of

    def fastest(self, method: Method, target: Target, repeats: int) -> tuple[Measured, Objective, Tensor]:
        """Return the fastest run and its map; each run has its own objective, so nothing is shared."""
        runs = []
        for _ in range(repeats):
            objective = self.objective(target)
            self.network.time(objective.scores[0])
            with frozen(self.network), Measured(self.network) as measured:
                maps = run(method, objective).maps
            runs.append((measured, objective, maps))
        measured, objective, maps = min(runs, key=lambda one: one[0].seconds)
        measured.megabytes = runs[0][0].megabytes  # later runs reuse the freed memory of the first
        measured.over_passes = min(one[0].over_passes for one in runs)
        measured.over_both = min(one[0].over_both for one in runs)
        return measured, objective, maps[0].mean(0)


Peer = Callable[[Work, Objective], Tensor]


def pairs(sizes: Sizes) -> list[tuple[Method, Peer, bool]]:
    """Return our method, its peer for the same work, and True if both compute the same numbers."""
    grid = Grid(sizes.feature)

    def mask_of(objective: Objective) -> Tensor:
        return grid.of(objective).labels[None]

    def peer_of(name: str, work: Work, objective: Objective) -> Any:
        return getattr(captum.attr, name)(work.score(objective))

    def occlusion(work: Work, objective: Objective) -> Tensor:
        shape = (len(work.image), *(sizes.occluder,) * (work.image.ndim - 1))
        peer = peer_of("Occlusion", work, objective)
        return peer.attribute(work.image[None], sliding_window_shapes=shape, strides=shape)

    def ablation(work: Work, objective: Objective) -> Tensor:
        return peer_of("FeatureAblation", work, objective).attribute(work.image[None], feature_mask=mask_of(objective))

    def shapley(work: Work, objective: Objective) -> Tensor:
        peer = peer_of("ShapleyValueSampling", work, objective)
        orders = sampling.orders(sampling.game(objective)).tolist()
        peer.permutation_generator = lambda n, samples: iter(orders)
        options = {"feature_mask": mask_of(objective), "n_samples": sampling.n_samples}
        return peer.attribute(work.image[None], **options) / sizes.feature**3  # ours is a share per voxel

    def kernel(work: Work, objective: Objective) -> Tensor:
        options = {"feature_mask": mask_of(objective), "n_samples": sizes.samples}
        return peer_of("KernelShap", work, objective).attribute(work.image[None], **options) / sizes.feature**3

    def lime(work: Work, objective: Objective) -> Tensor:
        peer = captum.attr.Lime(work.score(objective), interpretable_model=SkLearnRidge(alpha=1.0))
        return peer.attribute(work.image[None], feature_mask=mask_of(objective), n_samples=sizes.samples)

    sampling = ShapleyValueSampling(n_samples=sizes.orders, feature_mask=grid, baseline="zero")
    return [
        (Occlusion(window=sizes.occluder, baseline="zero"), occlusion, True),
        (FeatureAblation(grid, baseline="zero"), ablation, True),
        (sampling, shapley, True),
        (KernelShap(sizes.samples, grid, "zero"), kernel, False),
        (Lime(sizes.samples, grid, "zero"), lime, False),
    ]


@dataclass
class Sizes:
    """Sizes of volume, windows and perturbations."""

    volume: int
    window: int
    occluder: int
    feature: int
    orders: int
    samples: int


SIZES = {
    "tiny": Sizes(volume=48, window=24, occluder=16, feature=24, orders=4, samples=64),
    "middle": Sizes(volume=96, window=48, occluder=32, feature=48, orders=4, samples=64),
    "full": Sizes(volume=128, window=48, occluder=32, feature=32, orders=10, samples=256),
}


def segmentation(sizes: Sizes) -> tuple[Work, dict[str, Target]]:
    """Return a small UNet with windows, and a lesion and an organ in its prediction as targets."""
    torch.manual_seed(0)
    network = Counted(UNet(3, 1, 2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)).eval()
    inferer = SlidingWindowInferer((sizes.window,) * 3, sw_batch_size=4, overlap=0.25, mode="gaussian")
    corner = sizes.volume * 3 // 8 + 2
    targets: dict[str, Target] = {
        "lesion": Box(1, (corner - 2,) * 3, (corner + 2,) * 3),
        "organ": MultiClassMask(1),
        "organ, probability": MultiClassMask(1, output="probability"),
    }
    return Work(network, torch.randn(1, *(sizes.volume,) * 3), inferer), targets


def off(values: Tensor, reference: Tensor) -> float:
    """Return the largest difference relative to the largest value."""
    return float((values - reference).abs().max() / reference.abs().max())


def row(work: Work, target: Target, method: Method, peer: Peer, same: bool, title: str) -> list[str]:
    """Measure one line of the table."""
    ours, objective, maps = work.fastest(method, target, REPEATS)
    with frozen(work.network), torch.no_grad(), Measured(work.network) as of_peer:
        reference = peer(work, objective)[0].float().mean(0)
    if same:
        agreement = f"{off(maps, reference):.1e}"
    elif isinstance(method, KernelShap):
        with frozen(work.network):
            exact = run(KernelShap(2**13, method.feature_mask, method.baseline), objective).maps[0].mean(0)
        agreement = f"{off(maps, exact):.1e} and {off(reference, exact):.1e} off"
    else:
        agreement = f"r = {float(torch.corrcoef(torch.stack([maps.flatten(), reference.flatten()]))[0, 1]):.3f}"
    passes, seconds = of_peer.passes / ours.passes, of_peer.seconds / ours.seconds
    return [
        str(method.name),
        title,
        *(str(ours.passes), str(of_peer.passes), f"{passes:.1f}"),
        *(f"{ours.seconds:.2f}", f"{of_peer.seconds:.2f}", f"{seconds:.1f}", f"{seconds / passes:.2f}"),
        *(f"{ours.over_passes:.2f}", f"{ours.over_both:.2f}"),
        agreement,
        *(f"{ours.megabytes:.0f}", f"{of_peer.megabytes:.0f}"),
    ]


REPEATS = 3


def common() -> list[list[str]]:
    """Measure the overhead of the engine for windows of a common size."""
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="batch")
    inferer = SlidingWindowInferer((64,) * 3, sw_batch_size=2, overlap=0.25, mode="gaussian")
    work = Work(Counted(network).eval(), torch.randn(1, 96, 96, 96), inferer)
    grid = Grid(48)
    lines = []
    for title, output in (("organ", "logit"), ("organ, probability", "probability")):
        methods: list[Method] = [
            Occlusion(window=48, baseline="zero"),
            FeatureAblation(grid, baseline="zero"),
            ShapleyValueSampling(2, grid, "zero"),
        ]
        if output == "probability":  # many passes: the overhead is largest
            methods.append(KernelShap(64, grid, "zero"))
        for method in methods:
            measured, _, _ = work.fastest(method, MultiClassMask(1, output=output), 1)
            milliseconds = 1000 * measured.seconds / measured.passes / measured.over_passes
            lines.append([str(method.name), title, str(measured.passes), f"{milliseconds:.0f}"])
            lines[-1] += [f"{measured.over_passes:.3f}", f"{measured.megabytes:.0f}"]
            print(*lines[-1], sep="  ", flush=True)
    return lines


HEADER = [
    *("method", "target", "passes", "peer's passes", "ratio", "s", "peer's s", "ratio", "time / passes"),
    *("over its passes", "and scores", "difference", "MB", "peer's MB"),
]


def classification(sizes: Sizes) -> list[str]:
    """Compare with MONAI's `OcclusionSensitivity`: constant occluders that tile the image, probability of class 1."""
    torch.manual_seed(0)
    network = Counted(DenseNet(3, 1, 2, 8, 4, (2, 2), 2)).eval()
    work = Work(network, torch.randn(1, *(sizes.volume,) * 3), SimpleInferer())
    target = ClassScore(1, output="probability")
    monai = OcclusionSensitivity(network, sizes.occluder, n_batch=4, mode=0.0, overlap=0.0, verbose=False)
    monai.activate = lambda out: out.softmax(1)  # its default depends on the channels of the image, not of the output

    def peer(work: Work, objective: Objective) -> Tensor:
        occluded = monai(work.image[None])[0][:, 1:2]
        return objective.image_values()[0] - torch.as_tensor(occluded).as_subclass(Tensor)

    method = Occlusion(window=sizes.occluder, baseline="zero", name="Occlusion (MONAI's OcclusionSensitivity)")
    return row(work, target, method, peer, True, "class probability")


def counted() -> list[list[str]]:
    """Count window passes on a 240 x 240 x 155 scan, windows of 96³, overlap 0.5: ours and with whole predictions."""
    image = torch.rand(1, 240, 240, 155)
    inferer = SlidingWindowInferer((96,) * 3, 4, 0.5, "gaussian")
    plan = plan_windows(inferer, image.shape[1:])
    prediction = torch.zeros(2, *image.shape[1:])
    targets = {"lesion of 15³": Box(1, (60, 80, 70), (75, 95, 85)), "organ of 100³": Box(1, (40,) * 3, (140,) * 3)}
    methods: list[tuple[str, Method, int]] = [
        ("Occlusion, 16³", Occlusion(window=16, baseline="zero"), 15 * 15 * 10 + 1),
        ("FeatureAblation, boxes of 24³", FeatureAblation(Grid(24), "zero"), 10 * 10 * 7 + 1),
        ("ShapleyValueSampling, 25 orders of boxes of 48³", ShapleyValueSampling(25, Grid(48), "zero"), 25 * 100 + 1),
        ("KernelShap, 1000 samples of boxes of 48³", KernelShap(1000, Grid(48), "zero"), 1003),
        ("Lime, 1000 samples of boxes of 48³", Lime(1000, Grid(48), "zero"), 1000),
    ]
    lines = []
    for title, target in targets.items():
        model = Model(nn.Identity(), torch.device("cpu"))
        objective = Objective(model, image, plan, target.bind(prediction, Case()), prediction)
        for name, method, predictions in methods:
            ours, naive = method.passes(objective), predictions * len(plan)
            lines.append([name, title, f"{len(objective.windows)} of {len(plan)}", str(ours), str(naive)])
            lines[-1].append(f"{naive / ours:.0f}")
    return lines


def flat_memory(work: Work, objective: Objective) -> str:
    """Measure the growth of memory with the number of perturbations."""
    parts = []
    for stride in (12, 8, 6):
        method = Occlusion(window=12, stride=stride, baseline="zero")
        with frozen(work.network), Measured(work.network) as measured:
            occluders = run(method, objective).notes["occluders"]
        parts.append(f"{occluders} occluders: {measured.passes} passes, {measured.megabytes:.0f} MB")
    return "; ".join(parts)


NOTES = """\
Seconds are processor seconds, ours the least of three runs. "time / passes" is the ratio of seconds divided by that of
passes. "over its passes" is our time relative to that of the network's own passes in the same run. "and scores" is
relative to passes and the target's own formula (the softmax at its voxels for each perturbation): the overhead of the
engine. It is larger for small windows (a pass of 24³ takes 2 ms here, one of 48³ 11 ms), if features are removed one
by one (few passes share the first computation of a window), and for the probability of an organ (all its voxels are
blended and scored for each perturbation). KernelShap and Lime draw their own samples: Captum's 64 differ from ours.
Occlusion of
a lesion in 128³ compared with Captum: [occlusion.md](occlusion.md)."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny", help="48³, 96³ or (about an hour) 128³")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default="", help="comma-separated names; default: all")
    parser.add_argument("--no-counted", action="store_true", help="leave out the table of counted passes")
    parser.add_argument("--table", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = SIZES[args.size]
    wanted = {m for m in args.methods.lower().split(",") if m}
    work, targets = segmentation(sizes)
    rows = []
    for title, target in targets.items():
        for method, peer, same in pairs(sizes):
            if wanted and type(method).__name__.lower() not in wanted:
                continue
            rows.append(row(work, target, method, peer, same, title))
            print(*rows[-1], sep="  ", flush=True)
    if not wanted or "occlusion" in wanted:
        rows.append(classification(sizes))
    memory = flat_memory(work, work.objective(targets["organ"]))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    windows = len(plan_windows(work.inferer, work.image.shape[1:]))
    text = (
        f"{sizes.volume}³ voxels, windows of {sizes.window}³ ({windows}), UNet (8, 16, 32), torch {torch.__version__}, "
        f"{args.threads} threads of {os.cpu_count()} cores, load {load}.\n\n"
        f"{table(HEADER, rows)}\n\n{NOTES}\n\nMemory by number of perturbations (organ): {memory}.\n"
    )
    if not wanted:
        head = ["method", "target", "passes", "ms per pass", "over its passes", "MB"]
        text += (
            "\nWindows of a common size. 96³ voxels, windows of 64³ (8), UNet (16, 32, 64, 128), two residual units, "
        )
        text += "batch norm:\n\n"
        text += f"{table(head, common())}\n"
    if not args.no_counted:
        head = ["method", "target", "windows", "passes", "with whole predictions", "ratio"]
        text += f"\n240 x 240 x 155, windows of 96³, overlap 0.5, counted and not run:\n\n{table(head, counted())}\n"
    print(text)
    if args.table:
        args.table.parent.mkdir(parents=True, exist_ok=True)
        args.table.write_text(
            "# Perturbation methods compared with other libraries\n\n"
            f"`python benchmarks/perturbation.py --size {args.size}`. {text}",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
