from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Spacing
from PIL import Image

from esegeta_monai.errors import InputError
from esegeta_monai.files.scans import Grid, read_scan

AFFINE = np.array([[0.0, -1.5, 0.2, 10], [2.0, 0, 0, -20], [0, 0.3, 3.0, 5], [0, 0, 0, 1]])


def voxels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def nifti(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(data, affine), path)
    return path


def test_a_good_scan_is_read_as_it_is(tmp_path: Path) -> None:
    data = voxels(5, 6, 7)
    scan = read_scan(nifti(tmp_path / "a.nii.gz", data), spatial_dims=3, channels=1)
    assert isinstance(scan, MetaTensor)
    assert scan.dtype == torch.float32
    np.testing.assert_array_equal(scan[0].numpy(), data)
    np.testing.assert_allclose(scan.affine.numpy(), AFFINE, rtol=1e-6)
    assert scan.meta["filename_or_obj"] == str(tmp_path / "a.nii.gz")


def test_reading_equals_monai_s_loader(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", voxels(5, 6, 7, 3))
    ours, expected = read_scan(path), LoadImage(ensure_channel_first=True, image_only=True)(path)
    assert torch.equal(ours.as_tensor(), expected.as_tensor())
    assert torch.equal(ours.affine, expected.affine)
    assert ours.meta.keys() == expected.meta.keys()


def test_int16_with_slope(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), AFFINE)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    stored = nib.load(tmp_path / "a.nii")
    assert (stored.dataobj.slope, stored.dataobj.inter) == (0.5, -3)
    expected = stored.dataobj.get_unscaled() * 0.5 - 3
    np.testing.assert_array_equal(read_scan(tmp_path / "a.nii")[0].numpy(), expected)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def singular(path: Path, x: tuple[float, ...] = (1, 0, 1, 0)) -> None:
    image = nib.Nifti1Image(voxels(4, 4, 4), None)
    image.header["sform_code"] = 1
    image.header["srow_x"], image.header["srow_y"], image.header["srow_z"] = x, (0, 1, 1, 0), (0, 0, 0, 0)
    nib.save(image, path)


def bad_value(value: float) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        data = voxels(4, 4, 4)
        data[1, 2, 3] = value
        nifti(path, data)

    return write


def cut_png(path: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    cut(path)


def colour(path: Path) -> None:
    data = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(data, AFFINE), path)


BAD: list[tuple[str, str, Callable[[Path], Any], dict[str, int], str]] = [
    ("missing", "a.nii.gz", lambda p: None, {}, "no such file"),
    ("empty", "a.nii.gz", lambda p: p.write_bytes(b""), {}, "the file is empty"),
    (
        "text",
        "a.nii.gz",
        lambda p: p.write_text("hello, this is no NIfTI file at all", encoding="utf-8"),
        {},
        "no readable NIfTI",
    ),
    ("text, long", "a.nii", lambda p: p.write_text("hello " * 200, encoding="utf-8"), {}, "no readable NIfTI"),
    ("cut gz", "a.nii.gz", lambda p: cut(nifti(p, voxels(16, 16, 16))), {}, "truncated"),
    ("cut nii", "a.nii", lambda p: cut(nifti(p, voxels(16, 16, 16))), {}, "truncated"),
    ("cut header", "a.nii.gz", lambda p: p.write_bytes(nifti(p, voxels(8, 8, 8)).read_bytes()[:40]), {}, "NIfTI"),
    ("NaN", "a.nii.gz", bad_value(np.nan), {}, "1 of 64 voxels are NaN or infinite"),
    ("Inf", "a.nii.gz", bad_value(-np.inf), {}, "1 of 64 voxels are NaN or infinite"),
    ("singular", "a.nii.gz", singular, {}, "the affine is singular"),
    ("zero affine", "a.nii", lambda p: singular(p, (0, 0, 0, 0)), {}, "the affine is singular"),
    ("NaN affine", "a.nii", lambda p: singular(p, (np.nan, 0, 0, 0)), {}, "the affine is singular"),
    ("2D", "a.nii.gz", lambda p: nifti(p, voxels(8, 8)), {"spatial_dims": 3}, "a 2D image .8x8., but .* 3D"),
    ("one slice", "a.nii.gz", lambda p: nifti(p, voxels(8, 9, 1)), {"spatial_dims": 3}, "a 2D image .8x9x1., but"),
    ("3D for 2D", "a.nii.gz", lambda p: nifti(p, voxels(8, 8, 8)), {"spatial_dims": 2}, "a 3D image .* takes 2D"),
    ("channels", "a.nii.gz", lambda p: nifti(p, voxels(4, 4, 4, 2)), {"channels": 4}, "2 channel.* network takes 4"),
    ("colour", "a.nii.gz", colour, {}, "not grey values"),
    ("complex", "a.nii", lambda p: nifti(p, voxels(3, 3, 3).astype(np.complex64)), {}, "complex64 are not grey values"),
    ("cut png", "a.png", cut_png, {}, "cannot be read"),
    ("cut nrrd", "a.nrrd", lambda p: p.write_text("NRRD0004\ntype: float\n", encoding="utf-8"), {}, "cannot be read"),
    ("unknown", "a.xyz", lambda p: p.write_text("?", encoding="utf-8"), {}, "cannot be read"),
    ("no DICOM", "folder", lambda p: p.mkdir(), {}, "holds 0 DICOM series"),
]


@pytest.mark.parametrize(("name", "write", "asked", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_one_named_line(
    name: str, write: Callable[[Path], Any], asked: dict[str, int], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(InputError, match=message) as caught:
        read_scan(path, **asked)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path)) * 2


def test_monai_alone_lets_these_through(tmp_path: Path) -> None:
    """Why the checks exist: if this fails one day, MONAI has learnt them."""
    bad_value(np.nan)(tmp_path / "nan.nii")
    assert LoadImage(image_only=True)(tmp_path / "nan.nii").isnan().any()
    singular(tmp_path / "flat.nii")
    mended = LoadImage(image_only=True)(tmp_path / "flat.nii").affine.numpy()
    assert abs(np.linalg.det(mended)) > 0.5


def test_an_affine_that_monai_corrects_gives_a_warning_and_is_kept_for_maps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = nib.Nifti1Image(voxels(4, 5, 6), np.diag([2.0, 2, 2, 1]))
    image.header["pixdim"][1:4] = 1.0
    nib.save(image, tmp_path / "a.nii")
    written = nib.load(tmp_path / "a.nii")
    with caplog.at_level(logging.WARNING):
        scan = read_scan(tmp_path / "a.nii")
    assert not np.allclose(scan.affine, written.affine)
    assert "contradicts the voxel size" in caplog.text
    np.testing.assert_array_equal(Grid.of(tmp_path / "a.nii").affine, written.affine)


def test_tiny_voxels_are_not_singular(tmp_path: Path) -> None:
    affine = np.diag([1e-6, 1e-6, 2e-6, 1])
    assert read_scan(nifti(tmp_path / "a.nii", voxels(3, 4, 5), affine)).shape == (1, 3, 4, 5)


def test_two_dimensional_images(tmp_path: Path) -> None:
    data = voxels(6, 7)
    for name, array in (("a.nii", data), ("b.nii.gz", data[..., None])):
        scan = read_scan(nifti(tmp_path / name, array), spatial_dims=2, channels=1)
        assert scan.shape == (1, 6, 7)
        np.testing.assert_array_equal(scan[0].numpy(), data)
    Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "c.png")
    assert read_scan(tmp_path / "c.png", spatial_dims=2, channels=1).shape == (1, 4, 3)  # MONAI: first axis is x
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "rgb.png")
    assert read_scan(tmp_path / "rgb.png", spatial_dims=2, channels=3).shape == (3, 4, 3)


def test_a_vector_image_is_channels(tmp_path: Path) -> None:
    assert read_scan(nifti(tmp_path / "a.nii", voxels(3, 4, 5, 1, 2)), spatial_dims=3, channels=2).shape == (2, 3, 4, 5)


def test_freesurfer_files(tmp_path: Path) -> None:
    data = voxels(4, 5, 6)
    nib.save(nib.MGHImage(data, np.diag([1.0, 2, 3, 1])), tmp_path / "a.mgz")
    np.testing.assert_array_equal(read_scan(tmp_path / "a.mgz", spatial_dims=3)[0].numpy(), data)
    np.testing.assert_allclose(Grid.of(tmp_path / "a.mgz").affine, np.diag([1.0, 2, 3, 1]))


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_itk_formats(suffix: str, tmp_path: Path) -> None:
    itk = pytest.importorskip("itk")
    data = voxels(4, 5, 6)
    image = itk.image_from_array(np.ascontiguousarray(data.T))
    image.SetSpacing([1.0, 2.0, 3.0])
    image.SetOrigin([10.0, 20.0, 30.0])
    itk.imwrite(image, str(tmp_path / f"a{suffix}"))
    scan = read_scan(tmp_path / f"a{suffix}", spatial_dims=3, channels=1)
    np.testing.assert_array_equal(scan[0].numpy(), data)
    # ITK's world is LPS, NIfTI's RAS: x and y change sign
    expected = np.array([[-1.0, 0, 0, -10], [0, -2, 0, -20], [0, 0, 3, 30], [0, 0, 0, 1]])
    np.testing.assert_allclose(scan.affine.numpy(), expected)
    grid = Grid.of(tmp_path / f"a{suffix}")
    assert grid.shape == (4, 5, 6)
    np.testing.assert_allclose(grid.affine, expected)
    assert (grid.header["sform_code"], grid.header["qform_code"]) == (1, 1)


def dicom_series(folder: Path, itk: Any, uid: str) -> None:
    folder.mkdir(exist_ok=True)
    for z in range(3):
        image = itk.image_from_array(np.full((1, 4, 5), z, dtype=np.int16))
        image.SetSpacing([1.0, 1.0, 2.0])
        image.SetOrigin([0.0, 0.0, 2.0 * z])
        tags = image.GetMetaDataDictionary()
        for tag, value in (
            *(("0008|0060", "MR"), ("0020|000e", uid), ("0020|000d", f"{uid}.9"), ("0020|0013", str(z))),
            *(("0020|0032", f"0\\0\\{2.0 * z}"), ("0020|0037", "1\\0\\0\\0\\1\\0"), ("0018|0050", "2")),
        ):
            tags[tag] = value
        image_io = itk.GDCMImageIO.New()
        image_io.KeepOriginalUIDOn()
        writer = itk.ImageFileWriter.New(image, FileName=str(folder / f"{uid}.{z}.dcm"), ImageIO=image_io)
        writer.Update()


def test_a_dicom_folder_is_one_scan_and_two_series_are_refused(tmp_path: Path) -> None:
    itk = pytest.importorskip("itk")
    dicom_series(tmp_path / "dicom", itk, "1.2.3.1")
    scan = read_scan(tmp_path / "dicom", spatial_dims=3, channels=1)
    assert scan.shape == (1, 5, 4, 3)
    assert sorted(scan[0, 0, 0].tolist()) == [0.0, 1.0, 2.0]
    dicom_series(tmp_path / "dicom", itk, "1.2.3.2")
    with pytest.raises(InputError, match="holds 2 DICOM series; give a folder that holds one"):
        read_scan(tmp_path / "dicom")


def test_without_itk_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "itk", None)
    (tmp_path / "a.mha").write_text("ObjectType = Image", encoding="utf-8")
    (tmp_path / "dicom").mkdir()
    for name, what in (("a.mha", r"a \.mha file"), ("dicom", "a DICOM folder")):
        with pytest.raises(InputError, match=rf'{what} needs ITK: pip install "esegeta-monai\[itk\]"'):
            read_scan(tmp_path / name)


def test_the_grid_of_a_tensor_ignores_stale_header_values(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", voxels(8, 8, 8), np.diag([1.0, 1, 1, 1]))
    scan = read_scan(path)
    exact = Grid.of(scan)
    assert exact.header.binaryblock == Grid.of(path).header.binaryblock
    assert exact.shape == (8, 8, 8)
    coarse = Spacing((2.0, 2.0, 2.0))(scan)
    grid = Grid.of(coarse)
    np.testing.assert_allclose(grid.affine, coarse.affine.numpy())
    assert grid.shape == tuple(coarse.shape[1:])
    np.testing.assert_allclose(grid.header.get_zooms(), (2, 2, 2))


def test_the_grid_of_a_meta_dictionary(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii.gz", voxels(4, 5, 6))
    assert Grid.of(read_scan(path).meta).header.binaryblock == Grid.of(nib.load(path)).header.binaryblock
    with pytest.raises(InputError, match="no 'affine'"):
        Grid.of({"spatial_shape": [4, 5, 6]})
    with pytest.raises(InputError, match="no 'spatial_shape'"):
        Grid.of({"affine": np.eye(4)})


def test_a_sheared_affine_without_a_header_gets_no_qform() -> None:
    sheared = torch.tensor([[1.0, 0.5, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    grid = Grid.of(MetaTensor(torch.zeros(1, 3, 3, 3), affine=sheared))
    np.testing.assert_allclose(grid.affine, sheared.numpy())
    assert (grid.header["sform_code"], grid.header["qform_code"]) == (1, 0)
