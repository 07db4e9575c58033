"""The copies that a report shows: on the scan's grid, in bytes, with nothing of its header but geometry."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.errors import InputError
from esegeta_monai.files.copies import mask_path, save_mask, save_scan_copy, scan_copy_path
from esegeta_monai.files.scans import Grid


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    affine = np.array([[-2.0, 0.1, 0, 10], [0.1, 2.0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1]])
    image = nib.Nifti1Image(np.random.default_rng(0).normal(100, 30, (6, 7, 8)).astype(np.float32), affine)
    image.header["descrip"] = b"Doe, Jane"
    image.set_sform(affine, code=4)
    nib.save(image, tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


def test_a_copy_keeps_intensities_to_twelve_bits_and_nothing_of_the_header_but_geometry(
    scan: Path, tmp_path: Path
) -> None:
    values = np.asarray(nib.load(scan).dataobj)
    copy = nib.load(save_scan_copy(scan_copy_path(tmp_path, "a"), values[None], Grid.of(scan)))
    assert copy.get_data_dtype() == np.float32
    assert np.array_equal(copy.affine, nib.load(scan).affine)
    assert copy.header["sform_code"] == 4
    assert b"Doe" not in (tmp_path / "a" / "a_scan.nii.gz").read_bytes()
    assert not bytes(copy.header["descrip"]).strip(b"\0")
    assert np.abs(np.asarray(copy.dataobj) / values - 1).max() <= 2.0**-12


def test_whole_numbers_are_exact_and_channels_go_last(scan: Path, tmp_path: Path) -> None:
    values = np.rint(np.asarray(nib.load(scan).dataobj)) - 1000  # as a CT
    both = np.stack([values, 1000 - 7 * values])
    copy = nib.load(save_scan_copy(tmp_path / "two.nii.gz", both, Grid.of(scan)))
    assert copy.get_data_dtype() == np.int16
    assert np.array_equal(np.moveaxis(np.asarray(copy.dataobj), -1, 0), both)


def test_a_scan_with_holes(scan: Path, tmp_path: Path) -> None:
    values = np.full((1, 6, 7, 8), 5.0)
    values[0, 0, 0, 0] = np.nan
    copy = np.asarray(nib.load(save_scan_copy(tmp_path / "c.nii.gz", values, Grid.of(scan))).dataobj)
    assert (copy == 5).all()


def test_a_mask(scan: Path, tmp_path: Path) -> None:
    mask = np.zeros((1, 6, 7, 8), np.float32)
    mask[0, 1:3, 2, 4:] = 1
    path = save_mask(mask_path(tmp_path, "a", "MultiClassMask-grey matter"), mask, Grid.of(scan))
    assert path.name == "a_MultiClassMask-grey-matter_mask.nii.gz"
    assert np.array_equal(np.asarray(nib.load(path).dataobj), mask[0])
    with pytest.raises(InputError, match="does not fit the scan's grid"):
        save_mask(path, mask[:, 1:], Grid.of(scan))
