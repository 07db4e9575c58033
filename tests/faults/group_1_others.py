"""Labels, body masks and regions that lie nowhere; folders, files and names of every kind."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from tests.faults import nifti as n
from tests.faults.group_1_nifti import GROUP, NAN, damaged_trailer, explain, refused, saved
from tests.faults.runner import TARGET, Row, command, obey_permissions, statuses, unfinished
from tests.support.cli import make_bundle, make_scan

# -- labels, body masks, regions ---------------------------------------------------------------------------------------

LABEL = (n.ball() > 0.5).astype(np.uint8)
FAR = np.array([[2.0, 0, 0, 9000], [0, 2, 0, 9000], [0, 0, 2, 9000], [0, 0, 0, 1]])


def label(name: str, options: str, make: n.Make, says: str, code: int = 1, why: str = "") -> Row:
    """``evaluate`` with a label map, body mask or regions that cannot be right, or (code 0) that is."""

    def check(folder: Path) -> str:
        (folder / "label").mkdir()
        make(folder / "label" / "label.nii.gz")
        done = command(
            *("evaluate", "--bundle", make_bundle(folder / "bundle"), "--input", make_scan(folder / "good.nii.gz")),
            *("--output", folder / "out", "--methods", "Saliency", "--target", TARGET),
            *("--metrics", "RelevanceMass,Sparseness", options, folder / "label" / "label.nii.gz"),
        )
        assert done.code == code, f"{done.code} {done.err[-500:]} {done.out[-300:]}"
        assert not done.traceback
        assert not unfinished(folder / "out")
        if code:
            assert any(re.search(says, text) for text in done.errors), done.err[-500:]
            assert "0 problem(s)" not in done.out
        return "; ".join(done.errors)[:150]

    return Row(GROUP, f"{options} {name}", check, why=why)


def nothing(path: Path) -> None:
    """No file is written."""


def resolution(path: Path) -> None:
    nib.save(nib.Nifti1Image((n.ball((32, 40, 32)) > 0.5).astype(np.uint8), np.eye(4)), path)


def shifted(path: Path) -> None:
    nib.save(nib.Nifti1Image(LABEL, FAR), path)


def in_the_corner(path: Path) -> None:
    """A label map whose voxels, but not its field of view, lie outside the image."""
    values = np.zeros((16, 20, 40), np.uint8)
    values[:, :, 30:] = 1
    nib.save(nib.Nifti1Image(values, n.AFFINE), path)


LABELS = [
    label("on a finer grid", "--label", resolution, "", 0, why="the same place: resampled"),
    label("metres away", "--label", shifted, r"lies outside the image \(their centres are 1.559e\+04 mm apart"),
    label("beside the image", "--label", in_the_corner, "no voxel above 0 on the image"),
    label("empty", "--label", saved(LABEL * 0), "no voxel above 0 on the image .values: 0"),
    label("negative", "--label", saved(-LABEL.astype(np.int16)), "values: -1, 0.: it is empty, has negative"),
    label("NaN", "--label", saved(np.full(n.SHAPE, NAN, np.float32)), "no whole numbers"),
    label("probabilities", "--label", saved(n.ball()), "no whole numbers"),
    label("4D", "--label", saved(np.stack([LABEL, LABEL], -1)), "2 channels"),
    label("2D", "--label", saved(LABEL[..., 0]), r"a 2D image \(16x20\)"),
    label("truncated", "--label", n.raw(lambda b: b[:2000]), "label.nii.gz: the file is truncated"),
    label("with a flipped bit", "--label", n.raw(damaged_trailer), "label.nii.gz: the file is damaged"),
    label("missing", "--label", nothing, "no such file", 2),
    label("metres away", "--body", shifted, "lies outside the image"),
    label("empty", "--body", saved(LABEL * 0), "the body map has no voxel above 0"),
    label("metres away", "--regions", shifted, "lies outside the image"),
    label("empty", "--regions", saved(LABEL * 0), "the regions map has no voxel above 0"),
]


def in_the_handlers(make: n.Make, says: str) -> Callable[[Path], str]:
    """``monai.bundle run`` with an evaluation: a problem is named, and the engine goes on."""

    def check(folder: Path) -> str:
        from monai.data import list_data_collate
        from monai.engines import SupervisedEvaluator
        from monai.inferers import SlidingWindowInferer
        from monai.networks.nets import UNet
        from monai.transforms import LoadImaged

        from esegeta_monai.handlers import EvaluationHandler

        make(folder / "bad.nii.gz")
        saved(LABEL)(folder / "right.nii.gz")
        load, batches = LoadImaged(("image", "label"), ensure_channel_first=True), []
        for name in ("bad", "right"):
            scan = make_scan(folder / "scans" / f"{name}.nii.gz")
            batches.append(list_data_collate([load({"image": str(scan), "label": str(folder / f"{name}.nii.gz")})]))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = UNet(3, 1, 3, [4, 8], [2])
        handler = EvaluationHandler("Saliency", TARGET, "RelevanceMass", folder / "out")
        inferer = SlidingWindowInferer((16, 16, 16))
        SupervisedEvaluator(torch.device("cpu"), batches, network, inferer=inferer, val_handlers=[handler]).run()
        assert handler.writer is not None
        assert handler.writer.done >= 1
        (problem,) = handler.writer.problems
        assert problem.startswith("bad: ")
        assert says in problem
        return problem[:120]

    return check


# -- folders and files that cannot be read -----------------------------------------------------------------------------


def in_a_folder(name: str, spoil: Callable[[Path], object], says: str) -> Row:
    """A folder with a good scan and something that cannot be read: named, exit code 1, the good scan done."""

    def check(folder: Path) -> str:
        scans = folder / "scans"
        make_scan(scans / "good.nii.gz")
        spoil(scans)
        done = explain(folder, scans, before=obey_permissions)
        for path in scans.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755)
        refused(done, folder / "out", "bad")
        assert re.search(says, done.errors[0]), done.errors
        return done.errors[0][:150]

    return Row(GROUP, name, check)


def locked_folder(scans: Path) -> None:
    make_scan(scans / "bad" / "inside.nii.gz")
    (scans / "bad").chmod(0)


def listed_folder(scans: Path) -> None:
    """Names can be read, files cannot."""
    make_scan(scans / "bad" / "inside.nii.gz")
    (scans / "bad").chmod(0o444)


def locked_scan(scans: Path) -> None:
    make_scan(scans / "bad.nii.gz").chmod(0)


def looping(scans: Path) -> None:
    (scans / "bad").symlink_to(scans, target_is_directory=True)


def empty_folder(folder: Path) -> str:
    (folder / "bad.nii.gz").mkdir()
    done = explain(folder, folder / "bad.nii.gz", make_scan(folder / "good.nii.gz"))
    assert done.code == 2, done.err
    assert "bad.nii.gz: no scan in this folder" in done.errors[0]
    return done.errors[0][:150]


def linked_folder(folder: Path) -> str:
    """Links to folders are followed."""
    make_scan(folder / "elsewhere" / "b.nii.gz")
    make_scan(folder / "scans" / "a.nii.gz")
    (folder / "scans" / "more").symlink_to(folder / "elsewhere", target_is_directory=True)
    done = explain(folder, folder / "scans")
    assert done.code == 0, done.err
    assert {case for case, _, _ in statuses(folder / "out")} == {"a", "more-b"}
    return "both done"


def remote(name: str, options: list[str], remedy: str) -> Row:
    def check(folder: Path) -> str:
        words = {
            "--bundle": str(make_bundle(folder / "bundle")),
            "--input": str(make_scan(folder / "good.nii.gz")),
            "--output": str(folder / "out"),
        } | dict(zip(options[::2], options[1::2]))
        done = command("explain", *[w for pair in words.items() for w in pair], "--methods", "Saliency", cwd=folder)
        assert done.code == 2, done.err
        assert len(done.errors) == 1
        assert re.search(rf"remote paths are not supported; copy it here first \({remedy}", done.errors[0]), done.errors
        assert sorted(p.name for p in folder.iterdir()) == ["bundle", "good.nii.gz"]
        return done.errors[0][:150]

    return Row(GROUP, name, check)


def forged_line(folder: Path) -> str:
    """A file whose name contains a line of a log."""
    bad = folder / "x\n2026-01-01 00:00:00 ERROR: forged\x1b[31m.nii.gz"
    bad.write_bytes(b"")
    done = explain(folder, bad, make_scan(folder / "good.nii.gz"))
    log = (folder / "out" / "esegeta.log").read_text(encoding="utf-8")
    for text in (done.err, log):
        assert not [line for line in text.splitlines() if line.startswith("2026-01-01 00:00:00")], text
        assert "\x1b" not in text
    assert str(folder) not in log
    assert done.code == 1
    return done.errors[0][:150]


def forged_name(folder: Path) -> str:
    done = explain(folder, f"x\nforged={make_scan(folder / 'good.nii.gz')}")
    assert done.code == 2, done.err
    assert "must not contain control characters" in done.errors[0]
    return done.errors[0][:150]


def formulas(folder: Path) -> str:
    """Names of files and regions that a spreadsheet would run."""
    names = ["=cmd|' C calc'!A0", "@SUM(1)", "+1+1", "-1+1"]
    for name in names:
        make_scan(folder / "scans" / f"{name}.nii.gz")
    label = folder / "label.nii.gz"
    saved(LABEL + 1)(label)
    done = command(
        *("evaluate", "--bundle", make_bundle(folder / "bundle"), "--output", folder / "out", "--label", label),
        *("--methods", "Saliency", "--target", TARGET, "--metrics", "Sparseness", "--no-controls"),
        *("--input", folder / "scans", "--region-names", "1==HYPERLINK(1),2=@x"),
    )
    assert done.code == 0, done.err
    tables = list((folder / "out").rglob("*.csv"))
    assert len(tables) == len(names) + 1
    cells = [cell for table in tables for line in csv.reader(table.open(newline="")) for cell in line]
    for name in (*names, "=HYPERLINK(1)", "@x"):
        assert f"'{name}" in cells, name
    assert not [c for c in cells if c.startswith(("=", "@", "+"))]
    assert all(float(c) < 0 for c in cells if c.startswith("-"))
    again = command("report", folder / "out")
    assert again.code in (0, 2), again.err
    return f"{len(tables)} tables, {len(cells)} cells"


ROWS = [
    *LABELS,
    *(
        Row(GROUP, f"label {name}, in the handlers", in_the_handlers(make, says))
        for name, make, says in (
            ("metres away", shifted, "lies outside the image"),
            ("empty", saved(LABEL * 0), "no voxel above 0 on the image"),
        )
    ),
    in_a_folder("subfolder that cannot be read", locked_folder, r"bad: .*Permission denied"),
    in_a_folder("subfolder whose files cannot be read", listed_folder, r"bad: .*Permission denied"),
    in_a_folder("scan that cannot be read", locked_scan, r"bad.*Permission denied"),
    in_a_folder("link that leads back", looping, r"bad: .*a link that leads back to a folder above it"),
    Row(
        GROUP,
        "folder called .nii.gz",
        empty_folder,
        why="an input without scans is a usage error: exit code 2 before anything is computed",
    ),
    Row(GROUP, "link to another folder", linked_folder),
    remote("s3:// as input", ["--input", "s3://bucket/a.nii.gz"], "aws s3 cp"),
    remote("https:// as input", ["--input", "https://host/a.nii.gz"], "curl -O"),
    remote("s3:// as output", ["--output", "s3://bucket/out"], "aws s3 cp"),
    remote("gs:// as bundle", ["--bundle", "gs://bucket/bundle"], "gcloud storage cp"),
    Row(GROUP, "name of a file with a line of a log", forged_line),
    Row(GROUP, "case name with a line break", forged_name),
    Row(GROUP, "names that are formulas", formulas),
]
