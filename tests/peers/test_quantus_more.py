"""Metrics of Quantus that this package has no own one for: which run on our maps, in 2D, 3D and through windows.

On a linear network the answers are known. `CANNOT` lists what Quantus 0.6 refuses, with its reason: the test fails
once that changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai.explain.quantus import quantus_explain_func
from esegeta_monai.targets import MultiClassMask, TargetWrapper

pytestmark = pytest.mark.peers
quantus = pytest.importorskip("quantus")

SHAPES = {2: (1, 12, 12), 3: (1, 6, 6, 6)}
QUIET = {"disable_warnings": True}


def black(**more: Any) -> dict[str, Any]:
    return {"perturb_baseline": 0.0, **more, **QUIET}


METRICS: dict[str, Callable[[], Any]] = {
    "FaithfulnessEstimate": lambda: quantus.FaithfulnessEstimate(**black(features_in_step=4)),
    "Monotonicity": lambda: quantus.Monotonicity(**black(features_in_step=4)),
    "MonotonicityCorrelation": lambda: quantus.MonotonicityCorrelation(features_in_step=4, nr_samples=3, **QUIET),
    "Selectivity": lambda: quantus.Selectivity(**black(patch_size=3)),
    "Sufficiency": lambda: quantus.Sufficiency(**QUIET),
    "Consistency": lambda: quantus.Consistency(discretise_func=quantus.discretise_func.sign, **QUIET),
    "Continuity": lambda: quantus.Continuity(**black(nr_steps=3)),
    "RelativeRepresentationStability": lambda: quantus.RelativeRepresentationStability(
        nr_samples=3, return_nan_when_prediction_changes=False, **QUIET
    ),
    "AttributionLocalisation": lambda: quantus.AttributionLocalisation(**QUIET),
    "Focus": lambda: quantus.Focus(**QUIET),
    "SmoothMPRT": lambda: quantus.SmoothMPRT(
        nr_samples=2, similarity_func=quantus.similarity_func.correlation_spearman, **QUIET
    ),
    "EfficientMPRT": lambda: quantus.EfficientMPRT(
        complexity_func=quantus.complexity_func.discrete_entropy, abs=True, normalise=True, **QUIET
    ),
    "NonSensitivity": lambda: quantus.NonSensitivity(**black(features_in_step=1)),
}
CANNOT = {
    (3, "Selectivity"): "pad_width",
    (3, "Continuity"): "batch of 3D images",
    (3, "RelativeRepresentationStability"): "only supports 4D, 3D and 2D inputs",
    (3, "SmoothMPRT"): "Only batched 1D and 2D",
}


MAPS: list[int] = []
"""Number of maps of each call; a list of the module, since Quantus copies some of its arguments."""


def counted(**named: Any) -> np.ndarray:
    maps = quantus_explain_func(**named)
    MAPS.append(len(maps))
    return maps


def evaluated(name: str, model: nn.Module, images: np.ndarray, classes: list[int], explain: Any) -> Any:
    label = np.zeros((len(images), 1, *images.shape[2:]), dtype=bool)
    label[(..., *(slice(0, 3) for _ in images.shape[2:]))] = True
    more = {
        "Focus": {"custom_batch": np.array([(0, 1, 1, 0)] * len(images))},
        "AttributionLocalisation": {"s_batch": label},
    }
    return METRICS[name]()(
        model=model, x_batch=images, y_batch=np.array(classes), a_batch=None, explain_func=explain,
        explain_func_kwargs={"method": "InputXGradient"}, channel_first=True,
        softmax=name == "EfficientMPRT", **more.get(name, {}),
    )  # fmt: skip


def numbers(values: Any) -> np.ndarray:
    if isinstance(values, dict):
        values = list(values.values())
    parts = [numbers(v) if isinstance(v, (dict, list, tuple)) else np.ravel(np.asarray(v, dtype=float)) for v in values]
    return np.concatenate(parts)


def images_of(dims: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((count, *SHAPES[dims])).astype(np.float32) + 0.1


def curved(dims: int) -> nn.Module:
    torch.manual_seed(0)
    conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if dims == 2 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    return nn.Sequential(conv(1, 4, 3, padding=1), nn.SiLU(), pool(3), nn.Flatten(), nn.Linear(4 * 3**dims, 3)).eval()


def windowed(dims: int) -> nn.Module:
    """The scores of two classes of a segmentation, predicted through overlapping windows."""
    torch.manual_seed(1)
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    network = nn.Sequential(conv(1, 4, 3, padding=1), nn.SiLU(), conv(4, 3, 1)).eval()
    inferer = SlidingWindowInferer((4,) * dims, 4, 0.5, "gaussian")
    first = torch.from_numpy(images_of(dims)[:1])
    present = inferer(first, network).argmax(1).unique().tolist()
    return TargetWrapper(network, [MultiClassMask(int(k)) for k in present], inferer).freeze(first).eval()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("network", [curved, windowed], ids=["whole images", "windows"])
def test_which_metrics_run(network: Callable[[int], nn.Module], dims: int, name: str) -> None:
    MAPS.clear()
    count = 3 if network is curved else 1
    images, classes = images_of(dims, count), ([0, 1, 2] if network is curved else [0])
    if (dims, name) in CANNOT:
        with pytest.raises(Exception, match=CANNOT[dims, name]):
            numbers(evaluated(name, network(dims), images, classes, counted))
        return
    values = numbers(evaluated(name, network(dims), images, classes, counted))
    if name == "SmoothMPRT":  # Quantus 0.6 explains by its own default and ignores the function that it was given
        assert not MAPS
        return
    print(dims, name, values[:4], sum(MAPS))
    assert np.isfinite(values).all()
    assert sum(MAPS) >= count


@pytest.mark.parametrize("dims", [2, 3])
def test_known_answers_of_a_linear_network(dims: int) -> None:
    """Input times gradient is what a voxel adds: sums are exact, the order is right, no voxel is missed."""
    torch.manual_seed(2)
    images = images_of(dims)
    network = nn.Sequential(nn.Flatten(), nn.Linear(images[0].size, 3, bias=False)).eval()
    classes = [0, 1, 2]
    weights = network[1].weight.detach().numpy()[classes]
    maps = (weights * images.reshape(3, -1)).reshape(images.shape)
    assert numbers(evaluated("FaithfulnessEstimate", network, images, classes, quantus_explain_func)) == pytest.approx(
        np.ones(3), abs=1e-4
    )
    assert numbers(evaluated("NonSensitivity", network, images, classes, quantus_explain_func)) == pytest.approx(
        np.zeros(3)
    )
    box = (slice(None), slice(None), *(slice(0, 3) for _ in range(dims)))
    share = np.abs(maps[box]).reshape(3, -1).sum(1) / np.abs(maps).reshape(3, -1).sum(1)
    values = numbers(evaluated("AttributionLocalisation", network, images, classes, quantus_explain_func))
    assert values == pytest.approx(share, rel=1e-4)
