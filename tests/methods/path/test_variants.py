"""Blur-IG and Guided IG: complete, equal to naive loops through MONAI's inferer, and on paths as the papers say."""

from __future__ import annotations

import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import BlurIG, GuidedIG, IntegratedGradients
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.networks import build
from tests.support.layers import setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


def gradient(s, x: Tensor) -> Tensor:
    x = x.clone()[None].requires_grad_()
    score = s.objective.scores[0]
    (g,) = torch.autograd.grad(score.value(score.crop(s.inferer(x, s.model)[0])), x)
    return g[0]


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "ViTAutoEnc", "ResNet18"])
def test_blur_equals_the_sum_through_the_inferer(name, output):
    target = ClassScore(1, output=output) if name == "ResNet18" else MultiClassMask(1, output=output)
    s = setting(name, target=target)
    points = [torch.from_numpy(gaussian_filter(s.image[0].numpy(), w, mode="nearest"))[None] for w in (3.0, 2.0, 1.0)]
    points.append(s.image)
    g = [gradient(s, p) for p in points]
    naive = sum((g[i] + g[i + 1]) / 2 * (points[i + 1] - points[i]) for i in range(3))
    close(explain(BlurIG(sigma=3, n_steps=3), s.objective).maps[0], naive)


@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "SegResNet", "ViTAutoEnc", "ResNet18"])
def test_guided_without_a_band_is_the_straight_path(name):
    s = setting(name)
    x0 = torch.zeros_like(s.image)
    straight = explain(IntegratedGradients(x0, n_steps=5, method="riemann_trapezoid"), s.objective).maps
    close(explain(GuidedIG(x0, n_steps=4, max_dist=0), s.objective).maps, straight)


@pytest.mark.parametrize("dims", [2, 3])
def test_complete(dims):
    network, image = plain(dims)
    network.act, network.then = nn.SiLU(), nn.SiLU()
    network.head.weight.data[1].abs_()
    objective = objective_of(network, image[0], [ClassScore(1), ClassScore(1, output="probability")])
    n = 64 if dims == 2 else 192  # F changes by a hundredth of itself in 3D
    for make in (lambda n: BlurIG(2, n), lambda n: GuidedIG("zero", n), lambda n: GuidedIG("zero", n, max_dist=0.3)):
        few, many = explain(make(n // 2), objective), explain(make(n), objective)
        for k in range(2):
            assert many.note(k)["completeness_gap"] < 1e-3
            faster = 3 if isinstance(make(n), BlurIG) else 1.5  # of second order; guided paths differ with n
            assert few.note(k)["completeness_gap"] > faster * many.note(k)["completeness_gap"]


def test_bisecting_reaches_its_tolerance_where_more_steps_do_not():
    """Along the kinks of ReLU the trapezoid rule stays wrong, however many steps the guided path has."""
    s = setting("UNet_batch", target=MultiClassMask(1, reduction="mean"))
    case = build("UNet_batch", 2)
    x0 = torch.cat([case.reference, case.image[..., : case.roi[-1] // 2]], -1)[0]
    plain = explain(GuidedIG(x0, n_steps=256), s.objective)
    fine = explain(GuidedIG(x0, n_steps=16, tolerance=1e-3), s.objective)
    assert plain.note(0)["completeness_gap"] > 1e-3
    assert fine.note(0)["completeness_gap"] < 1e-3
    assert fine.note(0)["steps"] < 1024
    blurred = explain(BlurIG(2, n_steps=8, tolerance=1e-3), s.objective)
    assert blurred.note(0)["completeness_gap"] < 1e-3
    few = explain(GuidedIG(x0, n_steps=16, tolerance=1e-3, max_steps=40), s.objective)
    assert few.note(0)["steps"] <= 40
    assert any("max_steps=40" in w for w in s.objective.context.progress.warnings)


def test_the_guided_path_moves_calm_voxels_first_and_keeps_its_distance():
    torch.manual_seed(0)
    x0, x1, g = torch.zeros(1, 8, 8).double(), torch.randn(1, 8, 8).double(), torch.randn(1, 8, 8).double()
    method = GuidedIG(max_dist=0.1)
    for alpha in (0.2, 0.5, 0.9):
        start = torch.lerp(x0, x1, alpha - 0.1)
        moved = method._move(start, x0, x1, g, alpha)
        assert float((x1 - moved).abs().sum() / (x1 - x0).abs().sum()) == pytest.approx(1 - alpha, rel=1e-9)
        share = (moved / x1).flatten()
        assert float(share.min()) >= alpha - 0.1 - 1e-9
        assert float(share.max()) <= alpha + 0.1 + 1e-9
        at_the_front = share > alpha + 0.1 - 1e-9
        steep = g.abs().flatten()
        assert float(steep[at_the_front].max()) <= float(steep[share < alpha - 0.1 + 1e-9].min())


def test_bad_parameters():
    for wrong in ({"tolerance": 0.0}, {"tolerance": 1e-3, "max_steps": 9}):
        for method in (GuidedIG, BlurIG):
            with pytest.raises(UsageError, match="tolerance"):
                method(**wrong)
    for wrong in ({"fraction": 0.0}, {"max_dist": 2.0}, {"n_steps": 0}):
        with pytest.raises(UsageError, match="GuidedIG"):
            GuidedIG(**wrong)
    with pytest.raises(UsageError, match="BlurIG"):
        BlurIG(sigma=-1.0)
