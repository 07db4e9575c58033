"""Costs are known in advance: passes exactly, time roughly; methods over budget are refused."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

import esegeta_monai.explain.costs as costs
from esegeta_monai import Explainer
from esegeta_monai import methods as m
from esegeta_monai.errors import MethodError
from esegeta_monai.explain.record import peak_memory, reset_peak_memory
from esegeta_monai.methods.run import shares_passes
from esegeta_monai.targets import Box, MultiClassMask, Voxel
from tests.support.networks import small
from tests.support.tensors import noise
from tests.test_devices import PAIRS, SETTINGS, image

METHODS = [
    m.Saliency(),
    m.IntegratedGradients(n_steps=4),
    m.SmoothGrad(m.Saliency(), n_samples=3),
    m.SmoothGrad(m.LRP(), n_samples=3, name="SmoothLRP"),
    m.GuidedBackprop(),
    m.DeepLift(),
    m.DeepLiftShap(n_samples=3),
    m.ContrastiveLRP(),
    m.LRP(),
    m.LayerLRP("a"),
    m.ExcitationBackprop(),
    m.LayerActivationGuidedBackprop("a"),
    m.GradCam("a"),
    m.LayerActivation("a"),
    m.Occlusion(4, 3),
    m.FeatureAblation("grid(5)"),
    m.ShapleyValueSampling(3, "grid(6)"),
    m.KernelShap(20, "grid(6)"),
    m.ChannelShapley(),
    m.Lime(20, "grid(6)"),
    m.Rise(6, grid=2),
    m.Sobol(4, grid=2),
    m.Hsic(4, grid=2),
]


def explainer(**options) -> Explainer:
    return Explainer(small(2, 2), SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"), **options)


@pytest.mark.parametrize("calibration", [30.0, 0.0])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_the_passes_are_those_of_the_run(output, calibration):
    """Both if the method ran to its end while it was timed and if only its start was timed."""
    image = noise(1, 2, 6, 20)
    image[..., :9] = 0.25  # background, so that perturbations there change nothing
    chosen = [x for x in METHODS if output == "logit" or not x.needs_linear]
    targets = [MultiClassMask(1, output=output), Voxel(0, index=(2, 15), output=output)]
    for cost in explainer().costs(image, chosen, targets, calibration=calibration):
        method = next(x for x in chosen if x.name == cost.method)
        target = targets[0] if cost.target.startswith("MultiClassMask") else targets[1]
        (attribution,) = explainer()(image, [method], [target])
        assert cost.note is None
        assert cost.exact
        assert cost.passes == attribution.record["window_passes"], cost
        assert cost.naive_passes >= cost.passes or not isinstance(method, m.Occlusion)
        assert cost.seconds > 0
        assert cost.peak_memory_bytes > 0


@pytest.mark.parametrize(
    "method",
    [
        m.IntegratedGradients(n_steps=4),
        m.GuidedIG(n_steps=3),
        m.GradientShap(n_samples=3),
        m.GradientShap(n_samples=2, std=0.1),
        m.LayerGradientShap("a", n_samples=2),
        m.LayerConductance("a", n_steps=3),
        m.LayerIntegratedGradients("a", n_steps=3),
        m.InternalInfluence("a", n_steps=3),
        m.NeuronConductance("a", channel=1, n_steps=3),
        m.DeepLift(),
        m.DeepLiftShap(n_samples=2),
        m.LayerDeepLift("a"),
        m.SmoothGrad(m.IntegratedGradients(n_steps=2), n_samples=3),
        m.Occlusion(4),
    ],
    ids=repr,
)
def test_choosing_the_baseline_is_counted(method):
    """Without a norm layer "auto" looks at a window twice, to see whether the network is invariant to scale."""
    explain = Explainer(small(2, 2, "batch"), SlidingWindowInferer((8, 8), 3, 0.5, "gaussian"))
    image, targets = noise(1, 2, 6, 20), [MultiClassMask(1)]
    (cost,) = explain.costs(image, [method], targets, calibration=0.0)
    (attribution,) = explain(image, [method], targets)
    assert cost.exact
    assert cost.passes == attribution.record["window_passes"]


@pytest.mark.parametrize("calibration", [0.0, 30.0])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_the_passes_of_several_rounds_are_those_of_the_run(output, calibration):
    """Unperturbed outputs are computed in the first round that touches their windows."""
    image = noise(1, 2, 6, 20)
    others = [noise(2, 6, 20, seed=s) for s in (1, 2, 3)]
    others[0][..., :10] = image[0, ..., :10]  # which changes nothing there
    method, target = m.FeaturePermutation(others, "grid(5)"), [MultiClassMask(1, output=output)]
    (cost,) = explainer().costs(image, [method], target, calibration=calibration)
    (attribution,) = explainer()(image, [method], target)
    (judged,) = explainer().judge(image, target)
    assert cost.passes == attribution.record["window_passes"] == method.passes(judged.objective)


@pytest.mark.parametrize(("setting", "name"), PAIRS)
def test_every_method_that_knows_its_passes_exactly_does(setting, name):
    case = SETTINGS[setting]
    scan, method = image(0, *case.shape), case.method(name)
    explain = Explainer(case.network(), case.inferer)
    (judged,) = explain.judge(scan, [case.target])
    predicted = method.passes(judged.objective)
    (cost,) = explain.costs(scan, [method], [case.target], calibration=0.0)
    window_passes = case.explain(case.method(name), case.target).record["window_passes"]
    assert cost.note is None
    assert cost.exact or not method.passes_exact
    assert cost.passes == window_passes or not cost.exact
    counted = method.passes_data_dependent or name == "ScoreCam"  # counted as it went, not known before
    assert counted or cost.passes == window_passes
    assert predicted == window_passes or not method.passes_exact or getattr(method, "layer", "") is None


@pytest.mark.parametrize("calibration", [0.0, 60.0])
@pytest.mark.parametrize(
    "method",
    [
        m.IntegratedGradients(tolerance=1e-2, max_steps=20),
        m.BlurIG(n_steps=4, tolerance=1e-2, max_steps=20),
        m.GuidedIG(n_steps=4, tolerance=1e-2, max_steps=20),
        m.SmoothGrad(m.IntegratedGradients(tolerance=1e-2, max_steps=20), n_samples=2),
        m.XRAI([3], method=m.BlurIG(n_steps=4, tolerance=1e-2, max_steps=20)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_passes_that_depend_on_a_tolerance_are_an_upper_bound_unless_all_were_run(method, calibration):
    image, target = noise(1, 2, 12, 20), [MultiClassMask(1)]
    (cost,) = explainer().costs(image, [method], target, calibration=calibration)
    (attribution,) = explainer()(image, [method], target)
    assert not method.passes_exact
    assert cost.exact == (calibration > 0)
    assert cost.passes >= attribution.record["window_passes"]
    assert cost.passes == attribution.record["window_passes"] or not cost.exact


def test_the_naive_passes_are_those_of_whole_predictions():
    (cost,) = explainer().costs(noise(1, 2, 6, 20), [m.Occlusion(4)], [Voxel(0, index=(2, 3))])
    occluders, windows = 2 * 5, 4
    assert cost.naive_passes == (occluders + 1) * windows


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux begins the count anew")
def test_peak_memory_is_that_of_the_method(request):
    gc.collect()  # what earlier tests left must not be freed between two readings
    gc.disable()
    request.addfinalizer(gc.enable)
    cpu = torch.device("cpu")
    large = torch.ones(40_000_000)  # 160 MB, gone before
    before = peak_memory(cpu)
    del large
    reset_peak_memory(cpu)
    begun = peak_memory(cpu)
    assert begun < before - 100e6
    held = torch.ones(100_000_000)  # 400 MB: what other threads free or take meanwhile is small beside it
    assert 300e6 < peak_memory(cpu) - begun < 500e6
    assert held[0] == 1


class Clock:
    """A clock that advances only on demand."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("esegeta_monai.explain.costs._now", lambda device: clock.seconds)
    monkeypatch.setattr("esegeta_monai.engine.progress.time", clock)
    grad = torch.autograd.grad

    def slow_grad(outputs, *args, **kwargs):
        """Nine seconds a window backwards."""
        clock.seconds += 9 * len(outputs) if outputs.ndim else 0
        return grad(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", slow_grad)
    return clock


class Slow(nn.Module):
    """A window takes a second forwards."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.conv, self.head = clock, nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.clock.seconds += len(x)
        return self.head(self.conv(x).relu())


class Slower(m.Occlusion):
    """It takes its time before and after the passes."""

    before: float = 0.0
    after: float = 0.0
    clock: Clock | None = None

    def attribute(self, objective):
        self.clock.seconds += self.before
        result = super().attribute(objective)
        self.clock.seconds += self.after
        return result


class Endless(m.Saliency):
    """As many gradients as it likes, each with much work of its own."""

    rounds: int = 1000
    clock: Clock | None = None

    def passes(self, objective):
        return self.rounds * len(objective.windows)

    def attribute(self, objective):
        for _ in range(self.rounds):
            result = objective.gradient(objective.image[None])
            self.clock.seconds += 0.5
        return result.maps[:, 0]


def slow(clock: Clock, **options) -> Explainer:
    torch.manual_seed(0)
    return Explainer(Slow(clock), SlidingWindowInferer((8, 8), 2, 0.0), **options)


def foretold_and_taken(clock, method, calibration, output="logit"):
    """On twelve windows, eight of them in the target."""
    image, target = torch.rand(1, 1, 8, 96), [Box(0, (0, 0), (8, 64), output=output)]
    explain = slow(clock)
    prediction = explain.settings.inferer(image, explain.settings.network)
    (cost,) = explain.costs(image, [method], target, calibration=calibration, prediction=prediction)
    began = clock.seconds
    (attribution,) = explain(image, [method], target, prediction=prediction)
    taken = clock.seconds - began
    if not shares_passes(method):  # the run compares the windows with the prediction first, which is no method's
        taken -= 8
    assert cost.passes == attribution.record["window_passes"]
    return cost, taken


@pytest.mark.parametrize("calibration", [0.0, 3.0, 25.0, 1000.0])
@pytest.mark.parametrize(
    "method",
    [
        m.Saliency(),
        m.GuidedBackprop(),
        m.LRP(),
        m.DeepLift("zero"),  # passes forwards first
        m.DeepLiftShap("noise", n_samples=3),
        m.IntegratedGradients("zero", n_steps=5),
        m.GradientShap("zero", n_samples=3),
        m.LayerConductance("conv", baseline="zero", n_steps=3),
        m.SmoothGrad(m.Saliency(), n_samples=3),
        m.GradCam("conv"),  # gradients in some windows, activations in all
        m.EigenCam("conv"),
        m.FullGrad(),
        m.AblationCam("conv"),
    ],
    ids=repr,
)
def test_the_time_of_every_kind_of_pass_is_estimated(clock, method, calibration):
    """After one batch of each kind, after some, and after all, by a clock that only passes move."""
    cost, taken = foretold_and_taken(clock, method, calibration)
    assert taken / 2 <= cost.seconds <= 2 * taken


@pytest.mark.parametrize("calibration", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_time_before_and_after_the_passes_is_estimated(clock, calibration, output):
    """However long it takes until the first pass, as with supervoxels."""
    method = Slower(4, before=100.0, after=50.0, clock=clock)
    cost, taken = foretold_and_taken(clock, method, calibration, output)
    assert taken / 2 <= cost.seconds <= 2 * taken


def test_two_timings_that_are_equal_by_chance_give_no_tiny_estimate(monkeypatch):
    """On a busy machine one window may seem to take as long as two: 20,000 passes once seemed to be free."""

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.002)
            return torch.cat([x, -x], 1)

    timings = iter([(0.01, 1, None), (0.01 + 1e-7, 2, None)])
    monkeypatch.setattr(costs, "_timed", lambda *_: next(timings))
    cost = Explainer(Slow()).costs(noise(1, 1, 8, 8), m.SmoothGrad(n_samples=5000), MultiClassMask(1), calibration=0.3)
    (smooth,) = cost
    assert smooth.passes >= 5000
    assert smooth.seconds > 0.4 * 0.002 * smooth.passes


def test_a_method_without_a_cheap_copy_is_stopped(clock):
    method = Endless(clock=clock)
    cost, taken = foretold_and_taken(clock, method, 3.0)
    assert taken / 2 <= cost.seconds <= 2 * taken
    assert clock.seconds < 1.1 * taken


def test_the_cost_of_a_failing_method_has_the_reason(clock):
    class Failing(m.Saliency, registered=False):
        def attribute(self, objective):
            raise MethodError("never on Sundays")

    (cost,) = slow(clock).costs(torch.rand(1, 1, 8, 16), [Failing()], [Box(0, (0, 0), (8, 8))])
    assert cost.note == "never on Sundays"


class Patchy(m.Saliency, registered=False):
    """Its cheap copy fails."""

    def passes(self, objective):
        return len(objective.windows)

    def cheap_copy(self):
        raise ValueError("no copy on Sundays")


def test_a_failing_cheap_copy_is_reported(clock, caplog):
    image, target = torch.rand(1, 1, 8, 96), [Box(0, (0, 0), (8, 64))]
    (cost,) = slow(clock).costs(image, [Patchy(name="Patchy")], target, calibration=0.0)
    assert (cost.note, cost.seconds) == (None, None)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("Patchy: its time is")
    assert record.getMessage().endswith("ValueError: no copy on Sundays")
    caplog.clear()
    (cost,) = slow(clock).costs(image, [Endless(clock=clock)], target, calibration=0.0)  # stopped at the limit
    assert cost.seconds > 0
    assert not caplog.records


def test_a_dry_run_has_no_side_effects(caplog):
    """Maps of a dry run mean nothing, and no later run sees any of it."""
    image, target = noise(1, 2, 6, 20), [MultiClassMask(1)]
    methods = [m.IntegratedGradients("zero", n_steps=2), m.Occlusion(4), m.GradCam("a")]
    expected = [a.map for a in explainer()(image, methods, target)]
    explain = explainer()
    caplog.clear()
    assert all(c.note is None for c in explain.costs(image, methods, target, calibration=0.0))
    assert not caplog.records
    for attribution, values in zip(explain(image, methods, target), expected):
        assert torch.equal(attribution.map, values)


def test_an_empty_target_has_a_reason():
    image = noise(1, 2, 6, 20)
    estimates = list(explainer().costs(image, ["Saliency"], [MultiClassMask(c) for c in range(3)]))
    statuses = {a.label: a.status for a in explainer()(image, ["Saliency"], [MultiClassMask(c) for c in range(3)])}
    assert {c.target for c in estimates if c.note is None} == {label for label, s in statuses.items() if s == "ok"}


def test_what_costs_too_much_is_refused_with_number_and_remedy(monkeypatch):
    monkeypatch.setattr(costs, "COSTLY", 9)
    image, target = noise(1, 2, 6, 20), [Voxel(0, index=(2, 3))]
    with pytest.raises(MethodError, match=r"10 perturbations.*larger occluders.*--yes"):
        list(explainer()(image, [m.Occlusion(4)], target))
    refused, done = explainer(on_error="record")(image, [m.Occlusion(4), m.Occlusion(5, name="coarse")], target)
    assert (refused.status, done.status) == ("failed", "ok")
    assert refused.record["window_passes"] is None
    (allowed,) = explainer(allow_costly=True)(image, [m.Occlusion(4)], target)
    assert allowed.status == "ok"


def test_a_voxel_by_voxel_occlusion_of_a_volume_is_refused_at_once():
    network = torch.nn.Conv3d(1, 1, 1)
    torch.nn.init.ones_(network.bias)
    explain = Explainer(network, SlidingWindowInferer((32,) * 3, 4, 0.25), on_error="record")
    (attribution,) = explain(torch.rand(1, 1, 64, 64, 64), [m.Occlusion(1)], [MultiClassMask(0)])
    assert "262,144 perturbations" in attribution.record["reason"]


def test_the_lines_of_the_table():
    rows = [
        ("sub-01", costs.Cost(0, "Occlusion", "Voxel-1", 1200, True, 40000, 75.0, 2**31)),
        ("sub-01", costs.Cost(0, "Saliency", "Voxel-1", note="no voxel")),
    ]
    header, first, second = costs.table(rows)
    assert header.split() == ["case", "target", "method", "passes", "naive", "passes", "time", "peak", "memory"]
    assert first.split() == ["sub-01", "Voxel-1", "Occlusion", "1,200", "40,000", "1", "min", "15", "s", "2.0", "GiB"]
    assert first.index("40,000") == header.index("naive")
    assert second.endswith("no voxel")


def test_one_trial_is_enough_for_all_targets(clock):
    """Passes and times of targets with eight and with four windows; only the larger one is tried."""
    image = torch.rand(1, 1, 8, 96)
    targets = [Box(0, (0, 0), (8, 32)), Box(0, (0, 0), (8, 64))]
    explain = slow(clock)
    small, large = explain.costs(image, [m.Occlusion(4)], targets, calibration=3.0)
    began = clock.seconds
    alone = [next(iter(slow(clock).costs(image, [m.Occlusion(4)], [t], calibration=3.0))) for t in targets]
    one_by_one = clock.seconds - began
    assert [small.passes, large.passes] == [cost.passes for cost in alone]
    assert [small.naive_passes, large.naive_passes] == [cost.naive_passes for cost in alone]
    for cost, own in zip((small, large), alone):
        assert own.seconds / 2 <= cost.seconds <= 2 * own.seconds
    began = clock.seconds
    list(slow(clock).costs(image, [m.Occlusion(4)], targets, calibration=3.0))
    assert clock.seconds - began < 0.75 * one_by_one
