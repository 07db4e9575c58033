"""Output folders that were edited, cut or saved again: the page shows what is readable and names the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.output.report.collect import read_output
from esegeta_monai.output.report.page import write_report
from esegeta_monai.output.report.volumes import View
from tests.output.report.finished import evaluated, explained, one_map, sign
from tests.output.report.test_page import words
from tests.output.report.viewer import data_of

MAP = "sub-01/sub-01_MultiClassMask-grey-matter_Saliency_attr"
REGIONS = "sub-01/sub-01_regions.csv"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = explained(tmp_path_factory.mktemp("run"))
    evaluated(out, "sub-01")
    return out


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def report_text(out: Path) -> str:
    return words(write_report(out).cases["sub-01"].read_text(encoding="utf-8"))


def changed(path: Path, change: Callable[[dict], object]) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def test_a_table_that_a_spreadsheet_saved_is_read(out: Path) -> None:
    table = out / "metrics.csv"
    before = read_output(out).cases[0].metrics
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    (case,) = read_output(out).cases
    assert case.metrics == before
    assert before
    assert not case.notes


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("metrics.csv", "case,target,method\nsub-01,Köln,Saliency\n".encode("latin-1"), "metrics.csv cannot be read"),
        ("metrics.csv", b"case,target,value\nsub-01,x,1\n", "metrics.csv: 1 of 1 rows"),
        ("metrics.csv", b"case;target;method;metric\nsub-01;x;y;z\n", "metrics.csv: 1 of 1 rows"),
        (REGIONS, bytes(range(256)), "sub-01_regions.csv cannot be read"),
        (REGIONS, b"target,region\nx,y\n", "sub-01_regions.csv: 1 of 1 rows"),
    ],
)
def test_an_unreadable_table_is_reported(out: Path, file: str, content: bytes, text: str) -> None:
    (out / file).write_bytes(content)
    assert text in report_text(out)


@pytest.mark.parametrize("content", ["{", "[1, 2]", '"a"', '{"regions": [1]}'])
def test_regions_from_json_that_is_none(out: Path, content: str) -> None:
    (out / REGIONS).unlink()
    (out / REGIONS).with_suffix(".json").write_text(content, encoding="utf-8")
    assert "Before you trust the maps" in report_text(out)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("display", [1]),
        ("display", {"affine": [[1, 2]]}),
        ("parameters", [1]),
        ("network_affine", "x"),
        ("target_voxels", "5"),
        ("channel_names", 5),
        ("sum", "many"),
        ("value", float("nan")),
        ("predicted_probability", "x"),
        ("warnings", "abc"),
        ("units", 3),
    ],
)
def test_an_entry_of_another_kind_is_omitted_and_reported(out: Path, key: str, value: object) -> None:
    changed(out / f"{MAP}.json", lambda record: record.update({key: value}))
    text = report_text(out)
    assert (
        f"sub-01_MultiClassMask-grey-matter_Saliency_attr.json is not as 'explain' wrote it, left out: {key}." in text
    )
    assert "nan" not in text.split()


@pytest.mark.parametrize("change", [{"status": "nope"}, {"status": None}, {"target": None}, {"method": 5}])
def test_empty_results_of_run_json_are_omitted_and_reported(out: Path, change: dict) -> None:
    (out / "run.jsonl").unlink()
    changed(out / "run.json", lambda run: run["results"][0].update(change))
    assert "run.json: 1 results are not as 'explain' wrote them" in report_text(out)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_leaves_the_others_to_be_seen(out: Path, value: float) -> None:
    """In the page's data a NaN would be no JSON, and no map would be drawn at all."""
    image = nib.load(out / f"{MAP}.nii.gz")
    values = image.get_fdata().astype(np.float32)
    values[3, 3, 3] = value
    nib.save(nib.Nifti1Image(values, image.affine), out / f"{MAP}.nii.gz")
    sign(out / MAP)
    path = write_report(out).cases["sub-01"]
    result = data_of(path)
    json.dumps(result, allow_nan=False)
    assert [m["method"] for m in result["maps"]] == ["InputXGradient", "GradCam"]
    text = words(path.read_text(encoding="utf-8"))
    assert f"Saliency_attr.nii.gz: 1 of {values.size} values are not finite" in text
    assert "or cannot be shown" in text


def test_an_affine_that_leads_nowhere_is_reported(tmp_path: Path) -> None:
    one_map(tmp_path, np.ones((5, 5, 5), np.float32), np.eye(4), display={"affine": np.zeros((4, 4)).tolist()})
    text = words(write_report(tmp_path).cases["a"].read_text(encoding="utf-8"))
    assert "affine of the scan is singular" in text
    assert View.of((5, 5), np.eye(4), True).size == (5, 5, 1)


def test_a_synthesised_image_that_is_cut_leaves_the_page(tmp_path: Path) -> None:
    one_map(tmp_path, np.ones((5, 5, 5), np.float32), np.eye(4), produces="synthesised image")
    (tmp_path / "a" / "a_t_Saliency_attr.nii.gz").write_bytes(b"cut")
    sign(tmp_path / "a" / "a_t_Saliency_attr")
    text = words(write_report(tmp_path).cases["a"].read_text(encoding="utf-8"))
    assert "a_t_Saliency_attr.nii.gz cannot be read" in text


def test_an_altered_map_is_named_and_not_shown(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One voxel: until now the page showed it without a word."""
    assert main(["report", str(out), "-q"]) == 0
    image = nib.load(out / f"{MAP}.nii.gz")
    values = image.get_fdata().astype(np.float32)
    values[3, 3, 3] += 1
    nib.save(nib.Nifti1Image(values, image.affine, image.header), out / f"{MAP}.nii.gz")
    assert main(["report", str(out), "-q"]) == 1
    assert "Saliency_attr.nii.gz was altered" in capsys.readouterr().err
    page = write_report(out).cases["sub-01"]
    assert [m["method"] for m in data_of(page)["maps"]] == ["InputXGradient", "GradCam"]
    assert "1 altered" in words(page.read_text(encoding="utf-8"))
    (result,) = [r for r in read_output(out).cases[0].results if r.status == "altered"]
    assert result.map is None


@pytest.mark.parametrize("how", ["map", "absolute map", "mask", "absolute mask"])
def test_a_sidecar_names_no_file_of_another_patient(out: Path, tmp_path: Path, how: str) -> None:
    other = tmp_path / "other" / Path(MAP).with_suffix(".nii.gz").name
    other.parent.mkdir()
    shutil.copy(out / f"{MAP}.nii.gz", other)
    name = str(other) if "absolute" in how else f"../../other/{other.name}"

    def change(record: dict) -> None:
        if "mask" in how:
            record["display"]["mask"] = name
        else:
            record["map"] = name

    changed(out / f"{MAP}.json", change)
    (result,) = [r for r in read_output(out).cases[0].results if r.status == "altered"]
    assert (result.map, result.mask) == (None, None)
    assert "only files beside it are read" in str(result.reason)


@pytest.mark.parametrize("file", [f"{MAP}.nii.gz", f"{MAP}.json", "sub-01/sub-01_scan.nii.gz", REGIONS, "metrics.csv"])
def test_links_out_of_the_folder_are_not_read(out: Path, tmp_path: Path, file: str) -> None:
    """Nor are run.json and the journal: the page has nothing of the other patient."""
    shutil.move(out / file, tmp_path / "elsewhere")
    (out / file).symlink_to(tmp_path / "elsewhere")
    (case,) = read_output(out).cases
    maps = [r.map.name for r in case.results if r.map is not None]
    assert (f"{Path(MAP).name}.nii.gz" in maps) != file.startswith(MAP)
    assert bool(case.regions) or file != "metrics.csv"
    assert (case.scan is None) == (file == "sub-01/sub-01_scan.nii.gz")
    if file == "metrics.csv":
        assert "metrics.csv is a link to another folder and is not read." in case.notes


@pytest.mark.parametrize("file", ["run.json", "run.jsonl"])
def test_a_record_that_is_a_link_is_not_read(tmp_path: Path, file: str) -> None:
    entry = {"case": "Jane Doe", "target": None, "method": None, "status": "failed", "reason": "x"}
    (tmp_path / "other").write_text(json.dumps({"results": [entry]} if file == "run.json" else entry), encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).symlink_to(tmp_path / "other")
    with pytest.raises(UsageError, match=r"has neither a run\.json nor maps"):
        read_output(tmp_path / "out")


def test_curves_of_any_size_are_drawn(out: Path) -> None:
    curves = [{"target": "t", "method": "m", "metric": f"c{n}", "x": [0, 1], "y": y} for n, y in enumerate(CURVES)]
    (out / "sub-01" / "sub-01_metrics.json").write_text(json.dumps({"curves": curves}), encoding="utf-8")
    page = write_report(out).cases["sub-01"].read_text(encoding="utf-8")
    assert page.count("<polyline") == len(CURVES)
    assert ">0</text>" in page
    assert ">1e-14</text>" in page


CURVES = [[0, 3e-14], [0, 5e-324], [1, 1 + 2e-16], [-1e300, 1e300], [0, 0]]
