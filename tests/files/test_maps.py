from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from esegeta_monai.errors import InputError, MethodError, UsageError
from esegeta_monai.files.maps import is_complete, picture_path, save_map, save_sidecar, sidecar_path
from esegeta_monai.files.scans import Grid, read_scan
from esegeta_monai.utils.files import INTENDED_USE
from esegeta_monai.utils.names import map_path

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([-0.9, 1.1, 3.0]), [-90.0, 12.5, 7.25]
)
OTHER = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1) @ np.diag([0.9, 1.1, 3.0]), [1.0, 2.0, 3.0])


def scan_file(path: Path, shape: tuple[int, ...], sform: int = 1, qform: int = 1, **header: Any) -> Path:
    data = np.random.default_rng(0).integers(0, 999, shape).astype(np.int16)
    made = nib.Nifti1Header()
    made.set_data_dtype(np.int16)
    made.set_data_shape(shape)
    made.set_qform(OTHER if qform != sform else OBLIQUE, code=qform)
    made.set_sform(OBLIQUE, code=sform)
    made.set_xyzt_units("mm", "sec")
    for field, value in header.items():
        made[field] = value
    nib.save(nib.Nifti1Image(data, made.get_best_affine(), made), path)
    return path


def values(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


GEOMETRY = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@pytest.mark.parametrize("sform", range(5))
@pytest.mark.parametrize("qform", range(5))
def test_geometry_survives_bit_for_bit(sform: int, qform: int, tmp_path: Path) -> None:
    scan = nib.load(scan_file(tmp_path / "scan.nii.gz", (5, 6, 7), sform, qform))
    assert (int(scan.header["sform_code"]), int(scan.header["qform_code"])) == (sform, qform)
    attribution = values(1, 5, 6, 7)
    path = save_map(tmp_path / "map.nii.gz", attribution, Grid.of(tmp_path / "scan.nii.gz"), method="Saliency")
    written = nib.load(path)
    assert written.shape == scan.shape
    assert written.get_data_dtype() == np.float32
    np.testing.assert_array_equal(written.affine, scan.affine)
    for field in GEOMETRY:
        np.testing.assert_array_equal(written.header[field], scan.header[field], err_msg=field)
    np.testing.assert_array_equal(written.dataobj.get_unscaled(), attribution[0].numpy())  # raw, no slope
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), attribution[0].numpy())


@pytest.mark.parametrize(("sform", "qform"), [(4, 1), (0, 1), (1, 0), (0, 0), (2, 2)])
def test_the_grid_of_the_loaded_tensor_is_as_good_as_the_file(sform: int, qform: int, tmp_path: Path) -> None:
    scan_path = scan_file(tmp_path / "scan.nii.gz", (5, 6, 7), sform, qform)
    for name, grid in (("file", Grid.of(scan_path)), ("tensor", Grid.of(read_scan(scan_path)))):
        save_map(tmp_path / f"{name}.nii", values(1, 5, 6, 7), grid, method="Saliency")
    assert (tmp_path / "file.nii").read_bytes() == (tmp_path / "tensor.nii").read_bytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_big_endian_and_nifti2_scans(order: str, kind: Any, tmp_path: Path) -> None:
    header = kind.header_class(endianness=order)
    scan = kind(np.zeros((4, 5, 6), np.dtype(np.float32).newbyteorder(order)), OBLIQUE, header)
    nib.save(scan, tmp_path / "scan.nii")
    path = save_map(tmp_path / "map.nii", values(1, 4, 5, 6), Grid.of(tmp_path / "scan.nii"), method="Saliency")
    np.testing.assert_allclose(nib.load(path).affine, OBLIQUE, rtol=1e-6, atol=1e-6)


def test_scan_with_slope_does_not_scale_the_map(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), OBLIQUE)
    image.header.set_slope_inter(0.01, 100)
    nib.save(image, tmp_path / "scan.nii.gz")
    attribution = values(1, 3, 4, 5) * 1e-20
    path = save_map(tmp_path / "map.nii.gz", attribution, Grid.of(tmp_path / "scan.nii.gz"), method="Saliency")
    np.testing.assert_array_equal(nib.load(path).get_fdata(dtype=np.float32), attribution[0].numpy())


@pytest.mark.parametrize(
    ("on_disk", "tensor", "written"),
    [
        ((4, 5, 6), (1, 4, 5, 6), (4, 5, 6)),
        ((4, 5, 6, 3), (3, 4, 5, 6), (4, 5, 6, 3)),
        ((4, 5, 6, 3), (1, 4, 5, 6), (4, 5, 6)),
        ((4, 5, 6), (2, 4, 5, 6), (4, 5, 6, 2)),
        ((4, 5, 6, 1), (1, 4, 5, 6), (4, 5, 6, 1)),
        ((4, 5, 6, 1, 2), (2, 4, 5, 6), (4, 5, 6, 1, 2)),
        ((4, 5, 1), (1, 4, 5), (4, 5, 1)),
        ((4, 5, 1), (1, 4, 5, 1), (4, 5, 1)),
        ((4, 5), (1, 4, 5), (4, 5)),
        ((4, 5, 1), (3, 4, 5), (4, 5, 1, 3)),
        ((1, 5, 6), (1, 1, 5, 6), (1, 5, 6)),
    ],
)
def test_channels_and_dimensions(
    on_disk: tuple[int, ...], tensor: tuple[int, ...], written: tuple[int, ...], tmp_path: Path
) -> None:
    scan_file(tmp_path / "scan.nii", on_disk)
    attribution = values(*tensor)
    path = save_map(tmp_path / "map.nii.gz", attribution, Grid.of(tmp_path / "scan.nii"), method="Saliency")
    image = nib.load(path)
    assert image.shape == written
    expected = np.moveaxis(attribution.numpy(), 0, -1).reshape(written)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), expected)
    np.testing.assert_array_equal(image.affine, nib.load(tmp_path / "scan.nii").affine)


def test_voxel_sizes_beyond_the_third_axis_stay(tmp_path: Path) -> None:
    for name, shape in (("volume", (4, 5, 6)), ("series", (4, 5, 6, 2))):
        sizes = np.array([1, 0.9, 1.1, 3.0, 2.5, 0, 0, 0], np.float32)  # 2.5 s between volumes, the rest unset
        grid = Grid.of(scan_file(tmp_path / f"{name}.nii", shape, 0, 1, pixdim=sizes))
        written = nib.load(save_map(tmp_path / "map.nii", values(1, 4, 5, 6), grid, method="Saliency"))
        np.testing.assert_array_equal(written.header["pixdim"], nib.load(tmp_path / f"{name}.nii").header["pixdim"])
        assert written.header["pixdim"][4] == 2.5


def test_a_map_on_another_grid_is_refused(tmp_path: Path) -> None:
    grid = Grid.of(scan_file(tmp_path / "scan.nii", (4, 5, 6)))
    for shape in ((1, 4, 6, 5), (1, 4, 5), (1, 120, 1, 1), (1, 5, 4, 6)):
        with pytest.raises(InputError, match="does not fit the scan's grid"):
            save_map(tmp_path / "map.nii", values(*shape), grid, method="Saliency")
    assert not (tmp_path / "map.nii").exists()


def test_nothing_that_can_name_a_patient_is_copied(tmp_path: Path) -> None:
    names = {"descrip": b"Doe^John", "db_name": b"Doe", "aux_file": b"Doe.txt", "intent_name": b"Doe"}
    path = scan_file(tmp_path / "scan.nii.gz", (4, 5, 6), **names)
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^John 1970-01-01"))
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), tmp_path / "extended.nii")
    assert b"Doe" in (tmp_path / "extended.nii").read_bytes()
    for grid in (Grid.of(tmp_path / "extended.nii"), Grid.of(read_scan(tmp_path / "extended.nii"))):
        save_map(tmp_path / "map.nii", values(1, 4, 5, 6), grid, method="Saliency")
        assert b"Doe" not in (tmp_path / "map.nii").read_bytes()
        assert not nib.load(tmp_path / "map.nii").header.extensions


def test_intent_and_display_window(tmp_path: Path) -> None:
    grid = Grid.of(scan_file(tmp_path / "scan.nii", (10, 10, 10)))
    signed = values(1, 10, 10, 10)
    header = nib.load(save_map(tmp_path / "a.nii", signed, grid, method="IntegratedGradients")).header
    assert header.get_intent() == ("estimate", (), "IntegratedGradie")  # 16 bytes, all that the format holds
    expected = np.float32(np.quantile(np.abs(signed.numpy()), 0.995))
    assert header["cal_max"] == pytest.approx(expected, rel=1e-6)
    assert header["cal_min"] == -header["cal_max"]
    header = nib.load(save_map(tmp_path / "b.nii", signed.abs(), grid, method="größe")).header
    assert (header["cal_min"], header["cal_max"]) == (0, pytest.approx(expected, rel=1e-6))
    assert header.get_intent()[2] == "gr??e"
    single = torch.zeros(1, 10, 10, 10)
    single[0, 3, 3, 3] = 5
    header = nib.load(save_map(tmp_path / "c.nii", single, grid, method="GradCam")).header
    assert (header["cal_min"], header["cal_max"]) == (0, 5)
    header = nib.load(save_map(tmp_path / "d.nii", signed, grid, method="M", cal_min=-2, cal_max=3)).header
    assert (header["cal_min"], header["cal_max"]) == (-2, 3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_values_that_float32_does_not_hold_are_refused(value: float, tmp_path: Path) -> None:
    attribution = torch.zeros(1, 4, 5, 6, dtype=torch.float64)
    attribution[0, 0, 0, 0] = value
    grid = Grid.of(scan_file(tmp_path / "scan.nii", (4, 5, 6)))
    with pytest.raises(MethodError, match=r"map.nii: 1 of 120 values are not finite"):
        save_map(tmp_path / "map.nii", attribution, grid, method="Saliency")
    assert not (tmp_path / "map.nii").exists()


def test_half_precision_and_graphs_are_welcome(tmp_path: Path) -> None:
    grid = Grid.of(scan_file(tmp_path / "scan.nii", (4, 5, 6)))
    attribution = values(1, 4, 5, 6).to(torch.bfloat16).requires_grad_(True)
    with pytest.raises(TypeError, match="BFloat16"):  # what NumPy alone would do
        attribution.detach().numpy()
    path = save_map(tmp_path / "map.nii", attribution, grid, method="Saliency")
    np.testing.assert_array_equal(nib.load(path).get_fdata(dtype=np.float32), attribution[0].float().detach().numpy())


def test_a_crash_between_writing_and_renaming_leaves_the_old_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid.of(scan_file(tmp_path / "scan.nii", (4, 5, 6)))
    folder = tmp_path / "out"
    path = save_map(folder / "map.nii.gz", values(1, 4, 5, 6), grid, method="Saliency")
    before = path.read_bytes()

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        save_map(path, -values(1, 4, 5, 6), grid, method="Saliency")
    with pytest.raises(KeyboardInterrupt):
        save_sidecar(path, {"status": "ok"})
    assert path.read_bytes() == before
    assert [p.name for p in folder.iterdir()] == ["map.nii.gz"]
    assert not is_complete(path, {})


def test_unwritable_output_is_a_usage_error(tmp_path: Path) -> None:
    grid = Grid.of(scan_file(tmp_path / "scan.nii", (4, 5, 6)))
    (tmp_path / "out").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot write .*out.map.nii"):
        save_map(tmp_path / "out" / "map.nii", values(1, 4, 5, 6), grid, method="Saliency")


RECORD = {
    "status": "ok",
    "method": "Saliency",
    "parameters": {"abs": True, "window": (8, 8)},
    "sha256": {"weights": "ab12"},
    "completeness_gap": float("nan"),
    "warnings": [],
}
KEY = {k: RECORD[k] for k in ("method", "parameters", "sha256")}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    grid = Grid.of(scan_file(tmp_path / "scan.nii", (4, 5, 6)))
    path = save_map(map_path(tmp_path / "out", "a", "t", "Saliency"), values(1, 4, 5, 6), grid, method="Saliency")
    save_sidecar(path, RECORD)
    return path


def test_sidecar_is_beside_the_map_and_has_the_required_fields(finished: Path) -> None:
    assert sidecar_path(finished).name == "a_t_Saliency_attr.json"
    assert picture_path(finished).name == "a_t_Saliency_attr.png"
    assert sorted(p.name for p in finished.parent.iterdir()) == ["a_t_Saliency_attr.json", "a_t_Saliency_attr.nii.gz"]
    text = sidecar_path(finished).read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert record["intended_use"] == INTENDED_USE
    assert record["completeness_gap"] is None
    assert record["non_finite"] == {"completeness_gap": "NaN"}
    assert (record["map"], record["map_bytes"]) == (finished.name, finished.stat().st_size)
    assert list(record) == sorted(record)


def test_a_finished_map_is_recognised(finished: Path) -> None:
    assert is_complete(finished, KEY)
    assert is_complete(finished, {})
    assert is_complete(finished, {"parameters": {"window": [8, 8], "abs": True}})


@pytest.mark.parametrize(
    "key",
    [
        {"method": "GradCam"},
        {"parameters": {"abs": False, "window": (8, 8)}},
        {"sha256": {"weights": "ab13"}},
        {"seed": 0},
        {"seed": None},
    ],
)
def test_another_parameter_or_hash_is_not_finished(finished: Path, key: dict[str, Any]) -> None:
    assert not is_complete(finished, {**KEY, **key})


def test_damage_is_noticed(finished: Path) -> None:
    sidecar, whole_map, whole_record = (
        sidecar_path(finished),
        finished.read_bytes(),
        sidecar_path(finished).read_text(encoding="utf-8"),
    )
    for content in (whole_map[: len(whole_map) // 2], whole_map[:-1] + bytes([whole_map[-1] ^ 1]), b""):
        finished.write_bytes(content)
        assert not is_complete(finished, KEY)
    finished.unlink()
    assert not is_complete(finished, KEY)
    finished.write_bytes(whole_map)
    assert is_complete(finished, KEY)
    failed = whole_record.replace('"status": "ok"', '"status": "failed"')
    for text in (whole_record[:50], "", "[]", "null", failed, whole_record.replace("map_sha256", "another_key")):
        sidecar.write_text(text, encoding="utf-8")
        assert not is_complete(finished, KEY)
    sidecar.unlink()
    assert not is_complete(finished, KEY)


def test_empty_targets_need_no_map_and_failures_are_tried_again(tmp_path: Path) -> None:
    path = map_path(tmp_path, "a", "t", "Saliency")
    save_sidecar(path, {**RECORD, "status": "empty_target"})
    assert is_complete(path, KEY)
    assert "map" not in json.loads(sidecar_path(path).read_text(encoding="utf-8"))
    for status in ("failed", "timeout", "skipped", "ok", "zero"):
        save_sidecar(path, {**RECORD, "status": status})
        assert not is_complete(path, KEY)
