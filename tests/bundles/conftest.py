"""Bundles as fixtures: every MONAI bundle calls its code `scripts`, so one at a time is importable."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bundles import BUNDLES


def _forget_scripts() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]


@pytest.fixture
def enter_bundle() -> Iterator[Callable[[str], Path]]:
    """Make the `scripts` of a bundle importable until the test ends; returns the bundle's root."""
    path = list(sys.path)

    def enter(name: str) -> Path:
        _forget_scripts()
        sys.path[:] = [str(BUNDLES / name), *path]
        return BUNDLES / name

    yield enter
    sys.path[:] = path
    _forget_scripts()


@pytest.fixture(scope="session")
def mni152(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of the MNI152 template (population average of a skull-stripped brain), written once a session."""
    pytest.importorskip("nilearn", reason="the template comes with nilearn (extra `demo`)")
    sys.path.insert(0, str(BUNDLES / "brain_tissue_segmentation"))
    try:
        _forget_scripts()
        from scripts.anatomy import template_case

        return template_case(tmp_path_factory.mktemp("mni152"))
    finally:
        sys.path.pop(0)
        _forget_scripts()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real scans and networks, which are no part of the project."""
    folder = Path(os.environ.get("ESEGETA_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}: set ESEGETA_SHARED_DATA")
    return folder
