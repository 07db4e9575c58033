"""Perturbation methods on real images: three MR contrasts of one head, and chest X-rays with a trained network."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from esegeta_monai import Explainer
from esegeta_monai import methods as m
from esegeta_monai.engine.baselines import gaussian_blur
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.networks import small
from tests.support.real import chest_images, image, needs_real_data, pneumonia_cnn

pytestmark = needs_real_data


def contrasts() -> Tensor:
    """T1, T2 and FLAIR of a stroke patient on every sixth voxel, each z-scored: (3, *spatial)."""
    import nibabel as nib

    volumes = [np.asarray(nib.load(image(f"stroke_{c}.nii.gz")).dataobj)[::6, ::6, ::6] for c in ("t1", "t2", "flair")]
    stacked = torch.from_numpy(np.stack(volumes).astype(np.float64))
    flat = stacked.flatten(1)
    return (stacked - flat.mean(1).reshape(-1, 1, 1, 1)) / flat.std(1).reshape(-1, 1, 1, 1)


def test_channel_shapley_of_mr_contrasts_is_the_enumeration():
    """All 2³ subsets by whole predictions, and all 3! orders of them. Random weights: the mechanics, not medicine."""
    case, network = contrasts(), small(3, 3)
    inferer = SlidingWindowInferer((20, 20, 20), 2, 0.25, "gaussian")
    explain = Explainer(network, inferer)
    method = m.ChannelShapley(names=["t1", "t2", "flair"])
    (result,) = explain(case[None], [method], [MultiClassMask(1, output="probability")])
    with torch.no_grad():
        mask = inferer(case[None], network)[0].argmax(0) == 1
    background = torch.cat([case.select(a, e).flatten(1) for a in (1, 2, 3) for e in (0, -1)], 1).median(1).values

    def value(kept: tuple[int, ...]) -> float:
        image = background.reshape(3, 1, 1, 1).expand_as(case).clone()
        image[list(kept)] = case[list(kept)]
        with torch.no_grad():
            return float(inferer(image[None], network)[0].softmax(0)[1][mask].sum())

    subsets = [s for n in range(4) for s in itertools.combinations(range(3), n)]
    values = {frozenset(s): value(s) for s in subsets}
    phi = np.zeros(3)
    for order in itertools.permutations(range(3)):
        for place, channel in enumerate(order):
            before = frozenset(order[:place])
            phi[channel] += (values[before | {channel}] - values[before]) / math.factorial(3)
    rows = result.record["features"]
    assert [row["feature"] for row in rows] == ["t1", "t2", "flair"]
    assert np.abs(np.array([row["value"] for row in rows]) - phi).max() <= 1e-10 * np.abs(phi).max()
    whole = values[frozenset((0, 1, 2))] - values[frozenset()]
    assert result.record["sum"] == pytest.approx(whole, rel=1e-9)


METHODS = [
    m.Rise(n_masks=400, grid=7, baseline="blur", score="change"),
    m.Lime(n_samples=200, feature_mask="grid(4)", baseline="blur"),
    m.Occlusion(4, 2, baseline="blur"),
    m.ExtremalPerturbation(0.15, n_iter=100),
]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_what_a_map_marks_on_chest_x_rays_matters_to_the_network(method):
    """No lungs are outlined in this set. Measured on twelve X-rays with a confident prediction: pneumonia's margin
    falls further when the 15 % that a map marks most are blurred than when as large a square is, anywhere."""
    network = pneumonia_cnn()
    images, labels = chest_images()
    with torch.no_grad():
        out = network(images)
    margins = out[:, 1] - out[:, 0]
    sure = torch.nonzero((labels == 1) & (margins > 1)).flatten()[:: max(1, int((margins > 1).sum()) // 12)][:12]
    explain, gains = Explainer(network), []
    for i in sure.tolist():
        (result,) = explain(images[i : i + 1], [method], [ClassScore(1)])
        blurred = gaussian_blur(images[i], 28 / 8)

        def fall(mask: Tensor, i: int = i, blurred: Tensor = blurred) -> float:
            with torch.no_grad():
                none, pneumonia = network(torch.where(mask, blurred, images[i])[None])[0].tolist()
            return float(margins[i]) - (pneumonia - none)

        ranked = result.map[0].flatten().argsort(descending=True)[: round(0.15 * 28 * 28)]
        marked = torch.zeros(28 * 28, dtype=torch.bool)
        marked[ranked] = True
        squares = []
        for a, b in itertools.product(range(0, 18, 3), repeat=2):
            square = torch.zeros(28, 28, dtype=torch.bool)
            square[a : a + 11, b : b + 11] = True
            squares.append(fall(square))
        gains.append(fall(marked.reshape(28, 28)) - float(np.mean(squares)))
    print(f"{method.name}: {np.mean(gains):.2f} ± {np.std(gains) / math.sqrt(len(gains)):.2f} of a margin, ", end="")
    print(f"{sum(g > 0 for g in gains)} of {len(gains)}, mean margin {float(margins[sure].mean()):.2f}")
    assert np.mean(gains) > 2 * np.std(gains) / math.sqrt(len(gains))
