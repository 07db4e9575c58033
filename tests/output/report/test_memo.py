"""A page from a memo equals a page that is made again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.output.report import embed as module
from esegeta_monai.output.report.collect import read_output
from esegeta_monai.output.report.embed import embed
from esegeta_monai.output.report.memo import Memo, content_key
from tests.output.report.finished import one_map


def made(out: Path, memo: Memo | None = None) -> tuple[Any, ...]:
    """Data, volumes and notes of a page."""
    (case,) = read_output(out).cases
    case.scan = out / "a/scan.nii.gz"
    embedded = embed(case, memo=memo)
    return embedded.data, embedded.volumes, embedded.notes


def test_a_second_page_is_the_same_and_makes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    one_map(tmp_path, rng.normal(size=(9, 8, 7)).astype(np.float32), np.eye(4))
    nib.save(nib.Nifti1Image(rng.random((9, 8, 7)).astype(np.float32), np.eye(4)), tmp_path / "a/scan.nii.gz")
    memo, fresh = Memo(60), made(tmp_path)
    assert made(tmp_path, memo) == fresh

    def fails(*_: object) -> None:
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(module, "map_entry", fails)
        patch.setattr("esegeta_monai.output.report.case_volumes.read_volume", fails)
        patch.setattr("esegeta_monai.output.report.case_volumes.body_of", fails)
        again = made(tmp_path, memo)
    assert again == fresh
    again[0]["maps"][0]["text"] = "changed by a page"
    assert made(tmp_path, memo) == fresh

    one_map(tmp_path, rng.normal(size=(9, 8, 7)).astype(np.float32), np.eye(4))  # explained again
    second = made(tmp_path)
    assert made(tmp_path, memo) == second != fresh
    one_map(tmp_path, rng.normal(size=(9, 8, 7)).astype(np.float32), np.eye(4), signed=False)
    assert made(tmp_path, memo) == made(tmp_path)


def test_content_has_shape_and_type() -> None:
    values = np.arange(24, dtype=np.uint8)
    arrays = [
        values.reshape(2, 3, 4),
        values.reshape(4, 3, 2),
        values.view(np.int8).reshape(2, 3, 4),
        values + np.uint8(1),
    ]
    assert len({content_key(array) for array in arrays}) == len(arrays)


def test_memory_is_bounded() -> None:
    memo = Memo(3)
    for i in range(9):
        memo.get(i, lambda i=i: i)
    assert list(memo.values) == [6, 7, 8]
    assert not Memo().values
