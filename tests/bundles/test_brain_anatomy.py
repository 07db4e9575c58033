"""Individuals painted from the MNI152 template: labels, intensities and seeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = "brain_tissue_segmentation"
EnterBundle = Callable[[str], Path]


def ball_case(size: int = 24) -> dict[str, torch.Tensor]:
    """White core, grey shell, CSF rim, with soft borders; the probabilities add up to 1 inside radius 10."""
    grid = torch.stack(torch.meshgrid(*[torch.arange(size) - size / 2 + 0.5] * 3, indexing="ij"))
    radius = grid.norm(dim=0)
    white, inner = torch.sigmoid(2 * (4 - radius)), torch.sigmoid(2 * (8 - radius))
    tissue = torch.stack([1 - inner, inner - white, white]) * (radius < 10)
    return {"image": tissue[1:2] * 0.5 + tissue[2:3], "tissue": tissue}


def test_template_files_agree_with_each_other(mni152: dict[str, str]) -> None:
    image, tissue, label = (np.asarray(nib.load(mni152[key]).dataobj) for key in ("image", "tissue", "label"))
    brain = image > 0
    total = tissue.sum(-1)
    assert tissue.min() >= 0
    np.testing.assert_allclose(total[brain], 1, atol=1e-6)
    assert np.isin(np.round(total, 6), (0, 1)).all()
    assert not label[~brain].any()
    # On T1 the median intensities are in the order CSF, grey, white.
    csf, grey, white = (np.median(image[brain & (label == value)]) for value in range(3))
    assert csf < grey < white


def test_template_is_written_once(mni152: dict[str, str], enter_bundle: EnterBundle) -> None:
    enter_bundle(ROOT)
    from scripts.anatomy import template_case, template_images

    before = Path(mni152["image"]).stat().st_mtime_ns
    folder = Path(mni152["image"]).parents[1]
    assert template_case(folder) == mni152
    assert Path(mni152["image"]).stat().st_mtime_ns == before
    assert [file.name for file in Path(template_images(folder)).iterdir()] == ["mni152_t1_2mm.nii.gz"]


@pytest.mark.parametrize("seed", range(5))
def test_painted_intensities_follow_the_label(enter_bundle: EnterBundle, seed: int) -> None:
    enter_bundle(ROOT)
    from scripts.anatomy import RandIndividuald

    case = ball_case()
    paint = RandIndividuald(prob=1.0).set_random_state(seed=seed)
    painted = paint(case)
    assert "tissue" not in painted
    assert torch.equal(case["image"], ball_case()["image"]), "the input is never changed"
    image, label, brain = painted["image"], painted["label"], painted["brain"] > 0
    assert torch.equal(brain[0], case["tissue"].sum(0) > 0.5)
    assert set(label.unique().tolist()) == {0, 1, 2}
    assert not image[~brain].any()
    assert not label[~brain].any()
    csf, grey, white = (image[brain & (label == value)].mean() for value in range(3))
    assert csf < grey < white


def test_unpainted_case_keeps_image_and_takes_the_likeliest_tissue(enter_bundle: EnterBundle) -> None:
    enter_bundle(ROOT)
    from scripts.anatomy import RandIndividuald

    case = ball_case()
    kept = RandIndividuald(prob=0.0)(case)
    assert torch.equal(kept["image"].as_tensor(), case["image"])
    assert torch.equal(kept["label"][0].as_tensor(), case["tissue"].argmax(0).float())


def test_the_seed_decides_the_individual(enter_bundle: EnterBundle) -> None:
    enter_bundle(ROOT)
    from monai.transforms import Compose
    from scripts.anatomy import RandIndividuald, SeededDataset

    data = SeededDataset({}, lambda _: ball_case(), Compose([RandIndividuald(prob=1.0)]), seeds=[3, 4, 3])
    first, other, again = (data[index]["image"] for index in range(3))
    assert len(data) == 3
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.05


@pytest.mark.parametrize("cell", [1.5, 3, 8])
def test_smooth_noise_has_unit_deviation_and_the_given_scale(enter_bundle: EnterBundle, cell: float) -> None:
    enter_bundle(ROOT)
    from scripts.anatomy import smooth_noise

    noise = smooth_noise(np.random.RandomState(0), (32, 32, 32), cell, channels=2)
    assert noise.shape == (2, 32, 32, 32)
    assert float(noise.std()) == pytest.approx(1, abs=1e-5)

    def correlation(lag: int) -> float:
        return float((noise[:, lag:] * noise[:, :-lag]).mean() / (noise**2).mean())

    assert correlation(round(3 * cell)) < 0.25 < correlation(1)
