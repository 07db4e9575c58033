"""The content of a picture: sides, colours, proportions, words; read back from the PNG or from the figure."""

from __future__ import annotations

import json
import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import image as png
from monai.data import MetaTensor

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.pictures import picture, sketch
from esegeta_monai.files.pictures.picture import INTENDED_USE, save_picture

NAMES = {"case": "case_7", "method": "Saliency", "target": "MultiClassMask(class_index=2)", "class_name": "oedema"}
SIZE = (20, 24, 16)


def affine_of(*diagonal):
    affine = torch.diag(torch.tensor([*diagonal, 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor([-0.5 * step * (n - 1) for step, n in zip(diagonal, SIZE)])  # world origin: centre
    return affine


def black_scan(affine=None, size=SIZE, channels=1):
    return MetaTensor(torch.zeros(channels, *size), affine=affine_of(-1.0, 1.0, 1.0) if affine is None else affine)


def peak(*voxel, size=SIZE, value=1.0, channels=1, channel=0):
    values = torch.zeros(channels, *size)
    values[(channel, *voxel)] = value
    return values


@pytest.fixture
def sheets(monkeypatch):
    """Every figure that is saved, to be read after the fact."""
    kept = []
    save = picture.Sketch.save
    monkeypatch.setattr(picture.Sketch, "save", lambda self, path: (kept.append(self), save(self, path))[1])
    return kept


def words(sheet):
    texts = [text.get_text() for text in sheet.figure.texts]
    for axes in sheet.figure.axes:
        texts += [text.get_text() for text in axes.texts] + [axes.get_title(loc="left")]
    return "\n".join(texts)


@pytest.mark.parametrize("flip", [1.0, -1.0], ids=["stored R to the right", "stored L to the right"])
@pytest.mark.parametrize("convention", ["radiological", "neurological"])
def test_a_left_sided_peak_is_drawn_and_lettered_left(tmp_path, sheets, convention, flip):
    scan = black_scan(affine_of(flip, 1.0, 1.0))
    voxel = (3, 12, 8) if flip > 0 else (16, 12, 8)  # negative R in either storage order: the patient's left
    contour = torch.zeros(SIZE)
    contour[..., 8] = 1
    look = {"signed": True, "window": (2.0, 1.0), "convention": convention}  # all of the scan is black
    drawn = save_picture(tmp_path / "a.png", scan, peak(*voxel), contour, **look, **NAMES)
    assert drawn["world"] == [-6.5, 0.5, 0.5]
    viewers_right = convention == "radiological"
    assert drawn["sides"]["axial"]["right" if viewers_right else "left"] == "L"

    # the letter at its place, by position within the axes
    axial = sheets[0].panels[0]
    (letter,) = (text for text in axial.texts if text.get_text() == "L")
    assert (letter.get_position()[0] > 1) == viewers_right
    (other,) = (text for text in axial.texts if text.get_text() == "R")
    assert (other.get_position()[0] < 0) == viewers_right

    # the peak in the pixels of the file: red, and on that side of the panel
    pixels = png.imread(tmp_path / "a.png")
    box = axial.get_window_extent()
    panel = pixels[:, round(box.x0) : round(box.x1)]
    red = (panel[..., 0] > 0.5) & (panel[..., 1] < 0.2) & (panel[..., 2] < 0.2)
    assert red.any()
    across = np.flatnonzero(red.any(axis=0)).mean() / panel.shape[1]
    assert across == pytest.approx(16.5 / 20 if viewers_right else 3.5 / 20, abs=0.02)


def test_proportions_are_those_of_the_voxels(tmp_path, sheets):
    save_picture(tmp_path / "a.png", black_scan(affine_of(0.5, 1.0, 4.0)), peak(9, 9, 9), signed=True, **NAMES)
    boxes = [axes.get_window_extent() for axes in sheets[0].panels]
    # 10 x 24 mm, 10 x 64 mm, 24 x 64 mm at one scale
    ratios = [box.height / box.width for box in boxes]
    assert ratios == pytest.approx([24 / 10, 64 / 10, 64 / 24], rel=1e-3)
    assert boxes[2].width / boxes[0].width == pytest.approx(2.4, rel=1e-3)


def test_everything_to_be_read_is_written(tmp_path, sheets):
    scan = black_scan(channels=2)
    drawn = save_picture(
        tmp_path / "a.png",
        scan + torch.linspace(0, 100, SIZE[0]).view(1, -1, 1, 1),
        peak(4, 5, 6, value=-2.5, channels=2, channel=1),
        torch.ones(1, *SIZE),
        signed=True,
        units="logit per voxel",
        channel_names=["T1", "FLAIR"],
        window=(40, 80),
        **NAMES,
    )
    text = words(sheets[0])
    for expected in (
        "Saliency: oedema",
        "case case_7",
        "target MultiClassMask(class_index=2)",
        "channel 1 (FLAIR)",
        "-2.5 at voxel (4, 5, 6), RAS (5.5, -6.5, -1.5) mm",
        "window: level 40, width 80",
        "radiological convention: the patient's left is on the viewer's right",
        "outline: target, oedema",
        "logit per voxel",
        INTENDED_USE,
    ):
        assert expected in text
    assert "oblique" not in text
    assert drawn["channel"] == 1
    assert json.loads(json.dumps(drawn)) == drawn


def test_colours_end_at_the_stated_percentile(tmp_path):
    values = torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(0))
    for signed, strength in ((True, values.abs()), (False, values.clamp(min=0))):
        drawn = save_picture(tmp_path / "a.png", black_scan(), values, signed=signed, **NAMES)
        assert drawn["limit"] == pytest.approx(float(np.percentile(strength[strength > 0].numpy(), 99.5)), rel=1e-6)
        assert drawn["value"] == pytest.approx(float(values.flatten()[strength.argmax()]))


def test_a_sparse_map_has_colours_and_a_note(tmp_path, sheets):
    drawn = save_picture(tmp_path / "a.png", black_scan(), peak(1, 2, 3, value=4.0), signed=True, **NAMES)
    assert drawn["limit"] == 4.0
    assert "non-zero voxels" in words(sheets[0]).replace("\n", " ")


def test_colours_mean_what_they_should():
    rgba = sketch.colours(np.array([-9.0, -1.0, 0.0, 1.0, np.nan]), 1.0, signed=True)
    assert rgba[0].tolist() == rgba[1].tolist()
    assert rgba[1, 2] > rgba[1, 0]  # negative: blue
    assert rgba[3, 0] > rgba[3, 2]  # positive: red
    assert rgba[:, 3].tolist() == [sketch.OPACITY, sketch.OPACITY, 0.0, sketch.OPACITY, 0.0]
    assert np.allclose(sketch.SIGNED(0.5)[:3], 1.0, atol=0.01)
    ramp = sketch.colours(np.linspace(0, 1, 50), 1.0, signed=False)
    brightness = ramp[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(brightness) > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_a_zero_map_is_labelled(tmp_path, sheets, signed):
    mask = torch.zeros(SIZE)
    mask[2:5, 10:13, 4] = 1
    drawn = save_picture(tmp_path / "a.png", black_scan(), torch.zeros(1, *SIZE), mask, signed=signed, **NAMES)
    assert drawn["message"].startswith("The map is zero everywhere")
    assert drawn["voxel"] == [3, 11, 4]  # the planes go through the prediction
    assert drawn["message"] in words(sheets[0])
    assert "strongest point:" not in words(sheets[0])
    save_picture(tmp_path / "b.png", black_scan(), torch.zeros(1, *SIZE), signed=signed, **NAMES)
    assert (tmp_path / "b.png").stat().st_size > 0


def test_voxels_that_are_not_finite_are_named_and_blank(tmp_path, sheets):
    values = peak(4, 5, 6)
    values[0, 0, 0, 0], values[0, 1, 1, 1] = float("nan"), float("inf")
    drawn = save_picture(tmp_path / "a.png", black_scan(), values, signed=True, **NAMES)
    assert drawn["voxel"] == [4, 5, 6]
    assert "2 voxels of the map are not finite" in words(sheets[0])


def test_an_oblique_scan_is_called_so(tmp_path, sheets):
    turned = torch.eye(4, dtype=torch.float64)
    turned[:2, :2] = torch.tensor([[np.cos(0.3), -np.sin(0.3)], [np.sin(0.3), np.cos(0.3)]])
    save_picture(tmp_path / "a.png", black_scan(turned), peak(4, 5, 6), signed=True, **NAMES)
    assert "oblique scan: letters name the nearest axes, up to 17° away" in words(sheets[0])


def test_an_lps_affine_is_read_as_such(tmp_path):
    scan = black_scan(affine_of(1.0, 1.0, 1.0))
    scan.meta["space"] = "LPS"
    assert save_picture(tmp_path / "a.png", scan, peak(3, 5, 6), signed=True, **NAMES)["world"] == [6.5, 6.5, -1.5]


def test_two_dimensions(tmp_path, sheets):
    values = peak(2, 9, size=(12, 30))
    drawn = save_picture(tmp_path / "a.png", torch.zeros(1, 12, 30), values, signed=True, **NAMES)
    assert drawn["world"] is None
    assert drawn["voxel"] == [2, 9]
    assert drawn["sides"] == {}
    assert "orientation unknown" in words(sheets[0])
    (panel,) = sheets[0].panels
    shown = panel.images[1].get_array()  # rows upwards: row 2 of 12 is the tenth from below
    assert shown.shape[:2] == (12, 30)
    assert np.argwhere(shown[..., 3] > 0).tolist() == [[9, 9]]

    photo = MetaTensor(torch.zeros(1, 12, 30), meta={"filename_or_obj": "photo.PNG"})  # (x, y), y downwards
    save_picture(tmp_path / "b.png", photo, values, signed=True, **NAMES)
    shown = sheets[1].panels[0].images[1].get_array()
    assert shown.shape[:2] == (30, 12)
    assert np.argwhere(shown[..., 3] > 0).tolist() == [[20, 2]]

    slice_of_a_scan = MetaTensor(torch.zeros(1, 12, 30), affine=affine_of(-2.0, 1.0, 3.0))
    drawn = save_picture(tmp_path / "c.png", slice_of_a_scan, values, signed=True, **NAMES)
    assert list(drawn["sides"]) == ["axial"]
    assert len(drawn["world"]) == 3


def test_no_global_state_and_no_torn_file(tmp_path):
    before = dict(matplotlib.rcParams)
    save_picture(tmp_path / "a.png", black_scan(), peak(4, 5, 6), signed=True, **NAMES)
    assert dict(matplotlib.rcParams) == before
    assert os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(UsageError):
        save_picture(tmp_path / "a.png" / "b.png", black_scan(), peak(4, 5, 6), signed=True, **NAMES)


def test_names_are_written_as_they_are(tmp_path, sheets):
    """Dollar signs are no mathematics, and a long name is wrapped rather than cut."""
    names = {**NAMES, "case": "a$b_$c " + "long_name " * 30}
    save_picture(tmp_path / "a.png", black_scan(), peak(4, 5, 6), signed=True, **names)
    assert "a$b_$c" in words(sheets[0])
    sheets[0].figure.draw_without_rendering()
    right = sheets[0].figure.bbox.width
    assert all(text.get_window_extent().x1 <= right for text in sheets[0].figure.texts)


def test_what_does_not_fit_is_refused(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(InputError, match="does not lie on the grid of the scan"):
        save_picture(path, black_scan(), torch.zeros(1, 20, 24, 15), signed=True, **NAMES)
    with pytest.raises(InputError, match=r"prediction \(20, 24, 15\)"):
        save_picture(path, black_scan(), peak(1, 1, 1), torch.zeros(20, 24, 15), signed=True, **NAMES)
    with pytest.raises(InputError, match="2D or 3D"):
        save_picture(path, torch.zeros(1, 5), torch.zeros(1, 5), signed=True, **NAMES)
    with pytest.raises(UsageError, match="radiological or neurological"):
        save_picture(path, black_scan(), peak(1, 1, 1), signed=True, convention="surgical", **NAMES)
    assert not path.exists()


def test_on_a_real_scan(tmp_path):
    folder = Path(os.environ.get("ESEGETA_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    file = folder / "images" / "tumour_brain1_image.nii.gz"
    if not file.exists():
        pytest.skip(f"{file.name} is not there: set ESEGETA_SHARED_DATA")
    from monai.transforms import LoadImage

    load = LoadImage(ensure_channel_first=True)
    scan, label = load(file), load(file.with_name("tumour_brain1_label.nii.gz"))
    drawn = save_picture(tmp_path / "a.png", scan, (label > 0).float() * scan, label, signed=False, **NAMES)
    assert label[(0, *drawn["voxel"])] > 0
    assert drawn["world"][0] < 0  # this tumour lies in the left hemisphere


def test_a_lesion_is_graded_and_the_planes_go_through_it(tmp_path, sheets):
    """Strong values in a few voxels: by the percentile of the volume alone, nine tenths of them would be saturated."""
    generator = torch.Generator().manual_seed(0)
    values, mask = 0.01 * torch.randn(1, *SIZE, generator=generator), torch.zeros(SIZE)
    mask[10:14, 5:9, 6:9] = 1
    values[0][mask > 0] = 5 * torch.rand(int(mask.sum()), generator=generator)
    values[0, 0, 0, 15] = 6.0  # the strongest voxel, in a corner
    drawn = save_picture(tmp_path / "a.png", black_scan(), values, mask, signed=True, **NAMES)
    inside = values[0][mask > 0].abs().numpy()
    whole = np.percentile(values.abs().numpy(), 99.5)
    assert (inside > whole).mean() > 0.5, "the case is one"
    assert drawn["limit"] == pytest.approx(np.percentile(inside, 99, method="higher"))
    assert drawn["saturated_in_target"] == pytest.approx((inside > drawn["limit"]).mean())
    assert drawn["saturated_in_target"] <= 0.01
    assert drawn["planes"] == [11, 6, 7]
    assert drawn["voxel"] == [0, 0, 15]
    assert "% of the target's voxels lie beyond the end of the colours" in words(sheets[0])


@pytest.mark.parametrize("signed", [True, False])
def test_a_map_that_is_strong_in_few_voxels_is_graded_without_a_mask(tmp_path, signed):
    """The score of a class has no voxels; by the percentile alone, half of the map would be one block."""
    values = 1e-4 * torch.randn(1, *SIZE, generator=torch.Generator().manual_seed(0))
    values[0, :4, :4, :4] = torch.arange(1.0, 65).reshape(4, 4, 4)
    strength = (values.abs() if signed else values.clamp(min=0)).flatten().double().numpy()
    whole = np.percentile(strength[strength > 0], 99.5)
    assert strength[strength > whole].sum() > 0.3 * strength.sum(), "the case is one"
    limit = save_picture(tmp_path / "a.png", black_scan(), values, signed=signed, **NAMES)["limit"]
    assert limit in strength.astype(np.float32)
    assert strength[strength > limit].sum() <= 0.1 * strength.sum() < strength[strength >= limit].sum()


def test_a_photograph_is_drawn_in_colour(tmp_path):
    photo = torch.zeros(3, 20, 30)
    photo[1] = 255  # green
    save_picture(tmp_path / "a.png", photo, torch.zeros(1, 20, 30), signed=True, **NAMES)
    pixels = png.imread(tmp_path / "a.png")[..., :3]
    assert ((pixels[..., 1] > 0.9) & (pixels[..., 0] < 0.1)).mean() > 0.1


def test_what_the_map_tells_is_written(tmp_path, sheets):
    labels = {"caption": "Where the layer is active.", "ends": ("weak", "strong activation")}
    save_picture(tmp_path / "a.png", black_scan(), peak(4, 5, 6), signed=False, **labels, **NAMES)
    text = words(sheets[0])
    assert "Where the layer is active." in text
    assert "top: strong activation" in text
