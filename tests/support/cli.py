"""A tiny 3D bundle, scans for it, and a way to run a command in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.networks.nets import UNet

SIZE = 16
CLASSES = {"0": "background", "1": "grey matter", "2": "white matter"}
NETWORK: dict[str, Any] = {
    "_target_": "UNet",
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 3,
    "channels": [4, 8],
    "strides": [2],
    "norm": "batch",
}


def config(**changes: Any) -> dict[str, Any]:
    """An inference.json of the usual shape; a change to None takes an id away."""
    whole: dict[str, Any] = {
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cpu')",
        "network_def": dict(NETWORK),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
                {"_target_": "ScaleIntensityd", "keys": "image"},
            ],
        },
        "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [SIZE] * 3, "sw_batch_size": 2, "overlap": 0.25},
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [{"_target_": "Activationsd", "keys": "pred", "softmax": True}],
        },
    }
    whole.update(changes)
    return {k: v for k, v in whole.items() if v is not None}


def metadata(channels: int = 1) -> dict[str, Any]:
    names = ["T1", "T2", "FLAIR", "T1c"][:channels]
    return {
        "version": "0.1.0",
        "name": "Tiny brain",
        "task": "nothing",
        "network_data_format": {
            "inputs": {
                "image": {
                    "num_channels": channels,
                    "spatial_shape": [SIZE] * 3,
                    "channel_def": dict(enumerate(names)),
                }
            },
            "outputs": {"pred": {"channel_def": CLASSES}},
        },
    }


def make_bundle(folder: Path, channels: int = 1, weights: bool = True, **changes: Any) -> Path:
    """The bundle; its weights are seeded, and every class is predicted somewhere in `make_scan`."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    definition = {**NETWORK, "in_channels": channels}
    changes.setdefault("network_def", definition)
    (folder / "configs" / "inference.json").write_text(json.dumps(config(**changes)), encoding="utf-8")
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata(channels)), encoding="utf-8")
    if weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            network = UNet(**{k: v for k, v in definition.items() if k != "_target_"})
        torch.save(network.state_dict(), folder / "models" / "model.pt")
    return folder


def make_scan(path: Path, shape: tuple[int, ...] = (SIZE, SIZE + 4, SIZE), seed: int = 0) -> Path:
    """A bright ball with noise; 2 mm voxels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape[:3]], indexing="ij")
    ball = np.exp(-4 * sum(a**2 for a in axes))
    noise = np.random.default_rng(seed).normal(0, 0.1, shape)
    ball = ball.reshape(ball.shape + (1,) * (len(shape) - ball.ndim))
    nib.save(nib.Nifti1Image((ball + noise).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


def run_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def statuses(folder: Path) -> dict[tuple[str, str | None, str | None], str]:
    return {(e["case"], e["target"], e["method"]): e["status"] for e in run_json(folder)["results"]}
