"""Links, pipes and folders where the package reads and writes its own files, and names that its own files have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from esegeta_monai.files.journal import read_run
from tests.faults.group_8_integrity import GROUP, evaluated, study
from tests.faults.runner import TARGET, Done, Row, command, statuses, unfinished
from tests.support.cli import make_bundle, make_scan


def explained(folder: Path, *inputs: object, output: Path | None = None) -> Done:
    bundle = folder / "bundle" if (folder / "bundle").exists() else make_bundle(folder / "bundle")
    words = ["explain", "--bundle", bundle, "--input", *inputs, "--output", output or folder / "out"]
    return command(*words, "--methods", "Saliency", "--target", TARGET, "--no-pictures", timeout=60)


def _journal(folder: Path) -> str:
    """A link in place of the journal would write into any file, and the results would be read from nowhere."""
    (folder / "out").mkdir()
    (folder / "precious").write_text("x", encoding="utf-8")
    (folder / "out" / "run.jsonl").symlink_to(folder / "precious")
    done = explained(folder, make_scan(folder / "a.nii.gz"))
    assert done.code == 2, (done.code, done.err)
    assert "a link to another file" in done.errors[0]
    assert (folder / "precious").read_text(encoding="utf-8") == "x"
    return done.errors[0][-120:]


def _log(folder: Path) -> str:
    (folder / "out").mkdir()
    (folder / "precious").write_text("x", encoding="utf-8")
    (folder / "out" / "esegeta.log").symlink_to(folder / "precious")
    done = explained(folder, make_scan(folder / "a.nii.gz"))
    assert done.code == 0, (done.code, done.err)
    assert "a link to another file" in done.warnings[0]
    assert (folder / "precious").read_text(encoding="utf-8") == "x"
    return done.warnings[0][:120]


def _case_folder(folder: Path) -> str:
    """A link in place of a case's folder: its files would be written elsewhere, and no page would list them."""
    scans = [make_scan(folder / "scans" / f"{name}.nii.gz", (16, 16, 16)) for name in ("bad", "good")]
    for name in ("elsewhere", "out"):
        (folder / name).mkdir()
    (folder / "out" / "bad").symlink_to(folder / "elsewhere")
    done = explained(folder, *scans)
    assert done.code == 1, (done.code, done.err)
    words = ["evaluate", "--bundle", folder / "bundle", "--input", *scans, "--output", folder / "out"]
    words += ["--methods", "Saliency", "--target", TARGET, "--metrics", "Sparseness", "--no-controls"]
    evaluation = command(*words)
    assert evaluation.code == 1, (evaluation.code, evaluation.err)
    for one in (done, evaluation):
        assert len(one.errors) == 1
        assert "out/bad is a link to another folder" in one.errors[0], one.errors
    assert not list((folder / "elsewhere").iterdir())
    assert list((folder / "out" / "good").glob("*_metrics.json"))
    assert list((folder / "out" / "good").glob("*_attr.json"))
    return done.errors[0][-120:]


def pipe(of: str) -> Callable[[Path], str]:
    """A pipe in place of a file: to open it would wait for ever."""

    def check(folder: Path) -> str:
        sidecar, path = study(folder)
        place = {"sidecar": sidecar, "map": path}.get(of, folder / "out" / of)
        place.unlink(missing_ok=True)
        os.mkfifo(place)
        codes = []
        for done in (command("report", folder / "out", timeout=60), evaluated(folder)):
            assert done.code in (0, 1, 2), (done.code, done.err)
            assert not done.traceback
            codes.append(done.code)
        done = explained(folder, folder / "mine.nii.gz")
        assert done.code == (2 if of == "run.jsonl" else 0), (done.code, done.err)
        if done.code:
            assert "run.jsonl" in done.errors[0]
        else:
            assert set(statuses(folder / "out").values()) <= {"ok", "skipped"}
        assert not unfinished(folder / "out")
        return f"report {codes[0]}, evaluate {codes[1]}, explain {done.code}"

    return check


def _own_names(folder: Path) -> str:
    """Cases that are called like the files of the output folder."""
    scan = make_scan(folder / "a.nii.gz", (16, 16, 16))
    names = ("run.json", "run.jsonl", "esegeta.log", "index.html", "metrics.csv", "Run.Part0.JSONL")
    for _ in range(2):
        done = explained(folder, *(f"{name}={scan}" for name in names))
        assert done.code == 0, (done.code, done.err)
    assert {case for case, _, _ in statuses(folder / "out")} == set(names)
    assert set(statuses(folder / "out").values()) == {"skipped"}
    assert command("report", folder / "out").code == 0
    return ", ".join(sorted(path.name for path in (folder / "out").iterdir() if path.is_dir()))


def _output_inside(folder: Path) -> str:
    """Maps of an earlier run in a subfolder of the scans are no scans."""
    scans = folder / "scans"
    make_scan(scans / "a.nii.gz", (16, 16, 16))
    assert explained(folder, scans, output=scans / "first").code == 0
    done = explained(folder, scans, output=scans / "second")
    assert done.code == 0, (done.code, done.err)
    assert {case for case, _, _ in statuses(scans / "second")} == {"a"}
    assert any("first is the output folder of another run" in text for text in done.warnings), done.err
    same = explained(folder, scans, output=scans)
    assert same.code == 2
    assert "is the folder of the scans" in same.errors[0]
    assert sorted(p.name for p in scans.iterdir()) == ["a.nii.gz", "first", "second"]
    return done.warnings[0][-120:]


def _clock(folder: Path) -> str:
    """The clock is set back between two runs: the later run counts, although its times are earlier."""
    bad = folder / "a.nii.gz"
    bad.write_bytes(b"")
    assert explained(folder, bad).code == 1
    journal = folder / "out" / "run.jsonl"
    text = journal.read_text(encoding="utf-8")
    year = text.partition('"started":"')[2][:4] or text.partition('"started": "')[2][:4]
    assert year.isdigit(), text[:300]
    journal.write_text(text.replace(f'"{year}-', f'"{int(year) + 10}-'), encoding="utf-8")
    make_scan(bad, (16, 16, 16))
    assert explained(folder, bad).code == 0
    assert [entry["status"] for entry in read_run(folder / "out").results] == ["ok"]
    assert list(statuses(folder / "out").values()) == ["ok"]
    assert read_run(folder / "out").info["finished"].startswith(year)
    return "the failure of the first run is gone"


ROWS = [
    Row(GROUP, "journal is a link to another file", _journal),
    Row(GROUP, "log is a link to another file", _log, slow=True),
    Row(GROUP, "folder of a case, to be written, is a link to another folder", _case_folder),
    *(
        Row(GROUP, f"a pipe in place of the {of}", pipe(of), slow=of != "sidecar")
        for of in ("run.json", "run.jsonl", "esegeta.log", "sidecar", "map")
    ),
    Row(GROUP, "cases called like files of the output folder", _own_names),
    Row(GROUP, "output folders inside the folder of scans", _output_inside),
    Row(GROUP, "the clock is set back between two runs", _clock),
]
