"""Regions with p-values: against whole volumes, under exchangeable donors, and with borders as the only cause."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.feature_masks import LabelMap, Supervoxels
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.methods import RegionTest, run
from esegeta_monai.targets import ClassScore, MultiClassMask, Target, Voxel
from tests.support.networks import Computed, plain, small
from tests.support.objectives import Naive
from tests.support.tensors import noise


class Weighted(nn.Module):
    """Two outputs, each a weighted sum of the image: the change of a region is known."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([torch.zeros_like(weight), weight]).double())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.flatten(1).T


def table_of(method: RegionTest, case: Naive) -> dict[str, dict[str, float]]:
    """Run the test and return the table of the first target, by name of the region."""
    with frozen(case.net):
        result = run(method, case.objective)
    return {row["feature"]: row for row in result.note(0)["features"]}


def classified(net: nn.Module, image: Tensor) -> Naive:
    return Naive(net, image, [ClassScore(1)], SimpleInferer())


def by_definition(case: Naive, donors: list[Tensor], labels: Tensor) -> list[dict[str, float]]:
    """p and seam of each region, from whole volumes through MONAI's inferer."""
    rows, own = [], case.value(case.image)[0]
    for j in range(int(labels.max()) + 1):
        inside = (labels == j).expand_as(case.image)
        pasted = [case.value(torch.where(inside, d, case.image))[0] for d in donors]
        back = [case.value(torch.where(inside, case.image, d))[0] - case.value(d)[0] for d in donors]
        drops = torch.stack([own - value for value in pasted])
        rows.append(
            {
                "p": (1 + sum(bool(value >= own) for value in pasted)) / (len(donors) + 1),
                "seam": sum(bool(b < 0) for b in back) / len(donors),
                "value": float(drops.mean()),
            }
        )
    return rows


def boxes(shape: tuple[int, ...], size: int) -> Tensor:
    """Numbers of the boxes of a grid, (*spatial)."""
    counts = [-(-n // size) for n in shape]
    labels = torch.zeros(shape, dtype=torch.long)
    for axis, (n, count) in enumerate(zip(shape, counts)):
        line = torch.arange(n) // size
        labels = labels * count + line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return labels


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize("dims", [2, 3])
def test_windowed_segmentation_equals_the_definition(dims, output):
    shape = (10, 12) if dims == 2 else (6, 10, 9)
    case = Naive(small(dims, 2), noise(2, *shape), [MultiClassMask(1, output=output)])
    donors = [noise(2, *shape, seed=s) for s in range(1, 6)]
    rows = table_of(RegionTest(donors, "grid(5)"), case)
    expected = by_definition(case, donors, boxes(shape, 5))
    assert len(rows) == len(expected) > 3
    assert len({e["p"] for e in expected}) > 1
    for row, truth in zip(rows.values(), expected):
        assert row["p"] == pytest.approx(truth["p"], abs=1e-12)
        assert row["seam"] == pytest.approx(truth["seam"], abs=1e-12)
        assert row["value"] == pytest.approx(truth["value"], rel=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_classification_equals_the_definition(dims):
    net, _ = plain(dims)
    shape = (6,) * dims
    case = classified(net, noise(2, *shape))
    donors = [noise(2, *shape, seed=s) for s in range(1, 8)]
    rows = table_of(RegionTest(donors, "grid(3)"), case)
    for row, truth in zip(rows.values(), by_definition(case, donors, boxes(shape, 3))):
        assert row["p"] == pytest.approx(truth["p"], abs=1e-12)
        assert row["seam"] == pytest.approx(truth["seam"], abs=1e-12)


def test_the_map_shows_significant_regions_only():
    """One box of the scan is far brighter than those of all donors, and the score is the sum."""
    image = noise(1, 8, 8)
    image[..., :4, :4] += 5
    case = classified(Weighted(torch.ones(1, 8, 8)), image)
    donors = [noise(1, 8, 8, seed=s) for s in range(1, 100)]
    with frozen(case.net):
        result = run(RegionTest(donors, "grid(4)"), case.objective)
    rows, note = result.note(0)["features"], result.note(0)
    assert [row["significant"] for row in rows] == [1.0, 0.0, 0.0, 0.0]
    assert rows[0]["p"] == pytest.approx(0.01)
    assert rows[0]["p_adjusted"] == pytest.approx(0.04)
    assert bool((result.maps[0, 0, :4, :4] == rows[0]["value"]).all())
    assert not bool(result.maps[0, 0, 4:].any() or result.maps[0, 0, :, 4:].any())
    assert rows[0]["value"] == pytest.approx(
        float(image[0, :4, :4].sum() - torch.stack(donors)[:, 0, :4, :4].sum((1, 2)).mean()), rel=1e-9
    )
    assert note["claim"].startswith("the network's score for this scan is higher with this content than with that of a")
    assert "a share of these donors: box 0 0 (q = 0.05); a large p does not mean" in note["claim"]
    assert "assumes positive dependence" in note["correction"]
    with frozen(case.net):
        other = run(RegionTest(donors, "grid(4)", correction="BY"), case.objective)
    assert other.note(0)["features"][0]["p_adjusted"] == pytest.approx(0.04 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert "any dependence" in other.note(0)["correction"]


@pytest.mark.parametrize("dims", [2, 3])
def test_an_ignored_region_has_p_1(dims):
    shape = (8, 24) if dims == 2 else (8, 8, 24)
    targets: list[Target] = [Voxel(1, index=(1,) * dims)]
    case = Naive(small(dims, 1), noise(1, *shape), targets)
    rows = table_of(RegionTest([noise(1, *shape, seed=s) for s in (1, 2, 3)], "grid(8)"), case)
    *_, last = rows.values()
    assert last["p"] == 1.0
    assert last["value"] == 0.0
    weight = torch.ones(1, 8, 8)
    weight[..., 4:] = 0
    rows = table_of(
        RegionTest([noise(1, 8, 8, seed=s) for s in (1, 2, 3)], "grid(4)"), classified(Weighted(weight), noise(1, 8, 8))
    )
    assert rows["box 0 4"]["p"] == rows["box 4 4"]["p"] == 1.0


def test_rounding_is_no_evidence():
    """The right half only gives factors that are divided out again: what is left of it is rounding."""

    def rounded(x: Tensor) -> Tensor:
        other = 2 + x[..., 4:].sigmoid()
        value = (x[..., :4] * other / other).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(value), value], 1)

    net = Computed(rounded)
    image, donors = noise(1, 8, 8, seed=50).float(), [noise(1, 8, 8, seed=s).float() for s in range(1, 20)]
    case = classified(net, image)
    values = [float(case.value(torch.cat([image[..., :4], d[..., 4:]], -1))[0]) for d in donors]
    assert any(value < float(case.value(image)[0]) for value in values)  # without τ, p would be below 1
    with frozen(case.net):
        result = run(RegionTest(donors, "grid([8, 4])"), case.objective)
    note = result.note(0)
    assert note["features"][1]["p"] == 1.0
    assert note["tau"] == pytest.approx(10 * note["score_noise"])
    assert 0 < note["tau"] < 0.05 * abs(float(case.value(image)[0]))


def p_values(of: object, scans: int, donors: int = 19) -> Tensor:
    """p of all regions of scans that are exchangeable with their donors: bright and dark areas, a linear score."""

    def scan(seed: int) -> Tensor:
        smooth = nn.functional.avg_pool2d(nn.functional.avg_pool2d(noise(1, 32, 32, seed=seed), 5, 1), 5, 1)
        return smooth.sign() + 0.01 * noise(1, 24, 24, seed=seed)

    net, values = Weighted(torch.ones(1, 24, 24)), []
    for s in range(scans):
        first = s * (donors + 1)
        case = classified(net, scan(first))
        method = RegionTest(
            [scan(first + i) for i in range(1, donors + 1)],
            of if isinstance(of, str) else of(case),
            registered=not isinstance(of, str),
            seam_control=False,
        )
        values += [row["p"] for row in table_of(method, case).values()]
    return torch.tensor(values)


def exceeding(p: Tensor, donors: int = 19) -> float:
    """By how many standard errors of uniform p-values a share of them is too small, at most."""
    levels = torch.arange(1, donors + 1) / (donors + 1)
    shares = torch.stack([(p <= level + 1e-9).double().mean() for level in levels])
    return float(((shares - levels) / (levels * (1 - levels) / len(p)).sqrt()).max())


def test_p_is_super_uniform_under_exchangeable_donors():
    p = p_values("grid(12)", 60)
    assert len(p) == 240
    assert exceeding(p) <= 3  # the largest of 19 dependent deviations
    assert float(p.mean()) == pytest.approx(0.525, abs=0.06)  # uniform on 1/20 … 1, not merely large


def test_regions_drawn_from_the_scan_fail_the_uniformity_test():
    """This is why supervoxels get no p-values: here they are passed off as an atlas."""

    def drawn(case: Naive) -> LabelMap:
        labels = Supervoxels(12, 0.1, mask="everything").of(case.objective).labels[0]
        return LabelMap(labels + 1)

    p = p_values(drawn, 20)
    assert len(p) > 60
    assert exceeding(p) > 8
    assert float((p <= 0.05).double().mean()) > 0.2


@pytest.mark.parametrize("regions", ["supervoxels(6, mask='everything')", boxes((8, 8), 4) + 1])
def test_regions_that_may_be_drawn_from_the_scan_get_ranks(regions):
    case, donors = classified(Weighted(torch.ones(1, 8, 8)), noise(1, 8, 8)), [noise(1, 8, 8, seed=s) for s in (1, 2)]
    with frozen(case.net):
        result = run(RegionTest(donors, regions), case.objective)
    note = result.note(0)
    assert "p-values are not valid: ranks among donors" in note["p_values"]
    assert ("registered=True" in note["p_values"]) == (not isinstance(regions, str))
    assert not {"correction", "claim", "q"} & set(note)
    for row in note["features"]:
        assert "p" not in row
        assert "significant" not in row
        assert row["rank_among_donors"] == 1 + row["donors_at_least"]
    assert bool(result.maps.any())
    if not isinstance(regions, str):
        atlas = table_of(RegionTest(donors, regions, registered=True), case)
        assert [r["p"] for r in atlas.values()] == [r["rank_among_donors"] / 3 for r in note["features"]]


def test_the_seam_control_tells_borders_from_content():
    """Constant images: the score that punishes edges falls with every paste, whatever its content."""

    def edges(x: Tensor) -> Tensor:
        value = -(x[..., 1:] - x[..., :-1]).abs().sum((1, 2, 3)) - (x[..., 1:, :] - x[..., :-1, :]).abs().sum((1, 2, 3))
        return torch.stack([torch.zeros_like(value), value], 1)

    donors = [torch.full((1, 8, 8), float(v), dtype=torch.float64) for v in torch.linspace(1, 2, 99)]
    image = torch.full((1, 8, 8), 3.0, dtype=torch.float64)
    case = classified(Computed(edges), image)
    rows = table_of(RegionTest(donors, "grid(4)"), case)
    assert all(row["significant"] == 1.0 and row["seam"] == 1.0 for row in rows.values())
    assert any("the border of the region may be the cause" in text for text in case.objective.context.progress.warnings)
    case = classified(Weighted(torch.ones(1, 8, 8)), image)
    rows = table_of(RegionTest(donors, "grid(4)"), case)
    assert all(row["significant"] == 1.0 and row["seam"] == 0.0 for row in rows.values())
    assert case.objective.context.progress.warnings == []


def test_what_can_be_significant_is_stated_before_the_run():
    explainer = Explainer(Weighted(torch.ones(1, 8, 8)), checks=False)
    image, donors = noise(1, 1, 8, 8), [noise(1, 8, 8, seed=s) for s in range(1, 40)]
    few, some = RegionTest(donors[:3], "grid(4)"), RegionTest(donors, "grid(2)")
    enough, ranked = RegionTest(donors[:39], "grid([8, 4])"), RegionTest(donors, "supervoxels(4, mask='everything')")
    costs = list(explainer.costs(image, [few, some, enough, ranked], [ClassScore(1)]))
    assert costs[0].statement == (
        "3 donors: the least p is 1/4 = 0.25; of 4 regions, none can be significant at q = 0.05: give at least 19 "
        "donors, or 79 so that a single region can be"
    )
    assert "of 16 regions, 8 to 16 can be significant at q = 0.05, never fewer than 8" in str(costs[1].statement)
    assert str(costs[2].statement).endswith("of 2 regions, 1 to 2 can be significant at q = 0.05")
    assert "ranks among donors" in str(costs[3].statement)
    for method, cost in zip([few, some, enough, ranked], costs):
        (attribution,) = explainer(image, [method], [ClassScore(1)])
        assert attribution.record["statement"] == cost.statement
        assert (cost.statement in attribution.record["warnings"]) == (method in (few, some))
        assert attribution.record["window_passes"] == cost.passes


def test_wrong_donors_and_parameters_are_refused():
    image = noise(1, 8, 8)
    with pytest.raises(UsageError, match=r"cases has 1.*FeatureAblation"):
        RegionTest([image])
    with pytest.raises(UsageError, match=r"q=1.5: the false discovery rate"):
        RegionTest([image, -image], q=1.5)
    with pytest.raises(UsageError, match="registered=True concerns the label map"):
        RegionTest([image, -image], "grid", registered=True)
    case = classified(Weighted(torch.ones(1, 8, 8)), image)
    for cases, other in (([-image, image.clone()], "the image itself"), ([-image, -image], r"cases\[1\]")):
        with frozen(case.net), pytest.raises(InputError, match=f"is equal to {other}: each donor must be another"):
            run(RegionTest(cases, "grid(4)"), case.objective)
