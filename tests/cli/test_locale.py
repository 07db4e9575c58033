"""The command line in an environment whose locale is ASCII, as in many containers and schedulers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import make_bundle, make_scan

ASCII = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def run(*words: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "esegeta_monai", *words], env={**os.environ, **ASCII}, capture_output=True, check=False
    )


@pytest.mark.parametrize("words", [["methods"], ["targets"], ["metrics"], ["--help"], ["explain", "--help"]])
def test_tables_and_help_are_printed_whatever_the_locale(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.decode("utf-8").splitlines()) > 5


@pytest.mark.slow  # a process of its own that imports torch and MONAI
def test_a_scan_whose_name_is_not_ascii(tmp_path: Path) -> None:
    """Maps, report and pictures are written; no name and no formula ends the run."""
    bundle = make_bundle(tmp_path / "bundle")
    name = os.fsdecode("Kopf_größe_脳.nii.gz".encode())  # these tests may run in such a locale themselves
    scan = make_scan(tmp_path / name)
    words = [
        "explain",
        "--bundle",
        bundle,
        "--input",
        scan,
        "--output",
        tmp_path / "out",
        "--report",
        "--trust",
    ]
    done = run(*words, "--methods", "Saliency", "--target", "MultiClassMask(1)")
    assert done.returncode == 0, done.stderr.decode("utf-8", "backslashreplace")
    (case,) = (folder for folder in (tmp_path / "out").iterdir() if folder.is_dir())
    assert case.name.isascii()  # what this locale's file names can hold
    (sidecar,) = case.glob("*_attr.json")
    assert json.loads(sidecar.read_text(encoding="utf-8"))["status"] == "ok"
    assert "größe_脳" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
