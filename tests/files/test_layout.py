"""The layout of BIDS derivatives: names, commands that read a folder, and the validator's errors."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.files.layout import Layout, choose_layout
from esegeta_monai.output.merge import merge_runs
from esegeta_monai.output.report.collect import read_output
from tests.support.cli import make_bundle, make_scan, statuses

BIDS = Layout(Path("o"), bids=True)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("sub-01", "sub-01/anat/sub-01_label-A_desc-M_attr"),
        ("sub-01_T1w", "sub-01/anat/sub-01_mod-T1w_label-A_desc-M_attr"),
        ("sub-01_FLAIR", "sub-01/anat/sub-01_mod-FLAIR_label-A_desc-M_attr"),
        ("sub-01_ses-1_acq-mpr_run-2_T1w", "sub-01/ses-1/anat/sub-01_ses-1_acq-mpr_run-2_mod-T1w_label-A_desc-M_attr"),
        ("sub-1_dir-AP_echo-2_dwi", "sub-1/dwi/sub-1_dir-AP_mod-dwi_echo-2_label-A_desc-M_attr"),
        ("sub-01-ses-1-anat-sub-01_ses-1_T1w", "sub-01/ses-1/anat/sub-01_ses-1_mod-T1w_label-A_desc-M_attr"),
        ("sub-01_desc-preproc_T1w", "sub-01/anat/sub-01_mod-T1w+preproc_label-A_desc-M_attr"),
        ("site-sub-01", "sub-sitesub01/anat/sub-sitesub01_label-A_desc-M_attr"),
        ("sub-01_nokey-1_T1w", "sub-sub01nokey1T1w/anat/sub-sub01nokey1T1w_label-A_desc-M_attr"),
        ("patient_7 (a)", "sub-patient7a/anat/sub-patient7a_label-A_desc-M_attr"),
    ],
)
def test_places_of_maps(case: str, place: str) -> None:
    assert BIDS.map(case, "A", "M") == Path("o") / f"{place}.nii.gz"


def test_names_that_lose_letters_stay_distinct() -> None:
    names = ["größe", "grösse", "影", "像", "a" * 70, "a" * 71, "s0.15", "s01.5", "grey matter", "grey"]
    values = [BIDS.map("c", name, "M").name for name in names]
    assert len(set(values)) == len(names)
    assert all(name.isascii() and len(name) < 200 for name in values)


def test_each_scan_of_a_subject_has_its_own_mask() -> None:
    masks = [BIDS.mask(f"sub-01_{s}", "A").name for s in ("T1w", "FLAIR")]
    assert masks == ["sub-01_label-A_desc-T1w_mask.nii.gz", "sub-01_label-A_desc-FLAIR_mask.nii.gz"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cases explained in both layouts."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("bids")
    bundle = make_bundle(root / "bundle")
    for i, name in enumerate(("sub-01/ses-1/anat/sub-01_ses-1_T1w", "sub-02/anat/sub-02_T1w")):
        make_scan(root / "raw" / f"{name}.nii.gz", seed=i)
    for layout in ("plain", "bids"):
        words = ["--layout", layout] if layout == "bids" else []
        assert explain(root, bundle, layout, *words) == 0
    return root


def explain(root: Path, bundle: Path, output: str, *more: str) -> int:
    words = ["explain", "--bundle", bundle, "--input", root / "raw", "--output", root / output, "--methods", "Saliency"]
    return main([*map(str, words), "--target", "MultiClassMask(1)", "--no-progress", "--quiet", *more])


def test_the_maps_are_those_of_the_plain_layout(runs: Path) -> None:
    folder = runs / "bids" / "sub-01" / "ses-1" / "anat"
    stem = "sub-01_ses-1_mod-T1w_label-MultiClassMaskGreyMatter_desc-Saliency_attr"
    (plain,) = (runs / "plain").rglob("*sub-01*_attr.nii.gz")
    assert np.array_equal(nib.load(folder / f"{stem}.nii.gz").get_fdata(), nib.load(plain).get_fdata())
    assert {p.name for p in folder.iterdir()} == {
        f"{stem}.nii.gz",
        f"{stem}.json",
        f"{stem}.png",
        "sub-01_ses-1_label-MultiClassMaskGreyMatter_desc-T1w_mask.nii.gz",
    }
    description = json.loads((runs / "bids" / "dataset_description.json").read_text(encoding="utf-8"))
    assert (description["DatasetType"], description["GeneratedBy"][0]["Name"]) == ("derivative", "esegeta-monai")


def test_commands_read_the_folder(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bids", tmp_path / "out")
    (tmp_path / "raw").symlink_to(runs / "raw")
    assert explain(tmp_path, runs / "bundle", "out") == 0
    assert set(statuses(tmp_path / "out").values()) == {"skipped"}  # the layout is that of the folder
    out = str(tmp_path / "out")
    words = ["--bundle", runs / "bundle", "--input", runs / "raw", "--output", out, "--maps", out, "--no-progress"]
    (tmp_path / "labels").mkdir()
    for name in ("sub-01-ses-1-anat-sub-01_ses-1_T1w", "sub-02-anat-sub-02_T1w"):
        (scan,) = (runs / "raw").rglob(f"{name.split('-anat-')[1]}.nii.gz")
        image = nib.load(scan)
        label = (np.asarray(image.dataobj) > 0.5).astype(np.uint8) + 1
        nib.save(nib.Nifti1Image(label, image.affine), tmp_path / "labels" / f"{name}.nii.gz")
    regions = ["--regions", tmp_path / "labels"]
    more = ["--metrics", "Sparseness", "--no-controls", "--quiet"]
    assert main(["evaluate", *map(str, [*words, *regions, *more])]) == 0
    assert main(["report", out]) == 0
    run = read_output(tmp_path / "out")
    assert len(run.cases) == 2
    for case in run.cases:
        (result,) = case.results
        assert result.map is not None
        assert result.mask is not None
        assert case.scan is not None
        assert case.metrics
        assert case.regions
        assert not case.notes
    pages = sorted(p.relative_to(out).as_posix() for p in Path(out).rglob("*_report.html"))
    assert [p.count("/") for p in pages] == [1, 1]  # the page links to ../index.html
    assert main(["cohort", out]) == 0
    assert (tmp_path / "out" / "cohort" / "cohort.html").is_file()


def test_a_record_whose_mask_is_of_another_case_is_not_shown(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "bids", tmp_path / "out")
    (sidecar,) = (tmp_path / "out" / "sub-02").rglob("*_attr.json")
    record = json.loads(sidecar.read_text(encoding="utf-8"))
    other = "sub-01_label-MultiClassMaskGreyMatter_desc-T1w_mask.nii.gz"
    shutil.copy(sidecar.with_name(record["display"]["mask"]), sidecar.with_name(other))
    record["display"]["mask"] = other
    sidecar.write_text(json.dumps(record), encoding="utf-8")
    bad = {c.name: c.results[0].status for c in read_output(tmp_path / "out").cases}
    assert bad == {"sub-01-ses-1-anat-sub-01_ses-1_T1w": "ok", "sub-02-anat-sub-02_T1w": "altered"}


def test_parts_become_one_folder(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").symlink_to(runs / "raw")
    for part in ("0", "1"):
        assert explain(tmp_path, runs / "bundle", part, "--layout", "bids", "--num-parts", "2", "--part-id", part) == 0
    merged = merge_runs(tmp_path / "all", [tmp_path / "0", tmp_path / "1"])
    assert (merged.cases, merged.exit_code) == (2, 0)

    def files(folder: Path) -> set[str]:
        whole = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        return {name for name in whole if not name.startswith(("run", "esegeta.log"))}

    assert files(tmp_path / "all") == files(runs / "bids")
    with pytest.raises(UsageError, match="some have the layout bids and some the plain one"):
        merge_runs(tmp_path / "all", [runs / "plain"])


def test_a_folder_keeps_its_layout(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has results in the layout bids"):
        choose_layout(runs / "bids", "plain")
    with pytest.raises(UsageError, match="has results in the plain layout"):
        choose_layout(runs / "plain", "bids")
    (tmp_path / "dataset_description.json").write_text('{"Name": "my study"}', encoding="utf-8")
    with pytest.raises(UsageError, match="BIDS data set of my study"):
        choose_layout(tmp_path, "bids")
    with pytest.raises(UsageError, match="'plain' or 'bids'"):
        choose_layout(tmp_path, "nested")  # type: ignore[arg-type]
    assert not choose_layout(tmp_path, None).bids


def test_the_validator_has_no_error(runs: Path) -> None:
    validator = shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("needs the BIDS validator: pip install bids-validator-deno")
    run = subprocess.run([validator, str(runs / "bids"), "--json"], capture_output=True, text=True, encoding="utf-8")
    issues = json.loads(run.stdout)["issues"]["issues"]
    assert [i for i in issues if i["severity"] == "error"] == []
    assert {i["code"] for i in issues} <= {"NIFTI_UNIT", "SIDECAR_KEY_RECOMMENDED", "TOO_FEW_AUTHORS"}
