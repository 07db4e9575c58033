"""The content of a report, read back from the file, without a browser."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.files.pictures.picture import INTENDED_USE
from esegeta_monai.output.report import embed, page, render
from esegeta_monai.output.report.page import report_path, write_report
from tests.output.report.finished import GREY, HOSTILE, evaluated, explained, one_map, sign
from tests.output.report.viewer import data_of, scan_of, values_of, volume_of
from tests.support.cli import make_bundle, make_scan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = explained(tmp_path_factory.mktemp("Doe_Jane"), ("sub-01", "<img src onerror>"))
    evaluated(out, "sub-01")
    return out


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return write_report(folder).cases["sub-01"].read_text(encoding="utf-8")


def words(page_text: str) -> str:
    """The page without markup, scripts and styles."""
    plain = re.sub(r"<(script|style)\b.*?</\1>", " ", page_text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", plain.replace("<wbr>", ""))).split())


def test_pages_lie_where_they_should_and_are_complete_in_themselves(folder: Path) -> None:
    written = write_report(folder)
    assert written.index == folder / "index.html"
    assert written.cases == {name: report_path(folder, name) for name in ("sub-01", "<img src onerror>")}
    for path in (written.index, *written.cases.values()):
        content = path.read_text(encoding="utf-8")
        assert len(content.encode()) < 5_000_000
        assert "://" not in re.sub(r'<script type="text/plain".*?</script>', "", content, flags=re.S)
        assert not re.search(r"<(script|img|iframe|link)[^>]+(src|href)=\"(?!data:)", content)
        assert "default-src 'none'" in html.unescape(content)
        assert words(content).count(INTENDED_USE) == 2
    index = written.index.read_text(encoding="utf-8")
    for link in re.findall(r'<a href="([^"]+html)"', index):
        assert (folder / link).is_file()


def test_the_summary_lists_what_was_explained_and_the_warnings(text: str) -> None:
    reported = words(text)
    assert "What does “Tiny brain” (version 0.1.0) look at in this scan? 4 methods asked about 3 targets" in reported
    for expected in (
        "Problem Cam for grey matter (all predicted voxels) failed: Cam needs a network that ends in global average",
        "Region alarm, Saliency for grey matter (all predicted voxels): outside of the body (65.0 %",
        "Careful Empty target grey matter (voxels above a threshold): no voxel of the prediction belongs to",
        "Careful GradCam does not beat the control maps on deletion",
        "Radiological convention: the patient's left is on the viewer's right.",
    ):
        assert expected in reported


def test_metrics_regions_and_curves_are_there(text: str) -> None:
    reported = words(text)
    assert "deletion ↓" in reported
    assert "gini ↑" in reported
    assert re.search(r"GradCam 0.7 0.6 … 0.8 not better than controls", reported)
    assert text.count('<tr class="control">') == 4
    assert "cortex &lt;left&gt;" in text
    assert text.count("<svg") == 2
    assert text.count("<polyline") == 6


def test_a_failure_is_shown_with_its_traceback(text: str) -> None:
    (traceback,) = re.findall(r"<pre[^>]*>(.*?)</pre>", text, re.S)[:1]
    assert "esegeta_monai/methods/cam/pooled_cam.py, line " in traceback
    assert traceback.rstrip().endswith("(the output of this network is a map of voxels)")


def test_methods_paragraph_cites_every_method_that_has_a_paper(text: str) -> None:
    reported = words(text)
    assert "Saliency [1] (abs=True), InputXGradient [2], GradCam [3] (relu=True) and Cam [4] (relu=False)" in reported
    for paper in ("Simonyan et al., ICLR workshop 2014, arXiv:1312.6034", "Zhou et al., CVPR 2016, arXiv:1512.04150"):
        assert f"<li>{paper}</li>" in text


def test_nothing_names_the_patient(folder: Path, text: str) -> None:
    """Scans, bundle and the folder above all are called after her; the user called the case sub-01."""
    for path in (folder / "index.html", *folder.glob("*/*_report.html")):
        content = path.read_text(encoding="utf-8")
        for secret in ("Doe", "Jane", str(folder), os.path.expanduser("~")):
            assert secret not in content, path.name


def test_a_case_that_failed_as_a_whole_has_a_page(tmp_path: Path) -> None:
    broken = tmp_path / "Doe Jane.nii.gz"
    broken.write_bytes(b"")
    bundle = make_bundle(tmp_path / "bundle")
    out = tmp_path / "out"
    assert main(["explain", "--bundle", str(bundle), "--input", f"p7={broken}", "--output", str(out), "-q"]) == 1
    content = write_report(out).cases["p7"].read_text(encoding="utf-8")
    reported = words(content)
    assert "This case could not be explained" in reported
    assert "the file is empty" in reported
    assert "esegeta_monai/files/scans.py, line" in reported
    assert "Doe" not in content
    assert data_of(report_path(out, "p7"))["maps"] == []


def test_a_hostile_name_stays_text(folder: Path, text: str) -> None:
    content = report_path(folder, "<img src onerror>").read_text(encoding="utf-8")
    assert "<img src onerror>" not in content
    assert "&lt;img src onerror&gt;" in content
    entry = {"case": HOSTILE + "</script><script>alert(1)</script>", "target": "</script>", "method": "<b>"}
    out = folder.parent / "hostile"
    out.mkdir()
    (out / "run.json").write_text(
        json.dumps({"results": [{**entry, "status": "failed", "reason": "<i>", "traceback": "<u>"}]}), encoding="utf-8"
    )
    (path,) = write_report(out).cases.values()
    content = path.read_text(encoding="utf-8")
    for tag in (HOSTILE, "<script>alert", "<b>", "<i>", "<u>"):
        assert tag not in content


# ---- the volumes -----------------------------------------------------------------------------------------------------


def test_the_volumes_are_the_maps(folder: Path, text: str) -> None:
    """Against the NIfTI file, voxel by voxel, through world coordinates."""
    path = report_path(folder, "sub-01")
    data = data_of(path)
    assert [(m["method"], m["target"]) for m in data["maps"]] == [
        (m, GREY) for m in ("Saliency", "InputXGradient", "GradCam")
    ]
    affine = np.array(data["affine"])
    rng = np.random.default_rng(0)
    for entry in data["maps"]:
        shown = values_of(path, entry)
        image = nib.load(folder / "sub-01" / f"sub-01_MultiClassMask-grey-matter_{entry['method']}_attr.nii.gz")
        values = np.asarray(image.dataobj)
        strength = np.abs(values) if entry["signed"] else np.maximum(values, 0)
        mask = np.asarray(nib.load(folder / "sub-01/sub-01_MultiClassMask-grey-matter_mask.nii.gz").dataobj) > 0
        whole, inside = np.percentile(strength[strength > 0], 99.5), np.percentile(strength[mask], 99)
        assert entry["limit"] == pytest.approx(float(max(whole, inside)), rel=1e-6)
        for voxel in rng.integers(0, data["size"], (50, 3)):
            world = affine @ [*voxel, 1]
            stored = tuple(np.rint(np.linalg.inv(image.affine) @ world)[:3].astype(int))
            assert shown[tuple(voxel)] == pytest.approx(values[stored], rel=entry["error"], abs=1e-4 * entry["limit"])
        assert values.flat[np.abs(values).argmax()] == pytest.approx(entry["value"])


@pytest.mark.parametrize("flip", [1.0, -1.0], ids=["stored R to the right", "stored L to the right"])
def test_left_is_left(tmp_path: Path, flip: float) -> None:
    """A voxel in the patient's left half comes out in that half, however the scan is stored, and is lettered so."""
    affine = np.diag([flip, 1.0, 2.0, 1.0])
    affine[:3, 3] = [-5 * flip, -6, -8]
    values = np.zeros((11, 12, 9), np.float32)
    values[(1 if flip > 0 else 9), 3, 7] = 2.5  # R = -4
    values[:, 6, 4] = 0.5
    one_map(tmp_path, values, affine)
    for neurological in (False, True):
        written = write_report(tmp_path, convention="neurological" if neurological else "radiological")
        data = data_of(written.cases["a"])
        at = data["maps"][0]["peak"]
        world = np.array(data["affine"]) @ [*at, 1]
        assert world[:3].tolist() == [-4, -3, 6]
        axial = data["planes"][0]
        assert (axial["name"], axial["mirrored"], axial["left"]) == (
            "axial",
            not neurological,
            "L" if neurological else "R",
        )


def test_large_volumes_are_means_over_blocks_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=(32, 32, 16)).astype(np.float32)
    one_map(tmp_path, values, np.diag([1.0, 1.0, 2.0, 1.0]))
    monkeypatch.setattr(page, "BUDGET", 6000)
    written = write_report(tmp_path)
    data = data_of(written.cases["a"])
    assert data["maps"][0]["levels"] == embed.LEVELS[-1][0]
    blocks = [round(s / e) for s, e in zip(data["spacing"], (1, 1, 2))]
    assert blocks == [2, 2, 1]
    means = values.reshape(16, 2, 16, 2, 16).mean((1, 3))
    entry = data["maps"][0]
    shown = values_of(written.cases["a"], entry)
    assert (np.abs(shown - means) <= entry["error"] * np.abs(means) + 1e-3 * entry["limit"]).all()
    assert np.abs(shown).max() == pytest.approx(np.abs(means).max()), "nothing is clipped"
    assert "means over blocks of 2 x 2 x 1 voxels" in words(written.cases["a"].read_text(encoding="utf-8"))


def test_black_all_round_is_left_out(tmp_path: Path) -> None:
    values = np.zeros((20, 20, 20), np.float32)
    values[8:12, 9:14, 10] = 1
    one_map(tmp_path, values, np.eye(4))
    data = data_of(write_report(tmp_path).cases["a"])
    assert data["size"] == [4 + 2 * embed.RIM, 5 + 2 * embed.RIM, 1 + 2 * embed.RIM]
    assert (np.array(data["affine"]) @ [0, 0, 0, 1])[:3].tolist() == [8 - embed.RIM, 9 - embed.RIM, 10 - embed.RIM]


def test_channels_are_named_and_the_strongest_is_first(tmp_path: Path) -> None:
    values = np.ones((6, 6, 6, 2), np.float32)
    values[2, 3, 4, 1] = -7
    one_map(tmp_path, values, np.eye(4), channel_names=["T1", "FLAIR"])
    data = data_of(write_report(tmp_path).cases["a"])
    (entry,) = data["maps"]
    assert (data["channels"], entry["channel"], entry["peak"], entry["value"]) == (["T1", "FLAIR"], 1, [2, 3, 4], -7)
    assert len(entry["volumes"]) == 2


def test_of_many_channels_the_same_are_shown_of_every_map_and_of_the_scan_under_their_own_names(tmp_path: Path) -> None:
    """Each map's own strongest under shared names would call channel 11 of one map by the name of another."""
    shape, own = (6, 6, 6), tmp_path / "a"
    values = np.ones((*shape, 12), np.float32) * np.array([1, 1, 9, 9, 9, 9, 9, 9, 9, 1, 1, 20], np.float32)
    one_map(tmp_path, values, np.eye(4), channel_names=[f"c{n}" for n in range(12)])
    other = np.ones((*shape, 12), np.float32) * np.array([20, 1, 9, 9, 9, 9, 9, 9, 9, 1, 1, 1], np.float32)
    nib.save(nib.Nifti1Image(other, np.eye(4)), own / "a_t_GradCam_attr.nii.gz")
    record = json.loads((own / "a_t_Saliency_attr.json").read_text(encoding="utf-8"))
    record |= {"method": "GradCam", "method_name": "GradCam", "map": "a_t_GradCam_attr.nii.gz"}
    (own / "a_t_GradCam_attr.json").write_text(json.dumps(record), encoding="utf-8")
    sign(own / "a_t_GradCam_attr")
    scan = np.ones((*shape, 12), np.uint8) * np.arange(100, 112, dtype=np.uint8)
    nib.save(nib.Nifti1Image(scan, np.eye(4)), own / "a_scan.nii.gz")
    path = write_report(tmp_path).cases["a"]
    data = data_of(path)
    kept = [0, 2, 3, 4, 5, 6, 7, 11]
    assert data["channels"] == [f"c{n}" for n in kept]
    assert [m["channels"] for m in data["maps"]] == [data["channels"]] * 2
    assert [scan_of(path, c).max() for c in range(len(kept))] == [100 + n for n in kept]
    text = words(path.read_text(encoding="utf-8"))
    assert (
        text.count(
            "Maps with 12 channels are shown with the 8 channels that are strongest over all maps: numbers "
            "0, 2, 3, 4, 5, 6, 7, 11."
        )
        == 1
    )


def test_a_zero_map_is_seen_in_the_middle(tmp_path: Path) -> None:
    one_map(tmp_path, np.zeros((9, 9, 9), np.float32), np.eye(4), status="zero")
    assert data_of(write_report(tmp_path).cases["a"])["start"] == [4, 4, 4]


def test_two_dimensions_without_a_world_have_no_letters(tmp_path: Path) -> None:
    """An array of rows and columns: rows count downwards, as the picture beside the map shows it."""
    values = np.zeros((12, 30, 1), np.float32)
    values[2, 9:12] = 1
    values[11, :] = values[:, 29] = values[0, :] = values[:, 0] = 0.5
    one_map(tmp_path, values, np.eye(4))
    path = write_report(tmp_path).cases["a"]
    data = data_of(path)
    assert not data["oriented"]
    (plane,) = data["planes"]
    assert not plane["mirrored"]
    shown = volume_of(path, data["maps"][0]["volumes"][0])
    assert data["size"][:2] == [30, 12]
    assert np.argwhere(shown == data["maps"][0]["levels"]).tolist() == [
        [x, 12 - 1 - 2, 0] for x in (9, 10, 11)
    ]  # upwards: row 2 is tenth
    assert "Orientation is unknown" in words(path.read_text(encoding="utf-8"))


def test_a_zero_map_and_a_map_that_is_gone(tmp_path: Path) -> None:
    one_map(tmp_path, np.zeros((5, 5, 5), np.float32), np.eye(4), status="zero")
    reported = words(write_report(tmp_path).cases["a"].read_text(encoding="utf-8"))
    assert "the map is zero everywhere" in reported
    (tmp_path / "a" / "a_t_Saliency_attr.nii.gz").unlink()
    reported = words(write_report(tmp_path).cases["a"].read_text(encoding="utf-8"))
    assert "the map's file is missing" in reported


def test_an_unreadable_map_leaves_the_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    (out / "sub-01" / "sub-01_MultiClassMask-grey-matter_Saliency_attr.nii.gz").write_bytes(b"cut")
    path = write_report(out).cases["sub-01"]
    assert [m["method"] for m in data_of(path)["maps"]] == ["InputXGradient", "GradCam"]
    assert "sub-01_MultiClassMask-grey-matter_Saliency_attr.nii.gz was altered" in words(
        path.read_text(encoding="utf-8")
    )


def test_synthesised_images_are_shown_as_images_with_their_loss(tmp_path: Path) -> None:
    image = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    one_map(tmp_path, image, np.eye(4), produces="synthesised image", curve=[3.0, 2.0, 1.5])
    path = write_report(tmp_path).cases["a"]
    content = path.read_text(encoding="utf-8")
    assert data_of(path)["maps"] == []
    assert content.count('<img src="data:image/png;base64,') == 1
    assert "synthesis, objective" in content
    assert content.count("<polyline") == 1


# ---- interfaces ------------------------------------------------------------------------------------------------------


def test_failures_keep_their_reason_meaning_and_order(tmp_path: Path) -> None:
    """The file that a user has named and that is missing; privacy once made it "(scan)" with the words before it."""
    bundle, scan = make_bundle(tmp_path / "bundle"), make_scan(tmp_path / "Doe" / "Jane Doe.nii.gz")
    out, target = tmp_path / "out", ("--target", "MultiClassMask(1)")
    methods = [
        f"Occlusion(window=8, baseline={str(tmp_path / 'Doe' / 'healthy.nii.gz')!r})",
        "Saliency",
        f"FeatureAblation(feature_mask={str(tmp_path / 'Doe' / 'Jane Doe atlas.nii.gz')!r})",
    ]
    words_of = ["explain", "--bundle", str(bundle), "--input", f"sub-01={scan}", "--output", str(out), "-q", "--report"]
    assert main([*words_of, *target, *(w for m in methods for w in ("--methods", m)), "--no-pictures"]) == 1
    content = report_path(out, "sub-01").read_text(encoding="utf-8")
    shown = words(content)
    reasons = {
        "Occlusion": "baseline file healthy.nii.gz does not exist",
        "FeatureAblation": "feature map: '(scan)' is neither a file nor a key of the case's data (keys: image)",
    }
    results = json.loads((out / "run.json").read_text(encoding="utf-8"))["results"]
    failed = [(r["method"], r["target"].removeprefix("MultiClassMask-")) for r in results if r["status"] == "failed"]
    assert failed == [(method, "grey matter") for method in reasons], "as asked, though FeatureAblation ends first"
    assert re.findall(r'<div class="card problem"><h3>(\w+) · MultiClassMask-(\w+ \w+)', content) == failed
    places = [shown.index(f"{method} for {target} failed: {reasons[method]}") for method, target in failed]
    assert places[1:] == sorted(places[1:]), "in the order of the run; the first is also in the summary"
    assert not re.search("Jane|Doe", content)


def test_one_table_has_every_case_target_method_region_and_metric(folder: Path) -> None:
    write_report(folder)
    with open(folder / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {"sub-01", "<img src onerror>"}
    one = [r for r in rows if (r["case"], r["target"], r["method"]) == ("sub-01", GREY, "Saliency")]
    (gini,) = [r for r in one if r["metric"] == "gini"]
    assert (float(gini["value"]), gini["beats_controls"], gini["region"]) == (0.2, "false", "")
    shares = {r["region"]: float(r["value"]) for r in one if r["metric"].endswith("share_of_abs")}
    assert shares == {"cortex <left>": 0.35, "outside of the body": 0.65}
    keys = [tuple(r[k] for k in ("case", "target", "method", "region", "metric")) for r in rows]
    assert len(keys) == len(set(keys)), "tidy: one value for each"


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder)]) == 0
    assert f"Open {folder / 'index.html'} in a browser" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2
    assert "has neither a run.json nor maps: run 'esegeta-monai explain" in capsys.readouterr().err


def test_explain_writes_it_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, scan = make_bundle(tmp_path / "bundle"), make_scan(tmp_path / "a.nii.gz")
    words = ["explain", "--bundle", str(bundle), "--input", str(scan), "--output", str(tmp_path / "out")]
    assert main([*words, "--methods", "Saliency", "--target", "MultiClassMask(1)", "--no-pictures", "--report"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"The report is {tmp_path / 'out' / 'index.html'}."
    assert data_of(report_path(tmp_path / "out", "a"))["scan"] is None, "without pictures there is no anatomy"


def test_wrong_convention_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="radiological or neurological"):
        write_report(folder, convention="surgical")  # type: ignore[arg-type]


def test_3d_is_optional_and_the_error_names_the_package_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nilearn", reason="NiiVue comes with nilearn: pip install 'esegeta-monai[demo]'")
    plain = write_report(folder).cases["sub-01"].read_text(encoding="utf-8")
    assert "niivue.NVImage" in plain
    assert 'id="load-3d"' not in plain
    three = write_report(folder, view_3d=True).cases["sub-01"].read_text(encoding="utf-8")
    assert 'id="load-3d"' in three
    assert len(three) > len(plain) + 2_000_000
    (stated,) = set(re.findall(r"This page has ([\d.]+) MB; NiiVue for the 3D view takes [\d.]+ MB of it", three))
    assert float(stated) == pytest.approx(len(three.encode()) / 1e6, abs=0.11), "the page states its size"
    write_report(folder)
    monkeypatch.setattr("esegeta_monai.output.report.viewer3d.find_spec", lambda name: None)
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match=r"needs NiiVue: pip install \"nilearn>=0.11\""):
        write_report(folder, view_3d=True)


def test_numbers_are_short() -> None:
    assert [render.short(v) for v in (0, 12.0, 484714.2, 1.23456e-5, -0.5, None)] == [
        "0",
        "12",
        "484,700",
        "1.235e-05",
        "-0.5",
        "–",
    ]


def test_checks_of_single_maps_name_their_methods() -> None:
    """Equal results of different methods are one line; a check that all methods share names none."""
    texts = {"A": [("map", "fits"), ("rows", "mixed")], "B": [("map", "fits"), ("rows", "mixed")],
             "C": [("map", "differs"), ("rows", "mixed")]}  # fmt: skip
    results = [
        SimpleNamespace(
            method=method,
            record=SimpleNamespace(
                checks=[{"check": c, "text": t, "verdict": "warned" if t == "differs" else "passed"} for c, t in checks]
            ),
        )
        for method, checks in texts.items()
    ]
    lines = [(check["check"], check["text"], check["methods"]) for check in page._checks(results)]
    assert lines == [("map", "differs", "C"), ("map", "fits", "A, B"), ("rows", "mixed", "")]
