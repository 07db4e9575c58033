from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer

import esegeta_monai
from esegeta_monai import Explainer
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli import demo, explain
from esegeta_monai.cli.cases import Preprocessor, ScanCase, by_channel, find_cases
from esegeta_monai.cli.log import RunLog
from esegeta_monai.cli.main import build_parser, main
from esegeta_monai.cli.overlay import shipped_overlay
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import Saliency
from esegeta_monai.methods.base import METHODS
from esegeta_monai.output.report.page import report_path
from esegeta_monai.targets import MultiClassMask
from esegeta_monai.targets.base import TARGETS
from tests.support.cli import CLASSES, SIZE, config, make_bundle, make_scan, run_json, statuses


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    make_scan(tmp_path / "scans" / "2024_01_15.nii.gz")
    make_scan(tmp_path / "scans" / "007.nii.gz", seed=1)
    return tmp_path / "scans"


def run(*words: object) -> int:
    return main([str(word) for word in words])


def explained(bundle: Path, scans: object, output: Path, *more: object) -> int:
    inputs = scans if isinstance(scans, (list, tuple)) else [scans]
    return run("explain", "--bundle", bundle, "--input", *inputs, "--output", output, "--no-pictures", *more)


# ---------------------------------------------------------------------- explain


def test_defaults_explain_every_predicted_class(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("explain", "--bundle", bundle, "--input", scans, "--output", out) == 0
    reader = BundleReader(bundle)
    image = Preprocessor(reader)(ScanCase("x", (scans / "007.nii.gz",)))[1]
    predicted = set(reader.inferer(image[None], reader.network)[0].argmax(0).unique().tolist()) - {0}
    assert predicted, "the test bundle predicts something"
    result = {(target, method): s for (case, target, method), s in statuses(out).items() if case == "007"}
    names = [f"MultiClassMask-{CLASSES[str(c)]}" for c in predicted]
    assert result == {(t, m): "ok" for t in names for m in ("Saliency", "GradCam")}
    text = capsys.readouterr()
    assert f"ok. Maps, pictures and the log are in {out}" in text.out
    assert "2024_01_15: case 2 of 2" in text.err
    stems = {p.name.split(".")[0] for p in (out / "007").iterdir()}
    copies = {"007_scan", *(f"007_MultiClassMask-{CLASSES[str(c)].replace(' ', '-')}_mask" for c in predicted)}
    assert copies <= stems
    suffixes = [p.suffix for p in (out / "007").iterdir()]
    assert sorted(suffixes) == sorted([".gz", ".json", ".png"] * len(stems - copies) + [".gz"] * len(copies))


def test_the_map_is_the_explainer_s_on_the_scan_s_own_grid(bundle: Path, scans: Path, tmp_path: Path) -> None:
    """Against the Python interface on an image that is preprocessed by hand."""
    assert explained(bundle, scans / "007.nii.gz", tmp_path / "out", "--methods", "Saliency(abs=False)",
                     "--target", "MultiClassMask('Grey Matter')") == 0  # fmt: skip
    scan = nib.load(scans / "007.nii.gz")
    x = torch.as_tensor(np.asarray(scan.dataobj))[None, None]
    x = (x - x.min()) / (x.max() - x.min())
    inferer = SlidingWindowInferer((SIZE,) * 3, 2, 0.25)
    network = BundleReader(bundle).network
    (expected,) = Explainer(network, inferer)(x, [Saliency(abs=False)], [MultiClassMask(1)])
    written = nib.load(tmp_path / "out" / "007" / "007_MultiClassMask-grey-matter_Saliency_attr.nii.gz")
    assert np.array_equal(written.affine, scan.affine)
    reference = expected.map[0].numpy()
    np.testing.assert_allclose(np.asarray(written.dataobj), reference, rtol=0, atol=1e-5 * np.abs(reference).max())


def test_names_of_cases_stay_text_and_results_of_classes_by_name(bundle: Path, scans: Path, tmp_path: Path) -> None:
    target = "MultiClassMask('grey-matter')"
    assert explained(bundle, scans, tmp_path / "out", "--methods", "saliency", "--target", target) == 0
    assert {e["case"] for e in run_json(tmp_path / "out")["results"]} == {"007", "2024_01_15"}
    record = json.loads(
        (tmp_path / "out/007/007_MultiClassMask-grey-matter_Saliency_attr.json").read_text(encoding="utf-8")
    )
    assert (record["case"], record["class"], record["bundle"]) == ("007", "grey matter", "Tiny brain")
    assert len(record["weights_sha256"]) == len(record["scan_sha256"]) == 64
    assert set(record["configs_sha256"]) == {"inference.json", "metadata.json"}


def test_finished_maps_are_skipped_unless_overwrite(bundle: Path, scans: Path, tmp_path: Path) -> None:
    words = (bundle, scans / "007.nii.gz", tmp_path / "out", "--methods", "Saliency", "--target", "MultiClassMask(1)")
    assert explained(*words) == 0
    (path,) = (tmp_path / "out").rglob("*.nii.gz")
    first = path.stat().st_mtime_ns
    assert explained(*words) == 0
    assert set(statuses(tmp_path / "out").values()) == {"skipped"}
    assert path.stat().st_mtime_ns == first
    assert explained(*words, "--overwrite") == 0
    assert set(statuses(tmp_path / "out").values()) == {"ok"}
    assert path.stat().st_mtime_ns != first
    assert explained(*words, "--override", "inferer#overlap=0.5") == 0
    assert set(statuses(tmp_path / "out").values()) == {"ok"}, "another inferer is another map"


def test_maps_are_checked_on_request(bundle: Path, scans: Path, tmp_path: Path) -> None:
    for words, known in (((), [None]), (("--check-maps",), ["none", "passed"])):
        out = tmp_path / str(len(words))
        methods = ("--method", "Saliency", "--method", "VanillaBackprop")
        assert explained(bundle, scans / "007.nii.gz", out, "--target", "MultiClassMask(1)", *methods, *words) == 0
        results = {json.loads(p.read_text(encoding="utf-8")).get("map_check") for p in out.rglob("*_attr.json")}
        assert sorted(results, key=str) == known


def test_a_config_and_overrides_are_used(bundle: Path, scans: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"inferer": {"_target_": "SimpleInferer"}}), encoding="utf-8")
    words = ("--methods", "Saliency", "--target", "MultiClassMask(1)", "-q")
    assert explained(bundle, scans / "007.nii.gz", tmp_path / "a", *words) == 0
    assert explained(bundle, scans / "007.nii.gz", tmp_path / "b", *words, "--config", "configs/inference.json",
                     "--config", other) == 0  # fmt: skip
    (a, b) = (json.loads(next((tmp_path / f).rglob("*_attr.json")).read_text(encoding="utf-8")) for f in "ab")
    assert (a["windows_total"], b["windows_total"]) == (2, 1)
    assert set(b["configs_used_sha256"]) == {"inference.json", "other.json"}


def test_two_of_one_kind_get_distinct_names(bundle: Path, scans: Path, tmp_path: Path) -> None:
    methods = "Occlusion(window=8),Occlusion(window=16),Saliency(name='mine')"
    assert explained(bundle, scans / "007.nii.gz", tmp_path / "out", "--methods", methods,
                     "--target", "MultiClassMask(1)") == 0  # fmt: skip
    names = {p.name.split("_")[-2] for p in (tmp_path / "out").rglob("*.nii.gz")}
    assert names == {"Occlusion-window8", "Occlusion-window16", "mine"}


def test_synthesised_images_are_written_like_maps(bundle: Path, scans: Path, tmp_path: Path) -> None:
    """For a class and for a layer; on the scan's grid, finite and not constant."""
    methods = "FeatureVisualization(n_iter=3),ClassImage(n_iter=3),DeepDream(n_iter=2),InvertedRepresentation(n_iter=2)"
    words = ("--methods", methods, "--target", "MultiClassMask(1)", "-q")
    assert explained(bundle, scans / "007.nii.gz", tmp_path / "out", *words) == 0
    sidecars = sorted((tmp_path / "out").rglob("*_attr.json"))
    assert len(sidecars) == 4
    for sidecar in sidecars:
        assert json.loads(sidecar.read_text(encoding="utf-8"))["status"] == "ok"
        values = np.asarray(nib.load(sidecar.with_suffix(".nii.gz")).dataobj)
        assert np.isfinite(values).all()
        assert np.ptp(values) > 0


def test_twins_are_refused_before_any_work(bundle: Path, scans: Path, tmp_path: Path) -> None:
    assert explained(bundle, scans, tmp_path / "out", "--methods", "Saliency,Saliency") == 2
    assert list((tmp_path / "out").rglob("*.*")) == []


def test_a_time_limit_ends_one_method_only(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = "IntegratedGradients(n_steps=20000, method='riemann_middle'),LayerActivation"
    code = explained(bundle, scans / "007.nii.gz", tmp_path / "out", "--methods", methods,
                     "--target", "MultiClassMask(1)", "--time-limit", "0.5")  # fmt: skip
    assert code == 1
    result = {method: status for (_, _, method), status in statuses(tmp_path / "out").items()}
    assert result == {"IntegratedGradients": "timeout", "LayerActivation": "ok"}
    assert "time limit of 0.5 s" in capsys.readouterr().err


def test_ctrl_c_keeps_what_is_finished(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Preprocessor.__call__

    def second_is_stopped(self: Preprocessor, case: ScanCase) -> Any:
        if case.name == "2024_01_15":
            raise KeyboardInterrupt
        return whole(self, case)

    monkeypatch.setattr(Preprocessor, "__call__", second_is_stopped)
    words = ("--methods", "Saliency", "--target", "MultiClassMask(1)")
    assert explained(bundle, scans, tmp_path / "out", *words) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "esegeta-monai: error: stopped; finished maps are kept, and the same command resumes the run"
    assert run_json(tmp_path / "out")["finished"] is None
    monkeypatch.undo()
    assert explained(bundle, scans, tmp_path / "out", *words) == 0
    result = {case: status for (case, _, _), status in statuses(tmp_path / "out").items()}
    assert result == {"007": "skipped", "2024_01_15": "ok"}
    assert run_json(tmp_path / "out")["finished"]


def test_sigmoid_bundles_have_no_background(tmp_path: Path) -> None:
    """The postprocessing decides: with a sigmoid each channel has a mask of its own, class 0 too."""
    steps = {"_target_": "Compose", "transforms": [{"_target_": "Activationsd", "keys": "pred", "sigmoid": True}]}
    bundle = make_bundle(tmp_path / "bundle", postprocessing=steps)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    metadata["network_data_format"]["outputs"]["pred"]["channel_def"] = {"0": "core", "1": "oedema", "2": "edge"}
    (bundle / "configs" / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    make_scan(tmp_path / "a.nii.gz")
    assert explained(bundle, tmp_path / "a.nii.gz", tmp_path / "out", "--methods", "Saliency") == 0
    reader = BundleReader(bundle)
    image = Preprocessor(reader)(ScanCase("a", (tmp_path / "a.nii.gz",)))[1]
    above = (reader.inferer(image[None], reader.network)[0] > 0).flatten(1).any(1)
    result = {target for _, target, _ in statuses(tmp_path / "out")}
    assert result == {f"MultiClassMask-{n}" for n, some in zip(("core", "oedema", "edge"), above) if some}
    assert "MultiClassMask-core" in result


# ---------------------------------------------------------------------- cases of several files


def test_channels_from_a_comma_list_a_folder_a_case_and_one_file_agree(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", channels=2)
    t1 = make_scan(tmp_path / "sets" / "p1" / "p1_T1.nii.gz")
    t2 = make_scan(tmp_path / "sets" / "p1" / "p1_T2.nii.gz", seed=1)
    (tmp_path / "sets" / "p1" / "notes.txt").write_text("no scan", encoding="utf-8")
    both = np.stack([np.asarray(nib.load(f).dataobj) for f in (t1, t2)], -1)
    nib.save(nib.Nifti1Image(both, nib.load(t1).affine), tmp_path / "whole.nii.gz")
    more = ("--methods", "Saliency", "--target", "MultiClassMask(1)")
    inputs: Sequence[object] = [f"list={t1},{t2}", tmp_path / "whole.nii.gz", tmp_path / "sets"]
    assert explained(bundle, inputs, tmp_path / "out", *more) == 0
    maps = {p.name.split("_")[0]: nib.load(p) for p in (tmp_path / "out").rglob("*.nii.gz")}
    assert set(maps) == {"list", "whole", "p1"}
    expected = np.asarray(maps["whole"].dataobj)
    assert expected.shape == (*both.shape[:3], 2)
    assert np.abs(expected).max() > 0
    for image in maps.values():
        np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
    turned = [f"turned={t2},{t1}"]
    assert explained(bundle, turned, tmp_path / "out", *more) == 0
    (other,) = (tmp_path / "out" / "turned").glob("*.nii.gz")
    assert not np.array_equal(np.asarray(nib.load(other).dataobj), expected), "the order of the list is the network's"


def test_folders_are_looked_into_sorted_and_named(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a.nii", "sub-1/T1.nii.gz", "sub-2/T1.nii.gz", "out/a_attr.nii.gz", ".hidden.nii"):
        make_scan(tmp_path / name)
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"x")
    result = find_cases([str(tmp_path)], leave_out=tmp_path / "out")
    assert [case.name for case in result] == ["a", "b", "series", "sub-1-T1", "sub-2-T1"]
    assert result[2].files == (tmp_path / "series",)


def test_output_folders_of_other_runs_are_no_scans(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.nii.gz", "first/a/a_attr.nii.gz", "b/first/a/a_attr.nii.gz"):
        make_scan(tmp_path / name)
    for name in ("first/run.jsonl", "b/first/run.part0.jsonl"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    assert [case.name for case in find_cases([str(tmp_path)], leave_out=tmp_path / "second")] == ["a"]
    assert caplog.text.count("is the output folder of another run") == 2
    with pytest.raises(UsageError, match="is the folder of the scans; choose another one"):
        find_cases([str(tmp_path)], leave_out=tmp_path)


@pytest.mark.parametrize(
    ("files", "name"),
    [("x/s1_t1.nii,x/s1_t2.nii", "s1"), ("x/t1.nii,x/t2.nii", "x"), ("c=x/t1.nii,x/t2.nii", "c"), ("q=a.nii", "q")],
)
def test_names_of_cases(files: str, name: str) -> None:
    (case,) = find_cases([files])
    assert case.name == name
    assert len(case.files) == files.count(",") + 1


def test_the_name_of_a_case_has_no_slash(tmp_path: Path) -> None:
    """The whole text was taken for a path, and the case named after the file, whose name may be a person's."""
    scan, odd = tmp_path / "person.nii.gz", tmp_path / "odd=1"
    scan.touch()
    odd.mkdir()
    (odd / "scan.nii.gz").touch()
    with pytest.raises(UsageError, match="must not contain slashes"):
        find_cases([f"ward/7={scan}"])
    assert [case.name for case in find_cases([f"ward-7={scan}", str(odd / "scan.nii.gz")])] == ["ward-7", "scan"]


def test_channels_are_only_put_in_order_where_names_say_so() -> None:
    files = [Path(f"p_{n}.nii.gz") for n in ("flair", "t1", "t1c")]
    assert by_channel(files, ["T1c", "FLAIR", "T1"]) == (files[2], files[0], files[1])
    assert by_channel(files, ["T1c", "FLAIR", "T2"]) is None
    assert by_channel([*files, Path("q_t1.nii.gz")], ["T1c", "FLAIR", "T1"]) is None, "two files of one channel"


# ---------------------------------------------------------------------- log


def test_the_log_has_the_rank_and_no_path(
    bundle: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    (scans / "007.nii.gz").write_bytes(b"")
    before = list(logging.getLogger("esegeta_monai").handlers)
    assert explained(bundle, scans, tmp_path / "out", "--target", "MultiClassMask(1)", "-v") == 1
    text = (tmp_path / "out" / "esegeta.log").read_text(encoding="utf-8")
    assert " ERROR rank 3: 007: 007.nii.gz: the file is empty" in text
    assert str(tmp_path) not in text
    assert logging.getLogger("esegeta_monai").handlers == before, "handlers are taken away again"


def test_levels(bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (bundle, scans / "007.nii.gz", tmp_path / "out", "--target", "MultiClassMask(1)")
    assert explained(*words, "-q") == 0
    seen = capsys.readouterr()
    assert (seen.out, seen.err) == ("", "")
    assert explained(*words, "--log-level", "warning") == 0
    seen = capsys.readouterr()
    assert "INFO" not in seen.err
    assert "2 skipped" in seen.out


def test_hidden_paths_by_longest_first() -> None:
    log = RunLog("INFO")
    log.hide("/a", "A")
    log.hide("/a/b/c.nii", "c.nii")
    assert log.clean("/a/b/c.nii and /a/d") == "c.nii and A/d"


# ---------------------------------------------------------------------- tables, layers, info, overlay


@pytest.mark.parametrize(("command", "registry"), [("methods", METHODS), ("targets", TARGETS)])
def test_tables_have_every_class(command: str, registry: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command) == 0
    table = capsys.readouterr().out
    assert run(command, "--json") == 0
    entries = {e["name"]: e for e in json.loads(capsys.readouterr().out)}
    assert set(entries) == {cls.__name__ for cls in registry}
    for cls in registry:
        assert f"\n{cls.__name__}(" in f"\n{table}"
        names = [*entries[cls.__name__]["required"], *entries[cls.__name__]["parameters"]]
        assert sorted(names) == sorted(cls.parameter_names())
        assert entries[cls.__name__]["summary"], f"{cls.__name__} has no docstring"


def test_one_method_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("methods", "occlusion") == 0
    text = capsys.readouterr().out
    assert text.startswith("Occlusion(window=16")
    assert "stride: distance between occluders" in text
    assert "Zeiler & Fergus, ECCV 2014" in text
    assert run("methods", "Saliency", "--json") == 0
    entry = json.loads(capsys.readouterr().out)
    assert (entry["signed"], entry["produces"], entry["parameters"]) == (False, "input map", {"abs": True})


def test_layers(bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("layers", "--bundle", bundle, "--json") == 0
    noise = json.loads(capsys.readouterr().out)
    assert run("layers", "--bundle", bundle, "--json", "--input", scans / "007.nii.gz") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == noise["layers"]
    shapes = {e["name"]: e["shape"] for e in noise["layers"]}
    network, seen = BundleReader(bundle).network, {}
    for name, module in network.named_modules():
        module.register_forward_hook(lambda m, a, out, name=name: seen.update({name: list(out.shape[1:])}))
    network(torch.zeros(1, 1, SIZE, SIZE, SIZE))
    assert shapes == {name: shape for name, shape in seen.items() if name}
    (default,) = [e["name"] for e in noise["layers"] if e["default"]]
    assert run("layers", "--bundle", bundle) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "default layer" in line]
    assert line.split()[0] == default
    assert explained(bundle, scans / "007.nii.gz", tmp_path / "out", "--methods", "GradCam",
                     "--target", "MultiClassMask(1)") == 0  # fmt: skip
    record = json.loads(next((tmp_path / "out").rglob("*_attr.json")).read_text(encoding="utf-8"))
    assert record["layer"] == default, "the one that is marked is the one that is used"


def test_layers_need_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("layers", "--bundle", make_bundle(tmp_path / "b", weights=False)) == 0
    assert "default layer" in capsys.readouterr().out


def test_info(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info", "--bundle", bundle, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["versions"]["torch"] == torch.__version__
    about = result["bundle"]
    network = "UNet ($@network_def.to(@device))"
    assert (about["network"], about["inferer"], about["classes"]) == (network, "SlidingWindowInferer", CLASSES)
    assert about["weights"] == "model.pt (found, the bundle format)"
    assert about["inferer_options"] == {"roi_size": [16, 16, 16], "sw_batch_size": 2, "overlap": 0.25}
    assert about["image_key"] == "image"
    assert len(result["runs"]) == 11
    assert run("info") == 0
    assert "monai" in capsys.readouterr().out


def test_patterns_are_fitted_and_used(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "patterns.pt"
    assert run("patterns", "--bundle", bundle, "--input", scans, "--output", file) == 0
    assert "PatternAttribution(patterns=" in capsys.readouterr().out
    methods = f"PatternNet(patterns='{file}'),PatternAttribution(patterns='{file}')"
    scan = scans / "007.nii.gz"
    out = tmp_path / "out"
    assert run("explain", "--bundle", bundle, "--input", scan, "--output", out, "--methods", methods) == 0
    assert set(statuses(out).values()) == {"ok"}
    assert run("patterns", "--bundle", bundle, "--input", scans, "--output", file) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("patterns", "--bundle", bundle, "--input", scans, "--output", file, "--overwrite", "-q") == 0


def test_overlay_is_written_and_never_over_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_bundle(tmp_path / "b", weights=False)
    assert run("overlay", "--bundle", bundle) == 2
    assert "builds no evaluator" in capsys.readouterr().err
    evaluator = {"_target_": "SupervisedEvaluator", "network": "@network"}
    (bundle / "configs" / "inference.json").write_text(
        json.dumps(config(evaluator=evaluator, run=["$@evaluator.run()"])), encoding="utf-8"
    )
    assert run("overlay", "--bundle", bundle) == 0
    copy = bundle / "configs" / "explain.json"
    assert json.loads(copy.read_text(encoding="utf-8"))["evaluator#val_handlers"] == ["@explain_handler"]
    assert "['configs/inference.json', 'configs/explain.json']" in capsys.readouterr().out
    copy.write_text("mine", encoding="utf-8")
    assert run("overlay", "--bundle", bundle) == 2
    assert copy.read_text(encoding="utf-8") == "mine"
    assert "explain.json already exists" in capsys.readouterr().err
    assert run("overlay", "--bundle", bundle, "--output", tmp_path / "x.json") == 0
    assert (tmp_path / "x.json").is_file()
    capsys.readouterr()
    assert run("overlay", "--path") == 0
    assert Path(capsys.readouterr().out.strip()) == shipped_overlay()


# ---------------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    "command", [[], ["explain"], ["demo"], ["methods"], ["layers"], ["info"], ["overlay"], ["merge"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "usage: esegeta-monai" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "--bundel", "b", "--input", "a", "--output", "o"], "no option --bundel: did you mean --bundle"),
        (["explain", "--inptu=a"], "no option --inptu: did you mean --input"),
        (["explain", "--xyzzy"], "there is no option --xyzzy (see"),
        (["evaluate", "--bundle", "b", "--lable", "c"], "no option --lable: did you mean --label"),
        (["explian"], "there is no command 'explian': did you mean explain"),
        (["--verson"], "no option --verson: did you mean --version"),
        (["--bundle", "b"], "before the command: write 'esegeta-monai COMMAND --bundle'"),
    ],
)
def test_misspelled_options_and_commands(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window-batch", "0"], "'0' is not a positive integer"),
        (["--time-limit", "-1"], "'-1' is not a positive number of seconds"),
        (["--override", "inferer"], "write id=value"),
        (["--check-maps", "--no-checks"], "--check-maps and --no-checks contradict each other"),
        (["--device", "gpu"], "--device gpu: no such device"),
    ],
)
def test_wrong_values(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert explained(bundle, scans, tmp_path / "out", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esegeta-monai: error: ")
    assert message in line


def test_overrides_are_json_else_text() -> None:
    result = explain.overrides(["a#b=[1, 2]", "c=true", "d=@e", "f=x=y"])
    assert result == {"a#b": [1, 2], "c": True, "d": "@e", "f": "x=y"}


def test_the_unforeseen_is_one_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(*_: object) -> int:
        raise ZeroDivisionError("a bug\nof ours")

    monkeypatch.setattr("esegeta_monai.cli.tables._run", breaks)
    assert run("methods") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("esegeta-monai: error: ZeroDivisionError: a bug; unexpected error: please report it")


@pytest.mark.slow  # importing torch and MONAI in a new process takes longer than the run
def test_the_module_in_a_process_of_its_own(bundle: Path, scans: Path, tmp_path: Path) -> None:
    words = ["explain", "--bundle", bundle, "--input", scans / "007.nii.gz", scans / "none.nii.gz", "--output", "out",
             "--target", "MultiClassMask(7)", "--target", "MultiClassMask(1)"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "esegeta_monai", *map(str, words)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert sum(" ERROR: " in line for line in done.stderr.splitlines()) == 3
    assert done.stdout.startswith("3 failed, 2 ok.")


# ---------------------------------------------------------------------- demo


def test_the_demo_finds_its_bundle_or_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (demo.find_bundle() / "configs" / "inference.json").is_file()
    monkeypatch.setattr(esegeta_monai, "__file__", str(tmp_path / "site-packages" / "esegeta_monai" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"does not include bundles/brain_lesion_classification.*--bundle DIR"):
        demo.find_bundle()
    inside = tmp_path / "site-packages" / "esegeta_monai" / demo.BUNDLE  # as in a wheel
    (inside / "configs").mkdir(parents=True)
    assert demo.find_bundle() == inside


def test_the_demo_shows_the_lesion_in_one_network_and_the_mark_in_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("nilearn", reason="the template comes with nilearn")
    out = tmp_path / "out"
    assert run("demo", "--output", out, "--methods", "ExcitationBackprop,Saliency") == 0
    text = capsys.readouterr().out
    assert "population average" in text
    (row,) = [line.replace("%", "").split() for line in text.splitlines() if line.startswith("ExcitationBackprop")]
    shares = dict(zip(("lesion, lesion", "lesion, mark", "shortcut, lesion", "shortcut, mark"), map(float, row[1:])))
    assert shares["lesion, lesion"] > 5 * shares["lesion, mark"]
    assert shares["shortcut, mark"] > 5 * shares["shortcut, lesion"]

    # the table's share from the file, by other means
    values = nib.load(next((out / "lesion").rglob("*_ExcitationBackprop_attr.nii.gz"))).get_fdata()
    case = demo.make_head(BundleReader(demo.find_bundle()), tmp_path / "again")[1]
    share = sum(v for v, inside in zip(values.ravel(), case["lesion"].ravel()) if inside and v > 0)
    assert 100 * share / sum(v for v in values.ravel() if v > 0) == pytest.approx(shares["lesion, lesion"], abs=0.051)

    for name in demo.NETWORKS:
        record = json.loads(next((out / name).rglob("*_Saliency_attr.json")).read_text(encoding="utf-8"))
        assert record["predicted_class_name"] == "lesion"  # both networks are right, for different reasons
        report = report_path(out / name, demo.CASE)
        assert report.is_file()
        assert str(report.resolve()) in text


def test_the_documentation_has_every_command_and_option() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for name, parser in commands.choices.items():
        assert f"`{name}" in text
        for action in parser._actions:
            if action.option_strings and "--help" not in action.option_strings:
                assert any(option in text for option in action.option_strings if option.startswith("--")), action


def test_a_dry_run_reports_the_passes_and_writes_nothing(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (bundle, scans / "007.nii.gz", tmp_path / "out", "--methods", "Occlusion(window=8)")
    assert explained(*words, "--target", "MultiClassMask(1)", "--dry-run") == 0
    header, line, *_ = capsys.readouterr().out.splitlines()
    assert not (tmp_path / "out").exists()
    assert explained(*words, "--target", "MultiClassMask(1)") == 0
    record = json.loads(next((tmp_path / "out").rglob("*_attr.json")).read_text(encoding="utf-8"))
    assert line.split()[0] == "007"
    assert line[header.index("passes") :].split()[0] == str(record["window_passes"])


def test_a_dry_run_continues_after_a_case_that_fails(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "003.nii.gz").write_bytes(b"no scan")
    inputs = [tmp_path / "in" / "003.nii.gz", scans / "007.nii.gz"]
    words = (bundle, inputs, tmp_path / "out", "--methods", "Saliency")
    assert explained(*words, "--target", "MultiClassMask(1)", "--dry-run") == 1
    streams = capsys.readouterr()
    assert [line.split()[0] for line in streams.out.splitlines()[:2]] == ["case", "007"]
    assert "ERROR: 003: " in streams.err
    assert str(tmp_path / "in") not in streams.err  # names of folders may be those of people


def test_costly_methods_are_refused_without_yes(
    bundle: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esegeta_monai.explain.costs.COSTLY", 5)
    words = (bundle, scans / "007.nii.gz", tmp_path / "out", "--methods", "Occlusion(window=4)",
             "--target", "MultiClassMask(1)")  # fmt: skip
    assert explained(*words) == 1
    assert "perturbations" in capsys.readouterr().err
    assert explained(*words, "--yes") == 0


# A constant baseline: the perturbations of two noisy copies differ in nothing but the image.
INSIDE = [
    f"{wrapper}({inner[:-1]}, baseline={baseline}), n_samples=2, std=1.0)"
    for wrapper in ("SmoothGrad", "SmoothGradSquared", "VarGrad")
    for inner in ("Occlusion(8)", "FeatureAblation('grid(8)')", "KernelShap(64, 'grid(8)')", "Lime(12, 'grid(8)')",
                  "Rise(6, grid=2)", "Sobol(4, grid=2)", "Hsic(8, grid=2)")
    for baseline in ("0.0", "'zero'", "'constant(value=0.5)'")
]  # fmt: skip


def test_methods_inside_methods_never_read_the_scores_of_another_image(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scores stored after every batch, maps and passes are those of a run that stores none."""
    scan, maps, passes = make_scan(tmp_path / "scan.nii.gz", (SIZE,) * 3), [], []
    for every in (float("inf"), 0.0):
        monkeypatch.setattr(ScoreCheckpoint.__init__, "__defaults__", (every,))
        output = tmp_path / str(every)
        methods = [f"{method[:-1]}, name='m{i}')" for i, method in enumerate(INSIDE)]
        assert explained(bundle, scan, output, "--methods", ",".join(methods), "--target", "MultiClassMask(1)") == 0
        files = sorted(output.rglob("*_attr.nii.gz"))
        maps.append({p.name: np.asarray(nib.load(p).dataobj) for p in files})
        passes.append(
            {
                p.name: json.loads(p.read_text(encoding="utf-8"))["window_passes"]
                for p in sorted(output.rglob("*_attr.json"))
            }
        )
    assert len(maps[0]) == len(INSIDE)
    assert passes[0] == passes[1]
    assert all(np.array_equal(maps[0][name], maps[1][name]) for name in maps[0])
