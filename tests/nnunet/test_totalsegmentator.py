"""Tasks of TotalSegmentator: its own final file, its resampling in the score, and its class map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")
pytest.importorskip("totalsegmentator", reason="needs TotalSegmentator: make test-nnunet")

from esegeta_monai import Explainer
from esegeta_monai.bundle.nnunet import PROPERTIES, NnunetReader, TotalSegmentatorReader
from esegeta_monai.bundle.nnunet.totalsegmentator_task import TotalSegmentatorTask
from esegeta_monai.bundle.trust import TRUST_VARIABLE
from esegeta_monai.cli.main import build_parser, main
from esegeta_monai.cli.trust import require_trust
from esegeta_monai.engine.resampled import OUTPUT_GRID
from esegeta_monai.errors import TrustError, UsageError
from tests.nnunet.folders import model_folder, scan
from tests.nnunet.test_nnunet import plain_loop, predictor_of


def weights(root: Path, *numbers: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """Write tiny models with random weights in TotalSegmentator's layout, with the classes of its own class map."""
    from totalsegmentator import map_tasks_config, map_to_binary

    configs: list[dict[str, Any]] = []
    for name, task in map_tasks_config.TASK_CONFIGS.items():
        for mode in task.get("sub_modes", {"": task}).values():
            configs.append({"model": "3d_fullres", "resample": None} | task | mode | {"name": name})
    for number in numbers:
        config = next(c for c in configs if number in np.atleast_1d(c["task_id"]))
        if isinstance(config["task_id"], list):
            classes = map_to_binary.class_map_5_parts[map_to_binary.map_taskid_to_partname_ct[number]]
        else:
            classes = map_to_binary.class_map[config["name"]]
        spacing = config["resample"] or [1.0, 1.2, 1.5]  # that of the scan
        model_folder(
            root,
            dataset=map_tasks_config.TASK_ID_WEIGHTS_CONFIGS[number]["foldername"],
            trainer=config["trainer"],
            labels={"background": 0} | {name: label for label, name in classes.items()},
            spacing=[spacing] * 3 if isinstance(spacing, float) else spacing[::-1],
            folds=1,
            mirror=None,
            seed=number,
            favoured=5 if number == 298 else 0,  # the rough model finds a liver; the others leave voxels to each other
            **options,
        )
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(root))
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(root / "home"))
    return root


def own_file(file: Path, out: Path, root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> np.ndarray:
    """Return the content of the file that TotalSegmentator itself writes; nnU-Net predicts in this process."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from totalsegmentator import nnunet, python_api

    def sequential(self: Any, dir_in: str, dir_out: str, *_: Any, **__: Any) -> None:
        files = sorted(Path(dir_in).glob("*_0000.nii.gz"))
        outs = [str(Path(dir_out) / f.name.removesuffix("_0000.nii.gz")) for f in files]
        self.predict_from_files_sequential([[str(f)] for f in files], outs, False, True)

    monkeypatch.setattr(nnUNetPredictor, "predict_from_files", sequential)
    monkeypatch.setattr(nnunet, "supports_keyword_argument", lambda function, keyword: False)
    monkeypatch.setattr(
        nnunet,
        "nnUNetPredictor",
        lambda perform_everything_on_device=True, **more: nnUNetPredictor(perform_everything_on_device=False, **more),
    )
    monkeypatch.setattr(python_api, "send_usage_stats", lambda *_: None)
    monkeypatch.setattr(python_api, "download_pretrained_weights", lambda *_: None)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(root))
    threads = torch.get_num_threads()
    python_api.totalsegmentator(file, out, ml=True, quiet=True, device="cpu", **options)
    torch.set_num_threads(threads)
    return np.asarray(nib.load(out).dataobj)


CASES: dict[str, dict[str, Any]] = {
    "five models": {"task": "total", "numbers": (291, 292, 293, 294, 295)},
    "fast": {"task": "total", "mode": "fast", "numbers": (297,)},
    "cropped": {"task": "liver_vessels", "numbers": (8, 298)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_segmentation_and_the_gradient(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final file equals TotalSegmentator's, and F and its gradient those of its logits taken to the scan."""
    root = weights(tmp_path / "weights", *case["numbers"], monkeypatch=monkeypatch)
    (file,) = scan(tmp_path / "scans", shape=(30, 26, 22))
    fast = case.get("mode") == "fast"
    expected = own_file(file, tmp_path / "own.nii.gz", root, monkeypatch, task=case["task"], fast=fast)
    mode = case.get("mode", "default")
    counts = np.bincount(expected.ravel().astype(int))
    number = int(counts[1:].argmax()) + 1
    name = TotalSegmentatorTask.read(case["task"], mode).classes[number]
    reader = TotalSegmentatorReader(case["task"], [name], mode)
    assert name in reader.part.classes.values()
    data = reader.preprocessing({"image": str(file)})
    given = reader.case_arguments(data["image"], data, tmp_path / "ours")
    masks = given["data"][OUTPUT_GRID]
    ours = nib.load(tmp_path / "ours.nii.gz")
    np.testing.assert_array_equal(np.asarray(ours.dataobj), expected)
    np.testing.assert_allclose(ours.affine, nib.load(file).affine, atol=1e-6)
    assert np.count_nonzero(counts) > 2 or case["task"] != "total"
    label = next(k for k, of in reader.class_names.items() if of == name)
    mask = torch.as_tensor(expected == number)
    assert int(masks.masks(label).sum()) == int(mask.sum()) > 0

    # logits on the file that nnU-Net read, carried to each voxel of the scan by TotalSegmentator's own resampling
    inferer = reader.inferer
    inferer.members = tuple({key: value.double() for key, value in member.items()} for member in inferer.members)
    x = data["image"].as_tensor().double().requires_grad_(True)
    loop = plain_loop(predictor_of(reader, step=reader.step, mirroring=False), x)
    (map_,) = Explainer(reader.network.double(), inferer, class_names=reader.class_names)(
        data["image"][None].double(),
        ["VanillaBackprop"],
        [f"MultiClassMask({name!r})"],
        **given | {"prediction": loop[None].detach()},
    )
    assert map_.record["mask_grid"] == "scan"
    assert map_.record["target_voxels"] == int(mask.sum())
    score = carried(reader, data, loop[label])[mask].sum()
    assert map_.record["value"] == pytest.approx(float(score.detach()), rel=1e-9)
    (gradient,) = torch.autograd.grad(score, x)
    assert float((map_.map.as_tensor() - gradient).abs().max() / gradient.abs().max()) <= 1e-10


def carried(reader: TotalSegmentatorReader, data: Any, logits: torch.Tensor) -> torch.Tensor:
    """Return logits (*network) on the grid of the scan: nearest voxel, found by carrying the voxels' numbers."""
    from totalsegmentator.alignment import as_closest_canonical, undo_canonical
    from totalsegmentator.cropping import crop_to_bbox_nifti, undo_crop
    from totalsegmentator.resampling import change_spacing

    at, box = data["totalsegmentator_scan"], data[PROPERTIES]["bbox_used_for_cropping"]
    inside = tuple(slice(a, b) for a, b in box)
    read = torch.zeros(at.resampled.shape[::-1], dtype=logits.dtype)
    assert read[inside].shape == logits.shape  # nnU-Net itself crops to nonzero voxels, and does not resample
    read = read.index_put(
        tuple(torch.meshgrid(*(torch.arange(s.start, s.stop) for s in inside), indexing="ij")), logits
    )
    numbers = np.arange(1, at.resampled.size + 1, dtype=np.float64).reshape(at.resampled.shape)
    box = [[part.start, part.stop] for part in at.box]
    cropped = crop_to_bbox_nifti(nib.Nifti1Image(np.zeros(at.image.shape), at.image.affine), box)
    canonical = as_closest_canonical(cropped)
    spacing = reader.total_task.config["resample"]
    carried = nib.Nifti1Image(numbers, canonical.affine)
    if spacing is not None:
        prepared = change_spacing(canonical, [spacing] * 3, order=1)
        carried = nib.Nifti1Image(numbers, prepared.affine)
        carried = change_spacing(carried, [spacing] * 3, canonical.shape, order=0, force_affine=canonical.affine)
    back = undo_canonical(nib.Nifti1Image(carried.get_fdata(), canonical.affine), cropped)
    whole = undo_crop(back, at.image, box).get_fdata().astype(np.int64)
    values = torch.cat([torch.zeros(1, dtype=logits.dtype), read.permute(2, 1, 0).flatten()])
    return values[torch.as_tensor(whole)]


def test_maps_come_back_to_the_scan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Affine and sum are kept, and a blob of relevance lies where the image has the voxels that it marks."""
    from esegeta_monai.transforms import InvertAttribution

    weights(tmp_path / "weights", 297, monkeypatch=monkeypatch)
    (file,) = scan(tmp_path / "scans", shape=(30, 26, 22))
    nib.save(nib.as_closest_canonical(nib.load(file)).as_reoriented([[1, -1], [0, 1], [2, 1]]), file)
    values = np.zeros(nib.load(file).shape, np.float32)
    values[4:10, 12:18, 6:12] = 100.0
    nib.save(nib.Nifti1Image(values, nib.load(file).affine), file)
    reader = TotalSegmentatorReader("total", mode="fast")
    image = reader.preprocessing({"image": str(file)})["image"]
    bright = (image > image.mean()).double() * (image - image.min()).double()
    back = InvertAttribution()(bright.as_tensor(), image)
    np.testing.assert_allclose(np.asarray(back.affine), nib.load(file).affine, atol=1e-6)
    assert float(back.sum()) + float(np.sum(back.meta["sum_in_padding"])) == pytest.approx(
        float(bright.sum()), rel=1e-6
    )
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in values.shape), indexing="ij")
    centre = [float((back[0].as_tensor() * axis).sum() / back.sum()) for axis in grid]
    np.testing.assert_allclose(centre, [6.5, 14.5, 8.5], atol=0.6)


def test_the_commands_explain_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights(tmp_path / "weights", 291, 292, 293, 294, 295, monkeypatch=monkeypatch)
    (file,) = scan(tmp_path / "scans", shape=(30, 26, 22))
    task = ["--totalsegmentator", "total"]
    reader = TotalSegmentatorReader("total", ["rib_left_1"])  # the last model, which no other overwrites
    data = reader.preprocessing({"image": str(file)})
    masks = reader.predict(data["image"], data).masks
    name = next(name for label, name in reader.part.classes.items() if bool(masks.masks(label).any()))
    assert main(["info", *task]) == 0
    assert "class_map" not in (shown := capsys.readouterr().out)
    assert "model 291" in shown
    assert "liver" in shown
    for what in ("layers", "check"):
        assert main([what, *task]) == 2
        assert "--target" in capsys.readouterr().err
        assert main([what, *task, "--target", name]) == 0
    given = [*task, "--input", str(file), "--target", name]
    assert main(["explain", *given, "--output", str(tmp_path / "out"), "--methods", "Saliency", "--report"]) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    (result,) = run["results"]
    assert (result["status"], name in result["target"]) == ("ok", True)
    (segmentation,) = (tmp_path / "out").rglob("*_seg.nii.gz")
    assert nib.load(segmentation).shape == nib.load(file).shape
    assert main(["explain", *given, "--output", str(tmp_path / "dry"), "--methods", "Saliency", "--dry-run"]) == 0
    evaluated = [
        "evaluate",
        *given,
        "--output",
        str(tmp_path / "out"),
        "--methods",
        "Saliency",
        "--metrics",
        "Infidelity",
    ]
    assert main([*evaluated, "--no-controls"]) == 0
    assert main(["explain", *given, "--output", str(tmp_path / "x"), "--nnunet", str(tmp_path)]) == 2
    assert main(["explain", *given, "--output", str(tmp_path / "x"), "--folds", "0"]) == 2


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = weights(tmp_path / "weights", 291, 297, 8, monkeypatch=monkeypatch)
    with pytest.raises(UsageError, match=r"no folder Dataset292_.*totalseg_download_weights -t total"):
        TotalSegmentatorTask.read("total")
    with pytest.raises(UsageError, match="has no task totla"):
        TotalSegmentatorTask.read("totla")
    with pytest.raises(UsageError, match="has no class lever; it has 117"):
        TotalSegmentatorReader("total", ["lever"], "fast")
    with pytest.raises(UsageError, match="does not work with option --fast"):
        TotalSegmentatorTask.read("liver_vessels", "fast")
    weights(root, 292, 293, 294, 295, monkeypatch=monkeypatch)
    with pytest.raises(UsageError, match="liver in 291, vertebrae_L5 in 292"):
        TotalSegmentatorReader("total", ["liver", "vertebrae_L5"])
    with pytest.raises(UsageError, match="has 5 models: give the class by --target"):
        TotalSegmentatorReader("total")


def test_every_model_of_the_task_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rough model whose plans name foreign code does not run, though the plans of the task's own are harmless."""
    monkeypatch.delenv(TRUST_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    root = weights(tmp_path / "weights", 8, 298, monkeypatch=monkeypatch)
    argv = ["explain", "--totalsegmentator", "liver_vessels", "--input", "x.nii.gz", "--output", str(tmp_path)]
    require_trust(build_parser().parse_args(argv))
    (plans,) = root.glob("Dataset298*/*/plans.json")
    text = plans.read_text(encoding="utf-8").replace(
        "dynamic_network_architectures.architectures.unet.PlainConvUNet", "foreign.Network"
    )
    plans.write_text(text, encoding="utf-8")
    with pytest.raises(TrustError):
        require_trust(build_parser().parse_args(argv))


def test_the_way_out_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "totalsegmentator.map_to_binary", None)
    assert main(["info", "--totalsegmentator", "total"]) == 2
    assert "esegeta-monai[totalsegmentator]" in capsys.readouterr().err


def test_a_plain_folder_of_the_weights_is_still_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = weights(tmp_path / "weights", 297, monkeypatch=monkeypatch)
    (folder,) = (plans.parent for plans in root.glob("*/*/plans.json"))
    assert NnunetReader(folder).class_names[1] == "spleen"
