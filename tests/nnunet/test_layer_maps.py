"""A block at one end of the volume: every layer map lies on it, with and without mirrored views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")

from esegeta_monai import Explainer
from esegeta_monai.bundle.nnunet import NnunetReader
from esegeta_monai.engine.windows.plan import Call
from tests.nnunet.folders import model_folder

BLOCK = (slice(2, 6), slice(12, 16), slice(3, 7))
"""In the network's axes (z, y, x), of a volume of 21 x 19 x 22 voxels: it is near one end along each axis."""
LAYERS = {"encoder.stages.0": 1, "encoder.stages.1": 2, "decoder.stages.0": 1}
"""Layers and the size of their voxels in those of the image."""
METHODS = ["LayerActivation", "LayerGradientXActivation", "GradCam"]


def symmetric_folder(root: Path) -> Path:
    """Write a model without normalisation and biases, whose kernels are positive and symmetric.

    Its activations are zero far from the block, and centred on it.
    """
    changes = {"normalization_schemes": ["NoNormalization"]}
    folder = model_folder(root, patch=(16, 16, 16), folds=1, changes=changes, without_norm=True)
    for file in folder.glob("fold_*/checkpoint_final.pth"):
        checkpoint = torch.load(file, weights_only=False)
        for name, value in checkpoint["network_weights"].items():
            if value.ndim == 5:
                axes = [(2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
                flipped = sum((value.flip(a) for a in axes), value.clone()) / 8
                value.copy_(flipped.abs())
            assert value.ndim in (1, 5), name
            if value.ndim == 1:
                value.zero_()
        torch.save(checkpoint, file)
    return folder


def block_scan(path: Path) -> Path:
    values = np.full((21, 19, 22), 1e-6, np.float32)
    values[BLOCK] = 1
    nib.save(nib.Nifti1Image(values.transpose(2, 1, 0), np.eye(4)), path)
    return path


def centroid(values: torch.Tensor) -> np.ndarray:
    grid = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in values.shape), indexing="ij")
    return np.array([float((values.double() * axis).sum() / values.double().sum()) for axis in grid])


def maps_of(reader: NnunetReader, file: Path) -> dict[tuple[str, str], Any]:
    data = reader.preprocessing({"image": [str(file)]})
    assert tuple(data["image"].shape[1:]) == (21, 19, 22)
    given = reader.case_arguments(data["image"], data, predict=False)
    corners = [tuple(getattr(part, end) for part in BLOCK) for end in ("start", "stop")]
    target = f"Box(1, {corners[0]}, {corners[1]})"
    methods = [f"{method}({layer!r})" for method in METHODS for layer in LAYERS]
    done = Explainer(reader.network, reader.inferer, checks=False)(data["image"][None], methods, [target], **given)
    return {(a.record["method"], a.record["parameters"]["layer"]): a.map.as_tensor()[0] for a in done}


@pytest.mark.parametrize("mirroring", [False, True])
def test_the_centroid_is_that_of_the_block(mirroring: bool, tmp_path: Path) -> None:
    reader = NnunetReader(symmetric_folder(tmp_path / "model"), mirroring=mirroring)
    assert reader.mirror_axes == ((0, 1, 2) if mirroring else ())
    maps = maps_of(reader, block_scan(tmp_path / "block.nii.gz"))
    assert len(maps) == len(METHODS) * len(LAYERS)
    expected = np.array([(part.start + part.stop - 1) / 2 for part in BLOCK])
    for (method, layer), values in maps.items():
        away = np.abs(centroid(values) - expected).max() / LAYERS[layer]
        assert away <= 0.5, (method, layer, away)


def test_views_that_are_not_undone_do_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same test fails if the layer maps of mirrored views stay mirrored."""
    reader = NnunetReader(symmetric_folder(tmp_path / "model"))
    monkeypatch.setattr(Call, "undo", lambda self, values, dims: values)
    maps = maps_of(reader, block_scan(tmp_path / "block.nii.gz"))
    expected = np.array([(part.start + part.stop - 1) / 2 for part in BLOCK])
    away = [np.abs(centroid(values) - expected).max() / LAYERS[layer] for (_, layer), values in maps.items()]
    assert max(away) > 0.5
