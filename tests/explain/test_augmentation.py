"""Frozen test-time augmentation: MONAI's mean is predicted, and maps equal autograd and hooks through all views."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.data.test_time_augmentation import TestTimeAugmentation
from monai.inferers import SlidingWindowInferer
from monai.inferers.utils import sliding_window_inference
from monai.transforms import (
    Compose,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    RandRotate90d,
    ScaleIntensityd,
)
from monai.utils import set_determinism
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.explain.augmentation import freeze_augmentation
from esegeta_monai.methods import Occlusion, VanillaBackprop
from tests.support.networks import small


@pytest.fixture(autouse=True)
def equal_draws() -> Iterator[None]:
    set_determinism(7)
    yield
    set_determinism(None)


def image_of(*shape: int) -> MetaTensor:
    return MetaTensor(torch.rand(1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def random_views(*more: Any, prob: float = 0.8) -> Compose:
    return Compose(
        [
            RandFlipd("image", prob=0.5, spatial_axis=0),
            RandRotate90d("image", prob=prob, max_k=3, spatial_axes=(0, 1)),
            *more,
        ]
    )


def augmentation(transform: Any, function: Any, batch_size: int = 1, **more: Any) -> TestTimeAugmentation:
    return TestTimeAugmentation(transform, batch_size, inferrer_fn=function, orig_key="image", progress=False, **more)


def naive(x: Tensor, views: Any, predict: Any) -> Tensor:
    """Compute the mean over the views with torch's own flips and permutations; x is (1, C, *spatial)."""
    total = torch.zeros((), dtype=x.dtype)
    for view in views:
        axes = view.axes or tuple(range(x.ndim - 2))
        turned = x.permute(0, 1, *(a + 2 for a in axes)).flip([f + 2 for f in view.flips])
        out = predict(turned).flip([f + 2 for f in view.flips])
        back = torch.argsort(torch.tensor(axes)).tolist()
        total = total + view.weight * out.permute(0, 1, *(a + 2 for a in back))
    return total


@pytest.mark.parametrize("window", [None, (8, 8)])
def test_prediction_and_maps_equal_the_whole_loop(window: tuple[int, int] | None) -> None:
    network, image = small(2), image_of(14, 14)
    inferer = SlidingWindowInferer(window, 2, 0.25, "gaussian") if window else None

    def predict(x: Tensor) -> Tensor:
        return network(x) if inferer is None else inferer(x, network)

    tta = augmentation(random_views(), network if inferer is None else lambda x: inferer(x, network))
    set_determinism(7)
    _, mean, _, _ = tta({"image": image}, 8)
    set_determinism(7)
    case = freeze_augmentation(tta, {"image": image}, 8, inferer=inferer)
    assert len(case.inferer.views) > 1
    assert any(view.axes for view in case.inferer.views)
    x = case.image.as_tensor()[None].clone().requires_grad_(True)
    own = naive(x, case.inferer.views, predict)
    torch.testing.assert_close(own[0].detach(), torch.as_tensor(mean, dtype=torch.float64), rtol=1e-6, atol=1e-7)

    methods = [VanillaBackprop(), Occlusion(window=7, baseline=0.0)]
    target = "Box(1, (2, 3), (11, 9))"
    gradient, occlusion = Explainer(network, case.inferer)(case.image[None], methods, [target])
    score = own[0, 1, 2:11, 3:9].sum()
    (expected,) = torch.autograd.grad(score, x)
    largest = float(expected.abs().max())
    torch.testing.assert_close(gradient.map.as_tensor(), expected[0], rtol=0, atol=1e-10 * largest)
    changed = x.detach().clone()
    changed[..., 0:7, 7:14] = 0
    after = naive(changed, case.inferer.views, predict)[0, 1, 2:11, 3:9].sum()
    assert float(occlusion.map[0, 3, 9]) == pytest.approx(float(score - after), rel=1e-9)


def test_a_volume_that_is_no_cube_is_turned_whole() -> None:
    network, image = small(3), image_of(6, 8, 7)
    tta = augmentation(random_views(), network)
    case = freeze_augmentation(tta, {"image": image}, 6)
    assert any(view.axes for view in case.inferer.views)
    x = case.image.as_tensor()[None].clone().requires_grad_(True)
    score = naive(x, case.inferer.views, network)[0, 1, 1:4, 2:6, 1:5].sum()
    (expected,) = torch.autograd.grad(score, x)
    explainer = Explainer(network, case.inferer)
    (gradient,) = explainer(case.image[None], ["VanillaBackprop"], ["Box(1, (1, 2, 1), (4, 6, 5))"])
    largest = float(expected.abs().max())
    torch.testing.assert_close(gradient.map.as_tensor(), expected[0], rtol=0, atol=1e-10 * largest)


def test_layer_maps_equal_hooks_turned_back() -> None:
    network, image = small(2), image_of(12, 12)
    case = freeze_augmentation(augmentation(random_views(), network), {"image": image}, 6)
    assert any(view.axes for view in case.inferer.views)
    methods = ["GradCam('n', relu=False)", "HiResCam('n', relu=False)", "LayerActivation('n', reduce='sum')"]
    expected = [torch.zeros(12, 12, dtype=torch.float64) for _ in methods]
    for view in case.inferer.views:
        kept: list[Tensor] = []
        handle = network.n.register_forward_hook(lambda m, i, o, kept=kept: kept.append(o))
        out = naive(case.image.as_tensor()[None], [view], network)
        handle.remove()
        (gradient,) = torch.autograd.grad(out[0, 1, 2:7, 2:6].sum(), kept[0])
        axes = view.axes or (0, 1)
        back = [a + 1 for a in torch.argsort(torch.tensor(axes)).tolist()]
        a, g = (v[0].detach().flip([f + 1 for f in view.flips]).permute(0, *back) for v in (kept[0], gradient))
        expected[0] += (g.mean((1, 2), keepdim=True) * a).sum(0)
        expected[1] += (g * a).sum(0)
        expected[2] += view.weight * a.sum(0)
    result = Explainer(network, case.inferer)(case.image[None], methods, ["Box(1, (2, 2), (7, 6))"])
    for ours, truth in zip(result, expected, strict=True):
        torch.testing.assert_close(ours.map.as_tensor()[0], truth, rtol=0, atol=1e-10 * float(truth.abs().max()))


def test_rules_conserve_over_turned_views() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)).double().eval()
    case = freeze_augmentation(augmentation(random_views(), network), {"image": image_of(12, 12)}, 6)
    methods = ["DeepLift(baseline=0.0)", "LRP(composite='Epsilon')"]
    lift, relevance = Explainer(network, case.inferer)(case.image[None], methods, ["Box(1, (0, 0), (12, 12))"])
    assert lift.record["completeness_gap"] < 1e-10
    kept = 1 - relevance.record["absorbed_share"]
    assert float(relevance.map.sum()) / relevance.record["value"] == pytest.approx(kept, abs=1e-6)


def test_transforms_before_the_first_random_one_prepare_the_image() -> None:
    transform = Compose([ScaleIntensityd("image", 0, 5), RandFlipd("image", prob=1.0, spatial_axis=1)])
    network = small(2)
    partial = functools.partial(sliding_window_inference, predictor=network, roi_size=(8, 8), sw_batch_size=1)
    case = freeze_augmentation(augmentation(transform, partial), {"image": image_of(12, 12)}, 2)
    assert float(case.image.max()) == pytest.approx(5)
    assert [view.flips for view in case.inferer.views] == [(1,)]
    assert case.network is network


@pytest.mark.parametrize(
    ("transform", "options", "words"),
    [
        (Compose([RandGaussianNoised("image", prob=1.0)]), {}, "RandGaussianNoised.* do more than to mirror"),
        (RandAffined("image", prob=1.0, rotate_range=0.4), {}, "RandAffined.* do more than to mirror"),
        (RandFlipd("image", prob=1.0), {"post_func": lambda x: x.softmax(0)}, "leave post_func out"),
    ],
)
def test_other_transforms_are_refused(transform: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        freeze_augmentation(augmentation(transform, small(2), **options), {"image": image_of(12, 12)}, 2)


def test_views_of_different_shapes_in_one_batch_are_refused() -> None:
    tta = augmentation(random_views(), small(2), batch_size=4)
    with pytest.raises(UsageError, match="batch_size=1"):
        freeze_augmentation(tta, {"image": image_of(12, 10)}, 8)


def test_windows_of_unequal_sides_are_refused_for_turned_views() -> None:
    network = small(2)
    tta = augmentation(random_views(), network)
    case = freeze_augmentation(tta, {"image": image_of(14, 14)}, 8, inferer=SlidingWindowInferer((8, 6), 1))
    with pytest.raises(EsegetaError, match="windows of equal size"):
        list(Explainer(network, case.inferer)(case.image[None], ["Saliency"], ["MultiClassMask(0)"]))


def test_an_unknown_function_is_refused() -> None:
    with pytest.raises(UsageError, match="name the inferer that it uses"):
        freeze_augmentation(augmentation(random_views(), lambda x: x), {"image": image_of(8, 8)}, 2)
