from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.transforms import LoadImage

from esegeta_monai.errors import InputError
from esegeta_monai.files.doubts import geometry_doubts
from esegeta_monai.files.scans import read_scan
from esegeta_monai.transforms import Explain
from tests.faults import nifti as n


def test_a_good_file_has_none(tmp_path: Path) -> None:
    n.field()(tmp_path / "a.nii.gz")
    assert geometry_doubts(tmp_path / "a.nii.gz") == ()
    assert geometry_doubts(np.zeros(3)) == ()
    assert geometry_doubts(tmp_path / "a.mha") == ()


def test_equal_forms_are_no_doubt(tmp_path: Path) -> None:
    image = nib.Nifti1Image(n.ball(), n.AFFINE)
    image.set_qform(n.AFFINE, 1)
    image.set_sform(n.AFFINE, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    assert geometry_doubts(tmp_path / "a.nii.gz") == ()


def test_the_distance_of_two_forms(tmp_path: Path) -> None:
    image = nib.Nifti1Image(n.ball(), n.AFFINE)
    moved = n.AFFINE.copy()
    moved[0, 3] = 30
    image.set_qform(moved, 1)
    image.set_sform(n.AFFINE, 1)
    nib.save(image, tmp_path / "a.nii.gz")
    (text,) = geometry_doubts(tmp_path / "a.nii.gz")
    assert "up to 30 mm apart" in text


def test_the_transform_records_them(tmp_path: Path) -> None:
    n.two_forms(tmp_path / "a.nii.gz")
    image = LoadImage(ensure_channel_first=True, image_only=True)(tmp_path / "a.nii.gz")
    explain = Explain(torch.nn.Conv3d(1, 2, 3, padding=1), methods="Saliency", targets="MultiClassMask(1)")
    (attribution,) = explain(image).values()
    assert "sform and qform place voxels up to" in attribution.meta["record"]


@pytest.mark.parametrize("edge", [1e5, 1e30])
def test_voxels_larger_than_any_scan(edge: float, tmp_path: Path) -> None:
    n.sform(np.diag([edge, edge, edge, 1]))(tmp_path / "a.nii.gz")
    with pytest.raises(InputError, match="which no scan has"):
        read_scan(tmp_path / "a.nii.gz")
