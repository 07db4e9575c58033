"""Both bundles obey MONAI's format, and their committed weights do what the docs say."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, run, verify_net_in_out

from tests.support.bundles import BUNDLES

SEGMENTATION, CLASSIFICATION = "brain_tissue_segmentation", "brain_lesion_classification"
both = pytest.mark.parametrize("name", [SEGMENTATION, CLASSIFICATION])
EnterBundle = Callable[[str], Path]

# Required by MONAI's metadata schema (the specification of the bundle format); `verify_metadata` would download it.
METADATA_KEYS = {
    "schema": str,
    "version": str,
    "monai_version": str,
    "pytorch_version": str,
    "numpy_version": str,
    "required_packages_version": dict,
    "task": str,
    "description": str,
    "authors": str,
    "copyright": str,
    "network_data_format": dict,
}
TENSOR_KEYS = {
    "type": str,
    "format": str,
    "num_channels": int,
    "spatial_shape": list,
    "dtype": str,
    "value_range": list,
    "is_patch_data": bool,
    "channel_def": dict,
}

ZOO_IDS = (
    *("bundle_root", "device", "output_dir", "dataset_dir", "datalist", "image_key"),
    *("network_def", "network", "preprocessing", "inferer", "postprocessing", "handlers", "evaluator"),
    *("initialize", "run"),
)


def metadata(name: str) -> dict:
    return json.loads((BUNDLES / name / "configs" / "metadata.json").read_text(encoding="utf-8"))


def config(name: str, *files: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(BUNDLES / name / "configs" / file) for file in files])
    return parser


@both
@pytest.mark.parametrize(
    "file",
    ["LICENSE", "models/model.pt", "docs/README.md", "docs/data_license.txt", "configs/logging.conf"]
    + [f"configs/{config}.json" for config in ("metadata", "train", "inference", "evaluate")],
)
def test_layout(name: str, file: str) -> None:
    assert (BUNDLES / name / file).stat().st_size > 0


@both
def test_metadata_has_what_the_schema_requires(name: str) -> None:
    meta = metadata(name)
    for key, kind in METADATA_KEYS.items():
        assert isinstance(meta[key], kind), key
    assert all(part.isdigit() for part in meta["version"].split(".")), "semantic version"
    assert meta["version"] in meta["changelog"]
    tensors = meta["network_data_format"]
    assert set(tensors) >= {"inputs", "outputs"}
    assert "image" in tensors["inputs"]
    assert "pred" in tensors["outputs"]
    for tensor in (tensors["inputs"]["image"], tensors["outputs"]["pred"]):
        for key, kind in TENSOR_KEYS.items():
            assert isinstance(tensor[key], kind), key
        assert list(tensor["channel_def"]) == [str(channel) for channel in range(tensor["num_channels"])]
        assert getattr(torch, tensor["dtype"]).is_floating_point


@both
def test_metadata_states_the_limits(name: str) -> None:
    meta = metadata(name)
    for key in ("task", "description", "intended_use"):
        assert "demonstration only" in meta[key].lower()
    assert "population average of a skull-stripped brain" in meta["description"]
    assert meta["eval_metrics"]


@both
def test_configs_have_the_ids_of_the_zoo(name: str) -> None:
    inference = config(name, "inference.json")
    for key in ZOO_IDS:
        assert key in inference, key
    assert isinstance(inference["handlers"], list)
    assert inference["evaluator#val_handlers"] == "@handlers"
    assert inference["network_def"] == config(name, "train.json")["network_def"]


@both
def test_shapes_of_the_network_are_those_of_the_metadata(name: str) -> None:
    configs = BUNDLES / name / "configs"
    verify_net_in_out("network_def", str(configs / "metadata.json"), str(configs / "inference.json"), device="cpu")


@both
def test_verify_would_notice_a_wrong_channel_count(name: str) -> None:
    configs = BUNDLES / name / "configs"
    wrong = {"_meta_#network_data_format#outputs#pred#num_channels": 7}
    with pytest.raises(ValueError, match="channel number"):
        verify_net_in_out(
            "network_def", str(configs / "metadata.json"), str(configs / "inference.json"), device="cpu", **wrong
        )


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        (SEGMENTATION, "model.pt"),
        *((CLASSIFICATION, f"model{which}.pt") for which in ("", "_shortcut", "_distractor")),
    ],
)
def test_weights_are_a_small_plain_state_dict(name: str, weights: str) -> None:
    path = BUNDLES / name / "models" / weights
    assert path.stat().st_size <= 2_000_000
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert all(value.isfinite().all() for value in state.values())
    config(name, "inference.json").get_parsed_content("network_def").load_state_dict(state, strict=True)


def test_the_anatomy_of_both_bundles_is_one() -> None:
    one, other = (BUNDLES / name / "scripts" / "anatomy.py" for name in (SEGMENTATION, CLASSIFICATION))
    assert one.read_bytes() == other.read_bytes(), "a bundle stands alone: change both copies"


def run_inference(root: Path, output: Path, **overrides: object) -> None:
    run(
        config_file=str(root / "configs" / "inference.json"),
        logging_file=str(root / "configs" / "logging.conf"),
        bundle_root=str(root),
        output_dir=str(output),
        device="$torch.device('cpu')",
        **overrides,
    )


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


@pytest.mark.slow
def test_segmentation_runs_without_any_file_of_the_user(enter_bundle: EnterBundle, tmp_path: Path) -> None:
    pytest.importorskip("nilearn", reason="the template comes with nilearn (extra `demo`)")
    run_inference(enter_bundle(SEGMENTATION), tmp_path)
    (written,) = tmp_path.glob("mni152_t1_2mm/*_seg.nii.gz")
    label = nib.load(tmp_path / "mni152" / "labels" / "mni152_t1_2mm.nii.gz")
    prediction = nib.load(written)
    assert prediction.shape == label.shape
    np.testing.assert_allclose(prediction.affine, label.affine, atol=1e-5)
    # 0.874 both, as docs/README.md states.
    classes, truth = np.asarray(prediction.dataobj), np.asarray(label.dataobj)
    assert dice(classes == 1, truth == 1) > 0.86
    assert dice(classes == 2, truth == 2) > 0.86


@pytest.mark.slow
def test_classification_finds_no_lesion_in_the_template(enter_bundle: EnterBundle, tmp_path: Path) -> None:
    pytest.importorskip("nilearn", reason="the template comes with nilearn (extra `demo`)")
    run_inference(enter_bundle(CLASSIFICATION), tmp_path)
    ((file, no_lesion, lesion),) = csv.reader((tmp_path / "predictions.csv").open())
    assert file.endswith("mni152_t1_2mm.nii.gz")
    assert float(no_lesion) + float(lesion) == pytest.approx(1, abs=1e-5)
    assert float(no_lesion) > 0.5


@both
@pytest.mark.slow
def test_one_step_of_training_writes_the_same_kind_of_weights(
    name: str, enter_bundle: EnterBundle, tmp_path: Path
) -> None:
    pytest.importorskip("nilearn", reason="the template comes with nilearn (extra `demo`)")
    root = enter_bundle(name)
    run(
        config_file=str(root / "configs" / "train.json"),
        bundle_root=str(root),
        output_dir=str(tmp_path),
        ckpt_dir=str(tmp_path / "models"),
        device="$torch.device('cpu')",
        epochs=1,
        epoch_length=1,
        train_seeds=list(range(8)),  # what the cache holds
        val_seeds=[1_000_000],
    )
    trained = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    committed = torch.load(root / "models" / "model.pt", weights_only=True)
    assert {key: value.shape for key, value in trained.items()} == {k: v.shape for k, v in committed.items()}


@both
@pytest.mark.slow
def test_evaluation_overlay_writes_its_metric(name: str, enter_bundle: EnterBundle, tmp_path: Path) -> None:
    pytest.importorskip("nilearn", reason="the template comes with nilearn (extra `demo`)")
    root = enter_bundle(name)
    run(
        config_file=[str(root / "configs" / file) for file in ("train.json", "evaluate.json")],
        bundle_root=str(root),
        output_dir=str(tmp_path),
        device="$torch.device('cpu')",
        val_seeds=[2_000_000, 2_000_001],
    )
    ((metric, value),) = csv.reader((tmp_path / "metrics.csv").open())
    assert metric in ("val_mean_dice", "val_accuracy")
    assert 0.5 <= float(value) <= 1


@pytest.mark.parametrize("name", ["brain_tissue_segmentation", "brain_lesion_classification"])
def test_the_overlay_in_a_bundle_is_the_one_that_is_shipped(name: str) -> None:
    root = Path(__file__).parents[2]
    shipped = (root / "esegeta_monai" / "bundle" / "explain.json").read_text(encoding="utf-8")
    assert (root / "bundles" / name / "configs" / "explain.json").read_text(encoding="utf-8") == shipped
