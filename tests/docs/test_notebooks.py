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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_its_maps_are_pictures(path: Path) -> None:
    cells = run(path)
    shown = {cell.source.splitlines()[-1]: cell for cell in cells}
    for name in ("maps[0]", "shares"):
        picture = re.search(r'src="data:image/png;base64,([^"]+)"', shown[name].html)
        assert picture is not None
        assert imread(io.BytesIO(base64.b64decode(picture[1])))[..., :3].std() > 0.1
        assert "<figcaption>" in shown[name].html
    assert shown["written"].value == ["lesion.json", "lesion.nii.gz", "lesion.png", "other.png"]
    assert repr(shown["maps"].value).startswith("<Attributions: 2: Saliency of MultiClassMask-lesion")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_file_has_outputs_without_errors(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert all(output["output_type"] != "error" for cell in cells for output in cell["outputs"])
    assert sum("text/html" in o.get("data", {}) for cell in cells for o in cell["outputs"]) >= 2


def test_a_failing_cell_fails_the_run(tmp_path: Path) -> None:
    cell = {"cell_type": "code", "source": ["x = 1\n", "assert x == 2"]}
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": [cell]}))
    with pytest.raises(AssertionError):
        run(tmp_path / "a.ipynb")
