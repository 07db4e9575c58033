"""A tiny 3D bundle with real preprocessing, and oblique anisotropic scans for it, written to a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import UNet
from torch import nn

CHANNELS = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2], "norm": "batch"}
NETWORK = {"_target_": "UNet", **CHANNELS}
SHAPE = (20, 18, 14)
METADATA = {
    "version": "0.3.1",
    "name": "Oblique bundle",
    "network_data_format": {
        "inputs": {"image": {"type": "image", "num_channels": 1, "channel_def": {"0": "T1"}}},
        "outputs": {"pred": {"type": "image", "channel_def": {"0": "background", "1": "shell", "2": "core"}}},
    },
}


def affine(degrees: float = 20.0, spacing: Sequence[float] = (-1.2, 1.5, 2.0)) -> np.ndarray:
    """An oblique affine: voxels turned about two axes, the first one running right to left."""
    a, b = np.deg2rad(degrees), np.deg2rad(degrees / 2)
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    matrix = np.eye(4)
    matrix[:3, :3] = about_z @ about_x @ np.diag(spacing)
    matrix[:3, 3] = (11.0, -23.0, 5.0)
    return matrix


def write_scan(path: Path, seed: int = 0, shape: Sequence[int] = SHAPE) -> Path:
    """A bright ball in an empty surround, with sform code 2, qform code 1, and a name in ``descrip``."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"))
    centre = np.array(shape)[:, None, None, None] / 2
    ball = (((grid - centre) / (centre - 2)) ** 2).sum(0)
    values = np.where(ball < 1, 2 - ball + 0.2 * generator.random(shape), 0).astype(np.float32)
    image = nib.Nifti1Image(values, affine())
    image.set_sform(affine(), code=2)
    image.set_qform(affine(), code=1)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"Jane Doe"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def network(seed: int = 0, out_channels: int = 3) -> nn.Module:
    """The network that the bundle's weights belong to; it finds all of its classes in the ball."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = UNet(**{**CHANNELS, "out_channels": out_channels})  # type: ignore[arg-type]
        for m in built.modules():
            if isinstance(m, nn.BatchNorm3d):
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.5, 1.5)
    return built.eval()


def transforms(*, spacing: float = 1.6) -> list[dict[str, Any]]:
    """The bundle's preprocessing as in its config."""
    return [
        {"_target_": "LoadImaged", "keys": "image"},
        {"_target_": "EnsureChannelFirstd", "keys": "image"},
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
        {"_target_": "Spacingd", "keys": "image", "pixdim": [spacing] * 3, "mode": "bilinear"},
        {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "margin": 1},
        {"_target_": "ScaleIntensityd", "keys": "image", "minv": 0.0, "maxv": "@maximum"},
        {"_target_": "EnsureTyped", "keys": "image"},
    ]


def config(scans: Sequence[Path], output: Path) -> dict[str, Any]:
    """`configs/inference.json`."""
    return {
        "imports": ["$import os"],
        "bundle_root": ".",
        "output_dir": str(output),
        "files": [str(s) for s in scans],
        "maximum": 1.0,
        "device": "$torch.device('cpu')",
        "amp": False,
        "network_def": dict(NETWORK),
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": transforms()},
        "dataset": {"_target_": "Dataset", "data": "$[{'image': f} for f in @files]", "transform": "@preprocessing"},
        "batch_size": 1,
        "dataloader": {
            "_target_": "DataLoader", "dataset": "@dataset", "batch_size": "@batch_size", "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": [12, 12, 12], "sw_batch_size": 2, "overlap": 0.25,
            "mode": "gaussian",
        },
        "activation": {"_target_": "Activationsd", "keys": "pred", "softmax": True},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                "@activation",
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
                 "nearest_interp": False, "to_tensor": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "output_postfix": "seg",
                 "resample": False, "data_root_dir": ""},
            ],
        },
        "handlers": [
            {"_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'",
             "load_dict": {"model": "@network"}},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator", "device": "@device", "val_data_loader": "@dataloader",
            "network": "@network", "inferer": "@inferer", "postprocessing": "@postprocessing",
            "val_handlers": "@handlers", "amp": "@amp",
        },
        "run": ["$@evaluator.run()"],
    }  # fmt: skip


def write(folder: Path, content: dict[str, Any], *, weights: nn.Module | None = None) -> Path:
    """The bundle."""
    (folder / "configs").mkdir(parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    (folder / "configs" / "inference.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "configs" / "metadata.json").write_text(json.dumps(METADATA), encoding="utf-8")
    torch.save((weights or network()).state_dict(), folder / "models" / "model.pt")
    return folder
