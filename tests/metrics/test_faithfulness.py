"""Faithfulness: naive whole-volume computation, Captum's infidelity, and ranking of perfect, control and zero maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.metrics import infidelity
from monai.inferers import SimpleInferer
from torch import nn

from esegeta_monai.engine.feature_masks import features_for
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.errors import MetricError, UsageError
from esegeta_monai.methods import Saliency
from esegeta_monai.metrics import (
    IROF,
    METRICS,
    ROAD,
    Deletion,
    FaithfulnessCorrelation,
    Infidelity,
    Insertion,
    MetricInput,
    RegionPerturbation,
    SensitivityN,
    better,
)
from esegeta_monai.targets import Box, Case, ClassScore
from tests.metrics.cases import linear_case, ranked, subject_of, windowed
from tests.support.networks import Computed, small
from tests.support.objectives import Naive
from tests.support.tensors import noise

KINDS = [(k, d) for k in ("classification", "segmentation") for d in (2, 3)]
SIZE = {2: "grid(size=4)", 3: "grid(size=3)"}


def naive_curve(case: Naive, values: torch.Tensor, target: int, insert: bool, background: torch.Tensor, steps: int):
    """Deletion and insertion by whole volumes, features removed by a loop."""
    dims = values.ndim - 1
    features = features_for(SIZE[dims]).of(case.objective)
    labels = features.labels[0]
    seen = torch.zeros_like(labels, dtype=torch.bool)
    for w in case.objective.derive(scores=[case.scores[target]]).windows:
        seen[case.objective.plan.place(w)] = True
    players = sorted(set(labels[seen].tolist()))
    means = {j: float(values[:, labels == j].sum() / (labels == j).sum()) for j in players}
    order = sorted(players, key=lambda j: -means[j])
    counts = sorted({round(c) for c in np.linspace(0, len(order), steps + 1)})
    empty = case.value(background)[target]
    whole = case.value(case.image)[target]
    y = []
    for count in counts:
        gone = torch.isin(labels, torch.tensor(order[count:] if insert else order[:count], dtype=torch.long))
        x = torch.where(gone, background, case.image)
        y.append(float((case.value(x)[target] - empty) / (whole - empty).abs()))
    return np.array(counts) / len(order), np.array(y)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("metric", [Deletion, Insertion])
def test_curves_equal_the_naive_computation(metric, output, dims):
    case = windowed(dims, output)
    values = noise(2, *case.image.shape[1:], seed=9)
    for target in (0, 1):
        result = metric(SIZE[dims], steps=6, baseline=0.25).update(MetricInput(values, case.objective, target))
        background = torch.full_like(case.image, 0.25)
        x, y = naive_curve(case, values, target, metric is Insertion, background, 6)
        assert result.curve["x"] == pytest.approx(x.tolist())
        assert np.abs(np.array(result.curve["y"]) - y).max() <= 1e-10 * np.abs(y).max()
        assert result.value == pytest.approx(float(np.trapezoid(y, x)), rel=1e-10)


def test_deletion_by_hand():
    """F = 3a + b on two voxels with image (1, 1) and baseline 0: deleting a first gives 1, 1/4, 0."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2, bias=False)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 1.0]]))
    case = Naive(net, torch.ones(1, 1, 2, dtype=torch.float64), [ClassScore(1)], SimpleInferer())
    values = torch.tensor([[[3.0, 1.0]]])
    subject = MetricInput(values, case.objective)
    parts = {"features": "grid(size=1)", "baseline": 0.0}
    assert Deletion(**parts).update(subject).value == pytest.approx((1 + 1 / 4) / 4 + (1 / 4 + 0) / 4)
    assert Insertion(**parts).update(subject).value == pytest.approx((0 + 3 / 4) / 4 + (3 / 4 + 1) / 4)
    assert IROF(**parts).update(subject).value == pytest.approx((3 / 4 + 1) / 2)
    region = RegionPerturbation(steps=2, n_samples=1, **parts).update(subject)
    assert region.value == pytest.approx((0 + 3 / 4 + 1) / 3)
    wrong = MetricInput(values.flip(-1), case.objective)
    assert Deletion(**parts).update(wrong).value == pytest.approx((1 + 3 / 4) / 4 + (3 / 4 + 0) / 4)


def test_equal_features_are_removed_in_every_order():
    """F = first of four voxels, one the others do not change: in whatever place a flat map's draw removes it, the area
    is known, and their mean is that over the places. An order by number would give the first place always."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False)).double()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0] * 4, [1.0, 0.0, 0.0, 0.0]]))
    case = Naive(net, torch.ones(1, 1, 4, dtype=torch.float64), [ClassScore(1)], SimpleInferer())
    parts = {"features": "grid(size=1)", "baseline": 0.0, "n_samples": 400}
    # removed as number p of four (0, 1, 2, 3), the curve falls from 1 to 0 between p/4 and (p + 1)/4
    expected = {
        Deletion(**parts): np.mean([(p + 0.5) / 4 for p in range(4)]),
        Insertion(**parts): np.mean([1 - (p + 0.5) / 4 for p in range(4)]),
        IROF(**parts): np.mean([(4 - p) / 4 for p in range(4)]),
        RegionPerturbation(steps=1, **parts): np.mean([1 / 2, 0, 0, 0]),
    }
    for metric, mean in expected.items():
        flat = metric.update(subject_of(case, values=torch.full((1, 1, 4), 0.1)))
        assert flat.n == 400
        assert flat.low < mean < flat.high
        assert flat.high - flat.low < 0.08
    partly = torch.tensor([[[2.0, 1.0, 1.0, 3.0]]])  # the first is the second to go, whatever the order of the others
    result = Deletion(**parts).update(subject_of(case, values=partly))
    assert (result.n, result.value, result.low, result.high) == pytest.approx((400, 1.5 / 4, 1.5 / 4, 1.5 / 4))
    clear = Deletion(**parts).update(subject_of(case, values=torch.tensor([[[2.0, 1.0, 0.0, 3.0]]])))
    assert (clear.n, clear.low) == (1, None)
    backgrounds = [torch.full((1, 1, 4), value) for value in (0.0, 0.5)]
    drawn = Deletion(**{**parts, "baseline": backgrounds, "n_samples": 5})
    assert drawn.update(subject_of(case, values=torch.tensor([[[2.0, 1.0, 0.0, 3.0]]]))).n == 5


@pytest.mark.parametrize(("kind", "dims"), KINDS)
@pytest.mark.parametrize(
    "metric",
    [
        lambda f: Deletion(f, baseline=0.0),
        lambda f: Insertion(f, baseline=0.0),
        lambda f: IROF(f, baseline=0.0),
        lambda f: RegionPerturbation(4, f, baseline=0.0, n_samples=1),
        lambda f: FaithfulnessCorrelation(20, 0.25, f, baseline=0.0),
        lambda f: SensitivityN(3, 12, f, baseline=0.0),
        lambda f: Infidelity(n_samples=20, size=4, baseline=0.0),
    ],
)
def test_the_perfect_map_of_a_linear_network_wins_and_zero_never_does(metric, kind, dims):
    one = metric(SIZE[dims])
    values = ranked(one, linear_case(kind, dims))
    others = {k: v for k, v in values.items() if k != "perfect"}
    for name, value in others.items():
        assert better(one, values["perfect"], value), (name, values)
        assert not better(one, values["zero"], value), (name, values)
    if type(one) in (FaithfulnessCorrelation, SensitivityN):
        assert values["perfect"] == pytest.approx(1, abs=1e-9)
    if type(one) is Infidelity:
        assert values["perfect"] == pytest.approx(0, abs=1e-12)
        assert values["zero"] == 1


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("perturbation", ["noise", "boxes"])
def test_infidelity_is_captums(perturbation, dims, captum_in_float64):
    """The same perturbations through both: normalised as in Yeh 2019, target passed, network seen whole."""
    shape = (2, 8, 10) if dims == 2 else (2, 6, 7, 8)
    net = torch.nn.Sequential(small(dims, 2), torch.nn.Flatten(2)).double()

    def mean(x):
        return net(x).mean(-1)

    case = Naive(Computed(mean), noise(*shape), [ClassScore(1)], SimpleInferer())
    gradient = subject_of(case, Saliency(abs=False))
    metric = Infidelity(perturbation, 24, size=4, multiplied=False, baseline=0.5, keep_sign=False)
    seen: list[torch.Tensor] = []

    if perturbation == "noise":
        from esegeta_monai.engine.baselines import noise_like

        generator = case.objective.generator()
        seen = [noise_like(case.image, metric.std, generator) for _ in range(24)]
    else:
        generator = np.random.default_rng(case.objective.seed)
        for _ in range(24):
            sides = [min(n, 4) for n in shape[1:]]
            start = [int(generator.integers(0, n - s + 1)) for n, s in zip(shape[1:], sides)]
            place = tuple(slice(a, a + s) for a, s in zip(start, sides))
            removed = torch.zeros(shape, dtype=torch.float64)
            removed[(slice(None), *place)] = (case.image - 0.5)[(slice(None), *place)]
            seen.append(removed)
    draws = torch.stack(seen)

    def perturb(inputs):
        return draws, inputs - draws

    expected = infidelity(
        Computed(mean), perturb, case.image[None], gradient.map[None], target=1, n_perturb_samples=24, normalize=True
    )
    result = metric.update(gradient)
    assert result.notes["infidelity"] == pytest.approx(float(expected), rel=1e-9)
    plain = infidelity(Computed(mean), perturb, case.image[None], gradient.map[None], target=1, n_perturb_samples=24)
    assert result.notes["without_scale"] == pytest.approx(float(plain), rel=1e-9)
    assert result.low <= result.value <= result.high


def test_a_map_of_the_wrong_sign_explains_nothing():
    case = linear_case("segmentation", 2)
    wrong = -subject_of(case).map
    metric = Infidelity(n_samples=20, size=4, baseline=0.0)
    assert metric.update(subject_of(case, values=wrong)).value == 1
    assert Infidelity(n_samples=20, size=4, baseline=0.0, keep_sign=False).update(
        subject_of(case, values=wrong)
    ).value == pytest.approx(0, abs=1e-12)


def test_perturbations_that_do_not_depend_on_the_map_are_computed_once():
    case = windowed(2)
    shared: dict = {}
    passes = []
    for seed in range(2):
        for target in (0, 1):
            case.objective.context.progress.start()
            subject = MetricInput(noise(2, 11, 15, seed=seed), case.objective, target, shared=shared)
            for metric in (FaithfulnessCorrelation(features="grid(4)"), Infidelity(), Infidelity("noise", 10)):
                metric.update(subject)
            passes.append(case.objective.context.progress.passes)
    assert passes[0] > 0
    assert passes[2:] == [0, 0]


def test_only_windows_of_the_target_are_asked():
    case = windowed(2)
    small_target = case.objective.derive(scores=[Box(2, (0, 0), (3, 3)).bind(case.predict(case.image), Case())[0]])
    subject = MetricInput(noise(2, 11, 15), small_target)
    result = Deletion("grid(size=4)", steps=5).update(subject)
    assert result.notes["features_seen"] < result.notes["features"]
    assert small_target.context.progress.passes < 6 * len(case.objective.plan)


def test_what_cannot_be_evaluated_is_refused():
    case = windowed(2)
    flat = MetricInput(torch.zeros(2, 11, 15), case.objective)
    assert Deletion().update(flat).value is None
    same = Deletion(baseline=case.image).update(MetricInput(torch.ones(2, 11, 15), case.objective))
    assert "another baseline" in same.notes["undefined"]
    with pytest.raises(MetricError, match="a layer's channels"):
        Deletion().update(MetricInput(torch.ones(5, 11, 15), case.objective))
    with pytest.raises(MetricError, match="an objective"):
        Deletion().update(MetricInput(torch.ones(2, 11, 15)))
    for wrong in (
        lambda: Infidelity(n_samples=9),
        lambda: Deletion(steps=1),
        lambda: FaithfulnessCorrelation(subset=1),
    ):
        with pytest.raises(UsageError):
            wrong()
    one = MetricInput(torch.ones(1, 11, 15), case.objective)  # one channel counts for both
    assert torch.equal(one.per_channel, torch.full((2, 11, 15), 0.5, dtype=torch.float64))


def test_added_volumes_change_as_whole_volumes_do():
    from esegeta_monai.engine.perturbation.base import Added

    for output in ("logit", "probability"):
        case = windowed(3, output)
        deltas = noise(3, *case.image.shape, seed=4)
        naive = torch.stack([case.value(case.image + d) - case.value(case.image) for d in deltas], 1)
        result = score_changes(case.objective, Added(deltas))
        assert float((result - naive).abs().max()) <= 1e-10 * float(case.value(case.image).abs().max())


def test_every_faithfulness_metric_is_listed():
    assert {c.__name__ for c in METRICS if c.group == "faithfulness"} >= {"Deletion", "Insertion", "ROAD", "IROF"}


class Blind(nn.Module):
    """Class 0 is 3.7 and what rounding leaves of a mean taken off: it does not look at the image."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))

    def forward(self, x):
        axes = tuple(range(2, x.ndim))
        left = (x - x.mean(axes, keepdim=True)).sum(1, keepdim=True).mean(axes, keepdim=True)
        return torch.cat([left * self.w + 3.7, left - 1.1], 1) * torch.ones_like(x)


@pytest.mark.parametrize("shape", [(1, 17, 19), (1, 9, 11, 10)])
@pytest.mark.parametrize("metric", [Deletion, Insertion, IROF, RegionPerturbation, ROAD])
def test_rounding_is_no_loss_of_the_target(metric, shape):
    dims = len(shape) - 1
    case = Naive(Blind().eval(), noise(*shape).float() + 2, [Box(0, (1,) * dims, (6,) * dims)])
    result = metric().update(MetricInput(noise(*shape, seed=1), case.objective))
    assert result.value is None
    assert "does not change" in result.notes["undefined"]
