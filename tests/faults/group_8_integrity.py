"""Output folders that were altered, or whose sidecars lead to files of other patients."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.faults.runner import TARGET, Done, Row, command, statuses
from tests.support.cli import make_bundle, make_scan

GROUP = "8 altered folders, and files outside"


def study(folder: Path) -> tuple[Path, Path]:
    """A run with a map, and another patient's folder beside it; the sidecar and its map."""
    for name, place in (("mine", "out"), ("other", "elsewhere")):
        make_scan(folder / f"{name}.nii.gz", (16, 16, 16), seed=len(name))
        words = ["--bundle", folder / "bundle", "--input", folder / f"{name}.nii.gz", "--methods", "Saliency"]
        if name == "mine":
            make_bundle(folder / "bundle")
        assert command("explain", *words, "--target", TARGET, "--output", folder / place).code == 0
    (sidecar,) = (folder / "out").rglob("*_attr.json")
    return sidecar, sidecar.with_name(f"{sidecar.stem}.nii.gz")


def evaluated(folder: Path) -> Done:
    words = ["--bundle", folder / "bundle", "--input", folder / "mine.nii.gz", "--maps", folder / "out"]
    return command("evaluate", *words, "--output", folder / "evaluated", "--metrics", "Sparseness")


def named(folder: Path, text: str) -> str:
    """Both commands name the fault and end with 1; the page does not show the map."""
    report, evaluation = command("report", folder / "out"), evaluated(folder)
    for done in (report, evaluation):
        assert done.code == 1, (done.code, done.err)
        assert any(text in line for line in done.errors), done.err
        assert not done.traceback
    (page,) = (folder / "out").rglob("*_report.html")
    assert "altered" in page.read_text(encoding="utf-8")
    return report.errors[0][-140:]


def _voxel(folder: Path) -> str:
    _, path = study(folder)
    image = nib.load(path)
    values = image.get_fdata().astype(np.float32)
    values[8, 8, 8] *= 2
    nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    return named(folder, "was altered")


def _computed_again(folder: Path) -> str:
    """The same command computes an altered map again, and only this one."""
    _, path = study(folder)
    words = ["--bundle", folder / "bundle", "--input", folder / "mine.nii.gz", "--methods", "Saliency,GradCam"]
    words += ["--target", TARGET, "--output", folder / "out"]
    assert command("explain", *words).code == 0
    before = {p.name: p.read_bytes() for p in path.parent.glob("*_attr.nii.gz")}
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata().astype(np.float32) * 2, image.affine, image.header), path)
    again = command("explain", *words)
    assert again.code == 0, again.err
    results = {method: status for (_, _, method), status in statuses(folder / "out").items()}
    assert results == {"Saliency": "ok", "GradCam": "skipped"}
    assert {p.name: p.read_bytes() for p in path.parent.glob("*_attr.nii.gz")} == before
    return "the map is as before"


def _odd_records(folder: Path) -> str:
    """Records that are JSON, but none of ours: left out or named by all commands; and the work can be done again."""
    sidecar, _ = study(folder)
    odd = [1, "x", None, {"case": 5}, {"case": "mine", "target": [], "method": {}}, {"status": 3}]
    out = folder / "out"
    (out / "run.json").write_text(json.dumps({"results": odd, "summary": []}), encoding="utf-8")
    lines = [b'{"case": 1}', b"[]", b"null", b'{"case": "\xff"}', b'{"case":', b"\0" * 100]
    lines.append(b'{"case": "gone", "target": "t", "method": "M", "status": "?", "map": "../../x_attr.nii.gz"}')
    with open(out / "run.jsonl", "ab") as file:
        file.write(b"\n".join([b"", *lines, b""]))
    report = command("report", out)
    assert (report.code, report.traceback) == (0, False), report.err
    for words in (["merge-runs", out], ["merge-runs", folder / "joined", out]):
        done = command(*words)
        assert (done.code, done.traceback) == (0, False), done.err
    assert statuses(folder / "joined").items() >= {("mine", "MultiClassMask-grey matter", "Saliency"): "ok"}.items()
    sidecar.write_text("[]", encoding="utf-8")
    report = command("report", out)
    assert report.code == 1
    assert "is no record of a map" in report.errors[0], report.err
    words = ["--bundle", folder / "bundle", "--input", folder / "mine.nii.gz", "--methods", "Saliency"]
    again = command("explain", *words, "--target", TARGET, "--output", out)
    assert again.code == 0, again.err
    assert command("report", out).code == 0
    return report.errors[0][-140:]


def _leads(make: Callable[[Path, Path, Path], str], text: str) -> Callable[[Path], str]:
    def check(folder: Path) -> str:
        sidecar, path = study(folder)
        (other,) = (folder / "elsewhere").rglob("*_attr.nii.gz")
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        record["map"] = make(folder, path, other)
        record["map_sha256"] = json.loads(other.with_name(f"{other.name[:-7]}.json").read_text(encoding="utf-8"))[
            "map_sha256"
        ]
        sidecar.write_text(json.dumps(record), encoding="utf-8")
        return named(folder, text)

    return check


def _link(folder: Path, path: Path, other: Path) -> str:
    path.unlink()
    path.symlink_to(other)
    return path.name


def _copy(folder: Path, path: Path, other: Path) -> str:
    shutil.copy(other, path.with_name("copied_attr.nii.gz"))
    return "copied_attr.nii.gz"


def _page_has_no(what: str) -> Callable[[Path], None]:
    """A link in place of a table or of the copy of the scan: the page has nothing of it."""

    def check(folder: Path) -> None:
        study(folder)
        words = ["--bundle", folder / "bundle", "--input", folder / "other.nii.gz", "--maps", folder / "elsewhere"]
        assert command("evaluate", *words, "--output", folder / "elsewhere", "--metrics", "Sparseness").code == 0
        files = {
            "metrics.csv": ("metrics.csv", "metrics.csv"),
            "regions": ("mine/mine_regions.csv", "other/other_regions.csv"),
            "scan": ("mine/mine_scan.nii.gz", "other/other_scan.nii.gz"),
            "case folder": ("other", "other"),
        }
        place, source = files[what]
        link = folder / "out" / place
        before = folder / "out" / "mine" / "mine_report.html"
        link.unlink(missing_ok=True)
        assert command("report", folder / "out").code == 0
        wanted = before.read_text(encoding="utf-8")
        link.symlink_to(folder / "elsewhere" / source)
        assert command("report", folder / "out").code == 0
        assert "other" not in {path.name for path in (folder / "out").iterdir() if not path.is_symlink()}
        page = (folder / "out" / "mine" / "mine_report.html").read_text(encoding="utf-8")
        assert "Sparseness" not in page
        assert len(page) < len(wanted) + 2000  # no volume more

    return check


def _unlisted(folder: Path) -> None:
    """A link to the folder of another patient is not listed at all."""
    study(folder)
    (folder / "out" / "other").symlink_to(folder / "elsewhere" / "other")
    assert command("report", folder / "out").code == 0
    assert "other" not in (folder / "out" / "index.html").read_text(encoding="utf-8").split("<main", 1)[-1].replace(
        "another", ""
    )


ROWS = [
    Row(GROUP, "one voxel of a map altered", _voxel),
    Row(GROUP, "an altered map is computed again", _computed_again),
    Row(GROUP, "run.json, journal and sidecar are JSON of another kind", _odd_records),
    Row(GROUP, "sidecar names ../", _leads(lambda f, p, o: f"../../elsewhere/other/{o.name}", "only files beside it")),
    Row(GROUP, "sidecar names an absolute path", _leads(lambda f, p, o: str(o), "only files beside it"), slow=True),
    Row(GROUP, "map is a link to another folder", _leads(_link, "is a link to another folder")),
    Row(GROUP, "sidecar names another map beside it", _leads(_copy, "is not its own map"), slow=True),
    Row(GROUP, "metrics.csv is a link to another folder", _page_has_no("metrics.csv"), slow=True),
    Row(GROUP, "region table is a link to another folder", _page_has_no("regions"), slow=True),
    Row(GROUP, "copy of the scan is a link to another folder", _page_has_no("scan"), slow=True),
    Row(GROUP, "folder of a case is a link to another folder", _unlisted, slow=True),
]
