"""Networks, outputs and scans that are easily misread, as tiny bundles whose configs name the networks of this file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor, nn

from tests.support.synthetic import write


class BatchStatistics(nn.Module):
    """Normalises by the statistics of the batch in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4, track_running_stats=False)
        self.last = nn.Conv3d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Plain(nn.Module):
    """Two convolutions.

    Args:
        channels: number of outputs.
        inside: activation in which the network ends: ``"sigmoid"``; None: none.
    """

    def __init__(self, channels: int = 3, inside: str | None = None) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.last = nn.Conv3d(4, channels, 1)
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.last(torch.relu(self.first(x)))
        return torch.sigmoid(out) if self.inside == "sigmoid" else out


class AuxiliaryFirst(Plain):
    """Returns an auxiliary output before the segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Conv3d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        hidden = torch.relu(self.first(x))
        return {"auxiliary": self.auxiliary(hidden), "segmentation": self.last(hidden)}


class WritesIntoInput(Plain):
    """Shifts its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x.requires_grad and x.is_leaf):
            x.sub_(0.3).mul_(2)
        else:
            x = (x - 0.3) * 2
        return super().forward(x)


class RunsTwice(Plain):
    """Sends the mirrored image through the same first layer and averages both predictions."""

    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) + super().forward(x.flip(2)).flip(2)) / 2


class NoGradEncoder(Plain):
    """Computes its first layer under ``no_grad`` and adds the image, so that a backward pass exists but is wrong."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = torch.relu(self.first(x))
        return self.last(hidden + 0.1 * x)


THREE = {"0": "background", "1": "shell", "2": "core"}
FLIP = {"_target_": "Lambdad", "keys": "image", "func": "$lambda x: x.flip(1)"}
SOFTMAX = [{"_target_": "Activationsd", "keys": "pred", "softmax": True}]
SIGMOID = [
    {"_target_": "Activationsd", "keys": "pred", "sigmoid": True},
    {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.4},
]
WINDOWS = {"_target_": "SlidingWindowInferer", "roi_size": [10, 10, 12], "sw_batch_size": 1, "overlap": 0.25}
WHOLE = {"_target_": "SimpleInferer"}


@dataclass(frozen=True)
class Situation:
    """A bundle and what all interfaces report about it."""

    network: str
    arguments: dict[str, Any] = field(default_factory=dict)
    methods: str = "Saliency,GradCam,Occlusion(window=6)"
    classes: dict[str, str] = field(default_factory=lambda: THREE)
    preprocessing: Sequence[dict[str, Any]] = ()
    postprocessing: Sequence[dict[str, Any]] = field(default_factory=lambda: SOFTMAX)
    inferer: dict[str, Any] = field(default_factory=lambda: WINDOWS)
    amp: bool = False
    constant: bool = False
    symmetric: bool = False
    verdicts: dict[str, str] = field(default_factory=dict)  # some of the results of the checks
    maps: int = 6
    reason: str | None = None  # a part of the reason for which there is no map
    of_engine: Sequence[str] = ()  # parts of the warnings about the engine's own prediction


SITUATIONS = {
    "statistics of the batch": Situation("BatchStatistics", verdicts={"rows": "handled"}),
    "sigmoid inside": Situation(
        "Plain",
        {"channels": 2, "inside": "sigmoid"},
        classes={"0": "lesion", "1": "edema"},
        postprocessing=[{"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}],
        verdicts={"head": "handled"},
    ),
    "one logit of two classes": Situation(
        "Plain", {"channels": 1}, classes={"0": "background", "1": "lesion"}, postprocessing=SIGMOID, maps=3
    ),
    "several labels": Situation(
        "Plain", {"channels": 2}, classes={"0": "lesion", "1": "edema"}, postprocessing=SIGMOID
    ),
    "auxiliary output first": Situation(
        "AuxiliaryFirst",
        classes={"0": "lesion", "1": "edema", "2": "core"},
        maps=9,
        postprocessing=[
            {"_target_": "FlattenSubKeysd", "keys": "pred", "sub_keys": ["segmentation"]},
            {"_target_": "Activationsd", "keys": "segmentation", "sigmoid": True},
        ],
        verdicts={"outputs": "handled"},
    ),
    "statistics of a batch of windows": Situation(
        "BatchStatistics", inferer={**WINDOWS, "sw_batch_size": 2}, verdicts={"rows": "handled"}
    ),
    "writes into its input": Situation(
        "WritesIntoInput", verdicts={"input": "handled"}, of_engine=["overlapping windows change each other"]
    ),
    "writes into the whole image": Situation("WritesIntoInput", inferer=WHOLE, verdicts={"input": "handled"}),
    "mixed precision on a CPU": Situation("Plain", amp=True),
    "runs twice": Situation("RunsTwice", methods="GradCam(layer='first')", maps=2, verdicts={"layers": "handled"}),
    "encoder without gradient": Situation("NoGradEncoder", verdicts={"derivative": "warned"}),
    "flip without a record": Situation("Plain", preprocessing=[FLIP], reason="flipped along axis 0"),
    "flip of a symmetric scan": Situation(
        "Plain", preprocessing=[FLIP], symmetric=True, reason="a weak pattern added to the scan comes back"
    ),
    "constant scan": Situation("Plain", constant=True, reason="every voxel is 7"),
}


def network(situation: Situation) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return globals()[situation.network](**situation.arguments)


def write_bundle(folder: Path, situation: Situation) -> Path:
    scan = folder / "scan.nii.gz"
    content = {
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cpu')",
        "imports": ["$import torch"],
        "amp": situation.amp,
        "network_def": {"_target_": f"tests.support.odd.{situation.network}", **situation.arguments},
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
                *situation.preprocessing,
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": [{"image": str(scan)}], "transform": "@preprocessing"},
        "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
        "inferer": situation.inferer,
        "postprocessing": {"_target_": "Compose", "transforms": list(situation.postprocessing)},
        "handlers": [
            {
                "_target_": "CheckpointLoader",
                "load_path": "$@bundle_root + '/models/model.pt'",
                "load_dict": {"model": "@network"},
            }
        ],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": "@amp",
        },
        "run": ["$@evaluator.run()"],
    }
    metadata = {
        "version": "0.1.0",
        "name": "Odd",
        "network_data_format": {
            "inputs": {"image": {"num_channels": 1, "channel_def": {"0": "T1"}}},
            "outputs": {"pred": {"channel_def": situation.classes}},
        },
    }
    write(folder, content, metadata=metadata, weights=network(situation).state_dict())
    shape = (16, 10, 12)
    values = np.random.default_rng(0).random(shape) * np.linspace(0.2, 2, shape[0])[:, None, None]
    values = np.full(shape, 7.0) if situation.constant else values
    values = values + values[::-1] if situation.symmetric else values
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([2.0, 2, 2, 1])), scan)
    return folder
