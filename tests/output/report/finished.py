"""An output folder as ``explain`` leaves it, made by the command on a tiny bundle, and tables as ``evaluate`` does."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np

from esegeta_monai.cli.main import main
from esegeta_monai.utils.files import sha256_file
from esegeta_monai.utils.names import safe_name
from tests.support.cli import make_bundle, make_scan

HOSTILE = "<img src=x onerror>"
METHODS = "Saliency,InputXGradient,GradCam,Cam"  # Cam fails: the network does not end in pooling and a linear layer
TARGETS = ("MultiClassMask(1)", "MultiClassMask(2)", "ThresholdMask(1e9, channel=1)")
METRIC_COLUMNS = (
    *("case", "target", "method", "metric", "group", "value", "low", "high", "n"),
    *("higher_is_better", "beats_controls", "seconds", "passes"),
)
REGION_COLUMNS = (
    *("target", "method", "region", "voxels", "volume_mm3", "sum", "abs_sum", "share_of_abs", "mean", "alarm"),
)
GREY = "MultiClassMask-grey matter"


def explained(folder: Path, names: tuple[str, ...] = ("sub-01",), *more: str) -> Path:
    """Explains a scan for each name; one method fails, one target is empty. Folders are called after a patient."""
    bundle = make_bundle(folder / "Doe_Jane" / "bundle")
    out = folder / "out"
    inputs = [
        f"{name}={make_scan(folder / 'Doe_Jane' / f'Jane Doe {n}.nii.gz', seed=n)}" for n, name in enumerate(names)
    ]
    targets = [word for target in TARGETS for word in ("--target", target)]
    words = ["explain", "--bundle", str(bundle), "--input", *inputs, "--output", str(out), "--methods", METHODS]
    assert main([*words, *targets, "-q", *more]) == 1, "Cam fails"
    return out


def evaluated(out: Path, case: str) -> None:
    """Tables in the formats of ``evaluate``: GradCam does not beat the controls, Saliency lies outside of the body."""
    rows = []
    for target in (GREY, "MultiClassMask-white matter"):
        for method, value in (("Saliency", 0.2), ("GradCam", 0.7), ("control:random", 0.5), ("control:sobel", 0.4)):
            for metric, group, higher in (("deletion", "faithfulness", False), ("gini", "complexity", True)):
                control = method.startswith("control:")
                beats = "" if control else (value < 0.4) == (not higher)
                rows.append(
                    (case, target, method, metric, group, value, value - 0.1, value + 0.1, 10, higher, beats, 1.5, 9)
                )
    with open(out / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([METRIC_COLUMNS, *rows])
    own = out / safe_name(case)
    steps = [i / 10 for i in range(11)]
    curves = [
        {"target": GREY, "method": method, "metric": metric, "x": steps, "y": [1 - slope * x for x in steps]}
        for metric in ("deletion", "insertion")
        for method, slope in (("Saliency", 0.9), ("GradCam", 0.3), ("control:random", 0.5))
    ]
    (own / f"{safe_name(case)}_metrics.json").write_text(json.dumps({"curves": curves}), encoding="utf-8")
    with open(own / f"{safe_name(case)}_regions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            [
                REGION_COLUMNS,
                (GREY, "Saliency", "cortex <left>", 100, 800, 3.5, 3.5, 0.35, 0.035, False),
                (GREY, "Saliency", "outside of the body", 50, 400, 6.5, 6.5, 0.65, 0.13, True),
            ]
        )


def one_map(out: Path, values: np.ndarray, affine: np.ndarray, **record: object) -> None:
    """A folder with one map, of a run without pictures."""
    (out / "a").mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), out / "a" / "a_t_Saliency_attr.nii.gz")
    sidecar = {"case": "a", "method": "Saliency", "method_name": "Saliency", "target_name": "t", "status": "ok"}
    sidecar |= {"map": "a_t_Saliency_attr.nii.gz", "signed": True, **record}
    (out / "a" / "a_t_Saliency_attr.json").write_text(json.dumps(sidecar), encoding="utf-8")
    sign(out / "a" / "a_t_Saliency_attr")


def sign(stem: Path) -> None:
    """Write the checksum of the map ``stem.nii.gz`` to its sidecar."""
    sidecar = stem.with_name(f"{stem.name}.json")
    record = json.loads(sidecar.read_text(encoding="utf-8"))
    record["map_sha256"] = sha256_file(stem.with_name(f"{stem.name}.nii.gz"))
    sidecar.write_text(json.dumps(record), encoding="utf-8")
