"""Every method with its network, windows and volumes on a simulated device (`tests.support.fake_device`).

No tensor stays on the wrong device, and the map equals the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import UNet
from monai.transforms import Flipd, SpatialPadd
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.score import WeightedScore
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.methods import (
    METHODS,
    ClassImage,
    DeepDream,
    DeepLift,
    FeatureAblation,
    FeatureVisualization,
    InputXGradient,
    IntegratedGradients,
    Method,
    Occlusion,
)
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets import (
    Box,
    Case,
    ClassScore,
    Component,
    Errors,
    LabelMask,
    LayerNeuron,
    MultiClassMask,
    OutputValue,
    Score,
    Target,
    ThresholdMask,
    Voxel,
)
from esegeta_monai.transforms import Explaind, InvertAttributiond
from esegeta_monai.utils.tensors import bounding_box
from tests.support.fake_device import FAKE, fake_device
from tests.support.networks import ELSEWHERE

WINDOWS = SlidingWindowInferer((12, 12), 2, 0.5, "gaussian")
CLASS = MultiClassMask(1)


def image(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unet() -> nn.Module:
    return UNet(2, 2, 3, (2, 4), (2,), act="relu", norm="instance")


def classifier() -> nn.Module:
    """Convolutions, global average pooling and a linear layer."""
    features = [nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@dataclass(frozen=True)
class Setting:
    """A network, an image, how it is looked at, and a layer."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    inferer: Any
    target: Target
    layer: str

    def method(self, name: str) -> Method:
        """A method of the registry, as small as it goes."""
        kind, case = METHODS.get(name), image(1, *self.shape)
        offered = {**PARAMETERS, "cases": [case, 1 - case], "layer": self.layer, "channel": 0}
        if kind.produces == "synthesised image":
            del offered["layer"], offered["channel"]
        own: dict[str, dict[str, Any]] = {
            "KernelShap": {"n_samples": 64},  # it needs as many
            "RegionTest": {"feature_mask": "supervoxels(4, mask='everything')"},  # the map has all regions
        }
        return kind(**{n: v for n, v in offered.items() if n in kind.parameter_names()} | own.get(name, {}))

    def network(self, device: Any = "cpu") -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(18)
            return self.make().double().eval().to(device)

    def explain(self, method: Method, target: Target, device: Any = "cpu", volumes: Any = None) -> Attribution:
        """A map by a network that is built anew."""
        explainer = Explainer(self.network(device), self.inferer, device, volume_device=volumes)
        (result,) = explainer(image(0, *self.shape), [method], [target])
        return result


PARAMETERS: dict[str, Any] = {
    "areas": 0.1,
    "feature_mask": "grid(size=6)",
    "grid": 2,
    "max_channels": 2,
    "n_iter": 3,
    "n_masks": 4,
    "n_samples": 4,
    "n_steps": 2,
    "relu": False,
    "window": 6,
}
SETTINGS = {
    "UNet": Setting(unet, (1, 2, 18, 12), WINDOWS, CLASS, "model.0"),
    "classifier": Setting(classifier, (1, 1, 12, 12), None, ClassScore(1), "4"),
}
PAIRS = [
    (s, m.__name__)
    for s in SETTINGS
    for m in METHODS
    if (s, m.__name__) != ("UNet", "Cam") and m.__name__ not in ELSEWHERE
]
LAYOUTS = pytest.mark.parametrize("volumes", [FAKE, "cpu"], ids=["all-there", "volumes-here"])


# ---- the device itself -----------------------------------------------------------------------------------------------


REFUSED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a sum": lambda there, here: there + here,
    "in place": lambda there, here: here.mul_(there),
    "a number there": lambda there, here: here + there[0],
    "a cut": lambda there, here: here[there > 0],
    "rows": lambda there, here: here.index_select(0, torch.tensor([0], device=there.device)),
    "put": lambda there, here: there.index_put_((torch.tensor([0, 1, 2]),), here),
    "joined": lambda there, here: torch.cat([there, here]),
    "a product": lambda there, here: there @ here,
    "a choice": lambda there, here: torch.where(here > 0, there, there),
    "a backward": lambda there, here: torch.autograd.grad(there.clone().requires_grad_() * 2, [there], here),
    "a module": lambda there, here: nn.Linear(3, 1)(there),
    "NumPy": lambda there, here: there.numpy(),
    "an array": lambda there, here: np.asarray(there),
    "a draw": lambda there, here: torch.rand(3, generator=torch.Generator(), device=there.device),
    "inference": lambda there, here: torch.inference_mode()(lambda: torch.matmul(there[None], here[:, None]))(),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_gpu_refuses_is_refused(what: str) -> None:
    with fake_device() as there, pytest.raises((RuntimeError, TypeError)):
        REFUSED[what](torch.tensor([1.0, 2.0, 3.0], device=there), torch.ones(3))


def test_what_a_gpu_allows_is_done() -> None:
    with fake_device() as there:
        x = torch.arange(6.0, device=there).reshape(2, 3)
        assert (x + torch.tensor(1.0)).cpu().tolist() == [[1, 2, 3], [4, 5, 6]]  # a number of the CPU
        assert x[:, torch.tensor([0, 2])].cpu().tolist() == [[0, 2], [3, 5]]  # an index of the CPU
        assert x[torch.tensor([False, True])].tolist() == [[3, 4, 5]]
        x[0] = torch.ones(3)  # a copy
        x[1, [0, 2]] = 7.0
        x[:, 1] += 1
        assert x.cpu().tolist() == [[1, 2, 1], [7, 5, 7]]
        assert float(x.sum()) == 23
        assert bool((x > 0).all())
        assert torch.nonzero(x > 2).device == torch.zeros_like(x).device == x.new_tensor([1.0]).device == there
        assert torch.rand(2, generator=torch.Generator()).to(x).device == there


# ---- every method ----------------------------------------------------------------------------------------------------


@cache
def on_cpu(setting: str, name: str) -> Attribution:
    result = SETTINGS[setting]
    return result.explain(result.method(name), result.target)


def assert_same(there: Attribution, here: Attribution, volumes: Any) -> None:
    assert there.map is not None
    assert here.map is not None
    assert there.status == here.status in ("ok", "incomplete")  # few steps leave a gap
    assert there.map.device == torch.device(volumes)
    actual, expected = there.map.cpu().as_subclass(Tensor), here.map.as_subclass(Tensor)
    assert float((actual - expected).abs().max() / expected.abs().max()) <= 1e-10
    figures = {k: v for k, v in here.record.items() if isinstance(v, float) and k != "seconds"}
    assert {k: there.record[k] for k in figures} == pytest.approx(figures, rel=1e-9, abs=1e-12)
    assert there.record["window_passes"] == here.record["window_passes"]
    assert there.status == here.status


@LAYOUTS
@pytest.mark.parametrize(("setting", "name"), PAIRS)
def test_maps_are_those_of_the_cpu(setting: str, name: str, volumes: Any) -> None:
    here, result = on_cpu(setting, name), SETTINGS[setting]
    with fake_device():
        assert_same(result.explain(result.method(name), result.target, FAKE, volumes), here, volumes)


# ---- what makes masks, grids or draws of its own beside what the small ones above do --------------------------------

VOXEL = Voxel(1, index=(9, 6))
PROBABILITY = MultiClassMask(1, output="probability")
LABEL = torch.zeros(18, 12, dtype=torch.long)
LABEL[3:9, 2:8] = 1
VARIANTS: dict[str, Callable[[], tuple[Method, Target]]] = {
    "a neuron": lambda: (FeatureVisualization("model.0", channel=1, neuron="centre", n_iter=2), CLASS),
    "image, voxels": lambda: (FeatureVisualization(extent="image", parametrisation="voxel", n_iter=2), CLASS),
    "a voxel": lambda: (FeatureVisualization(n_iter=2), VOXEL),
    "a voxel, image": lambda: (ClassImage(extent="image", regularization=1.0, n_iter=2), VOXEL),
    "a channel": lambda: (DeepDream("model.0", channel=1, octaves=2, n_iter=2), CLASS),
    "octaves": lambda: (DeepDream(octaves=2, octave_scale=1.2, n_iter=2), CLASS),
    "one octave": lambda: (DeepDream(octaves=1, n_iter=2), PROBABILITY),
    "Occlusion": lambda: (Occlusion(6), PROBABILITY),
    "DeepLift": lambda: (DeepLift(baseline="blur(sigma=2)"), PROBABILITY),
    "IntegratedGradients": lambda: (IntegratedGradients(n_steps=2, baseline="uniform"), PROBABILITY),
    "Supervoxels": lambda: (FeatureAblation("Supervoxels(n_segments=4, mask='everything')"), CLASS),
    "a label map": lambda: (FeatureAblation(LABEL.clone()), CLASS),
    **{
        f"target {target.name}": lambda target=target: (InputXGradient(), target)
        for target in (
            Box(1, (2, 2), (14, 9)),
            Component(1),
            Errors(LABEL, "false_positive", 1),
            LabelMask(LABEL, class_index=1),
            OutputValue(1, 0.3),
            ThresholdMask("otsu", 1, value="raw"),
            LayerNeuron("model.0.conv", 0, index=(4, 3)),
        )
    },
}


@LAYOUTS
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_those_of_the_cpu(name: str, volumes: Any) -> None:
    result, make = SETTINGS["UNet"], VARIANTS[name]
    here = result.explain(*make())
    with fake_device():
        assert_same(result.explain(*make(), FAKE, volumes), here, volumes)


class Own(Target):
    """A user's target whose mask stays where it was made."""

    name: str | None = None

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        return [WeightedScore(LABEL > 0, 1, prediction.shape[0])]


class Half(Score):
    """A user's score: linear, and no `WeightedScore`."""

    linear, voxels, channels, label = True, 36, (1,), "half"

    def __init__(self) -> None:
        self.box, self.mask = bounding_box(LABEL > 0), torch.ones(6, 6, dtype=torch.bool)

    def value(self, prediction: Tensor) -> Tensor:
        return 0.5 * prediction.double().sum((-1, -2, -3))


class OwnScore(Own):
    """A user's target with a score of its own, whose tensors stay where they were made."""

    def bind(self, prediction: Tensor, case: Case) -> list[Score]:
        return [Half()]


@LAYOUTS
@pytest.mark.parametrize("method", [InputXGradient(), Occlusion(6)], ids=lambda m: m.name)
@pytest.mark.parametrize("target", [Own(), OwnScore()], ids=["mask", "score"])
def test_what_users_make_on_the_cpu_is_brought_along(target: Target, method: Method, volumes: Any) -> None:
    result = SETTINGS["UNet"]
    here = result.explain(method, target)
    with fake_device():
        assert_same(result.explain(method, target, FAKE, volumes), here, volumes)


# ---- after the maps --------------------------------------------------------------------------------------------------


CHECKED = [
    "VanillaBackprop",
    "InputXGradient",
    "IntegratedGradients(baseline='blur(sigma=2)', tolerance=0.01)",
    "DeepLift",
    "LRP",
    "Occlusion(6)",
    "FeatureAblation('grid(size=6)')",
    "GradCam('model.0', relu=False)",
    "HiResCam('model.0', relu=False)",
    "LayerActivation('model.0')",
]


@LAYOUTS
@pytest.mark.parametrize("method", CHECKED)
def test_checks_of_maps_run_there(method: str, volumes: Any) -> None:
    setting = SETTINGS["UNet"]
    with fake_device():
        explainer = Explainer(setting.network(FAKE), WINDOWS, FAKE, volume_device=volumes, checks="maps")
        (result,) = explainer(image(0, *setting.shape), [method], [CLASS])
        assert result.record["map_check"] == "passed", result.record["checks"]


def written(folder: Path, device: Any) -> dict[str, np.ndarray]:
    """Files of a case whose scan and network are on a device, with pictures, and the voxels of each NIfTI file."""
    result, methods = SETTINGS["UNet"], [InputXGradient(), DeepDream(octaves=1, n_iter=1)]
    scan = MetaTensor(image(0, *result.shape)[0], affine=torch.diag(torch.tensor([-2.0, 2.0, 2.0, 1.0]))).to(device)
    writer = ResultWriter(folder, methods, [CLASS], pictures=True)
    writer.explain(Explainer(result.network(device), result.inferer), scan, "alpha", methods, [CLASS])
    return {p.name: np.asarray(nib.load(p).dataobj) for p in sorted(folder.rglob("*.nii.gz"))}


def test_maps_there_are_written_with_their_pictures(tmp_path: Path) -> None:
    here = written(tmp_path / "here", "cpu")
    with fake_device() as there:
        result = written(tmp_path / "there", there)
    assert result.keys() == here.keys()
    assert len(result) > 2
    for name, values in here.items():
        assert np.abs(result[name] - values).max() <= 1e-6 * np.abs(values).max(), name
    pictures = [sorted(p.name for p in (tmp_path / side).rglob("*.png")) for side in ("here", "there")]
    assert pictures[0] == pictures[1] != []


def test_a_map_there_goes_back_to_the_scan_there() -> None:
    def inverted(device: Any) -> Tensor:
        data = {"image": MetaTensor(image(0, 1, 18, 12)).to(device)}
        data = SpatialPadd("image", (20, 20))(Flipd("image", 0)(data))
        explain = Explaind("image", nn.Conv2d(1, 2, 3, padding=1).double().to(device), WINDOWS, InputXGradient(), CLASS)
        data = explain(data)
        (key,) = [k for k in data if "InputXGradient" in str(k)]
        return InvertAttributiond(key)(data)[key].cpu().as_subclass(Tensor)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        here = inverted("cpu")
        torch.manual_seed(0)
        with fake_device() as there:
            result = inverted(there)
    assert here.shape == (1, 18, 12)
    assert float((result - here).abs().max() / here.abs().max()) <= 1e-10
