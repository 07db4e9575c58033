"""Repeat the numbers of a case from its files: scan, maps, sidecars, and the record of its metrics.

    python -m tests.explain.repeat_metrics BUNDLE SCAN MAPS/CASE EVALUATED/CASE/CASE_metrics.json

This package is not imported: the bundle is read with MONAI, its inferer predicts whole volumes, and the formulas are
written here again. Sparseness, Entropy, Infidelity (boxes) and RelevanceMass of targets ``MultiClassMask`` on logits
are repeated. Every number that differs by more than `TOLERANCE` is named, and the exit code is then 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser

TOLERANCE = 1e-4
"""Largest relative difference: windows are computed in float32, and changes of the target are differences of sums."""


@dataclass
class Repeated:
    """A number of the record, and the same from the files."""

    target: str
    method: str
    metric: str
    recorded: float
    repeated: float

    @property
    def agrees(self) -> bool:
        """True if both are equal up to `TOLERANCE`."""
        return abs(self.recorded - self.repeated) <= TOLERANCE * max(abs(self.recorded), abs(self.repeated))


class Model:
    """Image, network and inferer of a bundle, read by MONAI alone."""

    def __init__(self, bundle: Path, scan: Path) -> None:
        parser = ConfigParser()
        parser.read_config(str(bundle / "configs" / "inference.json"))
        parser["bundle_root"] = str(bundle)
        self.network = parser.get_parsed_content("network_def").eval()
        self.network.load_state_dict(torch.load(bundle / "models" / "model.pt", weights_only=True))
        self.inferer = parser.get_parsed_content("inferer")
        self.image = parser.get_parsed_content("preprocessing")({"image": str(scan)})["image"]

    def predict(self, image: torch.Tensor) -> np.ndarray:
        """Predict the logits (K, *spatial) of an image (C, *spatial)."""
        with torch.no_grad():
            return np.asarray(self.inferer(image[None], self.network)[0], dtype=np.float64)


def same_file(path: Path, sha256: str) -> Path:
    """Return a file that has the recorded SHA-256.

    Raises:
        ValueError: it has another one.
    """
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path.name} is not the file that was evaluated")
    return path


def on_network_grid(path: Path, affine: np.ndarray) -> np.ndarray:
    """Read a map as (C, *spatial), with the axes of the network's grid.

    Raises:
        ValueError: the two grids differ by more than the order and direction of their axes.
    """
    file = nib.load(path)
    to_network = nib.orientations.ornt_transform(nib.io_orientation(file.affine), nib.io_orientation(affine))
    turned = file.as_reoriented(to_network)
    if not np.allclose(turned.affine, affine, atol=1e-4):
        raise ValueError(f"{path.name} was resampled from the network's grid: its voxels are not those of the metrics")
    values = np.asarray(turned.get_fdata(), dtype=np.float64)
    return np.moveaxis(values.reshape(*values.shape[:3], -1), -1, 0)


def repeat(bundle: Path, scan: Path, maps: Path, record: dict[str, Any], label: Path | None = None) -> list[Repeated]:
    """Repeat all numbers that this module knows of one case."""
    sources = record["sources"]
    same_file(scan, sources["scan"][0]["sha256"])
    model = Model(bundle, scan)
    affine = np.array(record["network_affine"])
    assert list(model.image.shape[1:]) == record["network_grid"]
    cause = None
    if label is not None:
        cause = on_network_grid(same_file(label, sources["label"]["sha256"]), affine)[0] > 0
    repeated = []
    for source in sources["maps"]:
        sidecar = json.loads((maps / source["sidecar"]).read_text(encoding="utf-8"))
        values = on_network_grid(same_file(maps / source["map"], source["map_sha256"]), affine)
        score = Score(model, sidecar)
        for row in record["metrics"]:
            if (row["target"], row["method"]) == (sidecar["result"]["target"], source["method"]):
                for number in numbers(row, values, score, cause):
                    repeated.append(Repeated(row["target"], row["method"], row["metric"], row["value"], number))
    return repeated


class Score:
    """The target of a sidecar: the sum of a class's logits where the unchanged image is predicted as that class."""

    def __init__(self, model: Model, sidecar: dict[str, Any]) -> None:
        self.model, parameters = model, sidecar["target_parameters"]
        assert (sidecar["target"], parameters["output"], parameters["reduction"]) == ("MultiClassMask", "logit", "sum")
        self.index = sidecar["class_index"]
        logits = model.predict(model.image)
        self.mask = logits.argmax(0) == self.index
        assert int(self.mask.sum()) == sidecar["target_voxels"]
        self.value = float(logits[self.index][self.mask].sum())
        assert abs(self.value - sidecar["value"]) <= TOLERANCE * abs(self.value)

    def __call__(self, image: torch.Tensor) -> float:
        return float(self.model.predict(image)[self.index][self.mask].sum())


def numbers(row: dict[str, Any], values: np.ndarray, score: Score, cause: np.ndarray | None) -> Iterator[float]:
    """Yield the number of one row of the record, if this module knows its metric."""
    strength = np.abs(values).sum(0).ravel()
    share = strength / strength.sum()
    if row["metric"] == "Entropy":
        yield float(-(share[share > 0] * np.log(share[share > 0])).sum() / np.log(len(share)))
    elif row["metric"] == "Sparseness":  # Gini index, as the area between the Lorenz curve and the diagonal
        n = len(share)
        yield float(1 + 1 / n - 2 * np.cumsum(np.sort(share)).sum() / n)
    elif row["metric"] == "RelevanceMass" and cause is not None:
        yield float(share[cause.ravel()].sum())
    elif row["metric"] == "Infidelity":
        assert row["parameters"]["perturbation"] == "boxes"
        assert row["parameters"]["multiplied"]
        predicted, lost = [], []
        for box in row["notes"]["boxes"]:
            place = (slice(None), *(slice(start, stop) for start, stop in box))
            changed = score.model.image.as_tensor().clone()
            for channel, value in enumerate(row["used"]["baseline"]["values"]):
                changed[channel][place[1:]] = value
            predicted.append(values[place].sum())
            lost.append(score.value - score(changed))
        a, d = np.array(predicted), np.array(lost)
        scale = max(0.0, float(a @ d / (a @ a))) if row["parameters"]["keep_sign"] else float(a @ d / (a @ a))
        yield float(((scale * a - d) ** 2).sum() / (d @ d))


def main(arguments: list[str]) -> int:
    """Print recorded and repeated numbers; return 1 if some differ, or if none could be repeated."""
    bundle, scan, maps, file, *label = map(Path, arguments)
    record = json.loads(file.read_text(encoding="utf-8"))
    repeated = repeat(bundle, scan, maps, record, label[0] if label else None)
    for one in repeated:
        verdict = "" if one.agrees else "  DIFFERENT"
        print(f"{one.target}  {one.method}  {one.metric}  {one.recorded:.7f}  {one.repeated:.7f}{verdict}")
    return int(not repeated or not all(one.agrees for one in repeated))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
