"""``esegeta-monai concepts`` with given and found concepts, on a tiny bundle."""

from __future__ import annotations

import csv
import json

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.cli.concept_tests import named_paths
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from tests.support.cli import make_bundle, make_scan


@pytest.fixture
def words(tmp_path, monkeypatch):
    """The command for four scans; each has a mask of a few voxels at another place."""
    monkeypatch.setenv("ESEGETA_TRUST", "1")
    bundle = make_bundle(tmp_path / "bundle")
    for seed, name in enumerate("abcd"):
        scan = make_scan(tmp_path / "scans" / f"{name}.nii.gz", seed=seed)
        image = nib.load(scan)
        mask = np.zeros(image.shape, np.uint8)
        mask[4 + seed : 7 + seed, 5:8, 6:8] = 1
        (tmp_path / "masks").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(mask, image.affine), tmp_path / "masks" / f"{name}_mask.nii.gz")
    command = ["concepts", "--bundle", str(bundle), "--input", str(tmp_path / "scans"), "--no-checks"]
    return [*command, "--output", str(tmp_path / "out"), "--target", "MultiClassMask(1)", "--layer", "model.0"]


def test_given_concepts_are_tested(words, tmp_path, capsys):
    masks = tmp_path / "masks"
    assert main([*words, "--concept", f"ball={masks}", "--random", "100", "--layer", "model.1"]) == 0
    assert "2 test(s)" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "concept_tests.json").read_text(encoding="utf-8"))
    assert [(t["concept"], t["layer"], t["concept_cases"]) for t in record["tests"]] == [
        ("ball", "model.0", 4),
        ("ball", "model.1", 4),
    ]
    for t in record["tests"]:
        assert 1 / 101 <= t["p_share"] <= t["p_holm"] <= 1
        assert np.linalg.norm(t["vector"]) == pytest.approx(1)
    with (tmp_path / "out" / "concept_tests.csv").open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 2
    page = (tmp_path / "out" / "concept_tests.html").read_text(encoding="utf-8")
    assert "ball" in page
    assert str(tmp_path) not in page


def test_concepts_are_found(words, tmp_path):
    assert main([*words, "--find", "CRAFT", "--concepts", "2", "--units", "grid(size=8)", "--regions", "1"]) == 0
    record = json.loads((tmp_path / "out" / "found_concepts.json").read_text(encoding="utf-8"))
    assert [c["concept"] for c in record["concepts"]] == [0, 1]
    assert len(list((tmp_path / "out").glob("concept*.png"))) == 2
    assert "Concept" in (tmp_path / "out" / "found_concepts.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--concept", "ball"], "NAME=PATH"),
        (["--concept", "ball=nowhere"], "no such file"),
        (["--concept", "ball=masks", "--random", "50"], "at least 100 random concepts"),
        (["--concept", "ball=masks", "--find", "ACE"], "one after the other"),
        (["--layer", "model.1"], "give --layer once"),
        (["--layer", "model.1", "--find", "ACE"], "give --layer once"),
    ],
)
def test_wrong_options_are_refused(words, tmp_path, capsys, monkeypatch, more, message):
    monkeypatch.chdir(tmp_path)
    assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err


def test_names_are_parsed():
    assert named_paths("concept", ["a=b=c"]) == {"a": "b=c"}
    with pytest.raises(UsageError, match="each name once"):
        named_paths("concept", ["a=b", "a=c"])
