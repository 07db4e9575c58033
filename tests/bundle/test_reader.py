"""Bundles of every style are read to the same network that MONAI runs, or refused with what to do about it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.inferers import SimpleInferer, SlidingWindowInferer
from monai.networks.nets import BasicUNet
from monai.transforms import Compose

from esegeta_monai.bundle import BundleReader
from esegeta_monai.errors import NetworkError, UsageError
from tests.bundle.support import minimal, same_weights
from tests.support.synthetic import METADATA, network, wired, write, write_scan

BUNDLES = sorted((Path(__file__).parents[2] / "bundles").glob("*/configs/inference.json"))


pytestmark = pytest.mark.usefixtures("no_scripts_from_elsewhere")


# ---------------------------------------------------------------------- the usual bundle


def test_reads_every_part(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", wired(tmp_path))
    reader = BundleReader(folder)
    assert isinstance(reader.network, BasicUNet)
    assert same_weights(reader.network, network())
    assert not reader.network.training
    assert isinstance(reader.inferer, SlidingWindowInferer)
    assert reader.inferer.roi_size == [32, 32]
    assert isinstance(reader.preprocessing, Compose)
    assert [type(t).__name__ for t in reader.preprocessing.transforms] == ["LoadImaged", "ScaleIntensityd"]
    assert [type(t).__name__ for t in reader.postprocessing.transforms] == ["Activationsd", "SaveImaged"]
    assert reader.amp is False
    assert (reader.name, reader.version, reader.task) == ("Tiny bundle", "1.2.3", "Segmentation of nothing")
    assert reader.class_names == {0: "background", 1: "spleen", 2: "tumour"}
    assert reader.background == 0
    assert reader.channel_names == {0: "T1"}
    assert reader.image_key == "image"
    assert reader.output_dir == tmp_path / "eval"
    assert (reader.output_postfix, reader.output_ext, reader.separate_folder) == ("seg", ".nii", False)
    assert (reader.id_of("network"), reader.id_of("handlers"), reader.run_id) == ("network", "handlers", "run")


def test_equals_what_monai_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: MONAI's own workflow, with Ignite and its CheckpointLoader, predicts the same scan."""
    folder = write(tmp_path / "bundle", wired(tmp_path))
    write_scan(tmp_path)
    monkeypatch.chdir(folder)
    workflow = ConfigWorkflow(
        config_file=str(folder / "configs/inference.json"),
        meta_file=str(folder / "configs/metadata.json"),
        workflow_type="infer",
        device="$torch.device('cpu')",
        bundle_root=str(folder),
        postprocessing="$None",
    )
    workflow.initialize()
    workflow.run()
    expected = workflow.parser.get_parsed_content("evaluator").state.output[0]["pred"]

    reader = BundleReader(folder)
    image = reader.preprocessing({reader.image_key: str(tmp_path / "scan.nii.gz")})[reader.image_key]
    with torch.no_grad():
        prediction = reader.inferer(image[None], reader.network)
    assert torch.equal(prediction[0].as_tensor(), expected.as_tensor())
    assert expected.std() > 0


def test_nothing_is_executed_but_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = wired(tmp_path)
    for key in ("run", "initialize", "finalize", "other"):
        config[key] = [f"$open('{key}_was_executed', 'w')"]
    config["handlers"].append({"_target_": "builtins.open", "file": "handler_was_executed", "mode": "w"})
    folder = write(tmp_path / "bundle", config)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    reader = BundleReader(folder)
    parts = (reader.network, reader.inferer, reader.preprocessing, reader.postprocessing, reader.amp, reader.output_dir)
    assert len(parts) == 6
    assert reader.hashes()
    assert not list((tmp_path / "here").iterdir())
    reader.resolve("other")
    assert [file.name for file in (tmp_path / "here").iterdir()] == ["other_was_executed"]


def test_reading_alone_builds_nothing(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", {"network_def": {"_target_": "no.such.Network"}}, weights=None)
    assert BundleReader(folder).class_names[1] == "spleen"


# ---------------------------------------------------------------------- other styles


def test_yaml_with_other_ids_and_code_of_its_own(tmp_path: Path) -> None:
    """YAML, `val_handlers`, `evaluating`, a network from `scripts/`, weights of a DDP network under a key."""
    scripts = {
        "__init__.py": "",
        "nets.py": "from scripts.base import Base\nclass Mine(Base):\n    pass\n",
        "base.py": "import torch\nclass Base(torch.nn.Conv2d):\n    pass\n",
    }
    config = {
        "net": {"_target_": "scripts.nets.Mine", "in_channels": 2, "out_channels": 3, "kernel_size": 1},
        "checkpoint": "$@bundle_root + '/models/model.pt'",
        "bundle_root": "/nowhere",
        "val_handlers": [
            {
                "_target_": "CheckpointLoader",
                "_disabled_": "$not os.path.exists(@checkpoint)",
                "load_path": "@checkpoint",
                "load_dict": {"weights_of_it": "@net"},
                "strict": "True",
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "network": "@net",
            "val_handlers": "@val_handlers",
            "inferer": {"_target_": "SimpleInferer"},
            "amp": True,
        },
        "evaluating": ["$@evaluator.run()"],
    }
    state = {"module.weight": torch.arange(6.0).view(3, 2, 1, 1), "module.bias": torch.arange(3.0)}
    folder = write(
        tmp_path / "bundle",
        config,
        name="inference.yaml",
        scripts=scripts,
        metadata=None,
        weights={"weights_of_it": state, "optimizer": {"lr": torch.zeros(1)}},
    )
    reader = BundleReader(folder)
    assert type(reader.network).__name__ == "Mine"
    assert torch.equal(reader.network.state_dict()["weight"].flatten(), torch.arange(6.0))
    assert isinstance(reader.inferer, SimpleInferer)
    assert reader.amp is True
    assert (reader.id_of("handlers"), reader.run_id, reader.name) == ("val_handlers", "evaluating", "bundle")
    assert (reader.version, reader.task, reader.class_names, reader.background) == (None, None, {}, None)
    assert reader.output_ext == ".nii.gz"
    assert reader.output_dir == folder / "eval"
    assert reader.postprocessing.transforms == ()
    assert list(reader.hashes()) == ["models/model.pt", "configs/inference.yaml"]


def test_parts_inside_the_evaluator_win(tmp_path: Path) -> None:
    """The evaluator's own components run; an id of the usual name that it does not use is not taken."""
    config = wired(tmp_path)
    config["evaluator"]["inferer"] = {"_target_": "SimpleInferer"}
    config["evaluator"]["postprocessing"] = {
        "_target_": "Compose",
        "transforms": [{"_target_": "SaveImaged", "keys": "pred", "output_postfix": "inner"}],
    }
    reader = BundleReader(write(tmp_path / "bundle", config))
    assert isinstance(reader.inferer, SimpleInferer)
    assert reader.output_postfix == "inner"
    assert reader.output_dir == tmp_path / "eval"


@pytest.mark.parametrize(
    ("transforms", "more", "key"),
    [
        ([{"_target_": "LoadImaged", "keys": ["scan", "mask"]}], {}, "scan"),
        (
            [
                {"_target_": "LoadImaged", "keys": ["t1", "t2"]},
                {"_target_": "ConcatItemsd", "keys": ["t1", "t2"], "name": "image"},
            ],
            {},
            "image",
        ),
        ([{"_target_": "LoadImaged", "keys": "@which"}], {"which": "$monai.utils.CommonKeys.IMAGE"}, "image"),
        ([{"_target_": "LoadImaged", "keys": "scan"}], {"image_key": "other"}, "other"),
    ],
)
def test_image_key(tmp_path: Path, transforms: list[dict], more: dict[str, Any], key: str) -> None:
    config = minimal(preprocessing={"_target_": "Compose", "transforms": transforms}, **more)
    assert BundleReader(write(tmp_path / "bundle", config)).image_key == key


def test_several_config_files_and_overrides(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", wired(tmp_path))
    (folder / "configs/overlay.json").write_text(
        '{"output_dir": "elsewhere", "+handlers": [{"_target_": "X"}]}', encoding="utf-8"
    )
    reader = BundleReader(
        folder,
        ["configs/inference.json", "configs/overlay.json"],
        overrides={"inferer#overlap": 0.75, "evaluator::amp": True, "network_def#features": [2, 2, 2, 2, 2, 4]},
        weights="optional",
    )
    assert reader.output_dir == Path("elsewhere")
    assert len(reader.parser["handlers"]) == 3
    assert reader.inferer.overlap == 0.75  # type: ignore[union-attr]
    assert reader.amp is True
    with pytest.raises(NetworkError, match="does not fit BasicUNet"):
        _ = reader.network
    assert "configs/overlay.json" in reader.hashes()


def test_override_names_the_id(tmp_path: Path) -> None:
    config = wired(tmp_path)
    config["my_inferer"] = {"_target_": "SimpleInferer"}
    folder = write(tmp_path / "bundle", config)
    reader = BundleReader(folder, overrides={"inferer": "@my_inferer", "amp": True})
    assert isinstance(reader.inferer, SimpleInferer)
    assert reader.amp is True


def test_saver_of_its_own_kind(tmp_path: Path) -> None:
    config = minimal(output_ext=".tif", output_postfix="cells", output_dir="out")
    reader = BundleReader(write(tmp_path / "bundle", config))
    assert (reader.output_ext, reader.output_postfix, reader.output_dir) == (".tif", "cells", Path("out"))


# ---------------------------------------------------------------------- two bundles, one process


def test_sys_path_and_modules_are_restored(tmp_path: Path) -> None:
    def bundle(name: str, value: int, *, broken: bool = False) -> BundleReader:
        source = f"import torch\nclass Net(torch.nn.Identity):\n    value = {value}\n" + ("1 / 0" if broken else "")
        config = {"network": {"_target_": "scripts.nets.Net"}}
        folder = write(tmp_path / name, config, weights={}, scripts={"__init__.py": "", "nets.py": source})
        return BundleReader(folder, weights="optional")

    path = list(sys.path)
    first, second, broken = bundle("a", 1), bundle("b", 2), bundle("c", 3, broken=True)
    for reader in (first, second):
        (reader.bundle_dir / "models/model.pt").unlink()
    assert first.network.value == 1
    assert sys.modules["scripts.nets"].Net is type(first.network)
    copy.deepcopy(first.network)
    assert second.network.value == 2
    assert sys.modules["scripts.nets"].Net is type(first.network)
    with pytest.raises(NetworkError, match="ZeroDivisionError"):
        _ = broken.network
    assert sys.path == path
    assert sys.modules["scripts.nets"].Net is type(first.network)
    with second.importable():
        assert sys.modules["scripts.nets"].Net is type(second.network)
        assert sys.path[0] == str(second.bundle_dir)
    assert sys.path == path


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("part", "config", "message"),
    [
        ("network", {"inferer": 1}, r"no network: configs/inference\.json has none of .*--override network="),
        ("inferer", {"network_def": 1}, r"no inferer: .*evaluator::inferer, inferer.* --override inferer=@id_of_yours"),
        ("preprocessing", {"evaluator": "$None"}, r"no preprocessing: .*--override preprocessing="),
        ("preprocessing", {"preprocessing": 5}, r"is a int, not a transform"),
    ],
)
def test_missing_id(tmp_path: Path, part: str, config: dict[str, Any], message: str) -> None:
    reader = BundleReader(write(tmp_path / "bundle", config))
    with pytest.raises(UsageError, match=message):
        getattr(reader, part)


def test_missing_image_key(tmp_path: Path) -> None:
    reader = BundleReader(write(tmp_path / "bundle", minimal(), metadata={}))
    with pytest.raises(UsageError, match="--override image_key=image"):
        _ = reader.image_key


def test_unknown_id(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no nonsense"):
        BundleReader(write(tmp_path / "bundle", minimal())).resolve("nonsense")


def test_network_that_cannot_be_built(tmp_path: Path) -> None:
    config = minimal(network="$@network_def.to('cpu')")
    config["network_def"]["img_size"] = 3
    with pytest.raises(NetworkError, match=r"TypeError: .*img_size.*override network_def.*--override network_def#ARG"):
        _ = BundleReader(write(tmp_path / "bundle", config)).network


def test_network_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="is a str, no module"):
        _ = BundleReader(write(tmp_path / "bundle", {"network": "UNet"})).network


def test_no_such_folder_or_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        BundleReader(tmp_path / "absent")
    folder = write(tmp_path / "bundle", minimal(), name="predict.json")
    with pytest.raises(UsageError, match=r"no configs/inference\.json.*--config FILE.* are: configs/predict\.json"):
        BundleReader(folder)
    with pytest.raises(UsageError, match=r"no config file configs/other\.json"):
        BundleReader(folder, "configs/other.json")
    assert same_weights(BundleReader(folder, "configs/predict.json").network, network())


@pytest.mark.parametrize("file", ["inference.json", "metadata.json"])
def test_broken_json_is_named(tmp_path: Path, file: str) -> None:
    folder = write(tmp_path / "bundle", minimal())
    (folder / "configs" / file).write_text("{,", encoding="utf-8")
    with pytest.raises(UsageError, match=file):
        BundleReader(folder)


def test_circular_reference(tmp_path: Path) -> None:
    reader = BundleReader(write(tmp_path / "bundle", {"inferer": "@a", "a": "@inferer"}))
    with pytest.raises(UsageError, match="refers to itself"):
        _ = reader.inferer


# ---------------------------------------------------------------------- the bundles of this project


@pytest.mark.skipif(not BUNDLES, reason="bundles/ has no inference config yet")
@pytest.mark.parametrize("config", BUNDLES, ids=[file.parents[1].name for file in BUNDLES])
def test_own_bundles(config: Path) -> None:
    reader = BundleReader(config.parents[1], weights="optional")  # a fresh checkout has not trained yet
    assert isinstance(reader.network, torch.nn.Module)
    assert callable(reader.inferer)
    assert reader.preprocessing.transforms
    assert len(reader.class_names) >= 2
    assert reader.channel_names
    assert reader.image_key == "image"
    assert reader.version != METADATA["version"]
    assert reader.id_of("handlers") == "handlers"
    assert reader.weight_source.path == reader.bundle_dir / "models/model.pt"
    assert ("models/model.pt" in reader.hashes()) == reader.weight_source.path.is_file()
