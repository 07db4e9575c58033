"""Drop, increase and gain against whole volumes; ROAD's imputation against a dense linear solve; ranking."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from esegeta_monai.errors import UsageError
from esegeta_monai.metrics import ROAD, AverageDrop, AverageGain, AverageIncrease, MetricInput, better
from esegeta_monai.metrics.base import mean_interval
from esegeta_monai.metrics.masking import imputed, unit_mask
from esegeta_monai.targets import Box, ClassScore, MultiClassMask
from tests.metrics.cases import LinearClassifier, linear_case, ranked, subject_of
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import noise


@pytest.mark.parametrize("dims", [2, 3])
def test_drop_increase_and_gain_of_voxels_by_whole_volumes(dims):
    shape = (2, 9, 12) if dims == 2 else (2, 8, 9, 8)
    image = noise(*shape)
    target, other = MultiClassMask(1), Box(2, (1,) * dims, (5,) * dims)
    case = Naive(small(dims, 2), image, [target, other])
    probability = Naive(
        case.net,
        image,
        [
            MultiClassMask(1, output="probability", reduction="mean"),
            Box(2, (1,) * dims, (5,) * dims, output="probability", reduction="mean"),
        ],
    )
    values = noise(2, *shape[1:], seed=3)
    mask = values.clamp(min=0).sum(0)
    mask = (mask - mask.min()) / (mask.max() - mask.min())
    seen = 0.3 + mask * (image - 0.3)
    for k in (0, 1):
        before, after = float(probability.value(image)[k]), float(probability.value(seen)[k])
        subject = MetricInput(values, case.objective, k)
        assert 0 < before < 1
        drop = AverageDrop(baseline=0.3).update(subject)
        assert drop.notes["before"] == pytest.approx(before, rel=1e-10)
        assert drop.value == pytest.approx(max(0, before - after) / before, rel=1e-9)
        assert AverageIncrease(baseline=0.3).update(subject).value == (after > before)
        gain = AverageGain(baseline=0.3).update(subject)
        assert gain.value == pytest.approx(max(0, after - before) / (1 - before), rel=1e-9)


def test_the_unmasked_windows_are_computed_once_for_all_maps():
    """One pass per window for the first map to compare with and for each map, as for each map alone."""
    case = Naive(small(2, 2), noise(2, 9, 12), [MultiClassMask(1)])
    windows, shared = len(case.objective.windows), {}
    subjects = [MetricInput(noise(2, 9, 12, seed=s), case.objective, shared=shared) for s in range(3)]
    passes, values = [], []
    for subject in subjects:
        before = case.objective.context.progress.passes
        values.append([m.update(subject).value for m in (AverageDrop(0.3), AverageGain(0.3), AverageIncrease(0.3))])
        passes.append(case.objective.context.progress.passes - before)
    assert passes == [2 * windows, windows, windows]
    for subject, result in zip(subjects, values):
        alone = MetricInput(subject.map, case.objective)
        expected = [m.update(alone).value for m in (AverageDrop(0.3), AverageGain(0.3), AverageIncrease(0.3))]
        assert result == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("dims", [2, 3])
def test_a_map_of_what_the_class_needs_drops_less_than_controls(dims):
    case = linear_case("classification", dims)
    probability = Naive(case.net, case.image, [ClassScore(1)], case.inferer)
    values = ranked(AverageDrop(baseline=0.0), probability)
    assert values["zero"] is None, "what shows nothing is not judged by the baseline's probability"
    # flat maps hide everything: their mask is zero
    asked = Naive(case.net, case.image, [ClassScore(1, output="probability")], case.inferer)
    before, after = float(asked.value(case.image)), float(asked.value(torch.zeros_like(case.image)))
    assert values["control:constant"] == pytest.approx(max(0.0, before - after) / before, rel=1e-9)
    assert better(AverageDrop, values["perfect"], values["control:constant"])
    assert not bool(unit_mask(torch.ones(1, 4, 4)).any())
    gain = ranked(AverageGain(baseline=0.0), probability)
    for name in ("control:constant", "control:random", "control:sobel"):
        assert gain["perfect"] >= gain[name]


@pytest.mark.parametrize("metric", [AverageDrop, AverageGain, AverageIncrease])
def test_a_zero_map_gains_nothing_where_the_baseline_is_likelier_than_the_image(metric):
    """A class that the image speaks against: with nothing of the image left it is likelier."""
    case = linear_case("classification", 2)
    against = min((0, 1), key=lambda c: float(case.predict(case.image)[c]))
    unlikely = Naive(case.net, case.image, [ClassScore(against)], case.inferer)
    result = metric(baseline=0.0).update(subject_of(unlikely, values=torch.zeros_like(case.image)))
    assert result.value is None
    assert "zero everywhere" in result.notes["undefined"]
    shown = metric(baseline=0.0).update(subject_of(unlikely, values=torch.ones_like(case.image)))
    assert shown.notes["after"] > shown.notes["before"], "or there was nothing to gain"


def test_a_probability_of_nought_has_nothing_to_lose():
    case = linear_case("classification", 2)
    against = min((0, 1), key=lambda c: float(case.predict(case.image)[c]))
    image = 1e4 * case.image
    impossible = Naive(case.net, image, [ClassScore(against)], case.inferer)
    result = AverageDrop(baseline=0.0).update(subject_of(impossible))
    assert result.value is None
    assert "probability is 0" in result.notes["undefined"]


@pytest.mark.parametrize("shape", [(2, 7, 6), (2, 4, 5, 4)])
def test_imputation_is_the_solution_of_the_linear_system(shape):
    image, dims = noise(*shape), len(shape) - 1
    removed = noise(*shape[1:], seed=7) > -0.5
    assert removed.double().mean() > 0.5
    result = imputed(image, removed, 0.0, torch.Generator().manual_seed(0), tolerance=1e-13)
    places = [tuple(p) for p in np.argwhere(removed.numpy())]
    number = {p: i for i, p in enumerate(places)}
    for channel in range(2):
        matrix, right = np.eye(len(places)), np.zeros(len(places))
        for p, i in number.items():
            around = {}
            for step in itertools.product((-1, 0, 1), repeat=dims):
                q = tuple(a + b for a, b in zip(p, step))
                if any(step) and all(0 <= a < n for a, n in zip(q, shape[1:])):
                    around[q] = 1 / sum(s * s for s in step)
            total = sum(around.values())
            for q, weight in around.items():
                if q in number:
                    matrix[i, number[q]] -= weight / total
                else:
                    right[i] += weight / total * float(image[(channel, *q)])
        solution = np.linalg.solve(matrix, right)
        actual = np.array([float(result[(channel, *p)]) for p in places])
        assert np.abs(actual - solution).max() <= 1e-10 * np.abs(solution).max()
    assert torch.equal(result[:, ~removed], image[:, ~removed])


@pytest.mark.parametrize("dims", [2, 3])
def test_voxels_between_zeros_are_zero_whatever_the_other_channel_needs(dims):
    """Nearly all round a bright middle is removed: of channel 0, dark there, and of channel 1, which is noise. The
    system of the first is solved from the start, and must stay so while the second is still being solved."""
    shape = (2, *(24,) * dims)
    image = noise(*shape)
    middle = tuple(slice(8, 16) for _ in range(dims))
    removed = torch.rand(shape[1:], generator=torch.Generator().manual_seed(1)) < 0.99
    removed[middle] = False
    image[0] = 0
    image[(0, *(slice(10, 14) for _ in range(dims)))] = 5.0
    result = imputed(image, removed, 0.0, torch.Generator(), tolerance=1e-12)
    assert torch.equal(result[0], image[0])
    alone = imputed(image[1:], removed, 0.0, torch.Generator(), tolerance=1e-12)
    assert (result[1] - alone[0]).abs().max() <= 1e-9


def test_in_2d_the_weights_are_those_of_the_paper():
    image = torch.arange(9, dtype=torch.float64).reshape(1, 3, 3) ** 2
    removed = torch.zeros(3, 3, dtype=torch.bool)
    removed[1, 1] = True
    result = imputed(image, removed, 0.0, torch.Generator(), tolerance=1e-13)[0, 1, 1]
    direct, diagonal = [1, 9, 25, 49], [0, 4, 36, 64]
    assert float(result) == pytest.approx(sum(direct) / 6 + sum(diagonal) / 12)


@pytest.mark.parametrize("kind", ["classification", "segmentation"])
@pytest.mark.parametrize("dims", [2, 3])
def test_road_ranks_the_perfect_map_first(kind, dims):
    case = linear_case(kind, dims)
    values = ranked(ROAD(baseline=0.0), case)
    for name, value in values.items():
        if name != "perfect":
            assert better(ROAD, values["perfect"], value), values
    assert values["zero"] is None
    subject = subject_of(case)
    more, less = ROAD("morf", baseline=0.0).update(subject), ROAD("lerf", baseline=0.0).update(subject)
    assert values["perfect"] == pytest.approx((more.value - less.value) / 2)
    assert better(ROAD("lerf"), 0.1, 0.2)
    assert better(ROAD("morf"), 0.2, 0.1)


@pytest.mark.parametrize("dims", [2, 3])
def test_road_gives_nothing_to_a_flat_map(dims):
    """The voxels that a linear network reads are in the first corner; an order by index would remove them first. In
    random orders the strongest and the weakest share cost the same on average."""
    case, road = linear_case("classification", dims), ROAD(baseline=0.0)
    result = []
    for seed in range(30):
        case.objective = case.objective.derive(seed=seed)
        result.append(road.update(subject_of(case, values=torch.full_like(case.image, 0.1))).value)
    low, high = mean_interval(result)
    assert low < 0 < high
    shown = road.update(subject_of(case)).value
    assert high - low < shown / 5


def test_wrong_parameters():
    with pytest.raises(UsageError, match="order"):
        ROAD("both")
    with pytest.raises(UsageError, match="shares"):
        ROAD(shares=(0.5, 1.0))
    assert LinearClassifier((2, 4, 4)).weight.shape == (2, 2, 4, 4)
