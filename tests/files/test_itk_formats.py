"""NRRD, MHA and DICOM series in; maps out in the input's format: grid and values."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, EnsureChannelFirstd, LoadImage, LoadImaged, SaveImaged, Spacingd

from esegeta_monai.bundle.overlay import shipped_overlay
from esegeta_monai.cli.main import main
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.maps import save_map, sidecar_path
from esegeta_monai.files.scans import Grid, read_scan
from esegeta_monai.transforms import Explaind, InvertAttributiond
from esegeta_monai.utils.names import map_path, map_suffix
from tests.files.series import write_series, write_volume
from tests.support import oblique
from tests.support.cli import make_bundle, run_json

pytest.importorskip("itk")

SHAPE = (12, 10, 7)
AFFINE = oblique.affine()
RIGHT_HANDED = oblique.affine(spacing=(1.2, 1.5, 2.0))


def volume(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def in_the_world(values: np.ndarray, affine: np.ndarray) -> dict[tuple[float, ...], float]:
    """World position (mm, to 1e-3) to value: what must not change, whichever way a reader turns the axes."""
    index = np.stack(np.meshgrid(*[np.arange(n) for n in values.shape], indexing="ij"), -1).reshape(-1, 3)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    return {tuple(np.round(p, 3) + 0.0): float(v) for p, v in zip(points, values.reshape(-1))}


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("affine", [AFFINE, RIGHT_HANDED], ids=["left-handed", "right-handed"])
def test_a_volume_comes_and_goes(tmp_path: Path, suffix: str, affine: np.ndarray) -> None:
    scan = read_scan(write_volume(tmp_path / f"scan{suffix}", volume(), affine))
    np.testing.assert_allclose(np.asarray(scan.affine), affine, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(scan[0]), volume())
    values = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(0))
    path = save_map(tmp_path / f"map{suffix}", values, Grid.of(tmp_path / f"scan{suffix}"), method="Saliency")
    back = read_scan(path)
    np.testing.assert_array_equal(back.as_tensor(), values)
    np.testing.assert_allclose(np.asarray(back.affine), affine, atol=1e-5)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_several_channels_are_one_vector_image(tmp_path: Path, suffix: str) -> None:
    grid = Grid.of(write_volume(tmp_path / f"scan{suffix}", volume(), AFFINE))
    values = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    back = read_scan(save_map(tmp_path / f"map{suffix}", values, grid, method="Saliency"))
    np.testing.assert_array_equal(back.as_tensor(), values)
    np.testing.assert_allclose(np.asarray(back.affine), AFFINE, atol=1e-5)


@pytest.mark.parametrize("affine", [AFFINE, RIGHT_HANDED], ids=["left-handed", "right-handed"])
def test_a_dicom_series_has_the_position_of_its_slices(tmp_path: Path, affine: np.ndarray) -> None:
    folder = write_series(tmp_path / "series", volume(), affine)
    scan = read_scan(folder)
    assert in_the_world(np.asarray(scan[0]), np.asarray(scan.affine)) == in_the_world(volume(), affine)
    values = torch.as_tensor(volume(1)).float()[None]
    path = save_map(tmp_path / "map.nii.gz", values, Grid.of(folder), method="Saliency")
    image = nib.load(path)
    np.testing.assert_allclose(image.affine, np.asarray(scan.affine), atol=1e-4)
    np.testing.assert_array_equal(np.asarray(image.dataobj), values[0])
    assert b"Doe" not in path.read_bytes()


def gap(folder: Path) -> None:
    (folder / "003.dcm").unlink()


def cut(folder: Path) -> None:
    file = folder / "003.dcm"
    file.write_bytes(file.read_bytes()[:-60])


def emptied(folder: Path) -> None:
    (folder / "006.dcm").write_bytes(b"")


def end(folder: Path) -> None:
    (folder / "006.dcm").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (gap, "slices are missing, one gap of 4 mm among gaps of 2 mm"),
        (cut, "1 of 7 files cannot be read, first 003.dcm"),
        (emptied, "1 of 7 files cannot be read, first 006.dcm"),
        (end, "6 slices of the 7 that the files declare"),
    ],
    ids=["gap", "cut", "emptied", "end"],
)
def test_a_truncated_series_is_refused(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    folder = write_series(tmp_path / "series", volume(), AFFINE, declared=7)
    read_scan(folder)
    damage(folder)
    with pytest.raises(InputError, match=f"the DICOM series is truncated .{says}"):
        read_scan(folder)


def test_two_series_and_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds 0 DICOM series"):
        read_scan(tmp_path / "none")


def test_a_truncated_volume_is_refused(tmp_path: Path) -> None:
    for suffix in (".nrrd", ".mha"):
        path = write_volume(tmp_path / f"scan{suffix}", volume(), AFFINE)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"the file is truncated \(1580 of 1680 bytes"):
            read_scan(path)


def test_names_of_maps_in_the_scans_format(tmp_path: Path) -> None:
    path = map_path(tmp_path, "a", "t", "Saliency", extension=map_suffix("scan.mhd"))
    assert path.name == "a_t_Saliency_attr.mha"
    assert sidecar_path(path).name == "a_t_Saliency_attr.json"
    with pytest.raises(UsageError, match="maps are written as one of"):
        map_path(tmp_path, "a", "t", "Saliency", extension=".dcm")


# ---------------------------------------------------------------------- the interfaces


def command(*words: object, output: Path) -> tuple[int, dict[str, Any]]:
    return main([*map(str, words), "--output", str(output)]), run_json(output)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ""], ids=["nrrd", "mha", "dicom"])
def test_the_command_line(tmp_path: Path, suffix: str) -> None:
    torch.set_num_threads(1)
    bundle = make_bundle(tmp_path / "bundle")
    values = volume(shape=(16, 18, 14))
    scan = tmp_path / "scans" / f"case{suffix}"
    write_volume(scan, values, AFFINE) if suffix else write_series(scan, values, AFFINE)
    words = ["explain", "--bundle", bundle, "--input", scan, "--methods", "Saliency", "--target", "MultiClassMask(1)"]
    words += ["--no-pictures", "--no-progress", "--quiet", "--map-format", "input"]
    code, record = command(*words, output=tmp_path / "out")
    assert (code, [r["status"] for r in record["results"]]) == (0, ["ok"]), record["results"]
    (path,) = (p for p in (tmp_path / "out" / "case").iterdir() if p.suffix != ".json")
    assert path.name == f"case_MultiClassMask-grey-matter_Saliency_attr{suffix or '.nii.gz'}"
    back, source = read_scan(path), read_scan(scan)
    assert back.shape == source.shape
    np.testing.assert_allclose(np.asarray(back.affine), np.asarray(source.affine), atol=1e-4)
    assert float(back.as_tensor().abs().sum()) > 0
    code, record = command(*words, output=tmp_path / "out")
    assert [r["status"] for r in record["results"]] == ["skipped"]  # it finds its own map again
    nifti = tmp_path / "nifti"
    command(*words[:-2], output=nifti)
    (other,) = nifti.rglob("*.nii.gz")
    np.testing.assert_array_equal(read_scan(other).as_tensor(), back.as_tensor())


def test_the_command_line_refuses_a_truncated_series(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scans" / "case", volume(), AFFINE)
    gap(folder)
    words = ["explain", "--bundle", make_bundle(tmp_path / "bundle"), "--input", folder, "--methods", "Saliency"]
    code, record = command(*words, "--quiet", output=tmp_path / "out")
    assert code == 1
    assert "the DICOM series is truncated" in record["results"][0]["reason"]


@pytest.mark.parametrize("kind", ["series", "mha"])
def test_the_handler(tmp_path: Path, kind: str) -> None:
    torch.set_num_threads(1)
    values = volume(shape=oblique.SHAPE)
    scan = tmp_path / ("case" if kind == "series" else "case.mha")
    write_series(scan, values, AFFINE) if kind == "series" else write_volume(scan, values, AFFINE)
    config = oblique.config([scan], tmp_path / "eval")
    config["preprocessing"]["transforms"][0]["reader"] = "ITKReader"
    folder = oblique.write(tmp_path / "bundle", config)
    options: dict[str, Any] = {"explain_targets": "MultiClassMask(2)", "explain_methods": "Saliency"}
    options["explain_handler#map_format"] = "input"
    files = [str(folder / "configs" / "inference.json"), str(shipped_overlay())]
    monai.bundle.run(config_file=files, bundle_root=str(folder), **options)
    (sidecar,) = (tmp_path / "eval").rglob("*_attr.json")
    assert json.loads(sidecar.read_text(encoding="utf-8"))["status"] == "ok"
    path = sidecar.with_suffix(".nii.gz" if kind == "series" else ".mha")
    back, source = read_scan(path), read_scan(scan)
    assert back.shape == source.shape
    np.testing.assert_allclose(np.asarray(back.affine), np.asarray(source.affine), atol=1e-4)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha", ".nii.gz"])
def test_the_transforms_with_monais_own_writer(tmp_path: Path, suffix: str) -> None:
    """A chain of dictionary transforms: scan, explanation, back to the scan's grid, saved by ``SaveImaged``."""
    scan = write_volume(tmp_path / "case.nrrd", volume(), AFFINE)
    before = Compose(
        [
            LoadImaged("image", reader="ITKReader"),
            EnsureChannelFirstd("image"),
            Spacingd("image", pixdim=(1.5, 1.5, 1.5)),
        ]
    )
    network = torch.nn.Conv3d(1, 2, 3, padding=1)
    torch.manual_seed(0)
    explain = Explaind("image", network, methods="InputXGradient", targets="ThresholdMask(0.0)", output_keys="map")
    data = explain(before({"image": str(scan)}))
    data = InvertAttributiond("map")(data)
    assert tuple(data["map"].shape[1:]) == SHAPE
    saver = SaveImaged("map", output_dir=tmp_path, output_postfix="attr", output_ext=suffix, separate_folder=False,
                       resample=False, print_log=False,
                       writer="NibabelWriter" if suffix == ".nii.gz" else "ITKWriter")  # fmt: skip
    saver(data)
    back = LoadImage(reader=None if suffix == ".nii.gz" else "ITKReader", ensure_channel_first=True)(
        str(tmp_path / f"case_attr{suffix}")
    )
    assert isinstance(back, MetaTensor)
    np.testing.assert_allclose(np.asarray(back.affine), AFFINE, atol=1e-4)
    np.testing.assert_array_equal(back.as_tensor(), data["map"].as_tensor().float())
    shutil.rmtree(tmp_path)
