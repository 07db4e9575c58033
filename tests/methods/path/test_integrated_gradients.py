"""IntegratedGradients: equal to Captum rule by rule, complete, and honest where it is not."""

from __future__ import annotations

import pytest
import torch
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from monai.inferers import SlidingWindowInferer
from torch import nn

from esegeta_monai.engine.network.model import Model
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import IntegratedGradients, run
from esegeta_monai.methods.path.integrated_gradients import quadrature
from esegeta_monai.targets import Box, Case, ClassScore, MultiClassMask, TargetWrapper, Voxel
from tests.networks import build
from tests.support.networks import Computed, network
from tests.support.objectives import build_objective, objective
from tests.support.tensors import assert_equal, noise

RULES = ("gausslegendre", "riemann_trapezoid", "riemann_middle", "riemann_left", "riemann_right")


def case_objective(case) -> Objective:
    """One window, the mean logit of class 1: what the test networks are calibrated for."""
    with torch.no_grad():
        prediction = case.logits(case.image)[0]
    target = ClassScore(1) if case.kind == "classification" else Box(1, [0] * len(case.roi), case.roi, reduction="mean")
    model = Model(case.network, torch.device("cpu"), output=case.output)
    o = build_objective(model, case.image[0], target.bind(prediction, Case()), prediction)
    o.context.window_batch = 4
    return o


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dims", "shape", "n_steps"), [(2, (13, 10), 7), (3, (9, 8, 10), 4)])
def test_equals_captum_rule_by_rule(dims, shape, n_steps, rule, captum_in_float64):
    net, image, baseline = network(dims, 2), noise(2, *shape), noise(2, *shape, seed=1)
    inferer = SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian")
    targets = [MultiClassMask(1), Voxel(0, index=(3,) * dims, output="probability")]
    o, _ = objective(net, image, inferer, targets)
    wrapper = TargetWrapper(net, targets, inferer).freeze(image[None])
    method = IntegratedGradients(baseline=baseline, n_steps=n_steps, method=rule)
    with frozen(net):
        maps = run(method, o).maps
    captum = CaptumIntegratedGradients(wrapper)
    # Captum's trapezoid weights are 1/n and 1/2n, so that they sum to (n − 1)/n and not to one
    factor = n_steps / (n_steps - 1) if rule == "riemann_trapezoid" else 1
    for column in range(2):
        expected = captum.attribute(image[None].clone(), baseline[None], target=column, n_steps=n_steps, method=rule)[0]
        assert_equal(maps[column], factor * expected.detach())


def test_on_a_linear_network_one_step_is_exact():
    net = nn.Sequential(nn.Flatten(), nn.Linear(120, 2)).double()
    image, baseline = noise(1, 12, 10), noise(1, 12, 10, seed=1)
    o, _ = objective(net, image, None, [ClassScore(0), ClassScore(1)])
    with frozen(net):
        explained = run(IntegratedGradients(baseline=baseline, n_steps=1), o)
    assert_equal(explained.maps, net[1].weight.detach().reshape(2, 1, 12, 10) * (image - baseline))
    assert max(explained.notes["completeness_gap"]) <= 1e-12


def polynomial(x):
    """x⁴ summed: Gauss-Legendre with two nodes is exact for the cubic gradient."""
    return (x**4).flatten(1).sum(1, keepdim=True)


def test_gauss_legendre_integrates_a_polynomial_exactly():
    image = noise(1, 6, 5)
    o, _ = objective(Computed(polynomial), image, None, [ClassScore(0)])
    explained = run(IntegratedGradients(baseline="zero", n_steps=2), o)
    assert_equal(explained.maps[0], image**4)
    assert explained.notes["completeness_gap"][0] <= 1e-12


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_quadrature_weights_sum_to_one_and_nodes_are_on_the_path(rule, n):
    nodes, weights = quadrature(rule, n)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-12)
    assert all(0 <= a <= 1 for a in nodes)
    assert list(weights) == nodes


SLOW = pytest.param("UNETR", 200, marks=pytest.mark.slow)
ADAPTIVE = [("UNet_batch", 400), ("UNet_instance", 400), SLOW, ("ViT", 100)]  # (network, steps at most)


@pytest.mark.parametrize(("name", "most"), ADAPTIVE)
def test_the_adaptive_rule_reaches_its_tolerance(name, most):
    case = build(name, 2)
    o = case_objective(case)
    with frozen(case.network):
        adaptive = run(IntegratedGradients(tolerance=1e-3), o)
        fixed = run(IntegratedGradients(n_steps=64), o)
    f, f0 = float(o.image_values()[0]), adaptive.notes["baseline_value"][0]
    assert abs(f - f0) >= 0.1 * abs(f)
    gap, steps = adaptive.notes["completeness_gap"][0], adaptive.notes["steps"]
    print(
        f"{name} ({case.norm}, {adaptive.notes['baseline']['name']}): gap {gap:.1e} in {steps} steps, 64 fixed steps "
        f"{fixed.notes['completeness_gap'][0]:.1e}"
    )
    assert gap <= 1e-3
    assert steps <= most
    assert not o.context.progress.warnings
    # the gap is that of the map itself
    assert abs(float(adaptive.maps.sum()) - (f - f0)) <= 1.0001e-3 * abs(f - f0)


def test_adaptive_maps_agree_with_many_fixed_steps():
    net, image, baseline = network(2, 1, norm=False), noise(1, 13, 10), noise(1, 13, 10, seed=1)
    o, _ = objective(net, image, SlidingWindowInferer((8, 8), 3, 0.5), [MultiClassMask(1), Voxel(0, index=(2, 2))])
    with frozen(net):
        adaptive = run(IntegratedGradients(baseline=baseline, tolerance=1e-5), o)
        exact = run(IntegratedGradients(baseline=baseline, n_steps=200), o).maps
    assert max(adaptive.notes["completeness_gap"]) <= 1e-5
    for actual, reference in zip(adaptive.maps, exact):
        assert_equal(actual, reference, 1e-4)


def test_nonlinear_targets_are_complete_too():
    net, image, baseline = network(2, 1), noise(1, 13, 10), noise(1, 13, 10, seed=1)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    targets = [MultiClassMask(1, output="log_probability"), MultiClassMask(0, output="probability")]
    o, _ = objective(net, image, inferer, targets)
    with frozen(net):
        explained = run(IntegratedGradients(baseline=baseline, tolerance=1e-3), o)
    wrapper = TargetWrapper(net, targets, inferer).freeze(image[None])
    with torch.no_grad():
        change = (wrapper(image[None]) - wrapper(baseline[None]))[0]
    sums = explained.maps.flatten(1).sum(1)
    assert ((sums - change).abs() / change.abs()).max() <= 1e-3


def test_the_zero_baseline_under_instance_norm_is_found_out():
    net, image = network(2, 1), 100 * noise(1, 16, 12)  # intensities far above the norm's eps, as scans have
    o, _ = objective(net, image, None, [MultiClassMask(1)])
    with frozen(net):
        failed = run(IntegratedGradients(baseline="zero", n_steps=128, method="riemann_middle"), o)
        warned = list(o.context.progress.warnings)
        o.context.progress.start()
        good = run(IntegratedGradients(n_steps=128), o)
    assert failed.notes["completeness_gap"][0] > 0.5
    assert any("under instance, group or layer norm" in w for w in warned)
    assert good.notes["completeness_gap"][0] <= 1e-3
    assert good.notes["baseline"]["name"] == "blur"
    assert "InstanceNorm" in good.notes["baseline"]["reason"]
    assert not o.context.progress.warnings


def test_max_steps_stops_with_a_warning():
    case = build("UNet_batch", 2)
    o = case_objective(case)
    with frozen(case.network):
        explained = run(IntegratedGradients(tolerance=1e-9, max_steps=20), o)
    assert explained.notes["steps"] <= 20
    assert any("max_steps=20" in w for w in o.context.progress.warnings)


def test_steps_do_not_depend_on_the_batch():
    net, image, baseline = network(2, 1), noise(1, 13, 10), noise(1, 13, 10, seed=1)
    maps = []
    for size in (1, 3, 50):
        o, _ = objective(net, image, SlidingWindowInferer((8, 8), 3, 0.5), [MultiClassMask(1)])
        o.context.window_batch = size
        with frozen(net):
            maps.append(run(IntegratedGradients(baseline=baseline, n_steps=6), o).maps)
    assert_equal(maps[1], maps[0], 1e-12)
    assert_equal(maps[2], maps[0], 1e-12)


@pytest.mark.parametrize(
    "bad", [{"n_steps": 0}, {"method": "simpson"}, {"tolerance": 0.0}, {"tolerance": 1e-3, "max_steps": 4}]
)
def test_bad_parameters(bad):
    with pytest.raises(UsageError):
        IntegratedGradients(**bad)
