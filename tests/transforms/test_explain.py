"""Maps in the data dictionary, and the whole chain from file to file."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import (
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    LoadImaged,
    Orientationd,
    ScaleIntensityd,
    Spacingd,
)
from torch import nn

import esegeta_monai.transforms.explain as module
from esegeta_monai import Explainer
from esegeta_monai.errors import InputError, MethodError, NetworkError, UsageError
from esegeta_monai.methods import GradCam, InputXGradient, Saliency
from esegeta_monai.targets import MultiClassMask
from esegeta_monai.transforms import Explain, ExplainD, Explaind, ExplainDict, InvertAttributiond
from tests.support import oblique

INFERER = SlidingWindowInferer((12, 12, 12), 2, 0.25, "gaussian")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oblique.write_scan(tmp_path_factory.mktemp("scans") / "alpha.nii.gz")


def preprocessing() -> Compose:
    return Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", "RAS", labels=None),
            Spacingd("image", (1.6, 1.6, 1.6)),
            CropForegroundd("image", source_key="image", margin=1),
            ScaleIntensityd("image"),
            EnsureTyped("image"),
        ]
    )


@pytest.fixture(scope="module")
def data(scan: Path) -> dict[str, Any]:
    return preprocessing()({"image": str(scan)})


def explaind(**options: Any) -> Explaind:
    options = {"methods": [InputXGradient(), GradCam()], "targets": [MultiClassMask(1)], **options}
    return Explaind("image", oblique.network(), INFERER, **options)


def test_aliases() -> None:
    assert ExplainD is ExplainDict is Explaind


def test_names_are_known_before_the_run(data: dict[str, Any]) -> None:
    methods = ["Saliency", "Saliency(abs=False)", "GradCam"]
    transform = explaind(methods=methods, targets=["MultiClassMask(1)", "MultiClassMask(2, name='core')"])
    expected = [
        *("image_MultiClassMask_Saliency-absTrue", "image_MultiClassMask_Saliency-absFalse"),
        *("image_MultiClassMask_GradCam", "image_core_Saliency-absTrue", "image_core_Saliency-absFalse"),
        "image_core_GradCam",
    ]
    assert transform.output_keys == expected
    assert set(transform(data)) - set(data) == set(expected)


def test_output_keys_name_them_in_the_same_order(data: dict[str, Any]) -> None:
    usual = explaind()(data)
    named = explaind(output_keys=["a", "b"])(data)
    assert torch.equal(named["a"], usual["image_MultiClassMask_InputXGradient"])
    assert torch.equal(named["b"], usual["image_MultiClassMask_GradCam"])


@pytest.mark.parametrize("keys", [["a"], ["a", "a"], ["a", "b", "c"]])
def test_wrong_number_of_output_keys(keys: list[str]) -> None:
    with pytest.raises(UsageError, match="output_keys must be 2 different names, for image_MultiClassMask_Inp"):
        explaind(output_keys=keys)


def test_maps_are_the_explainers(data: dict[str, Any]) -> None:
    result = explaind()(data)
    explainer = Explainer(oblique.network(), INFERER)
    for attribution in explainer(data["image"][None], [InputXGradient(), GradCam()], [MultiClassMask(1)]):
        actual = result[f"image_MultiClassMask_{attribution.method.name}"]
        assert torch.equal(actual.as_tensor(), attribution.map.as_tensor())
        assert isinstance(actual, MetaTensor)
        assert torch.equal(actual.affine, data["image"].affine)
        assert len(actual.applied_operations) == len(data["image"].applied_operations)
        record = json.loads(actual.meta["record"])
        assert record["status"] == "ok"
        assert record["sum"] == attribution.record["sum"]


def test_the_input_stays_as_it_is(data: dict[str, Any]) -> None:
    image, before, meta = data["image"], data["image"].clone(), repr(data["image"].meta)
    keys, trace = list(data), len(image.applied_operations)
    explaind()(data)
    assert data["image"] is image
    assert torch.equal(image, before)
    assert (repr(image.meta), list(data), len(image.applied_operations)) == (meta, keys, trace)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(data: dict[str, Any], mode: Any) -> None:
    transform = explaind(methods=["InputXGradient", "IntegratedGradients(n_steps=2)", "Occlusion"])
    expected = transform(data)["image_MultiClassMask_InputXGradient"]
    with mode():
        inside = preprocessing()({"image": data["image"].meta["filename_or_obj"]})
        result = transform(inside)["image_MultiClassMask_InputXGradient"]
    assert torch.equal(result, expected)
    assert (result * 1).requires_grad is False


def test_missing_keys(data: dict[str, Any]) -> None:
    both = {"keys": ["image", "other"], "network": oblique.network(), "inferer": INFERER, "methods": "Saliency"}
    with pytest.raises(KeyError, match="other"):
        Explaind(**both, targets="MultiClassMask(1)")(data)
    result = Explaind(**both, targets="MultiClassMask(1)", allow_missing_keys=True)(data)
    assert set(result) - set(data) == {"image_MultiClassMask_Saliency"}


def test_two_images_each_by_itself(data: dict[str, Any]) -> None:
    more = {**data, "second": data["image"].flip(1)}
    result = Explaind(["image", "second"], oblique.network(), INFERER, "Saliency", "MultiClassMask(1)")(more)
    alone = Explaind("second", oblique.network(), INFERER, "Saliency", "MultiClassMask(1)")(more)
    key = "second_MultiClassMask_Saliency"
    assert torch.equal(result[key], alone[key])
    assert not torch.equal(result[key], result["image_MultiClassMask_Saliency"])


def test_targets_of_several_classes_are_named_by_class(data: dict[str, Any]) -> None:
    options = {"methods": "Saliency", "targets": None, "class_names": {1: "outer shell", 2: "core"}}
    transform = explaind(**options)
    assert transform.output_keys == []
    result = transform(data)
    assert set(result) - set(data) == {
        "image_PredictedClasses-outer-shell_Saliency",
        "image_PredictedClasses-core_Saliency",
    }


def test_empty_targets_leave_no_map_but_a_line(data: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    result = explaind(targets="ThresholdMask(1e9, value='raw')", methods="Saliency")(data)
    assert set(result) == set(data)
    assert "ThresholdMask_Saliency: no map, empty_target" in caplog.text


def test_failures_raise_or_are_left_out(data: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    methods = ["GradCam(layer='nowhere')", "Saliency"]
    with pytest.raises(UsageError, match="nowhere"):
        explaind(methods=methods)(data)
    result = explaind(methods=methods, on_error="record")(data)
    assert set(result) - set(data) == {"image_MultiClassMask_Saliency"}
    assert "GradCam: no map, failed: the network has no layer 'nowhere'" in caplog.text


def test_a_label_of_the_dictionary_can_be_the_target(data: dict[str, Any]) -> None:
    label = (data["image"] > 0.8).float()
    result = explaind(targets="LabelMask('label', 1, class_index=1)", methods="Saliency")({**data, "label": label})
    assert json.loads(result["image_LabelMask_Saliency"].meta["record"])["target_voxels"] == int(label.sum())


def test_a_known_prediction_saves_the_pass(data: dict[str, Any]) -> None:
    network, calls = oblique.network(), []
    network.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        prediction = INFERER(data["image"][None], network)[0]
    explain = Explaind("image", network, INFERER, "Saliency", "MultiClassMask(1)", pred_key="pred", checks=False)
    without = Explaind("image", network, INFERER, "Saliency", "MultiClassMask(1)", checks=False)
    counts, maps = [], []
    for transform, more in ((explain, {"pred": prediction}), (without, {})):
        calls.clear()
        maps.append(transform({**data, **more})["image_MultiClassMask_Saliency"])
        counts.append(len(calls))
    assert counts[0] < counts[1]
    assert torch.equal(*maps)


def test_wrong_networks_are_refused() -> None:
    with pytest.raises(UsageError, match="network is a str: give the module itself"):
        Explain("models/model.pt")  # type: ignore[arg-type]
    with pytest.raises(NetworkError, match=r"network\.float"):
        Explain(oblique.network().half())
    with torch.inference_mode():
        made_inside = nn.Conv2d(1, 2, 3)
    with pytest.raises(NetworkError, match="build it outside"):
        Explain(made_inside)


def test_names_that_clash_are_refused() -> None:
    with pytest.raises(UsageError, match="both be called 'x'"):
        explaind(methods=["Saliency(name='x')", "GradCam(name='x')"])


# ---- the whole chain ---------------------------------------------------------------------------------------------


def chain(output: Path) -> dict[str, Any]:
    """A config as a MONAI user writes it: additive maps by InvertAttributiond, others by Invertd, both saved."""
    save = {"_target_": "SaveImaged", "output_dir": str(output), "separate_folder": False, "resample": False}
    return {
        "network": oblique.network(),
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [12, 12, 12], "overlap": 0.25, "mode": "gaussian"},
        "before": {"_target_": "Compose", "transforms": oblique.transforms()},
        "maximum": 1.0,
        "after": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "esegeta_monai.transforms.Explaind", "keys": "image", "network": "@network",
                 "inferer": "@inferer", "methods": ["InputXGradient", "GradCam", "LayerActivation"],
                 "targets": ["MultiClassMask(1, name='shell')"]},
                {"_target_": "esegeta_monai.transforms.InvertAttributiond", "keys": "image_shell_InputXGradient"},
                {"_target_": "Invertd", "keys": ["image_shell_GradCam", "image_shell_LayerActivation"],
                 "transform": "@before", "orig_keys": "image", "nearest_interp": False},
                {**save, "keys": "image_shell_InputXGradient", "output_postfix": "gradient"},
                {**save, "keys": "image_shell_GradCam", "output_postfix": "cam"},
                {**save, "keys": "image_shell_LayerActivation", "output_postfix": "activation"},
            ],
        },
    }  # fmt: skip


def test_from_file_to_file(scan: Path, tmp_path: Path) -> None:
    parser = ConfigParser(chain(tmp_path))
    before, after = parser.get_parsed_content("before"), parser.get_parsed_content("after")
    image = before({"image": str(scan)})
    result = after(image)
    reference = nib.load(scan)
    for name in ("gradient", "cam", "activation"):
        saved = nib.load(tmp_path / f"alpha_{name}.nii.gz")
        assert saved.shape == reference.shape
        np.testing.assert_allclose(saved.affine, reference.affine, rtol=0, atol=1e-5)
        assert np.asarray(saved.dataobj).any()
    additive = result["image_shell_InputXGradient"]
    record = json.loads(additive.meta["record"])  # survives the way back
    scale = float(additive.abs().sum())
    assert abs(additive.meta["sum_network_grid"] - record["sum"]) < 1e-4 * scale
    assert abs(additive.meta["sum_scan_grid"] + additive.meta["sum_in_padding"] - record["sum"]) < 1e-4 * scale
    on_disk = np.asarray(nib.load(tmp_path / "alpha_gradient.nii.gz").dataobj, dtype=np.float64)
    assert abs(on_disk.sum() - additive.meta["sum_scan_grid"]) < 1e-4 * scale


def test_a_peak_comes_back_to_its_place(scan: Path, data: dict[str, Any], tmp_path: Path) -> None:
    """World coordinates of the strongest voxel on the network's grid and on the scan's differ by less than a voxel."""
    result = explaind(methods="InputXGradient")(data)["image_MultiClassMask_InputXGradient"]
    peak = MetaTensor(
        torch.zeros_like(result.as_tensor()), meta=result.meta, applied_operations=result.applied_operations
    )
    where = np.array([7, 8, 6])
    peak[(0, *where)] = 1.0
    back = InvertAttributiond("map")({"map": peak})["map"]
    grid = np.argwhere(back.numpy()[0] > 0)
    weights = back.numpy()[0][back.numpy()[0] > 0]
    centre = (grid * weights[:, None]).sum(0) / weights.sum()
    world = lambda affine, voxel: (np.asarray(affine) @ [*voxel, 1])[:3]  # noqa: E731
    distance = np.linalg.norm(world(back.affine, centre) - world(peak.affine, where))
    assert distance < 0.5 * 1.2


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_data_loader(scan: Path, workers: int) -> None:
    """The maps and their records collate, in a forked worker too (on the CPU that is allowed)."""
    transform = Compose([preprocessing(), explaind(methods="InputXGradient")])
    items = [{"image": str(scan)}] * 2
    loader = DataLoader(Dataset(items, transform), batch_size=2, num_workers=workers)
    (batch,) = list(loader)
    maps = batch["image_MultiClassMask_InputXGradient"]
    alone = transform(items[0])["image_MultiClassMask_InputXGradient"]
    assert maps.shape == (2, *alone.shape)
    torch.testing.assert_close(maps[0].as_tensor(), alone.as_tensor(), rtol=1e-5, atol=0)
    assert [json.loads(text)["method"] for text in maps.meta["record"]] == ["InputXGradient"] * 2


def test_pickles_for_spawned_workers(data: dict[str, Any]) -> None:
    transform = explaind(methods="Saliency")
    again = pickle.loads(pickle.dumps(transform))
    key = "image_MultiClassMask_Saliency"
    assert torch.equal(again(data)[key], transform(data)[key])


class TestForkedWorkersWithCuda:
    """CUDA does not survive a fork; the processes are played, since no GPU is needed to refuse one."""

    @pytest.fixture
    def on_cuda(self) -> Explaind:
        transform = explaind(methods="Saliency")
        settings = transform.explain.explainer.settings  # frozen, and checked against the network, which stays here
        object.__setattr__(settings, "device", torch.device("cuda", 0))
        return transform

    def process(self, monkeypatch: pytest.MonkeyPatch, kind: str, worker: bool = True, default: str = "fork") -> None:
        monkeypatch.setattr(module, "get_worker_info", lambda: object() if worker else None)
        monkeypatch.setattr(multiprocessing, "current_process", lambda: type(kind, (), {})())
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda: default)

    @pytest.mark.parametrize(("kind", "default"), [("ForkProcess", "spawn"), ("Process", "fork")])
    def test_refused(
        self, data: dict[str, Any], on_cuda: Explaind, monkeypatch: pytest.MonkeyPatch, kind: str, default: str
    ) -> None:
        self.process(monkeypatch, kind, default=default)
        with pytest.raises(UsageError, match=r'num_workers=0, or multiprocessing_context="spawn"'):
            on_cuda(data)

    def test_volumes_on_cuda_count_too(self, data: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        transform = explaind(methods="Saliency")
        explainer = transform.explain.explainer
        explainer.settings = replace(explainer.settings, volume_device=torch.device("cuda", 0))
        self.process(monkeypatch, "ForkProcess")
        with pytest.raises(UsageError, match="num_workers=0"):
            transform(data)

    @pytest.mark.parametrize(
        ("kind", "worker", "default"),
        [("SpawnProcess", True, "fork"), ("ForkServerProcess", True, "fork"), ("Process", True, "spawn"),
         ("ForkProcess", False, "fork")],
    )  # fmt: skip
    def test_let_through(
        self, on_cuda: Explaind, monkeypatch: pytest.MonkeyPatch, kind: str, worker: bool, default: str
    ) -> None:
        self.process(monkeypatch, kind, worker, default)
        on_cuda.explain._refuse_forked_cuda()

    @pytest.mark.slow
    def test_real_workers_are_distinguished(self, scan: Path) -> None:
        """The value of `_forked` inside real DataLoader workers of either kind."""
        for context, forked in (("fork", True), ("spawn", False)):
            loader = torch.utils.data.DataLoader(AskForked(), num_workers=1, multiprocessing_context=context)
            assert [bool(x) for x in loader] == [forked]
        assert module._forked() is (multiprocessing.get_start_method() == "fork")


class AskForked(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> bool:
        from esegeta_monai.transforms.explain import _forked

        return _forked()


def test_array_class_gives_maps_by_name(data: dict[str, Any]) -> None:
    explain = Explain(oblique.network(), INFERER, ["Saliency"], ["MultiClassMask(1)", "MultiClassMask(2)"])
    result = explain(data["image"])
    assert list(result) == explain.names
    assert list(result) == ["MultiClassMask-class_index1_Saliency", "MultiClassMask-class_index2_Saliency"]


def test_plain_tensors_in_two_dimensions() -> None:
    torch.manual_seed(0)
    network = nn.Conv2d(3, 2, 3, padding=1)
    result = Explain(network, methods="InputXGradient", targets="MultiClassMask(1)")(torch.rand(3, 9, 7))
    assert result["MultiClassMask_InputXGradient"].shape == (3, 9, 7)


def test_a_target_that_gives_several_maps_of_one_name_is_refused(data: dict[str, Any]) -> None:
    class Twice(MultiClassMask):
        def bind(self, prediction: Any, case: Any) -> Any:
            return super().bind(prediction, case) * 2

    with pytest.raises(UsageError, match="several maps called 'Twice_Saliency'"):
        explaind(targets=[Twice(1)], methods="Saliency")(data)


def test_half_precision_images_are_explained_in_the_networks_precision(data: dict[str, Any]) -> None:
    result = explaind(methods="Saliency")({"image": data["image"].half()})
    assert result["image_MultiClassMask_Saliency"].dtype == torch.float32


def test_non_finite_maps_never_get_in(data: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="not finite"):
        explaind(methods=[Overflow()])(data)


class Overflow(Saliency):
    """A method gone wrong."""

    def attribute(self, objective: Any) -> Any:
        maps = objective.new_maps()
        maps[..., 0] = torch.inf
        return maps


# ---- the place of a map -------------------------------------------------------------------------------------------


def record_of(image: Any) -> dict[str, Any]:
    maps = Explaind("image", oblique.network(), INFERER, "InputXGradient", "MultiClassMask(1)")({"image": image})
    return json.loads(maps["image_MultiClassMask_InputXGradient"].meta["record"])


def test_the_record_says_the_grid_and_whether_it_can_be_brought_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = oblique.write_scan(tmp_path / "scan.nii.gz")
    image = nib.load(path)
    values = np.asarray(image.dataobj) * np.linspace(0.3, 2, image.shape[0])[:, None, None]
    nib.save(nib.Nifti1Image(values.astype(np.float32), image.affine, image.header), path)
    right = preprocessing()({"image": str(path)})["image"]
    record = record_of(right)
    assert record["grid"] == "network"
    assert [c["verdict"] for c in record["checks"] if c["check"] == "geometry"] == ["passed"]
    wrong = MetaTensor(right.as_tensor().flip(1), meta=right.meta, applied_operations=right.applied_operations)
    record = record_of(wrong)
    assert [c["verdict"] for c in record["checks"] if c["check"] == "geometry"] == ["refused"]
    for texts in (record["warnings"], caplog.messages):
        assert any("would not be in its place" in text and "flipped along" in text for text in texts)
    record = record_of(right.as_tensor())
    assert record["grid"] == "network"
    assert any("has no metadata" in text for text in record["warnings"])


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_constant_images_are_refused(value: float) -> None:
    with pytest.raises(InputError, match=f"every voxel is {value:g}"):
        record_of(MetaTensor(torch.full((1, 12, 12, 12), value)))


def test_complex_images_are_refused() -> None:
    with pytest.raises(InputError, match="complex numbers"):
        record_of(MetaTensor(torch.rand(1, 12, 12, 12).to(torch.complex64)))
