"""The picture of a synthesised image and of its curve, read back from the figure and from the PNG."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import image as png

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.pictures import picture
from esegeta_monai.files.pictures.picture import INTENDED_USE
from esegeta_monai.files.pictures.synthesis import save_curve, save_synthesised
from tests.files.pictures.test_picture import SIZE, black_scan, words

NAMES = {"case": "case_7", "method": "DeepDream", "subject": "layer model.0"}


@pytest.fixture
def sheets(monkeypatch):
    kept = []
    save = picture.Sketch.save
    monkeypatch.setattr(picture.Sketch, "save", lambda self, path: (kept.append(self), save(self, path))[1])
    return kept


def test_it_is_grey_lettered_and_labelled_as_no_scan(tmp_path, sheets):
    image = black_scan(channels=2) + 5.0
    image[1, : SIZE[0] // 2] = 7.0  # a positive index is the patient's left here: R falls with it
    drawn = save_synthesised(
        tmp_path / "a.png", image, [[0, 10], [4, 8]], channel_names=["T1", "FLAIR"], units="z-score", **NAMES
    )
    assert drawn == {"channel": 1, "voxel": [10, 12, 8], "window": [6.0, 4.0], "convention": "radiological"}
    (sheet,) = sheets
    text = words(sheet).replace("\n", " ")
    for word in (
        "DeepDream: layer model.0",
        "not a scan",
        "case_7",
        "channel 1 (FLAIR)",
        "black 4, white 8",
        "z-score",
    ):
        assert word in text
    assert INTENDED_USE in text
    pixels = png.imread(tmp_path / "a.png")[..., :3]
    box = sheet.panels[0].get_window_extent()
    rows = slice(int(len(pixels) - box.y1) + 3, int(len(pixels) - box.y0) - 3)
    panel = pixels[rows, int(box.x0) + 3 : int(box.x1) - 3]
    assert np.ptp(panel, axis=-1).max() < 1e-6  # grey, no colour map
    left, right = np.split(panel[:, : panel.shape[1] // 2 * 2], 2, axis=1)
    assert float(np.median(left)) == pytest.approx(0.75, abs=0.02)  # high R first: the patient's right at the left
    assert float(np.median(right)) == pytest.approx(0.25, abs=0.02)


def test_in_2d_there_is_one_panel(tmp_path, sheets):
    drawn = save_synthesised(tmp_path / "a.png", torch.rand(1, 9, 12), [[0, 1]], **NAMES)
    assert len(sheets[0].panels) == 1
    assert drawn["voxel"] == [4, 6]
    assert drawn["convention"] is None


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match="one range per channel"):
        save_synthesised(tmp_path / "a.png", torch.rand(2, 9, 12), [[0, 1]], **NAMES)
    with pytest.raises(UsageError, match="radiological or neurological"):
        save_synthesised(tmp_path / "a.png", torch.rand(1, 9, 12), [[0, 1]], convention="left", **NAMES)
    assert not list(tmp_path.iterdir())


def test_a_curve(tmp_path):
    save_curve(tmp_path / "c.png", [1.0, 2.0, 4.0], title="DeepDream: $x$ case a_b", label="objective")
    pixels = png.imread(tmp_path / "c.png")[..., :3]
    assert (pixels[..., 2] - pixels[..., 0] > 0.5).sum() > 100  # the blue line
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]
