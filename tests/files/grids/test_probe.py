"""A pattern in the scan shows where a preprocessing puts voxels, where the contents of the image cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirstd,
    Flipd,
    Lambdad,
    LoadImaged,
    NormalizeIntensityd,
    RandFlipd,
    RandGaussianNoised,
    ScaleIntensityRanged,
    Spacingd,
    SpatialCropd,
)

from esegeta_monai.files.grids.probe import Pipeline
from esegeta_monai.files.grids.resample import geometry_of
from esegeta_monai.files.scans import read_scan
from tests.files.grids.test_geometry import phantom

HEAD = [LoadImaged("image"), EnsureChannelFirstd("image")]
AFFINE = np.diag([-1.2, 1.5, 2.0, 1.0])


def noise(x: torch.Tensor) -> torch.Tensor:
    """Other random numbers at each call, much stronger than the scan."""
    return x + 20 * torch.randn(x.shape)


def classes(x: torch.Tensor) -> torch.Tensor:
    """One-hot classes of no order."""
    return torch.cat([(x > 0.9) | (x < 0.5), (x < 0.9) & (x > 0.7), (x > 0.5) & (x < 0.7)]).float()


CHAINS: dict[str, list[Any]] = {
    "random noise": [Lambdad("image", noise), NormalizeIntensityd("image")],
    "one-hot channels": [Lambdad("image", classes)],
    "not monotone": [Lambdad("image", lambda x: torch.cos(40 * x)), Spacingd("image", (2.4, 2.0, 2.5))],
    "crop and random transforms": [
        SpatialCropd("image", roi_start=(8, 3, 2), roi_end=(35, 32, 30)),
        RandFlipd("image", prob=0.5, spatial_axis=1),
        RandGaussianNoised("image", prob=1.0, std=30.0),
        ScaleIntensityRanged("image", 0.3, 1.1, 0, 1, clip=True),
    ],
}


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A symmetric scan: its contents cannot decide along any axis."""
    return written(tmp_path, lambda x: sum((x.flip([k + 1 for k in axes]) for axes in AXES), torch.zeros_like(x)) / 8)


AXES = [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


def written(folder: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    values = change(phantom(3).as_tensor())[0].numpy()
    nib.save(nib.Nifti1Image(values, AFFINE), folder / "scan.nii.gz")
    return folder / "scan.nii.gz"


def verdicts(path: Path, *transforms: Any) -> tuple[str, str, Any]:
    """The verdict of the contents alone, that with the pattern, and the result."""
    chain = Compose([*HEAD, *copy.deepcopy(transforms)])
    image = chain({"image": str(path)})["image"]
    assert isinstance(image, MetaTensor)
    source = read_scan(path)
    pipeline = Pipeline(chain, {"image": str(path)}, "image")
    alone = geometry_of(image, source, additive=False)
    result = geometry_of(image, source, additive=False, pipeline=pipeline)
    return alone.verdict, result.verdict, result


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("name", CHAINS)
def test_the_pattern_decides_where_contents_cannot(scan: Path, name: str, axis: int | None) -> None:
    moved = [] if axis is None else [Lambdad("image", lambda x: x.flip(axis + 1))]
    alone, verdict, result = verdicts(scan, *CHAINS[name], *moved)
    assert alone == "warned" or (name, axis, alone) == ("not monotone", None, "passed")
    assert verdict == ("passed" if axis is None else "refused"), result
    assert axis is None or f"along axis {axis}:" in result.text


@pytest.mark.parametrize("name", CHAINS)
def test_recorded_flips_pass(scan: Path, name: str) -> None:
    assert verdicts(scan, *CHAINS[name], Flipd("image", 0))[1] == "passed"


MOVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exchanged axes": lambda x: x.transpose(2, 3),
    "shift": lambda x: x.roll(9, 1),
    "resampled": lambda x: x[:, :, ::2],
}


@pytest.mark.parametrize("move", MOVES)
def test_other_moves_are_refused(scan: Path, move: str) -> None:
    chain = Compose([*HEAD, Spacingd("image", (1.2, 1.5, 1.5)), *CHAINS["random noise"], Lambdad("image", MOVES[move])])
    image, source = chain({"image": str(scan)})["image"], read_scan(scan)
    assert geometry_of(image, source, additive=False).verdict == "warned"
    pipeline = Pipeline(chain, {"image": str(scan)}, "image")
    assert geometry_of(image, source, additive=False, pipeline=pipeline).verdict == "refused"


def test_a_pattern_that_does_not_come_back_decides_nothing(scan: Path) -> None:
    alone, verdict, result = verdicts(scan, Lambdad("image", lambda x: torch.rand(x.shape)))
    assert (alone, verdict) == ("warned", "warned")
    assert "cannot decide" in result.text


def test_random_states_and_transforms_stay_as_they_are(scan: Path) -> None:
    random = RandFlipd("image", prob=0.5).set_random_state(5)
    chain = Compose([*HEAD, Lambdad("image", classes), random])
    before = random.R.get_state()[1].copy(), torch.get_rng_state(), np.random.get_state()[1].copy()
    Pipeline(chain, {"image": str(scan)}, "image").probe(lambda image: np.eye(4))
    after = random.R.get_state()[1], torch.get_rng_state(), np.random.get_state()[1]
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


def test_a_preprocessing_that_fails_decides_nothing(scan: Path) -> None:
    assert (
        Pipeline(Compose(HEAD), {"image": str(scan.with_name("gone.nii"))}, "image").probe(lambda _: np.eye(4)) is None
    )
