"""The command writes the spread of an ensemble's maps on the scan's grid, in records and in the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.cli.main import main
from tests.bundle.test_ensemble import ensemble
from tests.support.synthetic import write_scan

METHODS = "VanillaBackprop,GradCam"


def explain(tmp_path: Path, *more: str) -> dict[str, Any]:
    output = tmp_path / "maps"
    words = ["explain", "--bundle", str(tmp_path / "bundle"), "--input", str(tmp_path / "scan.nii.gz")]
    target = ["--target", "Box(1, (20, 15), (24, 19))"]
    assert main([*words, "--output", str(output), "--methods", METHODS, *target, "--no-pictures", *more]) == 0
    return {p.name.split("_")[-2]: json.loads(p.read_text(encoding="utf-8")) for p in output.rglob("*_attr.json")}


def values(file: Path) -> np.ndarray:
    return np.asarray(nib.load(file).dataobj, dtype=np.float64)


def test_the_spread_is_written_beside_the_map(tmp_path: Path) -> None:
    folder = ensemble(tmp_path)
    write_scan(tmp_path)
    splits = [{"train": ["scan"], "val": []}, {"train": [], "val": ["scan"]}]
    (folder / "splits_final.json").write_text(json.dumps(splits), encoding="utf-8")
    for name in ("fold_0", "fold_1"):
        (folder / name).mkdir()
    records = explain(tmp_path, "--agreement", "--report")
    for method, record in records.items():
        result = record["agreement"]["members"]
        assert record["agreement"]["of"] == ["members"]
        assert result["count"] == 2
        assert result["mean_deviation"] < 1e-5 or method == "GradCam"
        (file,) = (tmp_path / "maps").rglob(result["map"])
        (own,) = (tmp_path / "maps").rglob(record["map"])
        assert values(file).shape == values(own).shape
        assert np.array_equal(nib.load(file).affine, nib.load(own).affine)
        assert values(file).max() > 0
        assert record["training_folds"] == {"fold_0": "training", "fold_1": "validation"}
    page = next((tmp_path / "maps").rglob("*_report.html")).read_text(encoding="utf-8")
    assert "Agreement of the folds" in page
    assert "fold_0: training; fold_1: validation" in page
    assert "confidence" not in page.lower()


def test_the_deviation_is_that_of_maps_of_each_network(tmp_path: Path) -> None:
    """Oracle: each network explained in a bundle of its own; their deviation of two is |a − b| / √2."""
    folder = ensemble(tmp_path)
    write_scan(tmp_path)
    record = explain(tmp_path, "--agreement")["VanillaBackprop"]
    (file,) = (tmp_path / "maps").rglob(record["agreement"]["members"]["map"])
    alone = []
    for i in range(2):
        output = tmp_path / f"alone_{i}"
        words = ["explain", "--bundle", str(folder), "--input", str(tmp_path / "scan.nii.gz"), "--output", str(output)]
        one = ["--override", f'evaluator#networks=["@network_{i}"]', "--override", 'evaluator#pred_keys=["pred_0"]']
        mean = ["--override", 'postprocessing#transforms#0#keys=["pred_0"]']
        target = ["--methods", "VanillaBackprop", "--target", "Box(1, (20, 15), (24, 19))", "--no-pictures"]
        assert main([*words, *one, *mean, *target]) == 0
        alone.append(values(next(output.rglob("*_attr.nii.gz"))))
    expected = np.abs(alone[0] - alone[1]) / np.sqrt(2)
    np.testing.assert_allclose(values(file), expected, rtol=0, atol=1e-6 * expected.max())


def test_a_finished_map_without_spread_is_computed_again(tmp_path: Path) -> None:
    ensemble(tmp_path)
    write_scan(tmp_path)
    explain(tmp_path)
    assert not list((tmp_path / "maps").rglob("*_sd.nii.gz"))
    explain(tmp_path, "--agreement")
    files = list((tmp_path / "maps").rglob("*_members_sd.nii.gz"))
    assert len(files) == 2
    explain(tmp_path, "--agreement")
    run = json.loads((tmp_path / "maps" / "run.json").read_text(encoding="utf-8"))
    assert {entry["status"] for entry in run["results"]} == {"skipped"}
    files[0].unlink()
    explain(tmp_path, "--agreement")
    assert files[0].is_file()
    explain(tmp_path, "--overwrite")
    assert not list((tmp_path / "maps").rglob("*_sd.nii.gz"))


@pytest.mark.parametrize("damage", [{"members": 3}, {"members": {"count": "x", "shuffled": []}}, [1]])
def test_a_report_of_an_edited_record_is_written(tmp_path: Path, damage: Any) -> None:
    ensemble(tmp_path)
    write_scan(tmp_path)
    explain(tmp_path, "--agreement")
    for sidecar in (tmp_path / "maps").rglob("*_attr.json"):
        sidecar.write_text(
            json.dumps({**json.loads(sidecar.read_text(encoding="utf-8")), "agreement": damage}), encoding="utf-8"
        )
    assert main(["report", str(tmp_path / "maps")]) == 0
