"""Tiny bundles of every style that is met in the wild, written to a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from monai.networks.nets import BasicUNet
from torch import nn

FEATURES = (2, 2, 2, 2, 2, 2)
NETWORK = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 3, "features": list(FEATURES)}
METADATA = {
    "version": "1.2.3",
    "name": "Tiny bundle",
    "task": "Segmentation of nothing",
    "network_data_format": {
        "inputs": {"image": {"type": "image", "num_channels": 1, "channel_def": {"0": "T1"}}},
        "outputs": {"pred": {"type": "image", "channel_def": {"0": "background", "1": "spleen", "2": "tumour"}}},
    },
}


def network(seed: int = 0) -> nn.Module:
    """The network that the synthetic bundles' weights belong to."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BasicUNet(2, 1, 3, features=FEATURES).eval()


def write(
    folder: Path,
    config: dict[str, Any],
    *,
    metadata: dict[str, Any] | None = METADATA,
    name: str = "inference.json",
    weights: Any = "plain",
    scripts: dict[str, str] | None = None,
) -> Path:
    """A bundle in `folder`; `weights` is "plain" (the state dict of `network()`), None, or what to save."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    text = json.dumps(config) if name.endswith("json") else yaml.safe_dump(config, sort_keys=False)
    (folder / "configs" / name).write_text(text, encoding="utf-8")
    if metadata is not None:
        (folder / "configs" / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    if weights is not None:
        torch.save(network().state_dict() if weights == "plain" else weights, folder / "models" / "model.pt")
    for file, source in (scripts or {}).items():
        (folder / "scripts").mkdir(exist_ok=True)
        (folder / "scripts" / file).write_text(source, encoding="utf-8")
    return folder


def wired(tmp_path: Path) -> dict[str, Any]:
    """The usual segmentation bundle: everything has an id and the evaluator is wired to it."""
    return {
        "imports": ["$import os"],
        "bundle_root": ".",
        "output_dir": str(tmp_path / "eval"),
        "data": [{"image": str(tmp_path / "scan.nii.gz")}],
        "device": "$torch.device('cuda:7')",
        "network_def": dict(NETWORK),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {"_target_": "ScaleIntensityd", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [32, 32], "overlap": 0.25},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_postfix": "seg",
                    "output_ext": "nii",
                    "separate_folder": False,
                    "squeeze_end_dims": False,
                },
            ],
        },
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": False,
        },
        "initialize": ["$open('initialized', 'w')"],
        "run": ["$@evaluator.run()"],
    }


def write_scan(tmp_path: Path) -> Path:
    """A small 2D scan with a spot in it."""
    rows, columns = np.mgrid[0:48, 0:40]
    spot = np.exp(-((rows - 20) ** 2 + (columns - 15) ** 2) / 60).astype(np.float32)
    nib.save(nib.Nifti1Image(spot + 0.01 * columns.astype(np.float32), np.diag([2, 2, 2, 1])), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"
