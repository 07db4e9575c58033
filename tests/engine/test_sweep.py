"""One pass over the windows serves the requests of several methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import InputGradient, Request, View, sweep
from esegeta_monai.errors import MethodError
from esegeta_monai.targets import Voxel
from tests.support.networks import network
from tests.support.objectives import full_gradient, objective
from tests.support.tensors import assert_equal, noise

INFERER = SlidingWindowInferer((8, 8), 2, 0.5)


def case() -> Objective:
    """One target in a corner: it sees one window of six."""
    o, _ = objective(network(2, 1), noise(1, 16, 12), INFERER, [Voxel(1, index=(0, 0))])
    return o


class Look(Request):
    """Records the windows that it is shown, and whether they come with gradients."""

    def __init__(self, layer: str = "a", backward: bool = False, everywhere: bool = False, name: Any = None) -> None:
        self.layers, self.backward, self.everywhere, self.name = (layer,), backward, everywhere, name

    @property
    def key(self) -> Any:
        return self if self.name is None else self.name

    def begin(self, objective: Objective) -> None:
        self.windows: list[tuple[int, bool, bool]] = []

    def see(self, view: View) -> None:
        assert view.activations[self.layers[0]][0].shape[0] == len(view.batch)
        self.windows += [(w, view.seen, self.layers[0] in view.gradients) for w in view.batch.windows]

    def result(self) -> list[tuple[int, bool, bool]]:
        return self.windows


def test_requests_see_the_windows_and_gradients_that_they_ask_for():
    o = case()
    requests = [Look(), Look(everywhere=True), Look(backward=True, everywhere=True)]
    with frozen(o.model.network):
        own, everywhere, backward = sweep(o, requests)
    assert o.context.progress.passes == len(o.plan) == 6
    assert [w for w, _, _ in own] == o.windows == [0]
    assert sorted(w for w, _, _ in everywhere) == list(range(6))
    assert [w for w, seen, _ in everywhere if seen] == [0]
    assert [w for w, _, gradient in backward if gradient] == [0]


def test_requests_of_equal_key_are_collected_once():
    o = case()
    first, second, other = Look(name="same"), Look(name="same"), Look(name="other")
    with frozen(o.model.network):
        results = sweep(o, [first, second, other])
    assert results[0] is results[1]
    assert results[2] is not results[0]
    assert results[2] == results[0]


def test_the_gradient_at_the_input_is_that_of_the_whole_volume():
    o = case()
    with frozen(o.model.network):
        (gradient,) = sweep(o, [InputGradient()])
    assert_equal(gradient.maps[0, 0], full_gradient(o.model.network, o.image, INFERER, o.scores[0]))
    assert_equal(gradient.values[:, 0], o.image_values())


def test_only_the_first_sweep_compares_with_the_prediction(monkeypatch):
    o, blended = case(), []
    blend = Objective.blend
    monkeypatch.setattr(Objective, "blend", lambda self, *args: blended.append(1) or blend(self, *args))
    assert o.blend_deviations() == [None]
    with frozen(o.model.network):
        sweep(o, [Look()])
        assert o.blend_deviations()[0] < 1e-12
        assert blended
        blended.clear()
        sweep(o, [Look()])
    assert blended == []


def test_a_prediction_that_the_windows_do_not_give_is_measured():
    o = case()
    o = o.derive(prediction=o.prediction * 1.5)
    with frozen(o.model.network):
        sweep(o, [Look()])
    assert o.blend_deviations()[0] == pytest.approx(1 / 3)


def test_a_layer_that_does_not_run_is_named():
    o = case()
    o.model.network.unused = torch.nn.ReLU()
    with frozen(o.model.network), pytest.raises(MethodError, match="'unused' is not used in the forward pass"):
        sweep(o, [Look("unused")])


def test_a_request_may_be_a_dataclass_and_is_collected_for_itself():
    @dataclass
    class Peak(Request):
        scale: float = 1.0

    first, second = Peak(2.0), Peak(2.0)
    assert len({first.key, second.key}) == 2
    assert first.key == first.key
