"""The example of declared windows runs and fails where it is broken; the rule of its stand-in is TorchIO's."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "own_windows.py"


def test_it_checks_itself(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert "24 windows of two networks" in capsys.readouterr().out


def test_it_fails_with_other_weights(tmp_path: Path) -> None:
    broken = EXAMPLE.read_text(encoding="utf-8").replace("count[place] += 1", "count[place] += 2 - place[0].start % 2")
    assert broken != EXAMPLE.read_text(encoding="utf-8")
    (tmp_path / "broken.py").write_text(broken, encoding="utf-8")
    with pytest.raises(AssertionError):
        runpy.run_path(str(tmp_path / "broken.py"), run_name="__main__")


def test_the_stand_in_gives_the_locations_of_torchio() -> None:
    pytest.importorskip("torchio", reason="TorchIO is not installed: the example runs with its stand-in")
    example = runpy.run_path(str(EXAMPLE))
    locations = example["grid_locations"]((13, 12, 10), (8, 6, 6), (2, 2, 2))
    assert locations.shape == (24, 6)
