"""The context of a run, and of a trial run that scores a sample of the perturbations."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import score_changes
from esegeta_monai.engine.run_context import RunContext, SampleComplete, ScoreSample
from esegeta_monai.methods import Occlusion, SmoothGrad, run, run_together
from esegeta_monai.targets import MultiClassMask
from tests.support.networks import network
from tests.support.objectives import objective
from tests.support.tensors import assert_equal, noise


def sampled(perturbations: int) -> Objective:
    o, _ = objective(network(2, 1), noise(1, 14, 9), SlidingWindowInferer((8, 8), 2, 0.5), [MultiClassMask(1)])
    return o.derive(context=RunContext.for_sample(perturbations, 2))


def test_a_trial_run_has_a_context_of_its_own():
    trial = RunContext.for_sample(16, 3)
    assert (trial.checkpoint, trial.window_batch, trial.precision_decided) == (None, 3, True)
    assert trial.progress is not RunContext.for_sample(16, 3).progress
    assert trial.progress.silent
    assert trial.processes.size == 1
    assert trial.sample is not None
    assert (trial.sample.perturbations, trial.sample.scores) == (16, None)


def test_scores_are_taken_once():
    sample = ScoreSample(4)
    scores = sample.scores = torch.zeros(1, 4)
    assert sample.take() is scores
    assert sample.take() is None


def test_a_sample_has_some_perturbations_of_each_window_and_their_scores():
    o = sampled(3)
    starts = [(a, b) for a in range(0, 14, 2) for b in range(0, 9, 3)]
    boxes = Boxes(starts, [(min(a + 2, 14), min(b + 3, 9)) for a, b in starts], 0.3)
    with frozen(o.model.network):
        with pytest.raises(SampleComplete, match="perturbations were scored"):
            score_changes(o, boxes)
        scores = o.context.sample.take()
        whole = score_changes(o.derive(context=RunContext()), boxes)
    assert scores.shape[0] == 1
    assert 3 <= scores.shape[1] <= 3 * len(o.windows) < len(boxes)
    assert all(any(torch.isclose(s, w, rtol=1e-12, atol=0) for w in whole[0]) for s in scores[0])


def test_the_sample_of_a_method_inside_methods_is_the_outcome_of_the_outermost():
    """The scores are those of the inner method on the first noisy image, and leave through both wrappers."""
    inner = Occlusion(2, baseline=0.0)
    once = SmoothGrad(inner, n_samples=2, std=1.0)
    twice = SmoothGrad(once, n_samples=2, std=0.0)
    o = sampled(3)
    with frozen(o.model.network):
        (plain,), (single,), (double,) = (run_together([m], o) for m in (inner, once, twice))
        for outcome in (plain, single, double):
            assert isinstance(outcome.error, SampleComplete)
            assert outcome.result is None
            assert outcome.scores.shape[0] == 1
        assert torch.equal(double.scores, single.scores)  # no noise is added by the outer one
        assert not torch.equal(single.scores, plain.scores)
        assert o.context.sample.scores is None
        with pytest.raises(SampleComplete):
            run(inner, o)
        assert_equal(o.context.sample.take(), plain.scores, 1e-12)
