"""Compare layers as the default of class activation maps, by relevance mass over all candidates.

    python benchmarks/known_cause/layers.py [--cases 6]

On the lesion classifier, the mass of the map in the lesion is measured. On the U-shaped tissue network (bundle
`brain_tissue_segmentation`) it is the mass in the grey matter of a box, which is the target, and within 8 mm of it. The
script writes the tables of docs/known_cause.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from causes import CAUSES, ROOT
from monai.bundle import ConfigParser
from monai.inferers import SimpleInferer
from table import write_block
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.default_layer import default_layer, layer_shapes
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.methods import METHODS
from esegeta_monai.metrics import MetricInput, PointingGame, RelevanceMass
from esegeta_monai.targets import Case, ClassScore, LabelMask, Target

CAMS = ("GradCam", "GradCamPlusPlus", "HiResCam", "LayerCam", "XGradCam")
CROP, BOX, CELL_MM = 48, 12, 8.0
FIRST_SEED = 5_500_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=6)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "known_cause")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "known_cause.md")
    parser.add_argument("--networks", default="classifier,tissue")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, table in (("classifier", _classifier), ("tissue", _tissue)):
        if name in args.networks.split(","):
            write_block(args.page, f"layers {name}", table(args.cases, args.work))


def _classifier(n: int, work: Path) -> str:
    cause = CAUSES[0]
    cause.folder = work
    cases = [(e.image, ClassScore(1), e.truth[0]) for e in cause.examples(n, FIRST_SEED)]
    return _table(cause.network, cases, spacing=4.0)


def _tissue(n: int, work: Path) -> str:
    root = ROOT / "bundles" / "brain_tissue_segmentation"
    network = ConfigParser(json.loads((root / "configs" / "inference.json").read_text(encoding="utf-8")))
    network = network.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(root / "models" / "model.pt", map_location="cpu", weights_only=True))
    return _table(network, list(_boxes(network, n, work)), spacing=2.0)


def _boxes(network: nn.Module, n: int, work: Path) -> Iterator[tuple[Tensor, Target, Tensor]]:
    """Yield crops of individuals; the target is the predicted grey matter in a box at the centre."""
    from scripts.anatomy import RandIndividuald, template_case

    template = {key: _volume(file) for key, file in template_case(work / "mni152").items() if key != "label"}
    middle = [slice((CROP - BOX) // 2, (CROP + BOX) // 2)] * 3
    for seed in range(n):
        head = RandIndividuald().set_random_state(seed=FIRST_SEED + seed)(dict(template))
        random = np.random.RandomState(seed)
        while True:
            corner = [random.randint(0, size - CROP) for size in head["image"].shape[1:]]
            place = (slice(None), *[slice(c, c + CROP) for c in corner])
            image = head["image"][place].as_tensor()
            with torch.no_grad():
                predicted = network(image[None])[0].argmax(0) == 1
            mask = torch.zeros_like(predicted)
            mask[tuple(middle)] = predicted[tuple(middle)]
            if int(mask.sum()) > BOX**3 // 4:
                break
        yield image, LabelMask(mask[None].float(), class_index=1), mask


def _volume(file: str) -> Tensor:
    import nibabel as nib

    values = torch.from_numpy(np.asarray(nib.load(file).dataobj, dtype=np.float32))
    return values[None] if values.ndim == 3 else values.movedim(-1, 0)


def _table(network: nn.Module, cases: Sequence[tuple[Tensor, Target, Tensor]], spacing: float) -> str:
    objective = _objective(network, *cases[0][:2])
    with frozen(network):
        chosen = default_layer(objective)
        shapes = [s for s in layer_shapes(objective) if s.name and s.grid and s.calls == 1 and np.prod(s.grid[1:]) > 1]
    blocks = [s for s in shapes if s.grid is not None and s.grid[0] > 1 and _is_block(network, s.name)]
    mass: dict[tuple[str, str], list[float]] = {}
    near: dict[tuple[str, str], list[float]] = {}
    layers = [s.name for s in blocks]
    explainer = Explainer(network, SimpleInferer())
    for image, target, truth in cases:
        methods = METHODS.create_all([{"_target_": f"esegeta_monai.methods.{cam}", "layer": layers} for cam in CAMS])
        for attribution in explainer(image[None], methods=methods, targets=[target]):
            if attribution.map is None:
                raise RuntimeError(f"{attribution.method.name}: {attribution.record['reason']}")
            for layer, one in zip(layers, attribution.map.as_subclass(Tensor)):
                subject = MetricInput(one[None], label=truth, spacing=(spacing,) * 3)
                key = layer, attribution.method.name
                mass.setdefault(key, []).append(RelevanceMass(sign="positive").update(subject).value or 0.0)
                hit = PointingGame(sign="positive", tolerance_mm=CELL_MM).update(subject).value or 0.0
                near.setdefault(key, []).append(hit)
    head = "| layer | grid | " + " | ".join(f"{cam}: mass, hits" for cam in CAMS) + " |"
    lines = [head, "|---|---|" + "---|" * len(CAMS)]
    for s in blocks:
        name = f"**{s.name}** (default)" if s.name == chosen else s.name
        grid = "x".join(map(str, s.grid[1:])) if s.grid else ""
        cells = [f"{np.mean(mass[s.name, cam]):.3f}, {np.mean(near[s.name, cam]):.2f}" for cam in CAMS]
        lines.append(f"| {name} | {grid} | {' | '.join(cells)} |")
    share = float(np.mean([truth.double().mean() for _, _, truth in cases]))
    return "\n".join(lines) + f"\n\n{len(cases)} cases; a constant map has a mass of {share:.4f}."


def _objective(network: nn.Module, image: Tensor, target: Target) -> Objective:
    with torch.no_grad():
        prediction = network(image[None])[0]
    plan = plan_windows(SimpleInferer(), tuple(image.shape[1:]))
    return Objective(Model(network, torch.device("cpu")), image, plan, target.bind(prediction, Case()), prediction)


def _is_block(network: nn.Module, name: str) -> bool:
    """Return True unless the module is part of a convolution block (norm, activation or bare convolution)."""
    parent = network.get_submodule(name.rpartition(".")[0]) if "." in name else network
    return type(parent).__name__ not in ("Convolution", "ADN")


if __name__ == "__main__":
    main()
