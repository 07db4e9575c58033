"""The time series of explanations: its figures by hand, the table, and TensorBoard's files read back."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.handlers import ValidationHandler
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.transforms import CopyItemsd, ThresholdIntensityd
from scipy.stats import rankdata
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from esegeta_monai import Explainer
from esegeta_monai.errors import UsageError
from esegeta_monai.handlers import ExplanationHandler, ExplanationSeries
from esegeta_monai.methods import Saliency
from esegeta_monai.targets import MultiClassMask
from tests.handlers.test_explanation import Small, evaluator, preprocessing, trainer
from tests.support import oblique

LABEL = "class1/Saliency"
TAG = "MultiClassMask-class1/Saliency"


@pytest.fixture
def scans(tmp_path: Path) -> list[Path]:
    return [oblique.write_scan(tmp_path / "scans" / f"{n}.nii.gz", i) for i, n in enumerate(("alpha", "beta", "gamma"))]


def loader(scans: list[Path]) -> DataLoader:
    """With a reference region: the bright half of the ball."""
    transforms = preprocessing()
    transforms.transforms = (
        *transforms.transforms,
        CopyItemsd("image", names="label"),
        ThresholdIntensityd("label", 1.5, above=True, cval=0.0),
    )
    return DataLoader(Dataset([{"image": str(s)} for s in scans], transforms), batch_size=1, num_workers=0)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "explanations.csv").open() as file:
        return list(csv.DictReader(file))


def by_hand(network: Small, batch: dict[str, MetaTensor]) -> torch.Tensor:
    inferer = SlidingWindowInferer((8, 8, 8), 2, 0.25, "gaussian")
    (result,) = Explainer(network, inferer)(batch["image"], [Saliency()], [MultiClassMask(1)])
    return result.map.as_tensor().abs().sum(0)


def test_figures_by_hand_in_the_table_and_in_tensorboard(scans, tmp_path):
    network, data = Small(), loader(scans)
    writer = SummaryWriter(str(tmp_path / "runs"))
    series = ExplanationSeries(writer)
    folder = f"{tmp_path}/seen/epoch{{epoch:02d}}"
    handler = ExplanationHandler("Saliency", "MultiClassMask(1)", folder, series=series, cases=["alpha", "gamma"])
    engine = evaluator(scans, network, val_data_loader=data)
    handler.attach(engine)
    kept: list[list[torch.Tensor]] = []
    batches = [b for i, b in enumerate(data) if i != 1]
    for epoch in (1, 2):
        if epoch == 2:
            with torch.no_grad():
                network.last.weight.mul_(torch.linspace(0.5, 2, 4)[None, :, None, None, None])
        kept.append([by_hand(network.eval(), b) for b in batches])
        engine.run(global_epoch=epoch)
    table = rows(tmp_path / "seen")
    assert [(r["epoch"], r["case"]) for r in table] == [("1", "alpha"), ("1", "gamma"), ("2", "alpha"), ("2", "gamma")]
    masses, similar = [], []
    for row, (epoch, case) in zip(table, [(0, 0), (0, 1), (1, 0), (1, 1)]):
        magnitude = kept[epoch][case].double()
        inside = batches[case]["label"].as_tensor()[0, 0] > 0
        assert 0 < int(inside.sum()) < inside.numel()
        masses.append(float(magnitude[inside].sum() / magnitude.sum()))
        assert float(row["relevance_mass"]) == pytest.approx(masses[-1], rel=1e-5)
        if epoch == 0:
            assert row["similarity"] == ""
            continue
        seen = (kept[0][case] != 0) | (kept[1][case] != 0)
        ranks = [rankdata(kept[e][case][seen].double().numpy()) for e in (0, 1)]
        similar.append(float(np.corrcoef(*ranks)[0, 1]))
        assert 0.1 < similar[-1] < 0.9999
        assert float(row["similarity"]) == pytest.approx(similar[-1], abs=1e-3)
    writer.close()
    board = EventAccumulator(str(tmp_path / "runs"), size_guidance={"images": 0}).Reload()
    result = {e.step: e.value for e in board.Scalars(f"explanation/relevance_mass/{TAG}")}
    assert result == pytest.approx({1: np.mean(masses[:2]), 2: np.mean(masses[2:])}, rel=1e-5)
    assert {e.step: e.value for e in board.Scalars(f"explanation/similarity/{TAG}")} == pytest.approx(
        {2: np.mean(similar)}, abs=1e-3
    )
    assert [e.step for e in board.Scalars(f"explanation/value/{TAG}")] == [1, 2]
    pictures = board.Images(f"explanation/alpha/{TAG}")
    assert [p.step for p in pictures] == [1, 2]
    assert pictures[0].width > 300
    assert not [t for t in board.Tags()["images"] if "beta" in t]


def test_on_a_validating_evaluator_of_a_trainer(scans, tmp_path):
    """Every second epoch, the first case, and training goes as without the handler."""
    states = []
    for watched in (False, True):
        torch.manual_seed(0)
        network = Small()
        training = trainer(scans, network, 3)
        if watched:
            validation = evaluator(scans, network, val_data_loader=loader(scans))
            series = ExplanationSeries(log_dir=tmp_path / "runs")
            handler = ExplanationHandler(
                "Saliency", "MultiClassMask(1)", tmp_path / "seen", series=series, cases=1, epochs=2, pictures=False
            )
            handler.attach(validation)
            ValidationHandler(interval=1, validator=validation).attach(training)
        training.run()
        states.append({k: v.clone() for k, v in network.state_dict().items()})
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert [(r["epoch"], r["case"]) for r in rows(tmp_path / "seen")] == [("1", "alpha"), ("3", "alpha")]
    assert rows(tmp_path / "seen")[1]["similarity"] != ""


def test_two_of_one_kind_have_series_of_their_own(scans, tmp_path):
    """Each is compared with its own map of the last epoch: the same network twice gives 1."""
    engine = evaluator(scans[:1], Small(), val_data_loader=loader(scans[:1]), inferer=SimpleInferer())
    methods = ["Saliency", "Saliency(abs=False)"]
    targets = [f"Box(1, start=({n}, 0, 0), stop=({n + 3}, 3, 3))" for n in (2, 5)]
    series = ExplanationSeries(tensorboard=False)
    ExplanationHandler(methods, targets, tmp_path, series=series, overwrite=True, pictures=False).attach(engine)
    for epoch in (1, 2):
        engine.run(global_epoch=epoch)
    table = rows(tmp_path)
    assert len({(r["target"], r["method"]) for r in table}) == 4
    assert [r["similarity"] for r in table[:4]] == [""] * 4
    assert [float(r["similarity"]) for r in table[4:]] == pytest.approx([1.0] * 4)


def test_the_table_of_an_earlier_run_stays_save_for_epochs_that_come_again(scans, tmp_path):
    for epochs in ((1, 2), (2,)):
        engine = evaluator(scans[:1], Small(), val_data_loader=loader(scans[:1]), inferer=SimpleInferer())
        series = ExplanationSeries(tensorboard=False)
        ExplanationHandler(
            "Saliency", "MultiClassMask(1)", tmp_path / "seen", series=series, overwrite=True, pictures=False
        ).attach(engine)
        for epoch in epochs:
            engine.run(global_epoch=epoch)
    assert [r["epoch"] for r in rows(tmp_path / "seen")] == ["1", "2"]
    assert not (tmp_path / "runs").exists()


def test_no_region_no_mass():
    magnitude = torch.rand(4, 5)
    assert ExplanationSeries._mass(magnitude, None) is None
    assert ExplanationSeries._mass(magnitude, torch.tensor([1])) is None
    assert ExplanationSeries._mass(torch.zeros(4, 5), torch.ones(1, 4, 5)) is None
    region = torch.zeros(1, 4, 5)
    region[0, 1] = 2
    assert ExplanationSeries._mass(magnitude, region) == pytest.approx(float(magnitude[1].sum() / magnitude.sum()))


@pytest.mark.parametrize("cases", ["alpha", 0, True])
def test_cases_are_names_or_a_number(cases, tmp_path):
    with pytest.raises(UsageError, match="list of names"):
        ExplanationHandler(output_dir=tmp_path, cases=cases)
