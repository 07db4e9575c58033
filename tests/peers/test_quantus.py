"""Our metrics against Quantus, which is given our explanations through `quantus_explain_func`, in 2D and 3D.

Where Quantus draws at random it is given our draws, so that numbers must be equal. It computes predictions in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from torch import nn

from esegeta_monai.engine.objective import Objective
from esegeta_monai.explain.quantus import quantus_explain_func
from esegeta_monai.methods import METHODS, Method
from esegeta_monai.metrics import (
    AverageSensitivity,
    Deletion,
    Entropy,
    FaithfulnessCorrelation,
    LocalisationAUC,
    MaxSensitivity,
    MetricInput,
    PointingGame,
    RelevanceMass,
    RelevanceRank,
    Sparseness,
    TopKIntersection,
)
from esegeta_monai.targets import ClassScore
from tests.support.objectives import objective_of

pytestmark = pytest.mark.peers
quantus = pytest.importorskip("quantus")

METHODS_2 = ["InputXGradient", "IntegratedGradients(n_steps=8, baseline='zero')"]
SHAPES = [(1, 14, 15), (1, 7, 8, 9)]
CLASS = 1


def network_of(shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    conv, pool = (nn.Conv2d, nn.AdaptiveAvgPool2d) if len(shape) == 3 else (nn.Conv3d, nn.AdaptiveAvgPool3d)
    size = 8 * 3 ** (len(shape) - 1)
    return nn.Sequential(conv(1, 8, 3, padding=1), nn.SiLU(), pool(3), nn.Flatten(), nn.Linear(size, 3)).eval()


class Setting:
    """One image of one shape explained by one method, for both."""

    def __init__(self, shape: tuple[int, ...], method: str) -> None:
        self.network = network_of(shape)
        self.image = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.1
        self.method: Method = METHODS.create(method)
        self.objective: Objective = objective_of(self.network, self.image, [ClassScore(CLASS)])
        self.label = torch.zeros(shape[1:], dtype=torch.bool)
        self.label[tuple(slice(2, 6) for _ in shape[1:])] = True
        self.explain = {"method": self.method}
        self.map = quantus_explain_func(self.network, self.image[None].numpy(), [CLASS], **self.explain)[0]
        self.subject = MetricInput(torch.from_numpy(self.map), self.objective, 0, self.method, label=self.label)

    def by_quantus(self, metric: Any, **more: Any) -> Any:
        """Compute Quantus' metric for this image; it asks for the map itself."""
        return metric(
            model=self.network, x_batch=self.image[None].numpy(), y_batch=np.array([CLASS]), a_batch=None,
            explain_func=quantus_explain_func, explain_func_kwargs=self.explain, channel_first=True, softmax=False,
            **more,
        )[0]  # fmt: skip


@pytest.fixture(params=[(s, m) for s in SHAPES for m in METHODS_2], ids=lambda p: f"{len(p[0]) - 1}D {p[1][:16]}")
def setting(request: pytest.FixtureRequest) -> Setting:
    return Setting(*request.param)


def close(what: str, values: Any, expected: Any, tolerance: float) -> None:
    deviation = np.abs(np.asarray(values) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
    print(f"{what}: {deviation:.1e}")
    assert deviation <= tolerance, (what, values, expected)


QUIET = {"disable_warnings": True}


@pytest.mark.parametrize("around", ["a corner", "the strongest voxel"])
def test_localisation(setting: Setting, around: str) -> None:
    if around == "the strongest voxel":
        at = np.unravel_index(np.abs(setting.map[0]).argmax(), setting.map.shape[1:])
        setting.label[tuple(slice(max(0, i - 1), i + 2) for i in at)] = True
        setting.subject.label = setting.label
    label = {"s_batch": setting.label[None, None].numpy()}
    pairs = [
        (PointingGame(), quantus.PointingGame(abs=True, **QUIET)),
        (RelevanceMass(), quantus.RelevanceMassAccuracy(abs=True, **QUIET)),
        (RelevanceRank(), quantus.RelevanceRankAccuracy(abs=True, **QUIET)),
        (TopKIntersection(k=20), quantus.TopKIntersection(k=20, abs=True, **QUIET)),
        (LocalisationAUC(), quantus.AUC(abs=True, **QUIET)),
    ]
    for actual, expected in pairs:
        a, b = actual.update(setting.subject).value, float(setting.by_quantus(expected, **label))
        print(actual.name, a, b)
        assert a == pytest.approx(b, rel=1e-5, abs=1e-12), actual.name
        if isinstance(actual, PointingGame):
            assert a == float(around == "the strongest voxel")


def test_complexity(setting: Setting) -> None:
    """Quantus' entropy is in nats, ours over that of a flat map; and Quantus adds 1e-7 to the map over its maximum."""
    entropy = Entropy().update(setting.subject).value * np.log(setting.map.size)
    close("entropy", entropy, setting.by_quantus(quantus.Complexity(**QUIET)), 1e-5)
    raised = torch.from_numpy(np.abs(setting.map) / np.abs(setting.map).max() + 1e-7)
    close("Gini", Sparseness().update(MetricInput(raised)).value, setting.by_quantus(quantus.Sparseness(**QUIET)), 1e-5)


def test_deletion_is_pixel_flipping(setting: Setting) -> None:
    """Point by point: Quantus has F itself, without its value at the image; ours is in units of F(x) - F(x0)."""
    step = 7  # Quantus wants a divisor of the number of voxels
    count = -(-setting.map.size // step)
    expected = setting.by_quantus(quantus.PixelFlipping(features_in_step=step, perturb_baseline=0.0, **QUIET))
    actual = Deletion(features="grid(size=1)", steps=setting.map.size, baseline="zero").update(setting.subject)
    x, zero = (float(setting.network(i[None])[0, CLASS]) for i in (setting.image, torch.zeros_like(setting.image)))
    values = np.array(actual.curve["y"]) * abs(x - zero) + zero
    chosen = [min((k + 1) * step, setting.map.size) for k in range(count)]
    close("pixel flipping", values[chosen], expected, 1e-5)


@pytest.fixture
def our_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantus draws its sets of voxels as our metric does."""
    generator = np.random.default_rng(0)
    monkeypatch.setattr(np.random, "choice", lambda n, size, replace: generator.choice(np.arange(n), size, replace))


def test_faithfulness_correlation_of_the_same_sets(setting: Setting, our_sets: None) -> None:
    actual = FaithfulnessCorrelation(n_samples=40, subset=0.25, features="grid(size=1)", baseline="zero")
    result = actual.update(setting.subject)
    size = result.notes["subset_size"]
    expected = quantus.FaithfulnessCorrelation(
        nr_runs=40, subset_size=size, perturb_baseline=0.0, return_aggregate=False, **QUIET
    )
    close("correlation", result.value, setting.by_quantus(expected), 1e-5)


@pytest.mark.parametrize("name", ["max", "average"])
def test_sensitivity_of_the_same_noise(setting: Setting, name: str) -> None:
    """Quantus' noise has one width for all images, ours one for each channel."""
    radius, n = 0.05, 6
    generator = setting.objective.generator()
    scale = float(setting.image.std()) * radius

    def our_noise(arr: np.ndarray, **_: Any) -> np.ndarray:
        drawn = torch.rand(setting.image.shape, generator=generator, dtype=torch.float32) * 2 - 1
        return arr + (drawn * scale).numpy().reshape(arr.shape)

    kinds = {"max": (MaxSensitivity, quantus.MaxSensitivity), "average": (AverageSensitivity, quantus.AvgSensitivity)}
    ours, metric = kinds[name]
    actual = ours(radius=radius, n_samples=n).update(setting.subject).value
    expected = setting.by_quantus(metric(nr_samples=n, perturb_func=our_noise, **QUIET))
    close(f"{name} sensitivity", actual, expected, 1e-5)


def test_sensitivity_n_of_quantus_is_another_quantity() -> None:
    """Ancona et al. correlate, for one image, sums over random sets of n voxels with what the target loses without
    them. Quantus removes voxels in the order of the map, keeps what was removed before, sums the map over the last step
    only, and correlates over the images of the batch; of a single image it gives nothing."""
    network = network_of(SHAPES[0])
    images = torch.rand(6, *SHAPES[0], generator=torch.Generator().manual_seed(4)) + 0.1
    maps = quantus_explain_func(network, images.numpy(), [CLASS] * 6, method="InputXGradient")
    metric = quantus.SensitivityN(
        features_in_step=7, perturb_baseline=0.0, normalise=False, return_aggregate=False, **QUIET
    )
    common = {"model": network, "y_batch": np.array([CLASS] * 6), "channel_first": True, "softmax": False}
    expected = np.asarray(metric(x_batch=images.numpy(), a_batch=maps, **common)).ravel()
    by_hand, size = [], maps[0].size
    order = np.argsort(-maps.reshape(6, -1), axis=1)
    before = network(images)[:, CLASS].detach().numpy()
    for step in range(int(0.8 * size // 7)):
        changed = images.reshape(6, -1).clone()
        last = order[:, step * 7 : (step + 1) * 7]
        changed[np.arange(6)[:, None], order[:, : (step + 1) * 7]] = 0
        lost = before - network(changed.reshape(images.shape))[:, CLASS].detach().numpy()
        by_hand.append(pearsonr(lost, maps.reshape(6, -1)[np.arange(6)[:, None], last].sum(1))[0])
    assert np.abs(expected - np.array(by_hand)).max() < 1e-3
