"""``esegeta-monai check``: results, exit codes, errors, and the sample in the documentation.

``python -m tests.cli.test_check`` writes the sample anew.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from esegeta_monai import Explainer
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.main import main
from tests.support.bundles import BUNDLES
from tests.support.odd import SITUATIONS, write_bundle

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
SAMPLE = re.compile(r"(<!-- output of check -->\n```text\n)(.*?)(```)", re.DOTALL)


def check(bundle: Path, *words: str | Path) -> int:
    return main(["check", "--bundle", str(bundle), *map(str, words)])


def results(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    return {entry["check"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_help_names_verdicts_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--help"]) == 0
    text = capsys.readouterr().out
    for word in ("--input", "--head", "--json", "passed", "handled", "warned", "refused", "not checked", "exit codes"):
        assert word in text


@pytest.mark.parametrize("name", ["brain_tissue_segmentation", "brain_lesion_classification"])
def test_the_shipped_bundles_pass_on_noise(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(1)
    assert check(BUNDLES / name, "--json") == 0
    entries = results(capsys)
    assert {entry["verdict"] for entry in entries.values()} == {"passed"}
    assert list(entries)[:4] == ["input", "determinism", "rows", "derivative"]
    assert "geometry" not in entries  # noise has no scan


def test_the_results_are_those_of_python_and_the_geometry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", SITUATIONS["several labels"])
    scan = bundle / "scan.nii.gz"
    assert check(bundle, "--input", scan, "--json") == 0
    entries = json.loads(capsys.readouterr().out)
    reader = BundleReader(bundle)
    image = reader.preprocessing({"image": str(scan)})["image"]
    expected = Explainer(reader.network, reader.inferer, postprocessing=reader.output_use).check(image[None])
    assert entries[:-1] == [result.entry() for result in expected]
    assert (entries[-1]["check"], entries[-1]["verdict"]) == ("geometry", "passed")
    assert entries[-1]["value"] > 0.99


def test_without_a_scan_there_is_no_geometry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", SITUATIONS["statistics of the batch"])
    assert check(bundle) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "Odd: BatchStatistics, noise of one window"
    assert any(line.startswith("rows         handled      the network mixes the images of a batch") for line in lines)
    assert not any(line.startswith("geometry") for line in lines)
    assert max(map(len, lines)) <= 110


def test_a_refused_geometry_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", SITUATIONS["flip without a record"])
    assert check(bundle, "--input", bundle / "scan.nii.gz", "--json") == 1
    entries = results(capsys)
    assert entries["geometry"]["verdict"] == "refused"
    assert "flipped along axis 0" in entries["geometry"]["text"]
    assert entries["derivative"]["verdict"] == "passed"  # the others are printed, too


def test_a_stated_head_that_the_values_contradict_gives_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle(tmp_path / "bundle", SITUATIONS["several labels"])
    scan = bundle / "scan.nii.gz"
    assert check(bundle, "--input", scan, "--head", "sigmoid inside", "--json") == 1
    entries = results(capsys)
    assert entries["prediction"]["verdict"] == "refused"
    assert "head='sigmoid inside'" in entries["prediction"]["text"]
    assert check(bundle, "--input", scan, "--head", "sigmoid", "--json") == 0


def test_an_image_without_metadata_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle(tmp_path / "bundle", SITUATIONS["several labels"])
    bare = [
        "--override",
        'preprocessing#transforms#1={"_target_": "EnsureTyped", "keys": "image", "track_meta": false}',
    ]
    assert check(bundle, "--input", bundle / "scan.nii.gz", *bare, "--json") == 0
    geometry = results(capsys)["geometry"]
    assert geometry["verdict"] == "warned"
    assert "has no metadata" in geometry["text"]


@pytest.mark.parametrize("name", ["no scan", "two scans", "constant scan", "no bundle"])
def test_errors_are_one_line_and_exit_code_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    situation = SITUATIONS["constant scan" if name == "constant scan" else "several labels"]
    bundle = write_bundle(tmp_path / "bundle", situation)
    given, words = bundle / "scan.nii.gz", "every voxel is 7"
    if name == "no scan":
        given, words = tmp_path / "nowhere.nii.gz", "nowhere.nii.gz"
    elif name == "two scans":
        (tmp_path / "scans").mkdir()
        for case in ("a", "b"):
            nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4)), tmp_path / "scans" / f"{case}.nii.gz")
        given, words = tmp_path / "scans", "contains 2 scans: give the one to check"
    elif name == "no bundle":
        bundle, words = tmp_path / "other", "other"
    assert check(bundle, "--input", given) == 2
    text = capsys.readouterr()
    assert text.out == ""
    (line,) = text.err.strip().splitlines()
    assert words in line


def sample(folder: Path) -> list[str]:
    return ["check", "--bundle", str(write_bundle(folder / "bundle", SITUATIONS["encoder without gradient"]))]


def test_the_sample_in_the_documentation_is_the_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sample(tmp_path)
    assert main([*words, "--input", str(tmp_path / "bundle" / "scan.nii.gz")]) == 0
    (stated,) = SAMPLE.findall(PAGE.read_text(encoding="utf-8"))
    figures = re.compile(r"\d[\d.]*(?:e-?\d+)?(?= %|\))")  # their last digits depend on the machine
    words_of = [" ".join(figures.sub("0", text).split()) for text in (stated[1], capsys.readouterr().out)]
    assert words_of[0] == words_of[1], "python -m tests.cli.test_check writes the sample anew"


def write_sample() -> None:
    import contextlib
    import io

    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        words = sample(Path(folder))
        code = main([*words, "--input", str(Path(folder) / "bundle" / "scan.nii.gz")])
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(SAMPLE.sub(lambda m: m[1] + out.getvalue() + m[3], text), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    write_sample()
