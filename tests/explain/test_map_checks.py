"""Checks of finished maps: right maps pass; halved, flipped, permuted, shifted and reversed ones do not."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import UsageError
from esegeta_monai.explain.map_checks import MAP_CHECKS, FinishedMap, check_map
from esegeta_monai.methods import (
    LRP,
    METHODS,
    DeepLift,
    DeepLiftShap,
    FeatureAblation,
    GradCam,
    GradientShap,
    HiResCam,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerCam,
    LayerGradCam,
    LayerGradientXActivation,
    LinearApproximation,
    Method,
    Occlusion,
    Saliency,
    SmoothGradSquared,
    VanillaBackprop,
)
from esegeta_monai.targets import Box
from tests.support.objectives import explain, objective_of

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
MEAN = {2: nn.AvgPool2d, 3: nn.AvgPool3d}

SHAPES = {2: (20, 24), 3: (12, 14, 12)}
WINDOWS = {2: (16, 16), 3: (8, 8, 8)}
BOXES = {2: ([3, 4], [10, 9]), 3: ([2, 3, 4], [6, 8, 7])}
TIMES = 20


class Net(nn.Module):
    """Convolutions with ReLU and max pooling, or an affine network; layer ``b`` has half the resolution."""

    def __init__(self, dims: int, affine: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = (CONV[dims](n, k, 3, padding=1) for n, k in ((2, 4), (4, 4), (4, 3)))
        self.act = nn.Identity() if affine else nn.ReLU(inplace=True)
        self.pool = (MEAN if affine else POOL)[dims](2)
        self.up = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.up(self.act(self.b(self.pool(self.act(self.a(x)))))))


@dataclasses.dataclass
class Setting:
    """A case: its dimensions, whether the network is affine, the output that is explained, and its background."""

    dims: int
    affine: bool
    output: str
    background: Literal["none", "thin", "wide"] = "thin"

    def __hash__(self) -> int:
        return hash(dataclasses.astuple(self))

    def __str__(self) -> str:
        kind = "affine" if self.affine else "relu"
        return f"{self.dims}d-{kind}-{self.output}" + f"-{self.background}"


DENSE = Setting(2, False, "logit", background="none")
SETTINGS = [Setting(2, False, "logit"), Setting(3, False, "probability"), Setting(2, True, "logit")]


@functools.cache
def _objective(s: Setting) -> tuple[Any, Callable[[Tensor], Tensor]]:
    torch.manual_seed(s.dims)
    network, shape = Net(s.dims, s.affine).eval(), SHAPES[s.dims]
    image = torch.rand(2, *shape) + 0.5
    if s.background != "none":
        inside = torch.zeros(shape)
        ends = [n - 2 if s.background == "thin" else n // 2 + 1 for n in shape]
        inside[tuple(slice(1 + i, end) for i, end in enumerate(ends))] = 1
        image = image * inside
    inferer = SlidingWindowInferer(WINDOWS[s.dims], 4, 0.5, "gaussian")
    o = objective_of(network, image, [Box(0, *BOXES[s.dims], output=s.output)], inferer)

    def infer(x: Tensor) -> Tensor:
        with torch.no_grad():
            return inferer(x[None], network)[0]

    return o, infer


@functools.cache
def _finished(method: Method, s: Setting) -> FinishedMap:
    o, infer = _objective(s)
    result = explain(method, o)
    return FinishedMap(method, o, 0, result.maps[0], result.note(0), infer)


def _check(done: FinishedMap, values: Tensor | None = None, seed: int = 0) -> CheckResult:
    """Check a map, or other values in its place, with the draws of a seed."""
    values = done.values if values is None else values
    done = dataclasses.replace(done, values=values, objective=done.objective.derive(seed=seed))
    with frozen(done.objective.model.network):
        return check_map(done)


def halved(values: Tensor, cell: int, draw: torch.Generator) -> Tensor:
    return values * (0.25 + 0.5 * float(torch.rand((), generator=draw)))


def reversed_sign(values: Tensor, cell: int, draw: torch.Generator) -> Tensor:
    return -values


def flipped(values: Tensor, cell: int, draw: torch.Generator) -> Tensor:
    axes = torch.rand(values.ndim - 1, generator=draw) < 0.5
    axes[int(torch.randint(len(axes), (), generator=draw))] = True
    return values.flip([1 + i for i in axes.nonzero().flatten().tolist()])


def voxels_permuted(values: Tensor, cell: int, draw: torch.Generator) -> Tensor:
    flat = values.flatten(1)
    return flat[:, torch.randperm(flat.shape[1], generator=draw)].view_as(values)


def blocks_permuted(values: Tensor, cell: int, draw: torch.Generator) -> Tensor:
    """Permute cubes of 2 cells, or 2 voxels, along each axis; voxels outside of whole cubes stay."""
    edge, out = 2 * cell if cell == 1 else cell, values.clone()
    counts = [n // edge for n in values.shape[1:]]
    places = list(torch.cartesian_prod(*(torch.arange(n) for n in counts)))
    order = torch.randperm(len(places), generator=draw).tolist()

    def block(place: Tensor) -> tuple[Any, ...]:
        return (..., *(slice(edge * int(p), edge * (int(p) + 1)) for p in place))

    for place, other in zip(places, order):
        out[block(place)] = values[block(places[other])]
    return out


def shifted(values: Tensor, cell: int, draw: torch.Generator) -> Tensor:
    axis = 1 + int(torch.randint(values.ndim - 1, (), generator=draw))
    return values.roll(cell if torch.rand((), generator=draw) < 0.5 else -cell, axis)


MUTATIONS = [halved, reversed_sign, flipped, voxels_permuted, blocks_permuted, shifted]
MOVED = [flipped, voxels_permuted, blocks_permuted, shifted]

# method and the edge of a cell of its maps in voxels
METHODS_WITH_PLACES: list[tuple[Method, int]] = [
    (VanillaBackprop(), 1),
    (InputXGradient(), 1),
    (IntegratedGradients(), 1),
    (IntegratedGradients(baseline="blur(sigma=2)", n_steps=128), 1),
    (Occlusion(window=4, stride=2), 2),
    (Occlusion(window=3, per_channel=True), 3),
    (FeatureAblation("grid(size=4)"), 4),
    (GradCam(layer="b"), 2),
    (LayerGradCam(layer="b"), 2),
    (HiResCam(layer="b", relu=False), 2),
    (LayerCam(layer="b"), 2),
    (LayerActivation(layer="b"), 2),
    (LayerActivation(layer="b", reduce="channels"), 2),
    (LayerGradientXActivation(layer="b"), 2),
    (LinearApproximation(layer="b"), 2),
]


def _name(value: object) -> str:
    if isinstance(value, Method):
        given = [str(v) for v in value.parameters.values() if v not in (None, "auto", "b")]
        return "-".join([type(value).__name__, *given])[:40]
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(("method", "cell"), METHODS_WITH_PLACES, ids=_name)
def test_right_maps_pass_and_mutated_ones_do_not(method: Method, cell: int, setting: Setting) -> None:
    done = _finished(method, setting)
    if not done.values.any():
        pytest.skip("the map is zero")
    for seed in range(TIMES):
        result = _check(done, seed=seed)
        assert result.verdict == "passed", result
    missed = []
    for mutation in MUTATIONS:
        for seed in range(TIMES):
            mutated = mutation(done.values, cell, torch.Generator().manual_seed(seed))
            assert not torch.equal(mutated, done.values)
            result = _check(done, mutated, seed)
            if result.verdict != "warned":
                missed.append((mutation.__name__, seed, result))
    assert not missed


SUMS: list[Method] = [DeepLift(baseline=0), DeepLiftShap(n_samples=3, baseline="noise"), LRP()]


@pytest.mark.parametrize("method", SUMS, ids=_name)
def test_sums_are_checked_and_places_only_where_they_are_defined(method: Method) -> None:
    """On a ReLU network DeepLIFT and LRP have no definition but their own rules: a moved map has the same sum, and its
    check passes; its text names what was not checked. (Shares where F does not depend on the image are found.)"""
    done = _finished(method, DENSE)
    assert not done.unseen().any()
    assert _check(done).verdict == "passed"
    passed = 0
    for seed in range(TIMES):
        for mutation in (halved, reversed_sign):  # the seed of the check stays, since noise baselines depend on it
            mutated = mutation(done.values, 1, torch.Generator().manual_seed(seed))
            assert _check(done, mutated).verdict == "warned"
        for mutation in MOVED:
            result = _check(done, mutation(done.values, 1, torch.Generator().manual_seed(seed)))
            passed += result.verdict == "passed"
            assert result.verdict == "warned" or "where its shares lie is" in result.text
    assert passed if isinstance(method, DeepLift) else passed == TIMES * len(MOVED)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=_name)
def test_zeros_show_a_moved_map(mutation: Any) -> None:
    """Where image and baseline are equal, as in a background of zeros, DeepLIFT has no share."""
    done = _finished(DeepLift(baseline=0), Setting(2, False, "logit", background="wide"))
    assert _check(done).verdict == "passed"
    for seed in range(TIMES):
        result = _check(done, mutation(done.values, 1, torch.Generator().manual_seed(seed)), seed)
        assert result.verdict == "warned", result


@pytest.mark.parametrize("mutation", MUTATIONS, ids=_name)
def test_deep_lift_of_an_affine_network_is_checked_in_boxes(mutation: Any) -> None:
    done = _finished(DeepLift(), Setting(2, True, "logit", background="none"))
    right = _check(done)
    assert right.verdict == "passed"
    assert "three boxes" in right.text
    for seed in range(TIMES):
        result = _check(done, mutation(done.values, 1, torch.Generator().manual_seed(seed)), seed)
        assert result.verdict == "warned", result


def test_a_flip_of_a_symmetric_map_is_the_same_map() -> None:
    """No check can find a mutation that changes nothing."""
    torch.manual_seed(0)
    network, half = nn.Conv2d(1, 2, 1).double().eval(), torch.rand(1, 12, 6, dtype=torch.float64)
    o = objective_of(network, torch.cat([half, half.flip(-1)], -1), [Box(0, [2, 0], [7, 12])])
    maps = explain(InputXGradient(), o).maps[0]
    done = FinishedMap(InputXGradient(), o, 0, maps.flip(-1), {}, lambda x: network(x[None])[0])
    assert _check(done).verdict == "passed"
    assert _check(done, maps.flip(-2)).verdict == "warned"


def test_cells_that_are_not_drawn_are_not_checked() -> None:
    """Three cells are scored again: a fault elsewhere shows only if its cell is drawn."""
    done = _finished(FeatureAblation("grid(size=4)"), SETTINGS[0])
    wrong = done.values.clone()
    smallest = done.values[done.values != 0].abs().min()
    wrong[done.values.abs() == smallest] *= -1
    assert not torch.equal(wrong, done.values)
    assert _check(done, wrong).verdict == "passed"


def test_an_incomplete_map_is_not_checked_further() -> None:
    """The status states it; a sum that differs from the recorded one is a contradiction."""
    method = IntegratedGradients(n_steps=1, baseline="blur(sigma=2)")
    done = _finished(method, SETTINGS[0])
    assert done.notes["completeness_gap"] > method.completeness_bound
    result = _check(done)
    assert (result.verdict, "as the record states" in result.text) == ("not checked", True)
    assert _check(done, done.values / 2).verdict == "warned"


class Detached(Net):
    """A network whose backward pass leaves out half of its output."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out / 2 + out.detach() / 2


def _explained(method: Method, network: nn.Module, **settings: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    inferer = SlidingWindowInferer((16, 16), 4, 0.5, "gaussian")
    explainer = Explainer(network.eval(), inferer, **settings)
    (attribution,) = explainer(torch.rand(1, 2, 20, 24), [method], [Box(0, *BOXES[2])])
    assert attribution.map is not None
    return attribution.record


def _map_entries(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for entry in record["checks"] or [] if entry["check"] == "map"]


@pytest.mark.parametrize(
    ("method", "result"),
    [
        (VanillaBackprop(), "passed"),
        (Occlusion(window=8), "passed"),
        (GradCam(layer="b"), "passed"),
        (Saliency(), "none"),
        (SmoothGradSquared(n_samples=2), "none"),
        (GradientShap(n_samples=2), "none"),
    ],
    ids=_name,
)
def test_records_have_the_result(method: Method, result: str) -> None:
    torch.manual_seed(0)
    record = _explained(method, Net(2, False), checks="maps")
    (entry,) = _map_entries(record)
    assert record["map_check"] == result
    assert entry["verdict"] == ("not checked" if result == "none" else "passed")


def test_a_wrong_map_gets_a_warning() -> None:
    torch.manual_seed(0)
    network = Detached(2, False)
    record = _explained(VanillaBackprop(), network, checks="maps")
    (entry,) = _map_entries(record)
    assert (record["map_check"], entry["verdict"]) == ("warned", "warned")
    assert entry["value"] == pytest.approx(0.5, abs=1e-3)  # half of the derivative is missing
    assert entry["text"] in record["warnings"]
    assert _explained(Occlusion(window=8), network, checks="maps")["map_check"] == "passed"


def test_maps_are_checked_on_request_only() -> None:
    for checks in (True, False, "once"):
        torch.manual_seed(0)
        record = _explained(VanillaBackprop(), Net(2, False), checks=checks)
        assert "map_check" not in record
        assert not record.get("checks") or not _map_entries(record)
    with pytest.raises(UsageError, match=re.escape("checks='all': give True, False, 'once' or 'maps'")):
        Explainer(nn.Conv2d(1, 1, 1), checks="all")  # type: ignore[arg-type]


def test_a_check_changes_nothing_of_the_map() -> None:
    torch.manual_seed(0)
    network = Net(2, False)
    plain, checked = (_explained(Occlusion(window=8), network, checks=c) for c in (True, "maps"))
    same = ["sum", "value", "window_passes", "status", "warnings"]
    assert [plain[name] for name in same] == [checked[name] for name in same]


class Squared(Saliency):
    """A user's method, which computes another map than its base class."""

    def attribute(self, objective: Any) -> Any:
        explained = yield from super().attribute(objective)
        return dataclasses.replace(explained, maps=explained.maps.square())


def test_a_subclass_does_not_inherit_the_check() -> None:
    torch.manual_seed(0)
    assert _explained(Squared(abs=False), Net(2, False), checks="maps")["map_check"] == "none"


def test_every_check_of_a_method_exists() -> None:
    named = {vars(cls).get("map_check", "none") for cls in METHODS}
    assert named - {"none"} == set(MAP_CHECKS)


def test_a_time_limit_does_not_end_a_check() -> None:
    torch.manual_seed(0)
    assert _explained(VanillaBackprop(), Net(2, False), checks="maps", time_limit=60.0)["map_check"] == "passed"


def test_half_precision_has_a_wider_bound() -> None:
    torch.manual_seed(0)
    assert _explained(Occlusion(window=8), Net(2, False), checks="maps", amp=True)["map_check"] == "passed"
