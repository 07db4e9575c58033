"""The shipped overlay on an unedited bundle: maps beside the predictions, and nothing else changed."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from fire.parser import DefaultParseValue

import esegeta_monai.bundle
from esegeta_monai.cli.main import main
from esegeta_monai.errors import UsageError
from esegeta_monai.utils.files import sha256_file
from tests.support import oblique

OVERLAY = Path(esegeta_monai.bundle.__file__).parent / "explain.json"
SMALL = {"explain_targets": "MultiClassMask(2)", "explain_methods": "Saliency", "explain_handler#pictures": False}


def run(folder: Path, *more: Path, overlay: bool = True, **override: Any) -> None:
    files = [folder / "configs" / "inference.json", *([OVERLAY] if overlay else []), *more]
    monai.bundle.run(config_file=[str(f) for f in files], bundle_root=str(folder), **override)


def results(output: Path) -> list[dict[str, Any]]:
    return json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]


def statuses(output: Path) -> dict[tuple[str, str], str]:
    return {(r["case"], r["method"]): r["status"] for r in results(output)}


def sidecar(output: Path, pattern: str = "*_attr.json") -> dict[str, Any]:
    (result,) = output.rglob(pattern)
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with two scans and no output yet."""
    folder = tmp_path_factory.mktemp("bundle")
    scans = [oblique.write_scan(folder / "scans" / f"{name}.nii.gz", i) for i, name in enumerate(("alpha", "beta"))]
    return oblique.write(folder, oblique.config(scans, folder / "eval"))


@pytest.fixture(scope="module")
def explained(bundle: Path) -> Path:
    """The output folder of a run with the overlay as shipped."""
    torch.set_num_threads(1)
    run(bundle)
    return bundle / "eval"


@pytest.fixture(scope="module")
def finished(bundle: Path) -> Path:
    """A small finished run, to be copied and run again."""
    torch.set_num_threads(1)
    run(bundle, output_dir=str(bundle / "finished"), **SMALL)
    assert set(statuses(bundle / "finished").values()) == {"ok"}
    return bundle / "finished"


def test_predictions_are_bit_equal_with_and_without(bundle: Path, explained: Path, tmp_path: Path) -> None:
    run(bundle, overlay=False, output_dir=str(tmp_path))
    for case in ("alpha", "beta"):
        with_overlay = nib.load(explained / case / f"{case}_seg.nii.gz")
        without = nib.load(tmp_path / case / f"{case}_seg.nii.gz")
        assert with_overlay.header.binaryblock == without.header.binaryblock
        assert np.asarray(with_overlay.dataobj).tobytes() == np.asarray(without.dataobj).tobytes()
        assert np.asarray(without.dataobj).any()


def test_default_is_saliency_and_gradcam_for_every_predicted_class(explained: Path) -> None:
    names = sorted(p.name for p in explained.rglob("*_attr.nii.gz"))
    assert names == [
        f"{case}_MultiClassMask-{c}_{method}_attr.nii.gz"
        for case in ("alpha", "beta")
        for c in ("core", "shell")
        for method in ("GradCam", "Saliency")
    ]
    for name in names:  # map, picture, sidecar: all three
        case = name.split("_")[0]
        assert (explained / case / name.replace(".nii.gz", ".png")).stat().st_size > 5000
        record = json.loads((explained / case / name.replace(".nii.gz", ".json")).read_text(encoding="utf-8"))
        assert record["status"] == "ok"
        assert (record["bundle"], record["bundle_version"]) == ("Oblique bundle", "0.3.1")
        assert record["blend_deviation"] < 1e-6
    assert {r["status"] for r in results(explained)} == {"ok"}


def test_maps_have_the_scans_own_grid(bundle: Path, explained: Path) -> None:
    for path in explained.rglob("*_attr.nii.gz"):
        attribution, scan = nib.load(path), nib.load(bundle / "scans" / f"{path.parent.name}.nii.gz")
        assert attribution.shape == scan.shape
        for field in ("sform_code", "qform_code", "xyzt_units", "srow_x", "srow_y", "srow_z", "pixdim", "quatern_b"):
            np.testing.assert_array_equal(attribution.header[field], scan.header[field], err_msg=field)
        assert attribution.affine.tobytes() == scan.affine.tobytes()
        assert attribution.header["descrip"].tobytes().strip(b"\0") == b""
        assert attribution.get_data_dtype() == np.float32


def test_additive_maps_keep_their_sum(bundle: Path, tmp_path: Path) -> None:
    run(
        bundle,
        output_dir=str(tmp_path),
        **{**SMALL, "explain_methods": "InputXGradient,IntegratedGradients(n_steps=2)"},
    )
    records = list(tmp_path.rglob("*_attr.json"))
    assert len(records) == 4
    for path in records:
        record = json.loads(path.read_text(encoding="utf-8"))
        on_disk = np.asarray(nib.load(path.with_suffix(".nii.gz")).dataobj, dtype=np.float64)
        scale = np.abs(on_disk).sum()
        assert record["additive"]
        assert record["sum_network_grid"] == pytest.approx(record["sum"], abs=1e-4 * scale)
        assert on_disk.sum() == pytest.approx(record["sum_scan_grid"], abs=1e-4 * scale)
        assert abs(record["sum_network_grid"] - record["sum_scan_grid"] - record["sum_in_padding"]) < 1e-4 * scale


def test_synthesised_images_are_written_beside_the_predictions(bundle: Path, tmp_path: Path) -> None:
    """On each scan's grid, with the curve in the sidecar and as a picture."""
    methods = ["FeatureVisualization(n_iter=3)", "ClassImage(n_iter=3)", "DeepDream(n_iter=1, octaves=1)"]
    methods += ["InvertedRepresentation(layer='model.0', n_iter=3)"]
    options = {"explain_methods": methods, "explain_handler#pictures": True}
    run(bundle, output_dir=str(tmp_path), **{**SMALL, **options})
    assert set(statuses(tmp_path).values()) == {"ok"}
    assert len(statuses(tmp_path)) == 2 * len(methods)
    for result in results(tmp_path):
        sidecar_file = tmp_path / result["map"].replace(".nii.gz", ".json")
        record = json.loads(sidecar_file.read_text(encoding="utf-8"))
        assert record["produces"] == "synthesised image"
        assert len(record["curve"]) >= 1
        written, scan = (nib.load(p) for p in (tmp_path / result["map"], bundle / "scans" / f"{result['case']}.nii.gz"))
        assert written.shape[:3] == scan.shape[:3]
        assert np.allclose(written.affine, scan.affine, atol=1e-6)
        assert list(sidecar_file.parent.glob(f"*{result['method']}*curve*.png"))


@pytest.mark.slow
def test_the_real_command(bundle: Path, tmp_path: Path) -> None:
    """In the bundle's folder, the overlay copied beside the configs, options as a user types them."""
    folder = tmp_path / "copy"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("eval", "finished"))
    shutil.copy(OVERLAY, folder / "explain.json")
    command = [
        *(sys.executable, "-m", "monai.bundle", "run", "--config_file", "['configs/inference.json','explain.json']"),
        *("--explain_methods", "Saliency,Occlusion(window=8)"),
        *("--explain_targets", "MultiClassMask(class_index='core')"),
        *("--explain_output_dir", str(tmp_path / "maps"), "--explain_overwrite", "false"),
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(p.name for p in (tmp_path / "maps" / "alpha").glob("*_attr.nii.gz")) == [
        "alpha_MultiClassMask-core_Occlusion_attr.nii.gz",
        "alpha_MultiClassMask-core_Saliency_attr.nii.gz",
    ]


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("Saliency", ["Saliency"]),
        ("Saliency,GradCam", ["Saliency", "GradCam"]),
        ("[Saliency,GradCam]", ["Saliency", "GradCam"]),
        ("['Saliency', 'Occlusion(window=8)']", ["Saliency", "Occlusion"]),
        ("Occlusion(window=(8,8,8)),Saliency", ["Occlusion", "Saliency"]),
        ("{'_target_': 'esegeta_monai.methods.Occlusion', 'window': 8}", ["Occlusion"]),
        ('[{"_target_": "esegeta_monai.methods.Saliency", "abs": true}, "GradCam"]', ["Saliency", "GradCam"]),
    ],
)
def test_methods_as_the_command_line_passes_them(bundle: Path, typed: str, names: list[str]) -> None:
    parser = monai.bundle.ConfigParser()
    parser.read_config([str(bundle / "configs" / "inference.json"), str(OVERLAY)])
    parser.update({"explain_methods": DefaultParseValue(typed), "bundle_root": str(bundle)})
    handler = parser.get_parsed_content("explain_handler")
    assert [type(m).__name__ for m in handler.methods] == names
    assert parser.get_parsed_content("handlers")[-1] is handler


def test_what_the_command_line_makes_of_a_date_and_of_false(bundle: Path) -> None:
    parser = monai.bundle.ConfigParser()
    parser.read_config([str(bundle / "configs" / "inference.json"), str(OVERLAY)])
    parser.update({"bundle_root": str(bundle), "explain_overwrite": DefaultParseValue("false")})
    assert parser.get_parsed_content("explain_handler").overwrite is False
    parser["explain_output_dir"] = DefaultParseValue("2024_01_15")
    with pytest.raises(RuntimeError) as raised:
        parser.get_parsed_content("explain_handler", reset=True)
    assert isinstance(raised.value.__cause__, UsageError)
    assert "output_dir=20240115 is not a folder name: on the command line write ./NAME" in str(raised.value.__cause__)


@pytest.mark.parametrize("dry_run", [True, DefaultParseValue("true")])
def test_a_dry_run_logs_what_it_would_cost(
    bundle: Path, tmp_path: Path, dry_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        run(bundle, output_dir=str(tmp_path), explain_dry_run=dry_run, explain_output_dir=str(tmp_path / "maps"))
    assert not (tmp_path / "maps").exists()
    lines = [r.getMessage() for r in caplog.records]
    (start,) = (i for i, line in enumerate(lines) if line.startswith("case ") and "naive passes" in line)
    assert any("Saliency" in line for line in lines[start + 1 :])


def test_second_run_skips_what_is_finished(bundle: Path, finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "again")
    before = {p: p.stat().st_mtime_ns for p in output.rglob("*_attr*")}
    run(bundle, output_dir=str(output), **SMALL)
    assert set(statuses(output).values()) == {"skipped"}
    assert {p: p.stat().st_mtime_ns for p in output.rglob("*_attr*")} == before


@pytest.mark.parametrize(
    "change",
    [
        {"explain_seed": 1},
        {"explain_methods": "Saliency(abs=False)"},
        {"explain_targets": "MultiClassMask(2, reduction='mean')"},
        {"inferer#overlap": 0.5},
        {"inferer#mode": "constant"},
        {"inferer#roi_size": [8, 8, 8]},
        {"maximum": 0.5},
        {"preprocessing#transforms#3#pixdim": [2.0, 2.0, 2.0]},
        {"network_def#act": "RELU"},
        {"explain_overwrite": True},
    ],
    ids=lambda change: "=".join(map(str, next(iter(change.items())))),
)
def test_any_change_computes_again(bundle: Path, finished: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    output = shutil.copytree(finished, tmp_path / "again")
    if "network_def#act" in change:  # a network without PReLU's slopes
        states = {k: v for k, v in oblique.network().state_dict().items() if "adn.A" not in k}
        folder = tmp_path / "relu"
        shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("eval", "finished"))
        torch.save(states, folder / "models" / "model.pt")
        bundle = folder
    run(bundle, output_dir=str(output), **{**SMALL, **change})
    assert set(statuses(output).values()) == {"ok"}
    run(bundle, output_dir=str(output), **{**SMALL, **change, "explain_overwrite": False})
    assert set(statuses(output).values()) == {"skipped"}


def test_structure_decides_where_weights_do_not(bundle: Path, finished: Path, tmp_path: Path) -> None:
    """The slope of a LeakyReLU is no weight: two runs that differ in it alone are two."""
    folder = tmp_path / "leaky"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("eval", "finished"))
    states = {k: v for k, v in oblique.network().state_dict().items() if "adn.A" not in k}
    torch.save(states, folder / "models" / "model.pt")
    for slope, status in ((0.1, "ok"), (0.1, "skipped"), (0.2, "ok")):
        act = ["leakyrelu", {"negative_slope": slope}]
        run(folder, output_dir=str(tmp_path / "out"), **{**SMALL, "network_def#act": act})
        assert set(statuses(tmp_path / "out").values()) == {status}


def test_other_weights_and_configs_compute_again(bundle: Path, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("eval", "finished"))
    output = shutil.copytree(finished, tmp_path / "again")
    weights = oblique.network()
    with torch.no_grad():
        next(weights.parameters()).mul_(1.01)
    torch.save(weights.state_dict(), folder / "models" / "model.pt")
    run(folder, output_dir=str(output), **SMALL)
    assert set(statuses(output).values()) == {"ok"}
    content = json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))
    (folder / "configs" / "inference.json").write_text(
        json.dumps({**content, "note": "another version"}), encoding="utf-8"
    )
    run(folder, output_dir=str(output), **SMALL)
    assert set(statuses(output).values()) == {"ok"}
    run(folder, output_dir=str(output), **SMALL)
    assert set(statuses(output).values()) == {"skipped"}


def test_another_scan_of_the_same_name_computes_again(bundle: Path, finished: Path, tmp_path: Path) -> None:
    output = shutil.copytree(finished, tmp_path / "again")
    scan = oblique.write_scan(tmp_path / "scans" / "alpha.nii.gz", seed=5)
    run(bundle, output_dir=str(output), files=[str(scan)], **SMALL)
    assert statuses(output) == {("alpha", "Saliency"): "ok", ("beta", "Saliency"): "ok"}
    record = json.loads(next((output / "alpha").glob("*_attr.json")).read_text(encoding="utf-8"))
    assert record["scan_sha256"] == sha256_file(scan)


def test_a_failing_method_leaves_the_others(bundle: Path, tmp_path: Path) -> None:
    failing = "IntegratedGradients(baseline='missing.nii.gz')"
    run(bundle, **{**SMALL, "output_dir": str(tmp_path), "explain_methods": [failing, "Saliency"]})
    result = statuses(tmp_path)
    assert result["alpha", "IntegratedGradients"] == result["beta", "IntegratedGradients"] == "failed"
    assert result["alpha", "Saliency"] == result["beta", "Saliency"] == "ok"
    reason = next(r["reason"] for r in results(tmp_path) if r["status"] == "failed")
    assert "missing.nii.gz does not exist" in reason
    assert not list(tmp_path.rglob("*IntegratedGradients_attr*"))


def test_a_layer_that_does_not_exist_is_named_before_any_case(bundle: Path, tmp_path: Path) -> None:
    methods = ["GradCam(layer='nowhere')", "Saliency"]
    with pytest.raises(RuntimeError) as raised:  # MONAI wraps the cause
        run(bundle, **{**SMALL, "output_dir": str(tmp_path / "out"), "explain_methods": methods})
    assert "no layer 'nowhere'" in str(raised.value.__cause__)
    assert not list(tmp_path.rglob("*.nii.gz"))


def test_a_failing_case_leaves_the_others(bundle: Path, tmp_path: Path) -> None:
    bad = oblique.write_scan(tmp_path / "bad.nii.gz")
    image = nib.load(bad)
    values = np.asarray(image.dataobj).copy()
    values[10, 9, 7] = np.nan
    nib.save(nib.Nifti1Image(values, image.affine, image.header), bad)
    scans = [str(bad), str(bundle / "scans" / "beta.nii.gz")]
    run(bundle, output_dir=str(tmp_path / "out"), files=scans, **SMALL)
    assert statuses(tmp_path / "out") == {("bad", "Saliency"): "failed", ("beta", "Saliency"): "ok"}
    assert "NaN" in next(r["reason"] for r in results(tmp_path / "out") if r["case"] == "bad")
    assert (tmp_path / "out" / "bad" / "bad_seg.nii.gz").exists()  # its prediction is the bundle's affair


def test_a_batch_of_two_gives_the_same_maps(finished: Path, bundle: Path, tmp_path: Path) -> None:
    """Shapes are the same here, as the two scans have the same outline."""
    run(bundle, output_dir=str(tmp_path), batch_size=2, **SMALL)
    for path in tmp_path.rglob("*_attr.nii.gz"):
        actual, single = nib.load(path), nib.load(finished / path.relative_to(tmp_path))
        a, b = np.asarray(actual.dataobj), np.asarray(single.dataobj)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()
    assert len(list(tmp_path.rglob("*_attr.nii.gz"))) == 2


@pytest.mark.parametrize("amp", [True, "true", "false"])
def test_amp_changes_nothing_on_a_cpu_as_in_monais_engines(bundle: Path, tmp_path: Path, amp: Any) -> None:
    """Overlay and command line agree bit for bit with a run without amp; MONAI's autocast is that of CUDA."""
    scan, methods = str(bundle / "scans" / "alpha.nii.gz"), "Saliency,Occlusion(8)"
    more = {**SMALL, "explain_methods": methods, "files": [scan]}
    run(bundle, output_dir=str(tmp_path / "plain"), amp=False, **more)
    run(bundle, output_dir=str(tmp_path / "amp"), amp=amp, **more)
    words = ["--methods", methods, "--target", "MultiClassMask(2)", "--override", f"amp={amp}"]
    assert main(["explain", "--bundle", str(bundle), "--input", scan, "--output", str(tmp_path / "cli"), *words]) == 0
    for method in ("Saliency", "Occlusion"):
        pattern = f"*_{method}_attr.json"
        plain, with_amp, cli = (sidecar(tmp_path / name, pattern) for name in ("plain", "amp", "cli"))
        assert with_amp["amp"] is cli["amp"] is None
        assert plain["map_sha256"] == with_amp["map_sha256"] == cli["map_sha256"]
        assert with_amp["blend_deviation"] < 1e-6


def test_names_of_one_case_never_overwrite_anothers(bundle: Path, tmp_path: Path) -> None:
    scans = [oblique.write_scan(tmp_path / f"patient{i}" / "T1.nii.gz", i) for i in (1, 2)]
    for order, output in ((scans, tmp_path / "a"), (scans[::-1], tmp_path / "b")):
        run(bundle, explain_output_dir=str(output), output_dir=str(tmp_path), files=[str(s) for s in order], **SMALL)
        for i, scan in enumerate(scans, 1):
            record = sidecar(output, f"patient{i}-T1_*_attr.json")
            assert record["scan_sha256"] == sha256_file(scan)


def test_sigmoid_bundle_explains_overlapping_classes(bundle: Path, tmp_path: Path) -> None:
    activation = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
    more = {**SMALL, "explain_targets": None, "files": [str(bundle / "scans" / "alpha.nii.gz")]}
    run(bundle, output_dir=str(tmp_path), activation=activation, **more)
    records = [json.loads(p.read_text(encoding="utf-8")) for p in tmp_path.rglob("*_attr.json")]
    assert {r["head"]["kind"] for r in records} == {"sigmoid"}
    probabilities = np.asarray(nib.load(tmp_path / "alpha" / "alpha_seg.nii.gz").dataobj)
    overlapping = {"shell", "core"} & {r["class"] for r in records}
    assert overlapping, probabilities.shape
    network_voxels = {r["class"]: r["target_voxels"] for r in records}
    assert sum(network_voxels.values()) != np.prod(records[0]["network_grid"])  # no partition, as argmax would be


def test_empty_target_is_recorded_and_finished(bundle: Path, tmp_path: Path) -> None:
    never = {**SMALL, "explain_targets": "ThresholdMask(1e9, value='raw')"}
    files = [str(bundle / "scans" / "alpha.nii.gz")]
    run(bundle, output_dir=str(tmp_path), files=files, **never)
    assert statuses(tmp_path) == {("alpha", "Saliency"): "empty_target"}
    record = sidecar(tmp_path)
    assert record["status"] == "empty_target"
    assert "nothing to explain" in record["reason"]
    assert not list(tmp_path.rglob("*_attr.nii.gz"))
    run(bundle, output_dir=str(tmp_path), files=files, **never)
    assert statuses(tmp_path) == {("alpha", "Saliency"): "skipped"}


def test_a_bundle_that_calls_its_handlers_otherwise(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("eval", "finished"))
    content = json.loads((folder / "configs" / "inference.json").read_text(encoding="utf-8"))
    content["val_handlers"] = content.pop("handlers")
    content["evaluator"]["val_handlers"] = "@val_handlers"
    (folder / "configs" / "inference.json").write_text(json.dumps(content), encoding="utf-8")
    third = tmp_path / "wire.json"
    third.write_text(json.dumps({"+val_handlers": ["@explain_handler"]}), encoding="utf-8")
    run(folder, third, output_dir=str(tmp_path / "out"), **SMALL)
    assert set(statuses(tmp_path / "out").values()) == {"ok"}


def test_clashing_names_stop_before_any_work(bundle: Path, tmp_path: Path) -> None:
    twins = ["Saliency(name='a')", "GradCam(name='a')"]
    with pytest.raises(RuntimeError) as raised:
        run(bundle, **{**SMALL, "output_dir": str(tmp_path), "explain_methods": twins})
    assert isinstance(raised.value.__cause__, UsageError)
    assert "would both be called 'a'" in str(raised.value.__cause__)
    assert not list(tmp_path.rglob("*.nii.gz"))
