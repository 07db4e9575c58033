"""Modules imported by help and errors of usage: neither torch nor MONAI, which take seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import esegeta_monai
from esegeta_monai.cli import tables
from esegeta_monai.cli.describe import entries_of
from esegeta_monai.cli.main import build_parser

HEAVY = ("torch", "monai", "scipy", "matplotlib", "nibabel")
PROGRAM = """
import json, sys
from esegeta_monai.cli.main import main
code = main(sys.argv[1:])
print(json.dumps([code, [name for name in %r if name in sys.modules]]))
"""


def _imported(*argv: str) -> tuple[int, list[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % (HEAVY,), *argv],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=True,
    )
    code, modules = json.loads(done.stdout.splitlines()[-1])
    return code, modules, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--help"], 0, "explain a bundle's predictions"),
        (["--version"], 0, esegeta_monai.__version__),
        (["explain", "--help"], 0, "inputs:"),
        (["explain", "--input", "a"], 2, "--output"),
        (["explain", "--bogus"], 2, "there is no option --bogus (see"),
        (["explian"], 2, "did you mean explain"),
        (["methods"], 0, "GradCam(layer=None"),
        (["targets", "multi-class-mask"], 0, "argmax"),
        (["metrics", "--json"], 0, '"higher_is_better"'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_imports_nothing_that_takes_long(argv, code, text):
    exit_code, modules, printed = _imported(*argv)
    assert (exit_code, modules) == (code, [])
    assert text in printed


def test_the_program_sees_what_a_command_imports():
    code, modules, _ = _imported("methods", "no-such-method")
    assert code == 2
    assert "torch" in modules


@pytest.mark.parametrize("kind", tables.KINDS)
def test_stored_tables_are_those_of_the_classes(kind):
    stored = tables._stored(kind, None)
    assert stored, "out of date: run python -m esegeta_monai.cli.tables"
    assert stored == json.loads(json.dumps(entries_of(kind)))


def test_tables_of_other_sources_are_not_used(monkeypatch, capsys):
    monkeypatch.setattr(tables, "_sources", lambda: "0" * 64)
    assert tables._stored("method", None) == []
    args = build_parser().parse_args(["methods", "Saliency"])
    assert args.run(args, None) == 0
    assert capsys.readouterr().out.startswith("Saliency(abs=True)")


def test_names_of_the_package_are_imported_when_asked_for():
    assert esegeta_monai.methods.GradCam.__name__ == "GradCam"
    assert {"Explainer", "Attribution", "targets"} <= set(dir(esegeta_monai))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = esegeta_monai.nothing
