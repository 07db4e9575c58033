"""Volumes that two views share are packed once, and are the same in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from esegeta_monai.app import view
from esegeta_monai.app.view import Views
from esegeta_monai.output.report.volumes import pack


def test_a_volume_is_packed_once_by_content_shape_and_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def counted(values: np.ndarray, effort: int) -> object:
        calls.append(values.shape)
        return pack(values, effort)

    monkeypatch.setattr(view, "pack", counted)
    views, values = Views(tmp_path), np.arange(24, dtype=np.uint8)
    arrays = [values.reshape(2, 3, 4), values.reshape(4, 3, 2), values.view(np.int8).reshape(2, 3, 4)]
    arrays.append(values.reshape(2, 3, 4) + np.uint8(1))
    for _ in range(3):
        assert [views._pack(array, 1) for array in arrays] == [pack(array, 1) for array in arrays]
    assert len(calls) == len(arrays)
    monkeypatch.setattr(view, "VOLUMES", 1)
    for i in range(9):
        views._pack(np.full((2, 2, 2), i, np.uint8), 1)
    assert len(views._packed) == view.KEPT, "the memory is bounded"
