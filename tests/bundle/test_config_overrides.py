"""Overrides and settings that would change nothing are refused by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import esegeta_monai.bundle as bundle_package
from esegeta_monai.bundle import BundleReader, ExplainWorkflow
from esegeta_monai.bundle.config_overrides import check_typed_settings, overlay_ids
from esegeta_monai.errors import UsageError
from esegeta_monai.handlers import EvaluationHandler, ExplanationHandler
from tests.support.cli import make_bundle


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("overlap", r"did you mean inferer#overlap\?$"),
        ("inferer.overlap", r"did you mean inferer#overlap\?$"),
        ("infrer#overlap", "did you mean inferer#overlap"),
        ("xyzzy", "its entries are: bundle_root, output_dir, device, network_def"),
    ],
)
def test_an_override_that_changes_nothing_is_refused(tmp_path: Path, key: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"inference.json has no entry '{key}' that a value could replace.*{meant}"):
        BundleReader(make_bundle(tmp_path / "bundle"), overrides={key: 0.75})


@pytest.mark.parametrize(
    "overrides",
    [
        {"inferer#overlap": 0.75},
        {"inferer::overlap": "@share", "share": 0.75},  # one override names another
        {"amp": True},  # read by this package
        {"image_key": "image"},
        {"_meta_#version": "2"},
        {"explain_methods": "Saliency"},
    ],
)
def test_an_override_that_something_reads_is_used(tmp_path: Path, overrides: dict[str, object]) -> None:
    reader = BundleReader(make_bundle(tmp_path / "bundle"), overrides=overrides)
    assert all(key in reader.parser for key in overrides)


def test_misspelled_settings_of_the_workflow(tmp_path: Path) -> None:
    folder = make_bundle(tmp_path / "bundle", evaluator={"_target_": "SupervisedEvaluator"}, run=["$@evaluator.run()"])
    with pytest.raises(UsageError, match="no setting explain_metods: did you mean explain_methods"):
        ExplainWorkflow(str(folder / "configs" / "inference.json"), explain_metods="Saliency", bundle_root=str(folder))


@pytest.mark.parametrize("handler", [ExplanationHandler, EvaluationHandler])
def test_misspelled_settings_of_monai_bundle_run(
    handler: type, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """MONAI adds an unknown id to the config, where nothing reads it."""
    import monai.bundle

    program = str(Path(monai.bundle.__file__).with_name("__main__.py"))
    monkeypatch.setattr(sys, "argv", [program, "run", "--explain_metods", "LRP", "--output_dir", "x"])
    with pytest.raises(UsageError, match="no setting explain_metods: did you mean explain_methods"):
        handler(output_dir=tmp_path)
    for good in ("--explain_methods=LRP", "--explain_handler#pictures", "--explain_colours_of_mine"):
        monkeypatch.setattr(sys, "argv", [program, "run", good, "x"])
        check_typed_settings()
    monkeypatch.setattr(sys, "argv", ["train.py", "--explain_metods", "of another program"])
    check_typed_settings()


def test_settings_are_those_of_the_overlays() -> None:
    assert {"explain_methods", "explain_metrics", "explain_handler", "explain_dry_run"} <= overlay_ids()
    assert Path(bundle_package.__file__).with_name("explain.json").is_file()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("bundel", "no bundle at .*bundel: there is no such folder: did you mean bundle"),
        ("bundle/models/model.pt", "it is a file: give .*bundle$"),
        ("bundle/configs", "it has no folder configs; give its bundle, .*bundle$"),
        ("other", "it has no folder configs; give the folder that has configs/$"),
    ],
)
def test_a_path_that_is_no_bundle(tmp_path: Path, given: str, message: str) -> None:
    make_bundle(tmp_path / "bundle")
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match=message):
        BundleReader(tmp_path / given)


def test_a_config_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config file evaluate.json, .* the bundle has: configs/inference.json"):
        BundleReader(make_bundle(tmp_path / "bundle"), "evaluate.json")
