"""Path methods without the factor ``x − x₀`` (``multiply_by_inputs=False``): equal to Captum's, in 2D and 3D."""

from __future__ import annotations

import captum.attr
import numpy as np
import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai import Explainer
from esegeta_monai.methods import (
    METHODS,
    ExpectedGradients,
    GradientShap,
    IntegratedGradients,
    LayerGradientShap,
    LayerIntegratedGradients,
    NeuronConductance,
)
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.networks import network, plain
from tests.support.objectives import explain, full_gradient, objective, objective_of
from tests.support.tensors import close, noise

PATH = {"n_steps": 3, "method": "riemann_middle"}


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_captum(dims, monkeypatch, captum_in_float64):
    net, image = plain(dims)
    o, x0 = objective_of(net, image[0], [ClassScore(1)]), 0.3 * torch.ones_like(image)
    own = {"baseline": x0[0], "multiply_by_inputs": False}
    options = {"baselines": x0, "target": 1}

    truth = captum.attr.IntegratedGradients(net, multiply_by_inputs=False).attribute(image, **options, **PATH)
    explained = explain(IntegratedGradients(**own, **PATH), o)
    close(explained.maps, truth)
    whole = explain(IntegratedGradients(x0[0], **PATH), o)
    assert explained.notes["completeness_gap"] == whole.notes["completeness_gap"]
    refined = explain(IntegratedGradients(**own, tolerance=1e-2), o)
    close(refined.maps * (image - x0)[0], explain(IntegratedGradients(x0[0], tolerance=1e-2), o).maps)

    truth = captum.attr.LayerIntegratedGradients(net, net.act, multiply_by_inputs=False).attribute(
        image, **options, **PATH
    )
    close(explain(LayerIntegratedGradients("act", "channels", **own, **PATH), o).maps, truth.detach())

    unit = captum.attr.NeuronConductance(net, net.act, multiply_by_inputs=False).attribute(
        image, (2, *[3] * dims), **options, **PATH
    )
    close(explain(NeuronConductance("act", 2, [3] * dims, **own, **PATH), o).maps, unit.detach())

    generator = o.generator()
    draws = [float(torch.rand((), generator=generator)) for _ in range(2)]
    monkeypatch.setattr(np.random, "uniform", lambda low, high, n: np.array(draws[:n]))
    shap = {**options, "n_samples": 2, "stdevs": 0.0}
    truth = captum.attr.GradientShap(net, multiply_by_inputs=False).attribute(image, **shap)
    result = explain(GradientShap(**own, n_samples=2), o)
    close(result.maps, truth.detach())
    assert result.notes["completeness_error"] == explain(GradientShap(x0[0], 2), o).notes["completeness_error"]
    truth = captum.attr.LayerGradientShap(net, net.act, multiply_by_inputs=False).attribute(image, **shap)
    close(explain(LayerGradientShap("act", "channels", **own, n_samples=2), o).maps, truth.detach())


def test_windows_equal_autograd_through_the_inferer():
    net, image = network(2, 2), noise(2, 13, 10)
    inferer = SlidingWindowInferer((8, 8), 3, 0.5, "gaussian")
    o, _ = objective(net, image, inferer, [MultiClassMask(1)])
    points = [(1 - a) * 0.2 + a * image for a in (1 / 6, 1 / 2, 5 / 6)]
    truth = sum(full_gradient(net, x, inferer, o.scores[0]) for x in points) / 3
    close(explain(IntegratedGradients(0.2, multiply_by_inputs=False, **PATH), o).maps[0], truth)


def test_a_mean_gradient_is_no_share_and_its_check_reads_it_as_one():
    method = IntegratedGradients(0.2, multiply_by_inputs=False)
    assert (method.additive, IntegratedGradients(0.2).additive) == (False, True)
    assert method.units == "target per unit of image intensity"
    net, image = network(2, 1), noise(1, 12, 12)
    (attribution,) = Explainer(net, checks="maps")(image[None], [method], [MultiClassMask(1)])
    (check,) = [c for c in attribution.record["checks"] if c["check"] == "map"]
    assert check["verdict"] == "passed", check


def test_expected_gradients_by_that_name():
    assert ExpectedGradients is GradientShap
    assert isinstance(METHODS.create("ExpectedGradients(n_samples=4)"), GradientShap)
