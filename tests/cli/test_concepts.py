"""``esegeta-monai concepts`` on a tiny bundle: a page with pictures, and a table of all channels."""

from __future__ import annotations

import csv
import re
from collections import defaultdict

from esegeta_monai.cli.main import main
from tests.support.cli import make_bundle, make_scan


def test_page_and_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESEGETA_TRUST", "1")
    bundle = make_bundle(tmp_path / "bundle")
    for seed, name in enumerate("ab"):
        make_scan(tmp_path / "scans" / f"{name}.nii.gz", seed=seed)
    output = tmp_path / "out"
    words = ["concepts", "--bundle", str(bundle), "--input", str(tmp_path / "scans"), "--output", str(output)]
    words += ["--layer", "model.0", "--target", "MultiClassMask(1)", "--channels", "2", "--regions", "2", "--no-checks"]
    assert main(words) == 0
    assert "concepts.html" in capsys.readouterr().out
    page = (output / "concepts.html").read_text(encoding="utf-8")
    assert len(re.findall(r'src="data:image/png', page)) == 4
    assert len(list(output.glob("*.png"))) == 4
    assert str(tmp_path) not in page
    shares = defaultdict(float)
    with (output / "concepts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        shares[row["case"]] += float(row["share"])
    assert {case: round(total, 9) for case, total in shares.items()} == {"a": 1.0, "b": 1.0}
    means = defaultdict(float)
    for row in rows:
        means[row["channel"]] += float(row["share"]) / 2
    best = sorted(means, key=lambda c: -means[c])[:2]
    assert re.findall(r"channel (\d+)</h2>", page) == best


def test_a_cohort_without_the_target_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESEGETA_TRUST", "1")
    bundle = make_bundle(tmp_path / "bundle")
    scan = make_scan(tmp_path / "a.nii.gz")
    words = ["concepts", "--bundle", str(bundle), "--input", str(scan), "--output", str(tmp_path / "out")]
    assert main([*words, "--target", "ThresholdMask(1e9)", "--no-checks"]) == 2
    assert "no scan has a voxel of the target" in capsys.readouterr().err


def test_without_a_target_every_predicted_class_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESEGETA_TRUST", "1")
    bundle, scan, output = make_bundle(tmp_path / "bundle"), make_scan(tmp_path / "a.nii.gz"), tmp_path / "out"
    words = ["concepts", "--bundle", str(bundle), "--input", str(scan), "--output", str(output), "--layer", "model.0"]
    assert main([*words, "--channels", "1", "--regions", "1", "--no-checks"]) == 0
    assert "a: ConceptRelevance took" in capsys.readouterr().err  # the name of the case, not "case 0"
    with (output / "concepts.csv").open(newline="") as file:
        targets = {row["target"] for row in csv.DictReader(file)}
    assert targets
    assert targets <= {"MultiClassMask-grey matter", "MultiClassMask-white matter"}
