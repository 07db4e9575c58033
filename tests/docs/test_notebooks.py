"""The notebooks run from the first cell to the last, and show what their outputs in the file show."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from tests.docs.notebook import run

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))


MAPS = {
    "first_map": ("maps[0]", "shares"),
    "own_method": ("mine", "theirs"),
    "watch_training": ("kept[1]", "kept[6]"),
}
"""Cells that show a map, by their last line."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_maps_are_pictures(path: Path) -> None:
    shown = {cell.source.splitlines()[-1]: cell for cell in run(path)}
    for name in MAPS[path.stem]:
        picture = re.search(r'src="data:image/png;base64,([^"]+)"', shown[name].html)
        assert picture is not None
        assert imread(io.BytesIO(base64.b64decode(picture[1])))[..., :3].std() > 0.1
        assert "<figcaption>" in shown[name].html
    values = {name: cell.value for name, cell in shown.items()}
    if path.stem == "first_map":
        assert values["written"] == ["lesion.json", "lesion.nii.gz", "lesion.png", "other.png"]
        assert repr(values["maps"]).startswith("<Attributions: 2: Saliency of MultiClassMask-lesion")
    elif path.stem == "watch_training":
        last = values["seen[-1]"]
        assert last["loss"] < 0.2
        assert last["on the mark"] > 0.3 > last["on the lesion"]  # the shortcut, of 3 % of the image
        assert values["written"] == [f"watched_ClassScore-class1_InputXGradient_attr.{e}" for e in ("json", "nii.gz")]
    else:
        beats = {row[:2]: row[3] for row in values["rows"]}
        assert beats["ContrastXGradient", "RelevanceMass"] is True
        assert len(values["rows"]) == 2 * 5


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_file_has_outputs_without_errors(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert sum("text/html" in o.get("data", {}) for cell in cells for o in cell["outputs"]) >= 2


def test_a_failing_cell_fails_the_run(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "source": ["x = 1\n", "assert x == 2"]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    with pytest.raises(AssertionError):
        run(tmp_path / "a.ipynb")
