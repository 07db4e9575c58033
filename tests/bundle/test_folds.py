"""The training set of each fold is read from nnU-Net's own splits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esegeta_monai.bundle.folds import folds_of_case

SPLITS = [{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"]}]


def model(tmp_path: Path) -> Path:
    folder = tmp_path / "Dataset001_Small" / "nnUNetTrainer__nnUNetPlans__2d"
    for name in ("fold_0", "fold_1", "fold_all"):
        (folder / name).mkdir(parents=True)
    return folder


@pytest.mark.parametrize("place", ["model", "above", "prepared"])
def test_the_splits_are_found_where_nnunet_puts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = model(tmp_path)
    prepared = tmp_path / "prepared"
    monkeypatch.setenv("nnUNet_preprocessed", str(prepared))
    where = {"model": folder, "above": folder.parent, "prepared": prepared / "Dataset001_Small"}[place]
    where.mkdir(parents=True, exist_ok=True)
    (where / "splits_final.json").write_text(json.dumps(SPLITS), encoding="utf-8")
    training = {"fold_0": "training", "fold_1": "validation", "fold_all": "training"}
    assert folds_of_case(folder, "a") == folds_of_case(folder, "a_0000") == training
    assert set(folds_of_case(folder, "new").values()) == {"not in the splits"}


def test_nothing_is_claimed_without_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("nnUNet_preprocessed", raising=False)
    folder = model(tmp_path)
    assert folds_of_case(folder, "a") == {}
    for text in ("{", "{}"):
        (folder / "splits_final.json").write_text(text, encoding="utf-8")
        assert folds_of_case(folder, "a") == {}
    assert caplog.text.count("is not known") == 2
