"""Where a bundle's weights are found, and which checkpoints are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets import BasicUNet

from esegeta_monai.bundle import BundleReader
from esegeta_monai.errors import NetworkError, UsageError
from tests.bundle.support import minimal, same_weights
from tests.support.synthetic import network, wired, write

pytestmark = pytest.mark.usefixtures("no_scripts_from_elsewhere")


@pytest.mark.parametrize(
    "expressions",
    [
        {"initialize": ["$@network_def.load_state_dict(torch.load(@path, map_location='cpu')['inner'])"]},
        {
            "initialize": ["$print(1)", "$@network_def.load_state_dict(@loaded['inner'], strict=True)"],
            "loaded": "$torch.load(@path, weights_only=False)",
        },
        {"go": {"load": "$@network_def.load_state_dict(torch.load(os.path.join(@bundle_root, 'other.pt'))['inner'])"}},
    ],
)
def test_weights_loaded_by_an_expression(tmp_path: Path, expressions: dict[str, Any]) -> None:
    config = minimal(path="$@bundle_root + '/other.pt'", imports=["$import os"], **expressions)
    folder = write(tmp_path / "bundle", config, weights=None)
    torch.save({"inner": network(3).state_dict(), "state_dict": network(4).state_dict()}, folder / "other.pt")
    reader = BundleReader(folder)
    assert same_weights(reader.network, network(3))
    assert reader.weight_source.key == "inner"
    assert next(iter(reader.hashes())) == "other.pt"


def test_weights_of_another_network_are_not_taken(tmp_path: Path) -> None:
    config = minimal(
        second={"_target_": "torch.nn.Identity"},
        handlers=[{"_target_": "CheckpointLoader", "load_path": "second.pt", "load_dict": {"model": "@second"}}],
        load="$@second.load_state_dict(torch.load('second.pt'))",
    )
    reader = BundleReader(write(tmp_path / "bundle", config))
    assert reader.weight_source.path == reader.bundle_dir / "models/model.pt"
    assert same_weights(reader.network, network())


@pytest.mark.parametrize("key", ["model", "state_dict", "net"])
def test_state_dict_under_a_usual_key(tmp_path: Path, key: str) -> None:
    folder = write(tmp_path / "bundle", minimal(), weights={key: network().state_dict(), "epoch": 3})
    assert same_weights(BundleReader(folder).network, network())


def test_missing_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = wired(tmp_path)
    config["handlers"][0]["load_path"] = "$@bundle_root + '/models/absent.pt'"
    folder = write(tmp_path / "bundle", config)
    with pytest.raises(UsageError, match=r"no weights at .*models/absent\.pt .*CheckpointLoader in 'handlers::0'"):
        _ = BundleReader(folder).network
    reader = BundleReader(folder, weights="optional")
    with caplog.at_level(logging.WARNING):
        assert isinstance(reader.network, BasicUNet)
    assert "absent.pt" in caplog.text
    assert "models/absent.pt" not in reader.hashes()


class Harmful:
    """Unpickling this would leave a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("harm", "w")


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "bundle", minimal(), weights={"model": network().state_dict(), "extra": Harmful()})
    with pytest.raises(UsageError, match="contains more than tensors"):
        _ = BundleReader(folder).network
    assert not (tmp_path / "harm").exists()


def test_torchscript_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", minimal(), weights=None)
    torch.jit.script(torch.nn.Conv2d(1, 1, 1)).save(str(folder / "models/model.pt"))
    with pytest.raises(NetworkError, match="TorchScript"):
        _ = BundleReader(folder).network


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {}])
def test_checkpoint_without_a_state_dict(tmp_path: Path, content: Any) -> None:
    folder = write(tmp_path / "bundle", minimal(), weights=None)
    torch.save(content, folder / "models/model.pt")
    with pytest.raises(UsageError, match="no state dict"):
        _ = BundleReader(folder).network


def test_damaged_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "bundle", minimal())
    whole = (folder / "models/model.pt").read_bytes()
    (folder / "models/model.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"model\.pt is not a readable checkpoint"):
        _ = BundleReader(folder).network


def test_not_strict_loads_matching_weights_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = wired(tmp_path)
    config["handlers"][0]["strict"] = False
    state = network().state_dict()
    state.pop("final_conv.bias")
    folder = write(tmp_path / "bundle", config, weights=state)
    with caplog.at_level(logging.WARNING):
        loaded = BundleReader(folder).network
    assert "1 missing keys, first final_conv.bias" in caplog.text
    assert torch.equal(loaded.state_dict()["final_conv.weight"], state["final_conv.weight"])


def test_wrong_weights_option(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="required"):
        BundleReader(write(tmp_path / "bundle", minimal()), weights="maybe")  # type: ignore[arg-type]
