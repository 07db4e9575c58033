"""The handler on MONAI's engines: it takes what it needs from them and leaves them as they were."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import EnsembleEvaluator, SupervisedEvaluator, SupervisedTrainer
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.transforms import (
    Activationsd,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    Invertd,
    Lambdad,
    LoadImaged,
    SaveImaged,
    Spacingd,
)
from monai.utils import ForwardMode
from torch import Tensor, nn

from esegeta_monai.engine.network.state import weights_hash
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.handlers import ExplanationHandler
from esegeta_monai.handlers.cases import CaseNames, files_of
from esegeta_monai.utils import files
from tests.support import oblique

CORNER = "Box(class_index=1, start=(0, 0, 0), stop=(2, 2, 2))"


class Small(nn.Module):
    """Two convolutions around a batch norm (whose statistics training would change); extras shift the logits."""

    def __init__(self, classes: int = 2, returns: str = "tensor") -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first, self.norm = nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4)
            self.last, self.returns = nn.Conv3d(4, classes, 3, padding=1), returns

    def forward(self, x: Tensor, shift: Tensor | None = None, *, factor: Tensor | float = 1.0) -> Any:
        out = self.last(torch.relu(self.norm(self.first(x))))
        if shift is not None:  # one per case: (B, 1, 1, 1, 1), with the batch length of x
            assert len(shift) == len(x)
            out = out + shift
        out = out * factor
        return {"tensor": out, "tuple": (out, out.mean()), "dict": {"pred": out, "features": x}}[self.returns]


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    return [oblique.write_scan(tmp_path / "scans" / f"{name}.nii.gz", i) for i, name in enumerate(("alpha", "beta"))]


def preprocessing() -> Compose:
    return Compose([LoadImaged("image"), EnsureChannelFirstd("image"), Spacingd("image", (2.0, 2.0, 2.0)),
                    CropForegroundd("image", source_key="image", allow_smaller=True)])  # fmt: skip


def loader(scans: list[Path], batch_size: int = 1, **more: Any) -> DataLoader:
    items = [{"image": str(s), **{k: v[i] for k, v in more.items()}} for i, s in enumerate(scans)]
    return DataLoader(Dataset(items, preprocessing()), batch_size=batch_size, num_workers=0)


def prepare(batch: Mapping[str, Any], *_: Any, **__: Any) -> tuple[Any, Any]:
    return batch["image"], None


def evaluator(scans: list[Path], network: nn.Module, **options: Any) -> SupervisedEvaluator:
    options = {"inferer": SlidingWindowInferer((8, 8, 8), 2, 0.25, "gaussian"), "prepare_batch": prepare, **options}
    options.setdefault("val_data_loader", loader(scans))
    return SupervisedEvaluator(torch.device("cpu"), network=network, **options)


FAILING = "IntegratedGradients(baseline='missing.nii.gz')"
"""A method whose failure shows when it runs."""


def handler(output: Path | str, **options: Any) -> ExplanationHandler:
    options = {"methods": "Saliency", "targets": "MultiClassMask(1)", "pictures": False, **options}
    return ExplanationHandler(output_dir=output, **options)


def statuses(output: Path) -> dict[tuple[str, str], str]:
    entries = json.loads((output / "run.json").read_text(encoding="utf-8"))["results"]
    return {(r["case"], r["method"]): r["status"] for r in entries}


def records(output: Path) -> dict[str, dict[str, Any]]:
    result = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(output.rglob("*_attr.json"))]
    return {f"{r['case']} {r['method']}": r for r in result}


def maps(output: Path) -> dict[str, np.ndarray]:
    return {p.name: np.asarray(nib.load(p).dataobj) for p in sorted(output.rglob("*_attr.nii.gz"))}


def state(network: nn.Module) -> list[Any]:
    """All that the handler could have left behind."""
    return [
        weights_hash(network),
        [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
         for name, m in network.named_modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in network.parameters()],
    ]  # fmt: skip


# ---- the report ---------------------------------------------------------------------------------------------------


def test_the_report_is_written_at_the_end_where_asked_for(scans: list[Path], tmp_path: Path) -> None:
    for report in (False, "true"):
        engine = evaluator(scans, Small())
        handler(tmp_path / str(report), report=report).attach(engine)
        engine.run()
        written = {p.name for p in (tmp_path / str(report)).rglob("*.html")}
        cases = {case for case, _ in statuses(tmp_path / str(report))}
        assert written == ({"index.html", *(f"{case}_report.html" for case in cases)} if report else set())


@pytest.mark.parametrize("checks", ["maps", "true"])
def test_maps_are_checked_on_request(scans: list[Path], tmp_path: Path, checks: str) -> None:
    engine = evaluator(scans, Small())
    handler(tmp_path, methods=["Saliency", "VanillaBackprop"], checks=checks).attach(engine)
    engine.run()
    results = {r["method"]: r.get("map_check") for r in records(tmp_path).values()}
    assert results == dict(zip(["Saliency", "VanillaBackprop"], ["none", "passed"] if checks == "maps" else [None] * 2))


def test_synthesis_runs_from_the_handler(scans: list[Path], tmp_path: Path) -> None:
    methods = ["FeatureVisualization(n_iter=2)", "DeepDream(layer='first', n_iter=2)"]
    engine = evaluator(scans[:1], network := Small())
    before = state(network)
    handler(tmp_path, methods=methods).attach(engine)
    engine.run()
    assert set(statuses(tmp_path).values()) == {"ok"}
    result = maps(tmp_path)
    assert len(result) == 2
    assert all(np.isfinite(values).all() and np.ptp(values) > 0 for values in result.values())
    assert state(network)[:2] == before[:2]


# ---- what it takes from the engine -------------------------------------------------------------------------------


def test_output_layout_and_sigmoid_are_the_engines(scans: list[Path], tmp_path: Path) -> None:
    """MONAI's engine keeps its postprocessing in a closure only; the handler finds it there."""
    data = loader(scans)
    pre = data.dataset.transform
    post = Compose(
        [
            Activationsd("pred", sigmoid=True),
            Compose([Invertd("pred", pre, "image", nearest_interp=False)]),
            SaveImaged("pred", output_dir=tmp_path / "out", output_postfix="seg", output_ext=".nii",
                       separate_folder=False, resample=False, print_log=False),
        ]
    )  # fmt: skip
    engine = evaluator(scans, Small(), postprocessing=post, val_data_loader=data)
    explain = ExplanationHandler(methods="Saliency", pictures=False)
    explain.attach(engine)
    engine.run()
    assert {
        json.loads(p.read_text(encoding="utf-8"))["head"]["kind"] for p in (tmp_path / "out").glob("*_attr.json")
    } == {"sigmoid"}
    names = sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix == ".nii")
    assert names == [
        "alpha_MultiClassMask-class0_Saliency_attr.nii",
        "alpha_MultiClassMask-class1_Saliency_attr.nii",
        "alpha_seg.nii",
        "beta_MultiClassMask-class0_Saliency_attr.nii",
        "beta_MultiClassMask-class1_Saliency_attr.nii",
        "beta_seg.nii",
    ]


def test_the_layout_of_bids(scans: list[Path], tmp_path: Path) -> None:
    """The handler writes the maps of the plain layout under the names of BIDS derivatives."""
    for layout in ("plain", "bids"):
        engine = evaluator(scans, Small())
        handler(tmp_path / layout, methods=["Saliency"], layout=layout).attach(engine)
        engine.run()
    written = {p.name: p for p in (tmp_path / "bids").glob("sub-*/anat/*_desc-Saliency_attr.nii.gz")}
    assert len(written) == len(maps(tmp_path / "plain")) > 0
    for path in (tmp_path / "plain").rglob("*_attr.nii.gz"):
        case, target = path.name.split("_")[:2]
        twin = written[f"sub-{case}_label-{target.replace('-c', 'C')}_desc-Saliency_attr.nii.gz"]
        assert twin.read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="layout='nested'"):
        handler(tmp_path, layout="nested")


def test_sigmoid_of_another_key_does_not_count(scans: list[Path], tmp_path: Path) -> None:
    post = Compose([Activationsd(["other", "pred"], sigmoid=[True, False], allow_missing_keys=True)])
    engine = evaluator(scans[:1], Small(), postprocessing=post)
    explain = handler(tmp_path, targets=None)
    explain.attach(engine)
    engine.run()
    kinds = {json.loads(p.read_text(encoding="utf-8"))["head"]["kind"] for p in tmp_path.rglob("*_attr.json")}
    assert kinds == {"softmax"}


def test_a_missing_output_folder_raises_before_any_work(scans: list[Path]) -> None:
    engine = evaluator(scans, Small())
    ExplanationHandler(methods="Saliency").attach(engine)
    with pytest.raises(UsageError, match="give output_dir"):
        engine.run()
    assert engine.state.iteration == 0


def test_ensembles_that_are_not_averaged_are_refused(scans: list[Path], tmp_path: Path) -> None:
    engine = EnsembleEvaluator(
        torch.device("cpu"), loader(scans), [Small(), Small()], ["a", "b"], prepare_batch=prepare
    )
    handler(tmp_path).attach(engine)
    with pytest.raises(UsageError, match="no transform of the postprocessing averages a, b"):
        engine.run()


def test_half_precision_is_refused_before_any_work(scans: list[Path], tmp_path: Path) -> None:
    engine = evaluator(scans, Small().half())
    handler(tmp_path).attach(engine)
    with pytest.raises(NetworkError, match=r"network\.float\(\)"):
        engine.run()
    assert engine.state.iteration == 0


@pytest.mark.parametrize("returns", ["tuple", "dict"])
def test_networks_with_several_outputs(scans: list[Path], tmp_path: Path, returns: str) -> None:
    """The same numbers as with a tensor, as the first output (or "pred") is the same."""
    result = {}
    for kind in ("tensor", returns):
        engine = evaluator(scans[:1], Small(returns=kind), inferer=SimpleInferer(), decollate=False)
        handler(tmp_path / kind).attach(engine)
        engine.run()
        (result[kind],) = maps(tmp_path / kind).values()
    np.testing.assert_array_equal(result[returns], result["tensor"])


def test_network_of_one_channel(scans: list[Path], tmp_path: Path) -> None:
    network = Small(classes=1)
    engine = evaluator(scans[:1], network)
    handler(tmp_path, targets=None).attach(engine)
    engine.run()
    (record,) = records(tmp_path).values()
    assert record["status"] == "ok"
    above = (engine.state.output[0]["pred"] > 0).sum().item()
    assert record["target_voxels"] == above > 0


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("sliding", [False, True])
def test_further_inputs_come_from_prepare_batch(
    scans: list[Path], tmp_path: Path, batch_size: int, sliding: bool
) -> None:
    """args and kwargs of a 4-tuple reach the network case by case, and matter."""

    def with_more(batch: Mapping[str, Any], *_: Any, **__: Any) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
        shift = batch["shift"].float().reshape(-1, 1, 1, 1, 1)
        return batch["image"], None, () if sliding else (shift,), {"factor": torch.tensor(2.0)}

    data = loader(scans, batch_size, shift=[0.5, -0.5])
    inferer = SlidingWindowInferer((8, 8, 8), 2, 0.25) if sliding else SimpleInferer()
    engine = evaluator(scans, Small(), val_data_loader=data, prepare_batch=with_more, inferer=inferer)
    handler(tmp_path, methods=["Saliency", "IntegratedGradients(n_steps=4)"]).attach(engine)
    engine.run()
    result = records(tmp_path)
    assert {r["status"] for r in result.values()} == {"ok"}
    assert len(result) == 4
    network = Small().eval()
    for i, case in enumerate(("alpha", "beta")):
        image = data.dataset[i]["image"].as_tensor()[None].requires_grad_(True)
        shift = torch.full((1, 1, 1, 1, 1), (0.5, -0.5)[i])
        out = inferer(image, network, factor=2.0) if sliding else network(image, shift, factor=2.0)
        score = out[0, 1][out[0].argmax(0) == 1].sum()
        assert result[f"{case} Saliency"]["value"] == pytest.approx(float(score), rel=1e-5)
        (gradient,) = torch.autograd.grad(score, image)
        assert result[f"{case} Saliency"]["sum"] == pytest.approx(float(gradient.abs().sum()), rel=1e-4)


def wrapped_in_ddp(network: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network)


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, backend="eager")  # type: ignore[return-value]


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [wrapped_in_ddp, compiled])
def test_wrapped_networks_are_unwrapped(
    scans: list[Path], tmp_path: Path, process_group: None, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    plain = Small()
    wrapped = wrap(plain)
    for network, name in ((plain, "plain"), (wrapped, "wrapped")):
        engine = evaluator(scans[:1], network)
        handler(tmp_path / name, methods=["Saliency", "LayerActivation(layer='first')"]).attach(engine)
        engine.run()
    assert set(statuses(tmp_path / "wrapped").values()) == {"ok"}
    for name, values in maps(tmp_path / "plain").items():
        np.testing.assert_array_equal(maps(tmp_path / "wrapped")[name], values)


def test_the_engines_own_compile(scans: list[Path], tmp_path: Path) -> None:
    """SupervisedEvaluator(compile=True) takes the metadata off and puts it back without the mark of a batch."""
    engine = evaluator(scans[:1], Small(), compile=True, compile_kwargs={"backend": "eager"}, inferer=SimpleInferer())
    handler(tmp_path).attach(engine)
    engine.run()
    assert statuses(tmp_path) == {("alpha", "Saliency"): "ok"}


# ---- what it leaves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", ["Saliency,GradCam", f"{FAILING},Saliency"])
def test_the_network_leaves_as_it_came(scans: list[Path], tmp_path: Path, methods: str) -> None:
    network = Small()
    network.first.requires_grad_(False)
    network.last.weight.grad = torch.ones_like(network.last.weight)
    handle = network.first.register_forward_hook(lambda *_: None)
    torch.manual_seed(0)
    evaluator(scans, network).run()
    before, random = state(network), torch.random.get_rng_state()  # data loaders draw from it themselves
    engine = evaluator(scans, network)
    handler(tmp_path, methods=methods).attach(engine)
    torch.manual_seed(0)
    engine.run()
    after = state(network)
    assert after[:2] == before[:2]
    for (flag, grad), (flag2, grad2) in zip(before[2], after[2]):
        assert flag == flag2
        assert (grad is None and grad2 is None) or torch.equal(grad, grad2)
    assert torch.equal(torch.random.get_rng_state(), random)
    handle.remove()


def trainer(scans: list[Path], network: nn.Module, epochs: int) -> SupervisedTrainer:
    def with_label(batch: Mapping[str, Any], *_: Any, **__: Any) -> tuple[Any, Any]:
        return batch["image"], (batch["image"] > 1).float()

    return SupervisedTrainer(
        torch.device("cpu"), epochs, loader(scans, 1), network, torch.optim.SGD(network.parameters(), 0.05),
        lambda out, label: ((out[:, 1:] - label) ** 2), prepare_batch=with_label,
    )  # fmt: skip


def test_training_goes_the_same_way_with_the_handler(scans: list[Path], tmp_path: Path) -> None:
    """Weights bit-equal after three epochs, batch-norm statistics included; maps of the first and third epoch."""
    finals, engines = [], []
    for explained in (False, True):
        torch.manual_seed(0)
        network = Small()
        engine = trainer(scans, network, 3)
        if explained:
            folder = f"{tmp_path}/epoch{{epoch:02d}}"
            handler(folder, epochs=2, targets=CORNER).attach(engine)
        engine.run()
        finals.append(weights_hash(network))
        engines.append(engine)
    assert finals[0] == finals[1] != weights_hash(Small())
    assert engines[1].network.training
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("epoch")) == ["epoch01", "epoch03"]
    first, third = records(tmp_path / "epoch01"), records(tmp_path / "epoch03")
    assert set(first) == set(third) == {"alpha Saliency", "beta Saliency"}
    hashes = [r["weights_sha256"] for r in (*first.values(), *third.values())]
    assert len(set(hashes)) == 4  # each iteration has its own weights


def test_on_a_trainer_the_network_is_explained_in_evaluation_mode(scans: list[Path], tmp_path: Path) -> None:
    """The engine's prediction comes from batch statistics; the explained one must not."""
    network = Small()
    engine = trainer(scans[:1], network, 1)
    handler(tmp_path, targets=CORNER).attach(engine)
    image = loader(scans).dataset[0]["image"].as_tensor()[None]
    with torch.no_grad():
        same = Small().train()
        in_training = float(same(image)[0, 1, :2, :2, :2].sum())  # moves the statistics, as the engine's pass does
        expected = float(same.eval()(image)[0, 1, :2, :2, :2].sum())
    engine.run()
    (record,) = records(tmp_path).values()
    assert abs(expected - in_training) > 0.01
    assert record["value"] == pytest.approx(expected, rel=1e-5)
    assert record["blend_deviation"] < 1e-6


def test_a_validating_evaluator_explains_the_weights_of_its_epoch(scans: list[Path], tmp_path: Path) -> None:
    """The same handler in several runs: new weights are never taken for finished."""
    network = Small()
    engine = evaluator(scans[:1], network)
    handler(tmp_path).attach(engine)
    values = []
    for epoch, status in ((1, "ok"), (2, "skipped"), (3, "ok")):
        if epoch == 3:
            with torch.no_grad():
                network.last.weight.mul_(1.5)
        engine.run(global_epoch=epoch)
        assert statuses(tmp_path) == {("alpha", "Saliency"): status}
        values.append(records(tmp_path)["alpha Saliency"]["value"])
    assert values[0] == values[1] != values[2]


@pytest.mark.parametrize(("interval", "every", "explained"), [(1, 2, [1, 3, 5]), (2, 2, [2, 4, 6]), (3, 2, [3, 6])])
def test_the_first_validated_epoch_of_each_block_is_explained(
    scans: list[Path], tmp_path: Path, interval: int, every: int, explained: list[int]
) -> None:
    """Counted from the first epoch, a validation every second epoch would never be explained; no folder stays empty."""
    training = trainer(scans[:1], network := Small(), 6)
    validation = evaluator(scans[:1], network)
    handler(f"{tmp_path}/epoch{{epoch}}", epochs=every, targets=CORNER).attach(validation)
    ValidationHandler(interval=interval, validator=validation).attach(training)
    training.run()
    assert [int(p.name.removeprefix("epoch")) for p in sorted(tmp_path.glob("epoch*"))] == explained
    assert all(len(maps(tmp_path / f"epoch{epoch}")) == 1 for epoch in explained)


def test_a_full_disk_ends_no_training(
    scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full from the second scan on is reported, and maps that fit are still written."""
    training = trainer(scans, Small(), 3)
    handler(f"{tmp_path}/epoch{{epoch}}", targets=CORNER).attach(training)
    flush = files._flush

    def flush_if_there_is_room(path: Path) -> None:
        if 2 <= training.state.iteration <= 3:
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(files, "_flush", flush_if_there_is_room)
    training.run()
    assert training.state.iteration == 6
    assert [len(maps(tmp_path / f"epoch{n}")) for n in (1, 2, 3)] == [1, 1, 2]
    assert "Saliency_attr.nii.gz: cannot write" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_folder_that_cannot_be_made_later_ends_no_training(
    scans: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "epoch2").write_text("a file", encoding="utf-8")
    training = trainer(scans[:1], Small(), 3)
    handler(f"{tmp_path}/epoch{{epoch}}", targets=CORNER).attach(training)
    training.run()
    assert [len(maps(tmp_path / f"epoch{n}")) for n in (1, 3)] == [1, 1]
    assert "epoch 2 is left out: cannot write" in caplog.text


def test_a_folder_with_other_fields_is_refused_before_any_work(scans: list[Path], tmp_path: Path) -> None:
    engine = evaluator(scans[:1], Small())
    handler(f"{tmp_path}/{{name}}/{{epoch}}").attach(engine)
    with pytest.raises(UsageError, match=r"only \{epoch\} is replaced"):
        engine.run()
    assert engine.state.iteration == 0


def test_a_prediction_that_another_handler_has_changed_is_warned_of(
    scans: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Then F is of raw outputs and the mask of what they were made into."""
    for changed in (False, True):
        engine = evaluator(scans[:1], Small())
        if changed:
            engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, soften)
        handler(tmp_path / str(changed), methods=["Saliency", "GradCam"], targets=CORNER).attach(engine)
        caplog.clear()
        engine.run()
        result = list(records(tmp_path / str(changed)).values())
        assert len(result) == 2
        reported = [any("deviates from the prediction" in w for w in r["warnings"]) for r in result]
        assert reported == [changed, changed]
        assert caplog.text.count("deviates from the prediction") == changed


def soften(engine: SupervisedEvaluator) -> None:
    engine.state.output["pred"] = 5 * torch.softmax(engine.state.output["pred"], 1)


def test_a_key_that_the_engine_does_not_give_is_named(scans: list[Path], tmp_path: Path) -> None:
    engine = evaluator(scans[:1], Small())
    handler(tmp_path, image_key="scan").attach(engine)
    with pytest.raises(UsageError, match="image_key='scan' is not in the engine's output, which has image"):
        engine.run()


def test_evaluators_in_train_mode_are_not_believed(scans: list[Path], tmp_path: Path) -> None:
    engine = evaluator(scans[:1], Small(), mode=ForwardMode.TRAIN)
    handler(tmp_path).attach(engine)
    engine.run()
    (record,) = records(tmp_path).values()
    assert record["blend_deviation"] < 1e-6


def test_failures_go_to_run_json_and_the_log(
    scans: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = evaluator(scans, Small())
    handler(tmp_path, methods=f"{FAILING},Saliency", name="my.logger").attach(engine)
    with caplog.at_level(logging.INFO):
        engine.run()
    assert statuses(tmp_path)["alpha", "IntegratedGradients"] == "failed"
    assert statuses(tmp_path)["beta", "Saliency"] == "ok"
    (last,) = [r for r in caplog.records if r.name == "my.logger"]
    assert "2 failed, 2 ok" in last.getMessage()
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["finished"]


def test_a_label_in_the_batch_can_be_a_target(scans: list[Path], tmp_path: Path) -> None:
    class WithLabel(Dataset):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = dict(super().__getitem__(index))
            item["label"] = (item["image"] > 1.2).float()
            return item

    data = DataLoader(WithLabel([{"image": str(s)} for s in scans], preprocessing()), batch_size=2)
    engine = evaluator(scans, Small(), val_data_loader=data)
    handler(tmp_path, targets="LabelMask('label', 1, class_index=1)").attach(engine)
    engine.run()
    voxels = {r["case"]: r["target_voxels"] for r in records(tmp_path).values()}
    expected = {c: int((data.dataset[i]["image"] > 1.2).sum()) for i, c in enumerate(("alpha", "beta"))}
    assert voxels == expected


# ---- names -------------------------------------------------------------------------------------------------------


def test_names_do_not_depend_on_the_order() -> None:
    files = ["/study/a/T1.nii.gz", "/study/b/T1.nii.gz", "/study/b/T2.nii.gz", "/study/b/T1.nii"]
    first, second = CaseNames(files), CaseNames(files[::-1])
    assert {f: first[f] for f in files[:1] + files[2:3]} == {files[0]: "a-T1", files[2]: "T2"}
    for names in (first, second):
        result = [names[f] for f in files]
        assert len({n.casefold() for n in result}) == len(files)
    assert first[files[0]] == second[files[0]]


def test_names_that_differ_in_case_or_punctuation_stay_apart() -> None:
    names = CaseNames()
    result = [names[f"/x/{n}.nii"] for n in ("Scan 1", "scan-1", "scan_1")]
    assert len({n.casefold() for n in result}) == 3
    assert result[0] == "Scan 1"
    assert result[1] != "scan-1"  # its file would be that of "Scan 1" where upper case does not count


def test_names_below_a_root_have_their_folders() -> None:
    assert CaseNames(root="/study")["/study/p1/day2/T1.nii.gz"] == "p1-day2-T1"


def test_files_of_reads_lists_of_dictionaries_only(scans: list[Path]) -> None:
    assert files_of(loader(scans), "image") == [os.fspath(s) for s in scans]
    assert files_of(DataLoader(Dataset([{"image": [str(s) for s in scans]}])), "image") == [str(scans[0])]
    assert files_of(DataLoader(Dataset([torch.zeros(1)])), "image") == []
    assert files_of([{"image": "a"}], "image") == []


def test_images_without_files_are_numbered(tmp_path: Path) -> None:
    data = DataLoader(Dataset([{"image": torch.rand(1, 8, 8, 8)} for _ in range(3)]), batch_size=2)
    engine = evaluator([], Small(), val_data_loader=data)
    handler(tmp_path, targets=CORNER).attach(engine)
    engine.run()
    assert [case for case, _ in statuses(tmp_path)] == ["iteration1_0", "iteration1_1", "iteration2_0"]


def test_crops_of_one_scan_do_not_overwrite_each_other(scans: list[Path], tmp_path: Path) -> None:
    data = loader([scans[0], scans[0]], batch_size=2)
    engine = evaluator(scans, Small(), val_data_loader=data)
    handler(tmp_path).attach(engine)
    engine.run()
    assert [case for case, _ in statuses(tmp_path)] == ["alpha-sample1", "alpha-sample2"]


@pytest.mark.parametrize(
    "option",
    [{"epochs": 0}, {"epochs": 2.5}, {"epochs": "two"}, {"overwrite": "perhaps"}, {"methods": "Salience"},
     {"methods": []}, {"targets": []}, {"class_names": {"liver": 1}}, {"checks": "all"}],
)  # fmt: skip
def test_wrong_options_are_refused_at_construction(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        handler(tmp_path, **option)


@pytest.mark.parametrize("wrapper", ["SmoothGrad", "SmoothGradSquared", "VarGrad"])
def test_methods_inside_methods_never_read_the_scores_of_another_image(
    wrapper: str, scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With scores stored after every batch, maps and passes are those of a run that stores none."""
    inner = ("Occlusion(8)", "FeatureAblation('grid(8)')", "KernelShap(64, 'grid(8)')", "Lime(12, 'grid(8)')",
             "Rise(6, grid=2)", "Sobol(4, grid=2)", "Hsic(8, grid=2)")  # fmt: skip
    baselines = ("0.0", "'zero'", "'constant(value=0.5)'")
    specs = [f"{i[:-1]}, baseline={b})" for i in inner for b in baselines]
    methods = [f"{wrapper}({spec}, n_samples=2, std=1.0, name='m{i}')" for i, spec in enumerate(specs)]
    outputs = [tmp_path / "never", tmp_path / "always"]
    for output, every in zip(outputs, (float("inf"), 0.0)):
        monkeypatch.setattr(ScoreCheckpoint.__init__, "__defaults__", (every,))
        engine = evaluator(scans[:1], Small())
        handler(output, methods=methods, targets=CORNER).attach(engine)
        engine.run()
    never, always = (maps(output) for output in outputs)
    assert len(never) == len(methods)
    assert all(np.array_equal(never[name], always[name]) for name in never)
    passes = [{name: record["window_passes"] for name, record in records(output).items()} for output in outputs]
    assert passes[0] == passes[1]
    assert set(statuses(outputs[1]).values()) == {"ok"}


# ---- the place of a map -------------------------------------------------------------------------------------------


def test_images_without_metadata_stay_on_the_networks_grid(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [{"image": torch.rand(1, 10, 9, 8, generator=torch.Generator().manual_seed(i))} for i in range(2)]
    engine = evaluator([], Small(), val_data_loader=DataLoader(Dataset(images), batch_size=1))
    handler(tmp_path).attach(engine)
    with caplog.at_level(logging.WARNING):
        engine.run()
    assert set(statuses(tmp_path).values()) == {"ok"}
    assert {r["grid"] for r in records(tmp_path).values()} == {"network"}
    for texts in [r["warnings"] for r in records(tmp_path).values()] + [caplog.messages]:
        assert any("has no metadata" in text for text in texts)
    assert {values.shape for values in maps(tmp_path).values()} == {(10, 9, 8)}


def test_moved_voxels_and_empty_images_are_refused(scans: list[Path], tmp_path: Path) -> None:
    for name, change in (("flip", lambda x: x.flip(3)), ("zero", lambda x: x * 0)):
        transforms = Compose([*preprocessing().transforms, Lambdad("image", change)])
        values = np.asarray(nib.load(scans[0]).dataobj) * np.linspace(0.3, 2, 14)
        nib.save(nib.Nifti1Image(values.astype(np.float32), nib.load(scans[0]).affine), scans[0])
        engine = evaluator([], Small(), val_data_loader=DataLoader(Dataset([{"image": str(scans[0])}], transforms)))
        handler(tmp_path / name).attach(engine)
        engine.run()
        entries = json.loads((tmp_path / name / "run.json").read_text(encoding="utf-8"))["results"]
        assert [e["status"] for e in entries] == ["failed"]
        expected = "fits the scan better when flipped along" if name == "flip" else "every voxel is 0"
        assert expected in entries[0]["reason"]


@pytest.mark.parametrize(
    "more", [{"methods": "GradCam(layer='no.such')"}, {"targets": "LayerNeuron('no.such', 0, index=(1, 1, 1))"}]
)
def test_a_layer_that_does_not_exist_is_named_before_the_first_case(
    scans: list[Path], tmp_path: Path, more: dict[str, str]
) -> None:
    """It was recorded for each case, one after the other."""
    passes: list[int] = []
    network = Small()
    network.register_forward_hook(lambda *_: passes.append(1))
    engine = evaluator(scans, network)
    handler(tmp_path, **more).attach(engine)
    with pytest.raises(UsageError, match=r"no\.such"):
        engine.run()
    assert passes == []
