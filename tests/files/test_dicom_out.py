"""Results as DICOM, read back with highdicom, pydicom and ITK: values, geometry and identifiers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from esegeta_monai.cli.main import main
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files import dicom_out
from esegeta_monai.files.dicom_out import DicomSource, check_dicom_writer, dicom_path
from esegeta_monai.files.scans import Grid, read_scan
from esegeta_monai.output.writer import ResultWriter
from tests.files.series import to_lps, write_series, write_volume
from tests.support import oblique
from tests.support.cli import make_bundle, run_json

AFFINE = oblique.affine(spacing=(1.2, 1.5, 2.0))
FLIPPED = AFFINE @ np.diag([1.0, 1.0, -1.0, 1.0])
SHAPE = (16, 18, 14)
TAKEN_OVER = ["PatientID", "PatientName", "StudyInstanceUID", "FrameOfReferenceUID", "AccessionNumber", "StudyDate"]


@pytest.fixture(autouse=True)
def _needs_packages(request: pytest.FixtureRequest) -> None:
    if "without_highdicom" not in request.node.name:
        pytest.importorskip("highdicom", reason="needs the extra dicom: pip install esegeta-monai[dicom]")
        pytest.importorskip("itk")


def series(folder: Path, affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE) -> Path:
    """A CT series with the identifiers that a hospital's files have; values of a fixed draw."""
    import pydicom

    values = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    for file in write_series(folder, values, affine).iterdir():
        one = pydicom.dcmread(file)
        one.PatientID, one.FrameOfReferenceUID, one.AccessionNumber = "P7", "1.2.826.0.1.3680043.2.1125.9", "A-1"
        one.StudyDate, one.SeriesNumber = "20240115", 4
        one.save_as(file)
    return folder


def values_of(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)


def in_the_world(values: np.ndarray, affine: np.ndarray) -> dict[tuple[float, ...], float]:
    """World position in units of 0.1 mm (LPS) to value."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in values.shape], indexing="ij"), -1).reshape(-1, 3)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(np.rint(10 * p).astype(int)): float(v) for p, v in zip(points, values.reshape(-1))}


def by_pydicom(path: Path) -> dict[tuple[float, ...], float]:
    """Place every frame by its own position, as a viewer does, with pydicom alone."""
    import pydicom

    made, there = pydicom.dcmread(path), {}
    shared = made.SharedFunctionalGroupsSequence[0]
    along = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    rows, columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    for frame, group in zip(made.pixel_array, made.PerFrameFunctionalGroupsSequence):
        matrix = np.eye(4)
        matrix[:3, 0], matrix[:3, 1] = along[3:] * rows, along[:3] * columns
        matrix[:3, 2] = np.cross(along[:3], along[3:])
        matrix[:3, 3] = group.PlanePositionSequence[0].ImagePositionPatient
        there |= in_the_world(frame[:, :, None], matrix)
    return there


def by_highdicom(path: Path) -> dict[tuple[float, ...], float]:
    import highdicom

    volume = highdicom.imread(path).get_volume(apply_real_world_transform=True)
    return in_the_world(volume.array, volume.affine)


@pytest.mark.parametrize("affine", [AFFINE, FLIPPED], ids=["ascending", "descending"])
@pytest.mark.parametrize("read", [by_pydicom, by_highdicom])
def test_a_map_comes_back(tmp_path: Path, affine: np.ndarray, read: Any) -> None:
    import pydicom

    folder = series(tmp_path / "s", affine)
    grid, source, values = Grid.of(folder), DicomSource(folder), values_of()
    path = source.save_map(
        tmp_path / "map.dcm", values, grid.affine, method="Saliency", units="target per voxel", target="grey", limit=2.0
    )
    assert read(path) == in_the_world(values, to_lps(grid.affine))
    made, first = pydicom.dcmread(path), source.slices[0]
    assert [made[n].value for n in TAKEN_OVER] == [first[n].value for n in TAKEN_OVER]
    assert (made.SOPClassUID.name, made.Modality, made.ContentQualification) == (
        "Parametric Map Storage",
        "OT",
        "RESEARCH",
    )
    mapping = made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1.0, 0.0)
    assert mapping.DoubleFloatRealWorldValueFirstValueMapped == pytest.approx(float(values.min()))
    referred = {i.ReferencedSOPInstanceUID for i in made.ReferencedSeriesSequence[0].ReferencedInstanceSequence}
    assert referred == {s.SOPInstanceUID for s in source.slices}


def test_a_target_comes_back_with_highdicom_and_itk(tmp_path: Path) -> None:
    import highdicom
    import itk

    folder = series(tmp_path / "s")
    grid, mask = Grid.of(folder), values_of() > 0.5
    path = DicomSource(folder).save_mask(tmp_path / "mask.dcm", mask, grid.affine, target="grey matter")
    truth = in_the_world(mask.astype(np.uint8), to_lps(grid.affine))
    read = highdicom.seg.segread(path)
    volume = read.get_volume(combine_segments=True)
    assert in_the_world(volume.array, volume.affine) == truth
    assert read.SegmentSequence[0].SegmentLabel == "grey matter"
    image = itk.imread(str(path))
    lps = np.eye(4)
    lps[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    array = itk.array_from_image(image).T
    assert in_the_world((array > 0).astype(np.uint8), lps) == truth


def test_a_picture_comes_back(tmp_path: Path) -> None:
    import pydicom

    pixels = np.random.default_rng(2).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    folder = series(tmp_path / "s")
    made = pydicom.dcmread(DicomSource(folder).save_picture(tmp_path / "p.dcm", tmp_path / "p.png", title="Saliency"))
    assert np.array_equal(made.pixel_array, pixels)
    assert (made.PatientID, made.BurnedInAnnotation, made.SeriesDescription) == ("P7", "YES", "Saliency")
    assert made.SOPClassUID.name == "Secondary Capture Image Storage"


@pytest.mark.parametrize("limit", [0.01, 300.0])
def test_the_standard_is_kept(tmp_path: Path, limit: float) -> None:
    """A display window below 1 needs LINEAR_EXACT, and the laterality is required; dciodvfy (dicom3tools) agrees."""
    import pydicom

    folder = series(tmp_path / "s")
    grid, source = Grid.of(folder), DicomSource(folder)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "p.png")
    options: Any = {"method": "Saliency", "units": "u", "target": "grey", "limit": limit}
    paths = [
        source.save_map(tmp_path / "map.dcm", values_of(), grid.affine, **options),
        source.save_mask(tmp_path / "mask.dcm", values_of() > 0.5, grid.affine, target="grey"),
        source.save_picture(tmp_path / "picture.dcm", tmp_path / "p.png", title="Saliency"),
    ]
    window = pydicom.dcmread(paths[0]).SharedFunctionalGroupsSequence[0].FrameVOILUTSequence[0]
    assert (window.VOILUTFunction, float(window.WindowWidth)) == ("LINEAR_EXACT", 2 * limit)
    assert [pydicom.dcmread(path).get("Laterality") for path in paths] == ["", None, ""]
    checker = shutil.which("dciodvfy")
    if checker is None:
        pytest.skip("needs dciodvfy: apt-get install dicom3tools")
    for path in paths:
        output = subprocess.run([checker, "-new", path], capture_output=True, text=True, encoding="utf-8")
        assert [line for line in (output.stdout + output.stderr).splitlines() if "Error" in line] == []


def test_the_same_content_gets_the_same_identifiers(tmp_path: Path) -> None:
    import pydicom

    folder = series(tmp_path / "s")
    affine, options = Grid.of(folder).affine, {"method": "Saliency", "units": "u", "target": "t", "limit": 1.0}
    paths = [
        DicomSource(folder).save_map(tmp_path / f"{i}.dcm", values_of(seed), affine, **options)
        for i, seed in enumerate((1, 1, 2))
    ]
    first, same, other = (pydicom.dcmread(p).SOPInstanceUID for p in paths)
    assert first == same != other


def test_a_map_on_another_grid_is_refused(tmp_path: Path) -> None:
    folder = series(tmp_path / "s")
    source, affine = DicomSource(folder), Grid.of(folder).affine
    shifted = affine.copy()
    shifted[0, 3] += 1.0
    for values, place in ((values_of()[:-1], affine), (values_of(), shifted), (values_of(), affine[[1, 0, 2, 3]])):
        with pytest.raises(InputError, match="not on the grid of the DICOM series"):
            source.frames(values, place)


def test_a_series_without_a_place_is_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "s", np.zeros(SHAPE, np.int16), AFFINE)
    with pytest.raises(InputError, match="FrameOfReferenceUID, so maps have no place"):
        DicomSource(folder)


def test_the_command_line(tmp_path: Path) -> None:
    import nibabel as nib
    import pydicom

    torch.set_num_threads(1)
    folder, output = series(tmp_path / "scans" / "case"), tmp_path / "out"
    words = ["explain", "--bundle", make_bundle(tmp_path / "bundle"), "--input", folder, "--methods", "Saliency"]
    words += ["--target", "MultiClassMask(1)", "--no-progress", "--quiet"]
    plain = main([*map(str, words), "--output", str(output)])
    code = main([*map(str, words), "--map-format", "dicom", "--output", str(output)])
    assert (plain, code, run_json(output)["results"][0]["status"]) == (0, 0, "ok")  # NIfTI alone is not all of it
    (path,) = output.rglob("*_attr.dcm")
    nifti = nib.load(str(path).replace(".dcm", ".nii.gz"))
    assert by_pydicom(path) == in_the_world(np.asarray(nifti.dataobj), to_lps(nifti.affine))
    (mask,) = output.rglob("*_mask.dcm")
    stored = nib.load(str(mask).replace(".dcm", ".nii.gz"))
    seen = {k: v for k, v in by_pydicom(mask).items() if v}
    assert seen == {k: 1.0 for k, v in in_the_world(np.asarray(stored.dataobj), to_lps(stored.affine)).items() if v}
    (picture,) = output.rglob("*_attr_picture.dcm")
    with Image.open(str(path).replace(".dcm", ".png")) as drawn:
        assert np.array_equal(pydicom.dcmread(picture).pixel_array, np.asarray(drawn.convert("RGB")))
    main([*map(str, words), "--map-format", "dicom", "--output", str(output)])
    assert run_json(output)["results"][0]["status"] == "skipped"


def test_a_scan_that_is_no_series_is_refused_before_any_map(tmp_path: Path) -> None:
    scan = write_volume(tmp_path / "scans" / "case.nrrd", (100 * values_of()).astype(np.int16), AFFINE)
    words = ["explain", "--bundle", make_bundle(tmp_path / "bundle"), "--input", scan, "--methods", "Saliency"]
    code = main([*map(str, words), "--quiet", "--map-format", "dicom", "--output", str(tmp_path / "out")])
    (result,) = run_json(tmp_path / "out")["results"]
    assert code == 1
    assert "case.nrrd: map format dicom needs a DICOM series" in result["reason"]
    with pytest.raises(InputError, match="an array: map format dicom"):
        DicomSource(read_scan(scan))


def test_without_highdicom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_out, "optional_import", lambda name: (None, False))
    for refused in (check_dicom_writer, lambda: ResultWriter(tmp_path, [], [], dicom=True)):
        with pytest.raises(UsageError, match=r"pip install \"esegeta-monai\[dicom\]\""):
            refused()


def test_names_of_channels_without_highdicom() -> None:
    assert [dicom_path("a_attr.nii", c).name for c in (None, 0, 1)] == ["a_attr.dcm", "a_attr_1.dcm", "a_attr_2.dcm"]
    assert dicom_path("a_attr.nii.gz", picture=True).name == "a_attr_picture.dcm"
