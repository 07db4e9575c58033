"""Methods that run together: outcomes, shared sweeps, failures that stay with their cause."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.run_context import RunContext, SampleComplete
from esegeta_monai.engine.sweep import InputGradient, Request, View
from esegeta_monai.errors import MethodError
from esegeta_monai.methods import GradCam, Method, Occlusion, Passes, Saliency, run, run_together
from esegeta_monai.methods.base import Explained
from esegeta_monai.methods.run import grouped, shares_passes
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import network
from tests.support.objectives import objective
from tests.support.tensors import noise


def case() -> Objective:
    o, _ = objective(network(2, 1), noise(1, 16, 12), SlidingWindowInferer((8, 8), 2, 0.5), [MultiClassMask(1)])
    return o


class Broken(Request):
    """A request that fails while windows are collected."""

    def see(self, view: View) -> None:
        raise MethodError("broken request")


class AsksForBroken(Method, registered=False):
    """Yields a request that fails."""

    produces, additive, units = "input map", False, "none"

    def attribute(self, objective: Objective) -> Passes:
        yield Broken()
        return objective.new_maps()


class FailsAtOnce(Method, registered=False):
    """Fails before it requests anything."""

    produces, additive, units = "input map", False, "none"

    def attribute(self, objective: Objective) -> Any:
        raise MethodError("broken method")


class FailsLater(Method, registered=False):
    """Fails after its request was served."""

    produces, additive, units = "input map", False, "none"

    def attribute(self, objective: Objective) -> Passes:
        yield InputGradient()
        raise MethodError("broken afterwards")


class LeavesAGap(Method, registered=False):
    """States a completeness gap."""

    produces, additive, units = "input map", False, "none"
    gap: float

    def attribute(self, objective: Objective) -> Explained:
        return Explained(objective.new_maps() + 1, {"completeness_gap": [self.gap]})


def test_a_method_that_fails_does_not_end_the_others():
    """A sweep that fails is repeated for each method alone: only the cause fails."""
    o = case()
    methods = [Saliency(), AsksForBroken(), FailsAtOnce(), FailsLater(), GradCam("a"), Occlusion(8)]
    with frozen(o.model.network):
        alone = {i: run(methods[i], o.derive()).maps for i in (0, 4, 5)}
        outcomes = run_together(methods, o)
    texts = [None if outcome.error is None else str(outcome.error) for outcome in outcomes]
    assert texts == [None, "broken request", "broken method", "broken afterwards", None, None]
    for i, outcome in enumerate(outcomes):
        assert (outcome.result is None) == (outcome.error is not None)
        assert outcome.scores is None
        if i in alone:
            assert torch.equal(outcome.result.maps, alone[i])


def test_a_failing_sweep_costs_one_more_pass_per_method():
    o = case()
    windows = len(o.windows)
    with frozen(o.model.network):
        run_together([Saliency(), FailsLater()], o)
        shared = o.context.progress.passes
        assert shared == windows
        run_together([Saliency(), AsksForBroken()], o)
    batch = o.window_batch  # the first batch fails in the shared sweep, and again alone
    assert o.context.progress.passes - shared == windows + 2 * batch


def test_run_raises_what_ended_the_method():
    with pytest.raises(MethodError, match="broken method"):
        run(FailsAtOnce(), case())


def test_a_sampled_method_has_scores_beside_the_maps_of_others():
    o = case()
    o = o.derive(context=RunContext.for_sample(2, 2))
    with frozen(o.model.network):
        gradient, sampled = run_together([Saliency(), Occlusion(4)], o)
    assert gradient.result is not None
    assert gradient.scores is None
    assert sampled.result is None
    assert isinstance(sampled.error, SampleComplete)
    assert sampled.scores.shape[0] == 1


def test_a_gap_is_warned_of_once_and_only_where_it_is_large():
    o = case()
    run_together([LeavesAGap(0.01), LeavesAGap(0.5), LeavesAGap(0.6)], o)
    assert len(o.context.progress.warnings) == 1
    assert "50 %: read it as a ranking of places" in o.context.progress.warnings[0]


def test_methods_that_share_passes_form_one_group_in_place_of_the_first():
    first, second, box, other = Saliency(), GradCam("a"), Occlusion(4), FailsAtOnce()
    assert [shares_passes(m) for m in (first, second, box, other)] == [True, True, False, False]
    assert grouped([box, first, other, second]) == [[box], [first, second], [other]]
    assert grouped([]) == []
