"""On the command line: scans that show nothing, images without metadata, voxels moved without a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.cli.main import main
from tests.support.cli import config, make_bundle, make_scan, run_json

LOAD: list[Any] = list(config()["preprocessing"]["transforms"][:2])
BARE = {"_target_": "EnsureTyped", "keys": "image", "track_meta": False}
MIRROR = {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x.flip(1)"}


def explain(tmp_path: Path, *transforms: Any, scan: Path | None = None) -> tuple[int, dict[str, Any]]:
    """Exit code and the only entry of run.json."""
    preprocessing = {"_target_": "Compose", "transforms": [*LOAD, *transforms]}
    bundle = make_bundle(tmp_path / "bundle", preprocessing=preprocessing)
    scan = scan or asymmetric(tmp_path / "scan.nii.gz")
    words = ["--bundle", bundle, "--input", scan, "--output", tmp_path / "out", "--no-pictures"]
    words += ["--methods", "Saliency", "--target", "MultiClassMask(1)"]
    code = main(["explain", *map(str, words)])
    (entry,) = run_json(tmp_path / "out")["results"]
    return code, entry


def asymmetric(path: Path) -> Path:
    image = nib.load(make_scan(path))
    values = np.asarray(image.dataobj) * np.linspace(0.3, 2, image.shape[0])[:, None, None]
    nib.save(nib.Nifti1Image(values.astype(np.float32), image.affine), path)
    return path


def test_a_map_in_its_place(tmp_path: Path) -> None:
    code, entry = explain(tmp_path)
    assert (code, entry["status"]) == (0, "ok")
    assert [c["verdict"] for c in entry["checks"] if c["check"] == "geometry"] == ["passed"]


def test_a_flip_by_lambda_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, entry = explain(tmp_path, MIRROR)
    assert (code, entry["status"]) == (1, "failed")
    assert "flipped along axis 0" in entry["reason"]
    text = capsys.readouterr()
    assert "flipped along axis 0" in text.err
    assert "1 failed" in text.out


def test_without_metadata_the_grid_is_the_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, entry = explain(tmp_path, BARE)
    assert (code, entry["status"]) == (0, "ok")
    (path,) = (tmp_path / "out").rglob("*_attr.json")
    assert json.loads(path.read_text(encoding="utf-8"))["grid"] == "network"
    assert "has no metadata" in capsys.readouterr().err
    assert any("has no metadata" in text for text in entry["warnings"])


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_scans_are_refused(tmp_path: Path, value: float) -> None:
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.full((16, 20, 16), value, np.float32), np.eye(4)), scan)
    code, entry = explain(tmp_path, scan=scan)
    assert (code, entry["status"]) == (1, "failed")
    assert entry["reason"].startswith(f"scan.nii.gz: every voxel is {value:g}")


def test_complex_scans_are_refused(tmp_path: Path) -> None:
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((16, 20, 16), np.complex64), np.eye(4)), scan)
    code, entry = explain(tmp_path, scan=scan)
    assert (code, entry["status"]) == (1, "failed")
    assert "complex" in entry["reason"]


@pytest.mark.parametrize(("last", "words"), [(BARE, "label maps have no place"), (MIRROR, "flipped along axis 0")])
def test_labels_without_a_place_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: dict[str, Any], words: str
) -> None:
    explain(tmp_path, last)
    label = tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((16, 20, 16), np.float32), np.diag([2.0, 2, 2, 1])), label)
    common = ["--bundle", tmp_path / "bundle", "--input", tmp_path / "scan.nii.gz", "--methods", "Saliency"]
    common += ["--target", "MultiClassMask(1)", "--metrics", "RelevanceMass", "--no-controls"]
    capsys.readouterr()
    assert main(["evaluate", *map(str, [*common, "--output", tmp_path / "a", "--label", label])]) == 1
    assert words in capsys.readouterr().err
