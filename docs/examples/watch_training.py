"""Watch what a network looks at while it trains: first a shortcut, then, once that is gone, the lesion.

    python docs/examples/watch_training.py [--out build/watch_training]

A classifier is trained on heads with and without a planted lesion (the bundle `brain_lesion_classification`; heads are
painted from the MNI152 template, a population average of skull-stripped brains). In the first epochs a mark in a corner
of the image is there exactly where a lesion is; then the mark is made to say nothing. After every epoch unseen cases
that have both are explained, and the share of the map that lies on the mark and in the lesion is written down. About
ten minutes of one core. Writes `watch_training.csv` and `watch_training.png`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.metrics import MetricInput, RelevanceMass
from esegeta_monai.targets import ClassScore

BUNDLE = Path(__file__).parents[2] / "bundles" / "brain_lesion_classification"
sys.path.insert(0, str(BUNDLE))

from scripts.anatomy import template_case  # noqa: E402
from scripts.lesions import LesionCases  # noqa: E402

METHODS = ["LRP", "IntegratedGradients(n_steps=16)"]
SHORTCUT_EPOCHS, CLEAN_EPOCHS, STEPS, BATCH = 4, 12, 100, 8
KEPT = (SHORTCUT_EPOCHS, SHORTCUT_EPOCHS + CLEAN_EPOCHS // 2)
"""Epochs whose maps are drawn, beside the last."""
WATCHED = 6
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/watch_training"), help="folder for table and picture")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    anatomy = template_case(out / "mni152")
    watched = watched_cases(anatomy)
    config = ConfigParser(json.loads((BUNDLE / "configs" / "train.json").read_text(encoding="utf-8")))
    network = config.get_parsed_content("network_def")
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    rows: list[Row] = []
    kept: dict[int, list[Tensor]] = {}
    epochs = SHORTCUT_EPOCHS + CLEAN_EPOCHS
    for epoch in range(epochs + 1):
        if epoch > 0:
            predicts = epoch <= SHORTCUT_EPOCHS
            if epoch in (1, SHORTCUT_EPOCHS + 1):
                images, labels = training_set(anatomy, agreement=1.0 if predicts else 0.5)
            train(network, optimizer, images, labels, seed=epoch)
        row, maps = watch(network, watched)
        rows.append({"epoch": epoch, "shortcut": epoch <= SHORTCUT_EPOCHS, **row})
        print({key: round(value, 3) for key, value in rows[-1].items()}, flush=True)
        kept = {**{e: kept[e] for e in KEPT if e in kept}, epoch: maps}
        with (out / "watch_training.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        draw(rows, kept, watched, out / "watch_training.png")
    print(f"written: {out / 'watch_training.csv'}, {out / 'watch_training.png'}")


def training_set(anatomy: dict[str, str], agreement: float) -> tuple[Tensor, Tensor]:
    """Scans in pairs without and with lesions, and their labels. The heads are the same whatever the mark does."""
    cases = LesionCases(anatomy, range(1600), heads=200, pairs=True, number=(1, 3), shortcut=agreement)
    images = torch.empty(len(cases), *cases[0]["image"].shape, dtype=torch.float16)
    labels = torch.empty(len(cases), dtype=torch.long)
    for i in range(len(cases)):
        case = cases[i]
        images[i], labels[i] = case["image"].as_tensor(), case["label"]
    return images, labels


def train(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, seed: int) -> None:
    """One epoch: batches of random pairs."""
    network.train()
    pairs = torch.randint(len(images) // 2, (STEPS, BATCH // 2), generator=torch.Generator().manual_seed(seed))
    for chosen in pairs:
        rows = torch.cat([2 * chosen, 2 * chosen + 1])
        loss = nn.functional.cross_entropy(network(images[rows].float()), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def watched_cases(anatomy: dict[str, str]) -> list[dict[str, Any]]:
    """Unseen cases with a lesion and the mark, and twice as many with one of them, of which the mark is no sign."""
    cases = LesionCases(anatomy, range(9_000_000, 9_000_100), shortcut=1.0)
    found = [i for i in range(60) if cases[i]["label"]][:WATCHED]
    return [
        {
            "both": cases.with_planted(i, lesion=True, shortcut=True),
            "mark": cases.with_planted(i, lesion=False, shortcut=True),
            "lesion": cases.with_planted(i, lesion=True, shortcut=False),
        }
        for i in found
    ]


def watch(network: nn.Module, watched: list[dict[str, Any]]) -> tuple[Row, list[Tensor]]:
    """Shares of the maps' positive part, and the maps of the first method."""
    network.eval()
    explainer = Explainer(network)
    mass = {
        key: [] for key in (f"{method.partition('(')[0]} {where}" for method in METHODS for where in ("mark", "lesion"))
    }
    maps = []
    for case in watched:
        image = case["both"]["image"].as_tensor()
        for attribution in explainer(image[None], methods=METHODS, targets=[ClassScore(1)]):
            if attribution.map is None:  # a network that does not answer to the image yet
                continue
            for where, key in (("mark", "shortcut"), ("lesion", "lesion")):
                subject = MetricInput(attribution.map, label=case["both"][key].as_tensor())
                share = RelevanceMass(sign="positive").update(subject).value
                mass[f"{attribution.method.name} {where}"].append(share)
            if attribution.method.name == METHODS[0]:
                maps.append(attribution.map.as_subclass(Tensor)[0].clamp(min=0))
    row = {key: float(np.mean(values)) if values else float("nan") for key, values in mass.items()}
    for what in ("mark", "lesion"):
        with torch.no_grad():
            said = [int(network(case[what]["image"].as_tensor()[None]).argmax(1)) for case in watched]
        row[f"called a lesion by the {what} alone"] = float(np.mean(said))
    return row, maps


def draw(rows: list[Row], kept: dict[int, list[Tensor]], watched: list[dict[str, Any]], file: Path) -> None:
    """The time series, and below it the first watched case with its map at some epochs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(11, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.1, 1])
    axes = above.subplots(1, 2, sharex=True)
    epochs = [row["epoch"] for row in rows]
    for method, style in zip(("LRP", "IntegratedGradients"), ("-", "--")):
        for where, colour in (("mark", "tab:red"), ("lesion", "tab:blue")):
            axes[0].plot(
                epochs, [row[f"{method} {where}"] for row in rows], style, color=colour, label=f"{where}, {method}"
            )
    axes[0].set(title="share of the map (mean of unseen cases)", xlabel="epoch", ylim=(0, 1))
    for where, colour in (("mark", "tab:red"), ("lesion", "tab:blue")):
        axes[1].plot(
            epochs, [row[f"called a lesion by the {where} alone"] for row in rows], color=colour, label=f"{where} alone"
        )
    axes[1].set(title="share of cases called a lesion", xlabel="epoch", ylim=(-0.03, 1.03))
    for axis in axes:
        axis.axvline(SHORTCUT_EPOCHS, color="grey", linewidth=1)
        axis.text(SHORTCUT_EPOCHS + 0.2, 0.93, "shortcut removed", color="grey", fontsize=8)
        axis.legend(fontsize=8, loc="center right")
    case = watched[0]["both"]
    panels = below.subplots(1, 1 + len(KEPT) + 1)
    image = case["image"].as_tensor()[0].amax(2).T.numpy()
    for panel, (epoch, maps) in zip(panels, [(None, None), *kept.items()]):
        panel.imshow(image, cmap="gray", origin="lower")
        if maps and maps[0].any():
            relevance = (maps[0] / maps[0].max()).amax(2).T.numpy()
            panel.imshow(relevance, cmap="hot", origin="lower", alpha=np.clip(2 * relevance, 0, 1))
        for key, colour in (("shortcut", "tab:red"), ("lesion", "tab:blue")):
            panel.contour(case[key].as_tensor()[0].amax(2).T.numpy(), [0.5], colors=colour, linewidths=1)
        panel.set_title("scan (maximum projection)" if epoch is None else f"LRP, epoch {epoch}", fontsize=9)
        panel.set_axis_off()
    note = (
        "Axial maximum projections, R at the right; red: the mark, blue: the lesion. MNI152 is a population average of"
    )
    below.text(0.01, 0.01, f"{note} skull-stripped brains. Research only.", fontsize=7)
    figure.savefig(file, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    main()
