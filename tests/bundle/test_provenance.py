"""Hashes that identify a bundle's files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from esegeta_monai.bundle import BundleReader
from tests.support.synthetic import wired, write

pytestmark = pytest.mark.usefixtures("no_scripts_from_elsewhere")


def test_hashes(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", wired(tmp_path))
    expected = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("models/model.pt", "configs/inference.json", "configs/metadata.json")
    }
    assert BundleReader(folder).hashes() == expected
