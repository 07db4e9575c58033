"""Natural mistakes on the command line: one line with the cause and the way out, exit code 2, nothing computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from esegeta_monai.cli.main import main
from tests.support.cli import make_bundle, make_scan


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, a scan, and a file that is neither."""
    folder = tmp_path_factory.mktemp("mistakes")
    make_bundle(folder / "bundle")
    make_scan(folder / "scan.nii.gz")
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--target", "grey matter"], "'grey matter' is a class; write --target \"MultiClassMask('grey matter')\""),
        (["--target", "grey_matter"], "'grey matter' is a class; write"),
        (["--target", "2"], "--target 2: 'white matter' is a class; write"),
        (["--target", "liver"], "lists all targets. If liver is a class, write"),
        (["--methods", "Saliency LRP"], "separate several by commas: Saliency,LRP"),
        (["--override", "overlap=0.5"], "did you mean inferer#overlap?"),
        (["--config", "evaluate.json"], "the bundle has: configs/inference.json"),
        (["--bundle", "bundle/configs"], "it has no folder configs; give its bundle, "),
        (["--bundle", "bundle/models/model.pt"], "it is a file: give bundle"),
    ],
)
def test_of_explain(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main(["explain", "--bundle", "bundle", "--input", "scan.nii.gz", "--output", "out", "--trust", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "--metrics", "quik"], "metrics='quik': did you mean the set 'quick'?"),
        (["evaluate", "--label", "no/label.nii.gz"], "--label no/label.nii.gz: no such file or folder"),
        (["evaluate", "--maps", "notes.txt"], "--maps notes.txt: it is a file; give the output folder of 'explain'"),
        (["app", "--input", "nowhere.nii.gz"], "--input nowhere.nii.gz: there is no such file or folder"),
    ],
)
def test_of_other_commands(
    place: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    command, *more = words
    whole = [command, "--bundle", "bundle", "--input", "scan.nii.gz", "--output", "out", "--trust", *more]
    assert main(whole) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_bundle_in_place_of_a_model_folder(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    assert main(["explain", "--nnunet", "bundle", "--input", "scan.nii.gz", "--output", "out"]) == 2
    assert "bundle is a MONAI bundle: give it by --bundle, not --nnunet" in capsys.readouterr().err
    (place / "empty").mkdir(exist_ok=True)
    assert main(["explain", "--nnunet", "empty", "--input", "scan.nii.gz", "--output", "out"]) == 2
    assert "empty is no nnU-Net model folder, since it has no plans.json: give the folder" in capsys.readouterr().err


def test_a_file_in_place_of_the_output_folder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(place / "notes.txt")]) == 2
    assert "notes.txt: it is a file; give the output folder" in capsys.readouterr().err
