"""Compare autocast with float32 for every method on six networks, on the first window and on the whole map.

    python benchmarks/amp.py [--dtype bfloat16] [--device cpu] [--networks UNet_batch:3 …] [--seed 1] [--table FILE]

Each method is computed three times for the same target: in float32, always under autocast, and as a user gets it
(measured on the first window, and in float32 if that correlates below 0.997). Networks are the untrained, calibrated
ones of ``tests/networks``, on an image of three Gaussian windows. For all three, the target's voxels are those of the
float32 prediction.
"""

from __future__ import annotations

import argparse
import logging
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from esegeta_monai import Explainer
from esegeta_monai.engine.feature_masks import Supervoxels
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods import METHODS, Explained, Method, run
from esegeta_monai.methods.precision import AGREES, full_precision
from esegeta_monai.methods.run import _run_side_by_side
from esegeta_monai.metrics.base import asking
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.networks import SEGMENTATION, NetworkCase, build

NETWORKS = ("UNet_batch:3", "UNet_instance:3", "SegResNet:3", "DynUNet:2", "SwinUNETR:2", "ResNet18:3")

FOR_ALL: dict[str, Any] = {
    "feature_mask": Supervoxels(24, mask="everything"),
    "max_channels": 16,
    "n_iter": 32,
    "n_samples": 8,
    "n_steps": 16,
}
SMALL: dict[str, dict[str, Any]] = {
    "ExtremalPerturbation": {"n_iter": 40, "areas": 0.1},
    "Hsic": {"n_samples": 128},
    "KernelShap": {"n_samples": 128},
    "Lime": {"n_samples": 128},
    "Occlusion": {"window": 6},
    "Rise": {"n_masks": 128},
    "ShapleyValueSampling": {"n_samples": 4},
    "Sobol": {"n_samples": 8},
}
"""Parameters that make methods affordable here."""


def methods(case: NetworkCase, image: Tensor) -> Iterator[Method]:
    """Yield every method of the registry; layer methods use the network's deep layer."""
    for kind in METHODS:
        offered = {**FOR_ALL, "layer": case.cam_layer, "cases": [image.flip(-1), image.roll(7, -2)]}
        if kind.produces != "synthesised image":
            offered["channel"] = 0
        yield kind(**{n: v for n, v in offered.items() if n in kind.parameter_names()} | SMALL.get(kind.__name__, {}))


@dataclass
class Row:
    """Result of one method on one network.

    Attributes:
        first: correlation on the first window; None: not measured.
        autocast: correlation of the whole map, always under autocast.
        saved: correlation of the map that a user gets.
        fallback: reason for float32.
    """

    network: str
    method: str
    first: float | None
    autocast: float | None
    saved: float | None
    fallback: str | None
    alone: bool = False

    @property
    def missed(self) -> bool:
        """True if the saved map differs from float32 although no fallback was triggered."""
        return self.fallback is None and self.saved is not None and self.saved < AGREES


def correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Pearson's correlation over all voxels, or None if a map is constant."""
    x, y = a.flatten().double().cpu(), b.flatten().double().cpu()
    if not bool(torch.isfinite(x).all()):
        return None
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else (1.0 if torch.equal(a, b) else None)


def objective_of(case: NetworkCase, device: str, dtype: torch.dtype) -> Objective:
    """Return the objective: the middle class on an image of three windows, or the class of a classification network."""
    maps = case.kind == SEGMENTATION
    image = torch.cat([case.image, case.reference[..., : case.roi[-1] // 2]], -1) if maps else case.image
    inferer = SlidingWindowInferer(case.roi, 2, 0.5, "gaussian") if maps else SimpleInferer()
    with torch.no_grad():
        prediction = inferer(image, case.logits)
    network = case.network.to(device)
    explainer = Explainer(network, inferer, device, True, amp_kwargs={"dtype": dtype}, output=case.output)
    target = MultiClassMask(1) if maps else ClassScore(1)
    given = prediction if case.output is None else {case.output: prediction}
    (judged,) = explainer.judge(image, [target], prediction=given)
    assert judged.objective is not None
    return judged.objective


def rows(name: str, device: str, dtype: torch.dtype, seed: int) -> Iterator[Row]:
    """Yield the rows of every method on one network."""
    kind, dims = name.split(":")
    case = build(kind, int(dims), torch.float32, seed)
    objective = objective_of(case, device, dtype)
    for method in methods(case, objective.image.cpu()):
        began = time.process_time()
        with asking(objective):
            try:
                precise = run(method, full_precision(objective))
            except Exception as error:  # a method that does not apply to this network in float32 either
                print(f"  {method.name}: {error}", file=sys.stderr)
                continue
            outcome = run(method, objective)
            rough = forced(method, objective)
        notes = outcome.notes
        yield Row(
            name,
            str(method.name),
            (notes.get("amp_correlation") or [None])[0],
            None if rough is None else correlation(rough.maps, precise.maps),
            correlation(outcome.maps, precise.maps),
            notes.get("amp_fallback"),
            method.full_precision,
        )
        print(f"  {method.name}: {time.process_time() - began:.1f} s", file=sys.stderr)


def forced(method: Method, objective: Objective) -> Explained | None:
    """Run a method under autocast without checks; return None if it fails."""
    objective.context.precision_decided = True
    (outcome,) = _run_side_by_side([method], objective)
    objective.context.precision_decided = False
    if outcome.error is not None:
        print(f"  {method.name} under autocast: {outcome.error}", file=sys.stderr)
    return outcome.result


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def table(results: list[Row], networks: list[str], title: str) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    measured = [r for r in results if not r.alone]
    fell = [r for r in measured if r.fallback is not None]
    missed = [r for r in measured if r.missed]
    spared = [r for r in fell if r.autocast is not None and r.autocast >= AGREES]
    yield f"# Autocast against float32\n\n{title}\n"
    yield (
        f"{len(measured)} pairs of method and network were measured; {len(fell)} fell back to float32, "
        f"{len(spared)} of them although the whole map would have kept {AGREES}. Of the {len(measured) - len(fell)} "
        f"maps computed under autocast {len(missed)} correlate below {AGREES} with float32 as a whole"
        f"{':' if missed else '.'}\n"
    )
    for r in missed:
        yield f"* {r.method} on {r.network}: first window {figure(r.first)}, whole map {figure(r.saved)}"
    for network in networks:
        yield f"\n## {network}\n"
        yield "| method | first window | whole map, autocast | whole map, saved | fallback |\n|---|---|---|---|---|"
        for r in (r for r in results if r.network == network):
            why = "always float32" if r.alone else (r.fallback or "")
            yield f"| {r.method} | {figure(r.first)} | {figure(r.autocast)} | {figure(r.saved)} | {why} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and images")
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("esegeta_monai").setLevel(logging.ERROR)
    results: list[Row] = []
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{args.device}, {platform.machine()}"
    title = f"`{args.dtype}` on {device}, torch {torch.__version__}, one thread; seed {args.seed}."
    for n, name in enumerate(args.networks, 1):
        print(name, file=sys.stderr)
        results += rows(name, args.device, getattr(torch, args.dtype), args.seed)
        text = "\n".join(table(results, args.networks[:n], title))
        if args.table is not None:
            args.table.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
