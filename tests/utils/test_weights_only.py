"""Checkpoints are read without running code, and errors are one line of ours."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from esegeta_monai.utils.weights_only import read_weights


class Code:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_code_is_named_and_not_run(writer: str, protocol: int, tmp_path: Path) -> None:
    file, marker = tmp_path / "a.pt", tmp_path / "made"
    content = {"weight": Code(marker)}
    if writer == "torch":
        torch.save(content, file, pickle_protocol=protocol)
    else:
        file.write_bytes(pickle.dumps(content, protocol=protocol))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(pickle.UnpicklingError, match=r"which is code|more than weights") as caught:
            read_weights(file)
    assert "weights_only" not in str(caught.value)  # torch's message advises to switch the protection off
    assert "\n" not in str(caught.value)
    assert not marker.exists()


def test_a_damaged_file_raises_as_torch_does(tmp_path: Path) -> None:
    torch.save({"weight": torch.rand(100)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:300])
    with pytest.raises(RuntimeError):
        read_weights(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "none.pt")
