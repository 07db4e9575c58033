"""``esegeta-monai influence`` on a tiny bundle: the table equals the Python function, the page has pictures."""

from __future__ import annotations

import csv
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch

from esegeta_monai import Explainer
from esegeta_monai.bundle import BundleReader
from esegeta_monai.cli.main import main
from esegeta_monai.explain.influence import Checkpoint, ExplainedCase, influence
from esegeta_monai.explain.training_loss import TrainingCase, TrainingLoss
from tests.support.cli import make_bundle, make_scan

LOSS = {"_target_": "DiceCELoss", "to_onehot_y": True, "softmax": True}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("ESEGETA_TRUST", "1")
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "configs" / "train.json").write_text(json.dumps({"loss": LOSS}), encoding="utf-8")
    make_scan(tmp_path / "test.nii.gz", seed=9)
    for seed, name in enumerate("abc"):
        scan = make_scan(tmp_path / "scans" / f"{name}.nii.gz", seed=seed)
        image = nib.load(scan)
        label = (image.get_fdata() > 0.5).astype(np.uint8) + (image.get_fdata() > 0.8)
        (tmp_path / "labels").mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(label.astype(np.uint8), image.affine), tmp_path / "labels" / f"{name}_seg.nii.gz")
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "early.pt")
    torch.save({k: v * 0.9 for k, v in state.items() if v.is_floating_point()} | {
        k: v for k, v in state.items() if not v.is_floating_point()}, tmp_path / "late.pt")  # fmt: skip
    return tmp_path


def words(place, *more: str, labels: str = "labels") -> list[str]:
    return [
        "influence", "--bundle", str(place / "bundle"), "--input", str(place / "test.nii.gz"),
        "--training", str(place / "scans"), "--labels", str(place / labels), "--checkpoints",
        str(place / "early.pt"), str(place / "late.pt"), "--output", str(place / "out"), "--no-checks", *more,
    ]  # fmt: skip


def rows_of(place) -> list[dict[str, str]]:
    with (place / "out" / "influence.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_table_equals_the_function_and_the_page_shows_the_cases(place, capsys):
    assert main(words(place, "--target", "MultiClassMask(1)", "--learning-rates", "0.1", "0.3", "--cases", "2")) == 0
    assert "influence.html" in capsys.readouterr().out
    rows = rows_of(place)
    assert [r["rank"] for r in rows] == ["1", "2", "3"]

    reader = BundleReader(place / "bundle")
    from monai.losses import DiceCELoss

    read = lambda name: reader.preprocessing({"image": str(name)})["image"]  # noqa: E731
    cases = []
    for name in "abc":
        label = nib.load(place / "labels" / f"{name}_seg.nii.gz").get_fdata()
        cases.append(
            TrainingCase(name, read(place / "scans" / f"{name}.nii.gz").as_tensor(), torch.from_numpy(label[None]))
        )
    states = [
        torch.load(place / "early.pt", weights_only=True)["model"],
        torch.load(place / "late.pt", weights_only=True),
    ]
    states[0] = {k.removeprefix("module."): v for k, v in states[0].items()}
    checkpoints = [Checkpoint(s, r) for s, r in zip(states, (0.1, 0.3))]
    explainer = Explainer(reader.network, reader.inferer, checks=False)
    asked = ExplainedCase("test", read(place / "test.nii.gz")[None], ["MultiClassMask(1)"])
    loss = TrainingLoss(DiceCELoss(to_onehot_y=True, softmax=True), (16, 16, 16))
    expected = {r["training_case"]: r["score"] for r in influence(explainer, [asked], cases, loss, checkpoints).rows()}
    for row in rows:
        assert float(row["score"]) == pytest.approx(expected[row["training_case"]], rel=1e-4, abs=1e-6)
    page = (place / "out" / "influence.html").read_text(encoding="utf-8")
    assert str(place) not in page
    assert len(re.findall(r'src="data:image/png', page)) >= 1 + 2
    record = json.loads((place / "out" / "influence.json").read_text(encoding="utf-8"))
    assert record["checkpoints"] == ["early.pt", "late.pt"]
    assert record["patch_size"] == [16, 16, 16]


def test_trak_a_given_loss_and_a_training_scan_without_a_label(place, capsys):
    (place / "labels" / "b_seg.nii.gz").unlink()
    (place / "bundle" / "configs" / "train.json").unlink()
    more = ("--method", "TRAK", "--projection", "64", "--loss", json.dumps(LOSS), "--patch-size", "8")
    assert main(words(place, *more)) == 1
    assert "b: --labels" in capsys.readouterr().err
    assert {r["training_case"] for r in rows_of(place)} == {"a", "c"}
    record = json.loads((place / "out" / "influence.json").read_text(encoding="utf-8"))
    assert record["dimension"] == 64
    assert record["patch_size"] == [8, 8, 8]


@pytest.mark.parametrize(
    ("change", "more", "text"),
    [
        ("no loss", (), "no configs/train.json"),
        ("other ids", (), "none of the ids"),
        ("", ("--loss", "{"), "--loss: it cannot be built"),
        ("", ("--loss", '"a"'), "--loss: give a component"),
        ("", ("--learning-rates", "0.1"), "1 values for 2 checkpoints"),
        ("", ("--target", "ThresholdMask(1e9)"), "no scan has a voxel"),
        ("", ("--layer", "nothing"), "nothing"),
        ("", ("--checkpoints", "nowhere.pt"), "no weights at nowhere.pt"),
    ],
)
def test_wrong_options_are_one_line(place, capsys, change, more, text):
    config = place / "bundle" / "configs" / "train.json"
    if change == "no loss":
        config.unlink()
    elif change == "other ids":
        config.write_text("{}", encoding="utf-8")
    assert main(words(place, *more)) == 2
    error = capsys.readouterr().err
    assert text in error
    assert len(error.strip().splitlines()[-1:]) == 1


def test_the_training_config_is_trusted_on_its_own(place, monkeypatch, capsys):
    """An expression in train.json is code like that of the inference config, and must not run unasked."""
    monkeypatch.delenv("ESEGETA_TRUST")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "settings"))
    assert main(["layers", "--bundle", str(place / "bundle"), "--trust"]) == 0
    marker = place / "marker"
    evil = {"loss": f"$open({str(marker)!r}, 'w') and None"}
    (place / "bundle" / "configs" / "train.json").write_text(json.dumps(evil), encoding="utf-8")
    assert main(words(place)) == 3
    assert "not trusted" in capsys.readouterr().err
    assert not marker.exists()


def test_classes_from_a_table(place, capsys):
    shutil.rmtree(place / "bundle")
    network = {
        "_target_": "DenseNet121", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "init_features": 4,
        "growth_rate": 2, "block_config": [1, 1], "bn_size": 1,
    }  # fmt: skip
    network["_target_"] = "DenseNet"
    bundle = make_bundle(place / "bundle", weights=False, network_def=network, inferer={"_target_": "SimpleInferer"})
    from monai.networks.nets import DenseNet

    torch.manual_seed(0)
    torch.save(DenseNet(3, 1, 2, 4, 2, (1, 1), 1).state_dict(), bundle / "models" / "model.pt")
    (place / "early.pt").write_bytes((bundle / "models" / "model.pt").read_bytes())
    (place / "late.pt").write_bytes((bundle / "models" / "model.pt").read_bytes())
    (place / "table.csv").write_text("case,label\na,0\nb,1\nc,1\n", encoding="utf-8")
    more = ("--target", "ClassScore(1)", "--loss", '{"_target_": "torch.nn.CrossEntropyLoss"}')
    assert main(words(place, *more, labels="table.csv")) == 0, capsys.readouterr().err
    assert {r["training_case"] for r in rows_of(place)} == {"a", "b", "c"}
    (place / "table.csv").write_text("case,label\na,x\n", encoding="utf-8")
    assert main(words(place, *more, labels="table.csv")) == 2
    assert "columns case and label" in capsys.readouterr().err
