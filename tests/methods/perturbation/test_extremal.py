"""Extremal masks on a network whose cause is known: area met, the cause inside, score kept or destroyed."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import ExtremalPerturbation, run
from esegeta_monai.methods.perturbation.extremal import SmoothMask, _area_error, _of_area
from esegeta_monai.targets import ClassScore, MultiClassMask, Voxel
from tests.support.networks import Computed, small
from tests.support.objectives import Naive
from tests.support.tensors import assert_equal, noise


class BlobDetector(nn.Module):
    """A class wherever the image, averaged over 3 voxels an axis, is brighter than 0.6."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[dims](3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        smooth = self.pool(x)
        return torch.cat([0.6 - smooth, 4 * torch.nn.functional.softplus(6 * (smooth - 0.6))], 1)


def blob(*shape: int) -> tuple[Tensor, Tensor]:
    """A dim noisy image with one bright box, and where the box is."""
    image = 0.2 * torch.rand((1, *shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inside = torch.zeros(shape, dtype=torch.bool)
    inside[tuple(slice(n // 4, n // 4 + n // 3) for n in shape)] = True
    image[0][inside] += 1
    return image, inside


@pytest.mark.parametrize(
    ("shape", "roi", "step", "output"),
    [
        ((48, 60), None, 2, "logit"),
        ((48, 60), None, 2, "probability"),
        ((48, 60), (32, 32), 2, "logit"),
        pytest.param((24, 18, 24), (16, 16, 16), 1, "logit", marks=pytest.mark.slow),
    ],
)
def test_finds_the_blob_within_the_area(shape, roi, step, output):
    image, inside = blob(*shape)
    area = float(inside.double().mean()) * 1.5
    inferer = SimpleInferer() if roi is None else SlidingWindowInferer(roi, 4, 0.5, "gaussian")
    case = Naive(BlobDetector(len(shape)), image, [MultiClassMask(1, output=output)], inferer)
    assert case.objective.scores[0].voxels > 0
    method = ExtremalPerturbation(areas=area, variant="preserve", baseline="zero", n_iter=60, step=step, lr=0.1)
    result = run(method, case.objective)
    mask, notes = result.maps[0, 0], result.note(0)["areas_found"][0]
    assert 0 <= float(mask.min()) <= float(mask.max()) <= 1
    assert notes["area_reached"] == pytest.approx(area, rel=1e-3)
    assert notes["area_reached"] == pytest.approx(float(mask.mean()), abs=1e-9)
    # at best 1/1.5 of the mask lies inside; a mask put anywhere has the blob's share of the volume inside
    assert float(mask[inside].sum() / mask.sum()) > 0.5 > 3 * float(inside.double().mean())
    assert float(mask[inside].mean()) > 0.85
    assert notes["kept"] > 0.75
    assert notes["left_without"] < 0.15
    assert case.objective.context.progress.passes == method.passes(case.objective)
    perturbed = image * mask
    share = (case.value(perturbed) - case.value(image * 0)) / (case.value(image) - case.value(image * 0))
    assert notes["kept"] == pytest.approx(float(share[0]), rel=1e-9)


def test_deletion_finds_it_too():
    image, inside = blob(48, 60)
    case = Naive(BlobDetector(2), image, [MultiClassMask(1)], SimpleInferer())
    area = float(inside.double().mean()) * 1.3
    method = ExtremalPerturbation(area, "delete", "zero", n_iter=60, step=2, lr=0.1)
    result = run(method, case.objective)
    assert float(result.maps[0, 0][inside].mean()) > 0.85
    notes = result.note(0)["areas_found"][0]
    assert notes["left_without"] < 0.3
    without = case.value(image * (1 - result.maps[0]))
    assert notes["value_without"] == pytest.approx(float(without[0]), rel=1e-9)
    assert case.objective.context.progress.passes == method.passes(case.objective)


def fooled_by_blends(x: Tensor) -> Tensor:
    """The brightness of a blob, and far more where the rest is half dimmed: as networks are fooled by blends."""
    blob, rest = x[:, :, 8:14, 8:14], x[:, :, 24:, 24:]
    fooled = 200 * torch.relu(0.3 - (rest.mean((1, 2, 3)) - 0.6).abs())
    return (blob.mean((1, 2, 3)) + fooled)[:, None]


def test_deletion_is_not_led_astray_by_blends():
    """A start from 0.5 everywhere would look at the rest: no image is like that blend, and its slope is no guide."""
    image = torch.ones(1, 40, 40, dtype=torch.float64)
    image[:, 8:14, 8:14] = 3
    case = Naive(Computed(fooled_by_blends), image, [ClassScore(0)], SimpleInferer())
    area = 36 / 1600 * 1.5
    result = run(ExtremalPerturbation(area, "delete", "zero", n_iter=60, step=2, lr=0.1), case.objective)
    mask = result.maps[0, 0]
    assert float(mask[6:16, 6:16].sum() / mask.sum()) > 0.9
    assert result.note(0)["areas_found"][0]["value_without"] < 0.3 * float(case.value(image)[0])


def test_a_series_is_the_mean_of_its_masks_and_each_area_is_met():
    image, _ = blob(48, 60)
    case = Naive(BlobDetector(2), image, [MultiClassMask(1), Voxel(1, index=(16, 19))], SimpleInferer())
    areas = (0.05, 0.1, 0.2)
    options = {"variant": "preserve", "baseline": "zero", "n_iter": 30, "step": 3, "lr": 0.1}
    series = run(ExtremalPerturbation(areas, **options), case.objective)
    single = [run(ExtremalPerturbation(a, **options), case.objective).maps for a in areas]
    assert torch.allclose(series.maps, torch.stack(single).mean(0), rtol=0, atol=1e-12)
    for k in range(2):
        rows = series.note(k)["areas_found"]
        assert [r["area"] for r in rows] == list(areas)
        assert [r["area_reached"] for r in rows] == pytest.approx(areas, rel=1e-3)
        kept = [r["kept"] for r in rows]
        assert kept == sorted(kept) if k == 0 else min(kept) > 0.9  # one voxel needs no more than the smallest area


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("shape", [(6, 20), (6, 14, 7)])
def test_the_slope_is_that_of_the_naive_computation(shape, norm, output):
    """∂F/∂m through gaussian windows against autograd through MONAI's inferer, under a norm and padding."""
    from esegeta_monai.methods.perturbation.extremal import _Single

    image = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    case = Naive(small(len(shape), 2, norm), image, [MultiClassMask(1, output=output)])
    mask = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_(True)
    x0 = torch.full_like(image, 0.2)
    prediction = case.inferer((x0 + mask * (image - x0))[None], case.net)[0]
    value = case.scores[0].value(case.scores[0].crop(prediction))
    (slope,) = torch.autograd.grad(value, mask)
    with frozen(case.net):
        game = _Single(case.objective, x0)
        actual = game.slope(mask.detach()[game.box]) * abs(game.rise)
    assert_equal(actual, slope[game.box])
    assert_equal(slope.sum(), slope[game.box].sum())  # outside its windows the target sees nothing


def test_only_the_box_of_windows_that_the_target_sees_is_searched():
    case = Naive(small(), torch.rand(1, 8, 40, dtype=torch.float64), [Voxel(1, index=(1, 1))])
    with frozen(case.net):
        result = run(ExtremalPerturbation(0.2, "preserve", "zero", n_iter=20, lr=0.2), case.objective)
    assert bool((result.maps[..., 8:] == 0).all())
    assert bool(result.maps.any())
    assert case.objective.context.progress.passes == 20 + 3


def test_the_smooth_maximum_by_hand():
    smooth = SmoothMask((5, 5), step=1, sigma=1.0)
    assert smooth.grid == (5, 5)
    one = torch.zeros(5, 5, dtype=torch.float64)
    one[2, 2] = 1
    mask = smooth.fine(smooth.coarse(one))
    height = torch.exp(torch.tensor(-0.5, dtype=torch.float64))
    others = sum(1 for o, _ in smooth.bumps) - 1
    weighted = height * torch.exp(20 * height) / (torch.exp(20 * height) + others)
    assert float(mask[2, 3]) == pytest.approx(float(weighted), rel=1e-12)
    assert float(mask[0, 0]) == 0  # √8 cells away: beyond 2σ
    assert float(smooth.coarse(torch.ones(5, 5, dtype=torch.float64))[2, 2]) == pytest.approx(1, abs=1e-2)


def test_the_area_is_met_by_a_power_of_the_mask():
    mask = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert torch.allclose(_of_area(mask, 1 / 3), mask**2, atol=1e-3)  # the mean of u² is a third
    assert float(_of_area((mask > 0.5).double(), 0.1).mean()) == pytest.approx(0.5, abs=1e-3)  # nothing to move


def test_area_error():
    mask = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert float(_area_error(mask, 0.5)) == 0
    assert float(_area_error(mask, 0.25)) == 0.25


def test_what_is_refused():
    for areas in ((), 0.0, 1.0, (0.1, 2.0)):
        with pytest.raises(UsageError, match="areas"):
            ExtremalPerturbation(areas)
    with pytest.raises(UsageError, match="variant"):
        ExtremalPerturbation(variant="keep")
    image, _ = blob(12, 12)
    case = Naive(BlobDetector(2), image, [MultiClassMask(1)], SimpleInferer())
    with pytest.raises(MethodError, match="another baseline"):
        run(ExtremalPerturbation(baseline=image), case.objective)


@pytest.mark.parametrize(("area", "step"), [(0.001, None), (0.999, None), (0.1, 100)])
def test_an_area_that_the_mask_cannot_have_is_refused(area, step):
    """The mask was the same shade of 0.001 everywhere, and its area was "met"."""
    method = ExtremalPerturbation(area, step=step, n_iter=2)
    with pytest.raises(UsageError, match="none or all of them"):
        list(Explainer(small(2, 1))(noise(1, 1, 12, 12), [method], [Voxel(1, index=(2, 2))]))


def test_each_target_has_its_own_warnings():
    net, image = small(2, 1), noise(1, 1, 12, 12)
    targets = [Voxel(c, index=(i, 5), name=f"v{c}{i}") for c in range(3) for i in (2, 6, 9)]
    result = list(Explainer(net)(image, [ExtremalPerturbation(n_iter=1)], targets))
    warned = [f for f in result if f.record["warnings"]]
    assert 0 < len(warned) < len(result)
    assert all(w.startswith(f"{f.label}: ") for f in warned for w in f.record["warnings"])
