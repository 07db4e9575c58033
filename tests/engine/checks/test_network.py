"""The checks of a network: correct networks pass, faulty ones are found, and their number of passes is limited."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.checks.base import small_sample
from esegeta_monai.engine.checks.network import check_network_once
from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import evaluating
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.methods import Occlusion, Saliency
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.networks import NAMES, build
from tests.support.checks import blob, checked


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_test_network_passes_on_a_background_of_zeros(name: str) -> None:
    case = build(name)
    image = case.image[0].clone()
    image[..., : image.shape[-1] // 2] = 0
    model = Model(case.network, torch.device("cpu"), output=case.output)
    results = check_network_once(model, image, plan_windows(SimpleInferer(), image.shape[1:]))
    assert {r.name: r.verdict for r in results} == dict.fromkeys(
        ("input", "determinism", "rows", "derivative"), "passed"
    ), [r.text for r in results]
    assert sum(r.passes for r in results) <= 40


class Standardised(nn.Module):
    """Standardises its input over the whole batch."""

    def __init__(self, axes: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.conv, self.axes = nn.Conv2d(1, 3, 3, padding=1), axes

    def forward(self, x: Tensor) -> Tensor:
        if self.axes is None:
            return self.conv((x - x.mean()) / x.std())
        return self.conv((x - x.mean(self.axes, keepdim=True)) / x.std(self.axes, keepdim=True))


class WithTheNext(nn.Module):
    """Adds to each image the one before it in the batch, which has no effect on the first image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x + x.roll(-1, 0))


MIXING: dict[str, Callable[[], nn.Module]] = {
    "standardised over the batch": Standardised,
    "batch statistics": lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
    "the next image": WithTheNext,
}


@pytest.mark.parametrize("kind", MIXING)
def test_rows_that_mix_are_found(kind: str) -> None:
    result = checked(MIXING[kind]())["rows"]
    assert result.verdict == "handled"
    assert "mixes the images of a batch" in result.text


@pytest.mark.parametrize(
    "network", [Standardised((1, 2, 3)), nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4))]
)
def test_rows_that_do_not_mix_pass(network: nn.Module) -> None:
    assert checked(network)["rows"].verdict == "passed"


class OneOnly(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise ValueError("one image at a time")
        return torch.cat([x, -x], 1)


def test_a_network_for_one_image_at_a_time_gets_one_window_per_pass() -> None:
    x = torch.rand(1, 1, 12, 12)
    (attribution,) = Explainer(OneOnly(), SlidingWindowInferer((8, 8), 1))(
        x, ["Occlusion(window=4, baseline=0)"], [MultiClassMask(0)]
    )
    assert attribution.status == "ok"
    assert attribution.record["window_batch"] == 1


@pytest.mark.parametrize("kind", MIXING)
def test_occlusion_of_a_network_that_mixes_rows_equals_single_passes(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(MIXING[kind](), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    image = torch.rand(1, 1, 12, 12, dtype=torch.float64)
    (attribution,) = Explainer(network)(image, [Occlusion(window=4, baseline=0.0)], [ClassScore(1)])
    expected = torch.zeros(12, 12, dtype=torch.float64)
    with torch.no_grad():
        for i in range(0, 12, 4):
            for j in range(0, 12, 4):
                changed = image.clone()
                changed[..., i : i + 4, j : j + 4] = 0
                expected[i : i + 4, j : j + 4] = network(image)[0, 1] - network(changed)[0, 1]
    torch.testing.assert_close(attribution.map.as_tensor()[0], expected, rtol=1e-10, atol=1e-12)
    assert attribution.record["window_batch"] == 1
    assert [c["verdict"] for c in attribution.record["checks"] if c["check"] == "rows"] == ["handled"]


def test_a_prediction_of_mixed_windows_is_made_one_by_one_with_a_warning() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False)).double().eval()
    image = torch.rand(1, 1, 16, 12, dtype=torch.float64)
    explainer = Explainer(network, SlidingWindowInferer((8, 8), 4, 0.5))
    (attribution,) = explainer(image, [Saliency()], [MultiClassMask(1)])
    with torch.no_grad():
        single = SlidingWindowInferer((8, 8), 1, 0.5)(image, network)
    assert attribution.record["target_voxels"] == int((single.argmax(1) == 1).sum())
    assert any("sw_batch_size=1" in text for text in attribution.record["warnings"])


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.dropout(x, 0.5, training=True)).mean((2, 3))


class Counting(nn.Module):
    """Adds a count of its calls to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.conv(x) + self.calls


def test_a_random_network_is_found_and_its_noise_measured() -> None:
    torch.manual_seed(0)
    network, image = Noisy().eval(), blob()[None]
    with torch.no_grad():
        drawn = torch.stack([network(image)[0, 1] for _ in range(200)]).std()
    (attribution,) = Explainer(network)(image, [Saliency()], [ClassScore(1)])
    check = next(c for c in attribution.record["checks"] if c["check"] == "determinism")
    assert check["verdict"] == "warned"
    assert "torch's random state" in check["text"]
    assert check["text"] in attribution.record["warnings"]
    # a standard deviation of 8 draws lies between 0.3 and 1.8 times the true one in all but one of 10^4 cases
    assert 0.3 < attribution.record["noise"] / float(drawn) < 1.8


def test_a_network_that_keeps_state_is_found() -> None:
    result = checked(Counting())["determinism"]
    assert result.verdict == "warned"
    assert "buffer calls" in result.text


class FirstImage(nn.Module):
    """Keeps a figure of the first image in a plain attribute, and subtracts it from all images."""

    def __init__(self, figure: Callable[[Tensor], Tensor], *, used: bool = True, graph: bool = False) -> None:
        super().__init__()
        self.conv, self.figure, self.first = nn.Conv2d(1, 2, 3), figure, None
        self.used, self.kept = used, torch.ones((), requires_grad=True) * 2 if graph else None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            self.first = self.figure(x.detach())
        return self.conv(x - self.first) if self.used else self.conv(x)


@pytest.mark.parametrize("figure", [torch.mean, torch.std, lambda x: x[0, 0, 6, 4]], ids=["mean", "std", "voxel"])
def test_a_network_that_keeps_a_figure_of_its_first_image_is_found(figure: Callable[[Tensor], Tensor]) -> None:
    result = checked(FirstImage(figure))["determinism"]
    assert result.verdict == "warned"
    assert "has seen before" in result.text
    assert checked(FirstImage(figure, used=False))["determinism"].verdict == "passed"


def test_a_network_that_cannot_be_copied_is_not_tested_for_memory() -> None:
    result = checked(FirstImage(torch.mean, graph=True))["determinism"]
    assert result.verdict == "passed"
    assert "not checked" in result.text


class Skipping(nn.Module):
    """Leaves a block out in a part of its passes; two passes agree in half of the cases."""

    def __init__(self, draw: Callable[[], float], seed: int) -> None:
        super().__init__()
        self.conv, self.draw = nn.Conv2d(1, 2, 3), draw
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * (1 + (self.draw() > 0.5)))


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())), "numpy": np.random.rand, "Python": random.random, "own": lambda: 1.0,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("source", DRAWS)
def test_a_pass_that_draws_random_numbers_is_found_whatever_the_output(source: str, seed: int) -> None:
    result = checked(Skipping(DRAWS[source], seed))["determinism"]
    assert result.verdict == ("passed" if source == "own" else "warned")
    assert source == "own" or f"{source}'s random state" in result.text


def test_a_deterministic_network_has_no_noise() -> None:
    (attribution,) = Explainer(nn.Conv2d(1, 2, 3, padding=1))(blob()[None], [Saliency()], [MultiClassMask(0)])
    assert "noise" not in attribution.record


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mul_(2).sub_(1))


class Pure(Overwriting):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x * 2 - 1)


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("inferer", [None, SlidingWindowInferer((8, 8), 2, 0.5)])
def test_a_network_that_writes_into_its_input_gives_the_same_maps(inferer: SlidingWindowInferer, checks: bool) -> None:
    image, methods = (
        blob()[None],
        ["Saliency", "InputXGradient", "GradCam('conv')", "Occlusion(window=4)", "LRP", "DeepLift"],
    )
    torch.manual_seed(0)
    writing, pure = Overwriting().eval(), Pure().eval()
    pure.load_state_dict(writing.state_dict())
    before = image.clone()
    ours = list(Explainer(writing, inferer, checks=checks)(image, methods, [MultiClassMask(0)]))
    expected = list(Explainer(pure, inferer)(image, methods, [MultiClassMask(0)]))
    assert torch.equal(image, before)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.map.as_tensor(), b.map.as_tensor(), rtol=1e-5, atol=1e-6)
    if checks:
        assert {c["check"]: c["verdict"] for c in ours[0].record["checks"]}["input"] == "handled"


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = nn.Conv2d(1, 2, 3, padding=1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += len(x)
        return self.conv(x)


def test_a_network_is_checked_once_for_its_weights() -> None:
    network = Calls().eval()
    checked(network)
    first = network.seen
    assert 0 < first <= 42  # 40 passes, and the trials of small windows
    checked(network)
    assert network.seen == first
    with torch.no_grad():
        network.conv.weight += 1
    checked(network)
    assert network.seen > first
    image, plan = blob(), plan_windows(None, (12, 12))
    model = Model(network, torch.device("cpu"))
    check_network_once(model, image, plan, ignore_weights=True)
    seen = network.seen
    with torch.no_grad():
        network.conv.weight += 1
    check_network_once(model, image, plan, ignore_weights=True)
    assert network.seen == seen


def test_no_checks_cost_nothing() -> None:
    network = Calls().eval()
    (attribution,) = Explainer(network, checks=False)(blob()[None], [Saliency()], [MultiClassMask(0)])
    assert network.seen == 2  # the prediction and the gradient
    assert {check["check"] for check in attribution.record["checks"]} == {"outputs", "head"}  # which cost no pass here


def test_checks_leave_random_states_as_they_are() -> None:
    network = Noisy()
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    checked(network)
    assert (torch.rand(1), np.random.rand()) == expected


def test_the_window_is_the_smallest_that_the_network_accepts() -> None:
    image = torch.rand(1, 48, 96)
    plan = plan_windows(SlidingWindowInferer((48, 48)), (48, 96))
    free = nn.Conv2d(1, 2, 3)
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(48 * 48, 2))
    at_least_20 = nn.Conv2d(1, 2, 20)
    two_positions = nn.Sequential(nn.Conv2d(1, 2, 16, stride=16), nn.InstanceNorm2d(2))
    cases = ((free, (16, 16)), (at_least_20, (32, 32)), (fixed, (48, 48)), (two_positions, (16, 32)))
    for network, expected in cases:
        with evaluating(network, "cpu"):
            sample = small_sample(Model(network, torch.device("cpu")), image, plan)
        assert tuple(sample.window.shape[2:]) == expected


def test_the_explainer_lists_its_checks() -> None:
    explainer = Explainer(Standardised().eval(), checks=False)
    results = explainer.check(blob()[None])
    assert {r.name: r.verdict for r in results}["rows"] == "handled"
    refused = explainer.check(torch.full((1, 1, 12, 12), 3.0))[-1]
    assert (refused.name, refused.verdict) == ("finite", "refused")
