"""Every perturbation method against the naive computation on whole volumes, with the same seed."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai import methods
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.perturbation import game
from esegeta_monai.methods import METHODS, run
from esegeta_monai.methods.cam import perturbation_cam
from esegeta_monai.methods.perturbation import occlusion, rise, sensitivity
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import small
from tests.support.objectives import Naive, two_targets
from tests.support.tensors import assert_equal, noise

LABELS = torch.arange(6 * 20).reshape(6, 20) // 5 % 7  # scattered over the windows; 0 is background
OTHERS = [noise(2, 6, 20, seed=s) for s in (5, 6)]
BLACK_BOX = [
    methods.FeatureAblation("grid(4)"),
    methods.FeatureAblation("grid(size=5, per_channel=True)", baseline=0.3),
    methods.FeatureAblation(LABELS, baseline="feature mean"),
    methods.FeaturePermutation(OTHERS, "grid(5)"),
    methods.RegionTest(OTHERS, LABELS),
    methods.ShapleyValueSampling(n_samples=4, feature_mask=LABELS),
    methods.KernelShap(n_samples=64, feature_mask="grid(4)"),
    methods.ChannelShapley(),
    methods.Lime(n_samples=30, feature_mask=LABELS),
    methods.Rise(n_masks=12, grid=(2, 3)),
    methods.Sobol(n_samples=4, grid=(2, 4)),
    methods.Hsic(n_samples=16, grid=3),
    methods.Occlusion(3, 2),
    methods.Occlusion((3, 7), 3, baseline=0.3, per_channel=True),
    methods.ScoreCam("a", baseline=0.3),
    methods.ScoreCam("a", max_channels=2),
]


def score_naively(monkeypatch, case: Naive) -> None:
    """Every perturbation is a whole volume through MONAI's inferer from now on."""
    for module in (game, rise, sensitivity):
        monkeypatch.setattr(module, "known_score_changes", case.change)
    for module in (occlusion, perturbation_cam):
        monkeypatch.setattr(module, "score_changes", case.change)


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("method", BLACK_BOX, ids=lambda m: f"{m.name}-{len(repr(m))}")
def test_equals_the_naive_computation(method, norm, output, monkeypatch):
    case = Naive(small(2, 2, norm), noise(2, 6, 20), two_targets(output))
    with frozen(case.net):
        expected_passes = method.passes(case.objective)
        assert case.objective.context.progress.passes == 0
        actual = run(method, case.objective)
        if method.passes_exact:
            assert case.objective.context.progress.passes == expected_passes
        score_naively(monkeypatch, case)
        naive = run(method, case.objective)
    for k in range(2):
        assert_equal(actual.maps[k], naive.maps[k])


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_ablation_cam_equals_the_naive_computation(norm, output):
    """Channel by channel switched off by a hook of the test's own, through MONAI's inferer."""
    case = Naive(small(2, 2, norm), noise(2, 6, 20), two_targets(output))
    weights, base = torch.zeros(2, 5, dtype=torch.float64), case.value(case.image)
    with frozen(case.net):
        result = run(methods.AblationCam("a", relu=False), case.objective)
        activations = case.inferer(case.image[None], case.net.a)[0]
        for c in range(5):
            hook = case.net.a.register_forward_hook(lambda m, a, out, c=c: out.index_fill(1, torch.tensor([c]), 0.0))
            weights[:, c] = (base - case.value(case.image)) / base.abs()
            hook.remove()
    for k in range(2):
        assert_equal(result.maps[k, 0], torch.einsum("c,c...->...", weights[k], activations))


@pytest.mark.parametrize("method", BLACK_BOX[5:], ids=lambda m: m.name)
def test_in_three_dimensions(method, monkeypatch):
    labels = torch.arange(6 * 10 * 9).reshape(6, 10, 9) // 5 % 5
    if hasattr(method, "feature_mask"):
        method = type(method)(**{**{p: getattr(method, p) for p in method.parameter_names()}, "feature_mask": labels})
    if isinstance(method, methods.Rise | methods.Sobol):
        method = type(method)(grid=2, **({"n_masks": 8} if isinstance(method, methods.Rise) else {"n_samples": 4}))
    if isinstance(method, methods.Occlusion):
        method = methods.Occlusion(4, 3, per_channel=method.per_channel)
    case = Naive(small(3, 2), noise(2, 6, 10, 9), [MultiClassMask(1, output="probability")])
    with frozen(case.net):
        actual = run(method, case.objective)
        score_naively(monkeypatch, case)
        naive = run(method, case.objective)
    assert actual.maps.shape[2:] == (6, 10, 9)
    assert_equal(actual.maps, naive.maps)


@pytest.mark.parametrize("method", BLACK_BOX, ids=repr)
def test_the_same_seed_gives_the_same_map_and_the_image_is_left_alone(method):
    image = noise(2, 6, 20)
    maps = []
    for _ in range(2):
        case = Naive(small(2, 2), image.clone())
        with frozen(case.net):
            maps.append(run(method, case.objective).maps)
        assert torch.equal(case.image, image)
    assert torch.equal(*maps)


def test_methods_are_found_by_name_and_described():
    for method in BLACK_BOX:
        cls = METHODS.get(type(method).__name__.lower())
        assert cls is type(method)
        assert cls.reference
        assert method.units
        assert not method.needs_gradient


def test_equal_coalitions_are_scored_once_for_all_methods():
    case = Naive(small(2, 1), noise(1, 6, 20), [MultiClassMask(1)])
    labels = LABELS.clamp(max=3)
    with frozen(case.net):
        exact = run(methods.KernelShap(n_samples=64, feature_mask=labels), case.objective)
        spent = case.objective.context.progress.passes
        run(methods.ShapleyValueSampling(n_samples=6, feature_mask=labels), case.objective)
        run(methods.FeatureAblation(labels), case.objective)
        assert case.objective.context.progress.passes == spent
        run(methods.FeatureAblation(labels, baseline=7.0), case.objective)
        assert case.objective.context.progress.passes > spent
        again = case.objective.derive(image=case.image + 1)
        other = run(methods.KernelShap(n_samples=64, feature_mask=labels), again)
    assert not torch.equal(other.maps, exact.maps)
