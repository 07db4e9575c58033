"""Expected gradients: equal to Captum with the same draws, complete within the stated error."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import GradientShap, LayerGradientShap
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.methods.layer.test_path import along
from tests.support.layers import setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_captum_with_the_same_draws(dims, monkeypatch):
    network, image = plain(dims)
    x0 = torch.randn_like(image) / 2
    objective = objective_of(network, image[0], [ClassScore(1)])
    method = GradientShap(x0[0], n_samples=5)
    alphas = [d.alpha for d in method._draws(objective)]
    assert len(set(alphas)) == 5
    monkeypatch.setattr(np.random, "uniform", lambda low, high, n: np.array(alphas[:n]))
    given = {"baselines": x0, "n_samples": 5, "stdevs": 0.0, "target": 1}
    expected = captum.attr.GradientShap(network).attribute(image, **given).detach()
    close(explain(method, objective).maps, expected)
    expected = captum.attr.LayerGradientShap(network, network.act).attribute(image, **given).detach()
    close(explain(LayerGradientShap("act", "channels", baseline=x0[0], n_samples=5), objective).maps, expected)


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "ViTAutoEnc", "ResNet18"])
def test_windowed_equals_autograd_through_the_inferer(name, output):
    target = ClassScore(1, output=output) if name == "ResNet18" else MultiClassMask(1, output=output)
    s = setting(name, target=target)
    score = s.objective.scores[0]
    method = GradientShap("noise(std=0.5)", n_samples=2, std=0.1)
    naive = torch.zeros_like(s.image)
    layer_map: Tensor | float = 0.0
    for draw in method._draws(s.objective):
        x = draw.point.clone().requires_grad_()
        (g,) = torch.autograd.grad(score.value(score.crop(s.inferer(x[None], s.model)[0])), x)
        naive += g * (draw.x - draw.x0) / 2
        ends = [along(s, v, 0.0)[0] for v in (draw.x, draw.x0)]
        layer_map = layer_map + along(s, draw.point, 0.0)[1] * (ends[0] - ends[1]) / 2
    close(explain(method, s.objective).maps[0], naive)
    actual = LayerGradientShap(s.layer, "channels", baseline="noise(std=0.5)", n_samples=2, std=0.1)
    close(explain(actual, s.objective).maps[0], s.scatter(layer_map))


@pytest.mark.parametrize("std", [0.0, 0.2])
def test_complete_within_the_stated_error(std):
    """The error stated is the standard deviation of the mean: found again as the spread of gaps over seeds."""
    network, image = plain(2)
    objective = objective_of(network, image[0], [ClassScore(1), ClassScore(2, output="probability")])
    objective.context.window_batch = 8
    misses, errors = [], []
    for seed in range(24):
        objective = objective.derive(seed=seed)
        result = explain(GradientShap(torch.zeros_like(image[0]), n_samples=12, std=std), objective)
        misses.append([result.note(k)["completeness_gap"] for k in range(2)])
        errors.append([result.note(k)["completeness_error"] for k in range(2)])
        scale = 1 if std == 0 else None  # with noise every seed has another denominator
    misses, errors = np.array(misses), np.array(errors)
    assert (misses <= 5 * errors).all()
    root = np.sqrt((misses**2).mean(0)) if scale else np.median(misses / errors, 0)
    expected = np.sqrt((errors**2).mean(0)) if scale else 0.67
    assert (np.abs(root / expected - 1) < 0.45).all()


def test_bad_parameters():
    with pytest.raises(UsageError, match="n_samples=1"):
        GradientShap(n_samples=1)
