"""BAM: formulas by hand, networks that use the object or the scene, and controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.model_contrast import (
    input_dependence_rate,
    input_independence_rate,
    insignificant_patch,
    model_contrast_score,
    region_attribution,
)
from tests.support.scenes import accuracy, pair, scenes

METHODS = ["IntegratedGradients(baseline='zero', n_steps=16)", "InputXGradient"]


def maps_of(model: nn.Module, images: torch.Tensor, classes: torch.Tensor, method: str) -> list[torch.Tensor]:
    explainer = Explainer(model, checks=False)
    return [
        next(iter(explainer(image[None], [method], [f"ClassScore({int(k)})"]))).map.as_tensor()
        for image, k in zip(images, classes)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dims", [2, 3])
def test_two_networks_on_the_same_images(dims: int, method: str) -> None:
    of_objects, of_scenes = pair(dims)
    test = scenes(12, dims, 1)
    assert accuracy(of_objects, test.images, test.objects) >= 0.9
    assert accuracy(of_scenes, test.images, test.scenes) >= 0.9
    first = maps_of(of_objects, test.images, test.objects, method)
    second = maps_of(of_scenes, test.images, test.scenes, method)
    mcs = model_contrast_score(first, second, test.masks)
    rng = np.random.default_rng(0)
    chance = []
    for _ in range(50):
        random = [[torch.from_numpy(rng.normal(size=m.shape)) for m in first] for _ in range(2)]
        chance.append(model_contrast_score(*random, test.masks))
    idr = input_dependence_rate(second, maps_of(of_scenes, test.empty, test.scenes, method), test.masks)
    print(dims, method, mcs, max(map(abs, chance)), idr)
    assert mcs > max(map(abs, chance))
    assert model_contrast_score(first, first, test.masks) == 0  # a map that ignores the network, such as edges


@pytest.mark.parametrize("dims", [2, 3])
def test_region_attribution_by_hand(dims: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (6,) * dims
    attribution = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) > 0.7
    total = np.abs(attribution.numpy()).sum(0)
    scaled = np.minimum(total / np.quantile(total, 0.99), 1)
    (value,) = region_attribution([attribution], [mask])
    assert float(value) == pytest.approx(scaled[mask.numpy()].mean(), rel=1e-12)


def test_rates_by_hand() -> None:
    mask = torch.tensor([1, 0, 0, 0])

    def regions(*values: float) -> list[torch.Tensor]:
        return [torch.tensor([[v, 1.0, 1.0, 1.0]], dtype=torch.float64) for v in values]

    masks = [mask] * 4
    before, after = regions(0.5, 0.5, 0.5, 0.5), regions(0.4, 0.49, 0.6, 0.5)
    assert input_dependence_rate(after, before, masks) == 0.5
    assert input_independence_rate(after, before, masks) == 0.5
    assert input_independence_rate(after, before, masks, threshold=0.5) == 1.0
    assert model_contrast_score(after, before, masks) == pytest.approx((-0.1 - 0.01 + 0.1) / 4)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_insignificant_patch(dims: int) -> None:
    """The network ignores the patch, and not noise of the same size; IIR is high for a map that follows the output."""
    model = pair(dims)[1]
    held = scenes(4, dims, 3)
    patched, changes, noises = [], [], []
    for image, mask in zip(held.empty, held.masks):
        new = insignificant_patch(model, image, mask, 0.3)
        delta = new - image
        assert float(delta[:, ~mask].abs().max()) == 0
        assert float(delta[:, mask].square().mean().sqrt()) == pytest.approx(0.3, rel=1e-4)
        noise = torch.where(mask, torch.randn(image.shape, generator=torch.Generator().manual_seed(1)), 0)
        noise *= 0.3 / noise[:, mask].square().mean().sqrt()
        with torch.no_grad():
            base = model(image[None])
            changes.append(float((model(new[None]) - base).norm()))
            noises.append(float((model((image + noise)[None]) - base).norm()))
        patched.append(new)
    print(dims, changes, noises)
    assert np.mean(changes) <= 0.1 * np.mean(noises) + 1e-6
    maps = [maps_of(model, images, held.scenes, "InputXGradient") for images in (torch.stack(patched), held.empty)]
    assert 0 <= input_independence_rate(*maps, held.masks) <= 1
    assert input_independence_rate(maps[1], maps[1], held.masks) == 1


def test_wrong_inputs_are_refused() -> None:
    attribution, mask = torch.rand(1, 4, 4), torch.ones(4, 4)
    for maps, masks in (
        ([], []),
        ([attribution], []),
        ([attribution], [torch.zeros(4, 4)]),
        ([attribution], [torch.ones(4)]),
    ):
        with pytest.raises(InputError):
            region_attribution(maps, masks)
    with pytest.raises(UsageError):
        input_independence_rate([attribution], [attribution], [mask], 0.0)
    with pytest.raises(UsageError):
        insignificant_patch(nn.Flatten(), attribution, mask, 0.0)
    with pytest.raises(InputError):
        insignificant_patch(nn.Flatten(), attribution, torch.zeros(4, 4), 1.0)
    assert region_attribution([torch.zeros(1, 4, 4)], [mask]).tolist() == [0.0]
