"""TCAV on networks that use one planted object and ignore another: found, not found, and how often chance is found."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.concept_cases import random_masks
from esegeta_monai.explain.concept_vectors import ConceptExamples, _classifier, concept_vector, held_out_accuracy
from esegeta_monai.explain.tcav import (
    examples_of_cases,
    examples_of_masks,
    needed_random_concepts,
    scores,
    tcav,
)
from tests.support.concepts import activations

SLOW = pytest.mark.slow  # these take as long again
SETTINGS = [(2, True), pytest.param(2, False, marks=SLOW), pytest.param(3, True, marks=SLOW), (3, False)]
IDS = ["2D classification", "2D segmentation", "3D classification", "3D segmentation"]


@pytest.mark.parametrize(("dims", "pooled"), SETTINGS, ids=IDS)
@pytest.mark.parametrize("where", ["mask", "everywhere"])
def test_the_used_object_is_found_and_the_ignored_one_is_not(dims, pooled, where):
    cases = activations(dims, pooled, 16, 104, where)
    concepts = [examples_of_masks(cases, name, 100) for name in ("used", "ignored")]
    for statistic in ("share", "mean"):
        used, ignored = tcav(concepts, cases, statistic=statistic, where=where)
        assert (used.verdict, ignored.verdict) == ("significant", "not significant")
        assert used.score == 1
        assert used.p_holm <= 0.04
    assert min(used.accuracy, ignored.accuracy) > 0.9  # both concepts can be read from the layer
    assert min(used.stability, ignored.stability) > 0.9
    assert abs(ignored.mean) < 0.5 * used.mean
    assert np.abs(used.vector).argmax() == 0
    assert np.abs(ignored.vector).argmax() == 1


def runs(cases, statistic: str, where: str, n: int, k: int = 100):
    """p-values of random concepts in place of a real one, each with K others: n families, K drawn of a large pool."""
    rng, values = np.random.default_rng(0), []
    pool = len(cases[0].random["used"])
    for _ in range(n):
        drawn = rng.permutation(pool)[: k + 5]
        fake = [
            replace(
                c,
                pooled={"used": c.random["used"][drawn[0]]},
                random={"used": c.random["used"][drawn[1:]]},
                local={"used": {t: g[1 + drawn] for t, g in c.local["used"].items()}},
            )
            for c in cases
        ]
        (test,) = tcav([examples_of_masks(fake, "used", k)], fake, statistic=statistic, where=where)
        values.append(test.p_share if statistic == "share" else test.p_mean)
    return np.array(values)


@lru_cache(maxsize=1)
def many_random(dims: int, pooled: bool, where: str):
    return activations(dims, pooled, 10, 1500, where)


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "pooled"), SETTINGS, ids=IDS)
@pytest.mark.parametrize("statistic", ["share", "mean"])
@pytest.mark.parametrize("where", ["mask", "everywhere"])
def test_random_concepts_are_significant_as_often_as_stated(dims, pooled, statistic, where):
    """200 runs, each with its own random concept and null, of places that are independent between cases."""
    cases = many_random(dims, pooled, where)
    p = runs(cases, statistic, where, 200)
    for alpha in (0.05, 0.2):
        assert (p <= alpha).mean() <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / 200)
    if statistic == "mean":
        assert (p <= 0.5).mean() > 0.4  # it is not merely blind; shares have ties


def test_the_share_is_blind_where_the_gradient_is_the_same_in_all_cases():
    cases = activations(2, True, 12, 104)
    (gradient,) = cases[0].derivatives.values()
    same = [replace(c, derivatives={"t": gradient}) for c in cases]
    (test,) = tcav([examples_of_masks(same, "used", 100)], same, where="everywhere")
    assert test.random_extreme == 1
    assert test.p_share == 1


def test_a_concept_orthogonal_to_the_gradient_has_a_score_of_one_half():
    """With the usual sign count a derivative of 0 would give a score of 0, the most extreme one."""
    share, mean = scores(np.array([[[1.0, 0.0]], [[3.0, 0.0]]]), np.array([[0.0, 1.0], [1.0, 0.0], [1e-9, 1.0]]))
    assert share.tolist() == [0.5, 1.0, 0.5]
    assert mean.tolist() == [0.0, 2.0, 0.0]


def test_concepts_of_whole_cases():
    """Half of the cases have a brighter texture channel; permuted labels are the null."""
    cases = activations(2, True, 24, 1)
    with_it = [c.case for c in cases[:12]]
    shown = [replace(c, whole=c.whole + 0.3 * np.eye(7)[0]) if c.case in with_it else c for c in cases]
    (real,) = tcav([examples_of_cases(shown, "bright", with_it, 200, 0)], shown, statistic="mean")
    assert real.verdict == "significant"
    (chance,) = tcav([examples_of_cases(cases, "bright", with_it, 200, 0)], cases, statistic="mean")
    assert chance.verdict != "significant"
    assert chance.accuracy < 0.7
    assert chance.verdict == "not interpreted"


def test_accuracy_is_measured_on_cases_that_the_classifier_has_not_seen():
    """Each case has an offset of its own, the same with and without the concept: on seen cases the classifier is right,
    on held-out cases it is not."""
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(24)]
    positives = rng.normal(size=(24, 100))
    examples = ConceptExamples("x", "l", positives, -positives, names, names, positives[None])
    vector = concept_vector(positives, -positives)
    assert ((positives @ vector) > 0).all()
    assert held_out_accuracy(examples, 0) < 0.7
    clear = ConceptExamples("x", "l", positives + 3, positives - 3, names, names, positives[None])
    assert held_out_accuracy(clear, 0) == 1


def test_a_vector_points_to_the_concept_whatever_the_units():
    rng = np.random.default_rng(0)
    without, with_it = rng.normal(size=(30, 6)), rng.normal(size=(30, 6)) + 2 * np.eye(6)[0]
    vector = concept_vector(with_it, without)
    assert vector[0] > 0.9
    assert np.linalg.norm(vector) == pytest.approx(1)
    np.testing.assert_allclose(concept_vector(1e6 * with_it, 1e6 * without), vector, atol=1e-5)
    assert not concept_vector(np.ones((3, 2)), np.ones((3, 2))).any()


def test_the_classifier_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for n, m, channels in ((8, 30, 5), (6, 6, 40)):
        with_it, without = rng.normal(size=(n, channels)) + 0.5, rng.normal(size=(m, channels))
        both = np.concatenate([with_it, without])
        scale = np.sqrt(((both - both.mean(0)) ** 2).mean())
        fitted = RidgeClassifier(class_weight="balanced").fit(both / scale, np.arange(n + m) < n)
        reference = np.ravel(fitted.coef_)
        np.testing.assert_allclose(
            concept_vector(with_it, without), reference / np.linalg.norm(reference), atol=1e-10, rtol=0
        )
        weights, intercept = _classifier(with_it, without)
        decision = fitted.decision_function(both / scale)
        np.testing.assert_allclose(both @ weights + intercept, np.ravel(decision), atol=1e-10, rtol=0)
        several = concept_vector(np.stack([with_it, with_it + 1]), without)
        np.testing.assert_allclose(several[0], concept_vector(with_it, without), atol=1e-12)
        np.testing.assert_allclose(several[1], concept_vector(with_it + 1, without), atol=1e-12)


def test_random_masks_have_the_shape_and_the_share_inside_the_body():
    body = torch.zeros(30, 30, dtype=torch.bool)
    body[:15] = True
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[2:5, 3:5] = mask[4, 6] = True
    for place, inside in ((mask, 1.0), (mask.flip(0), 0.0)):
        moved = random_masks(place, body, 200, np.random.default_rng(0))
        shares = [float(body[m.box][m.mask].double().mean()) for m in moved]
        assert all(int(m.mask.sum()) == int(mask.sum()) for m in moved)
        assert max(abs(s - inside) for s in shares) <= 0.1
        assert len({m.box[0].start for m in moved}) > 8
    with pytest.raises(InputError, match="give a smaller mask"):
        random_masks(body, body, 50, np.random.default_rng(0))


def test_too_few_cases_or_random_concepts_are_refused():
    cases = activations(2, True, 6, 100)
    with pytest.raises(InputError, match="in 3 case"):
        examples_of_masks(cases[:3], "used", 99)
    with pytest.raises(UsageError, match="need 100 random concepts, and there are 99"):
        tcav([examples_of_masks(cases, "used", 99)], cases)
    assert needed_random_concepts(10, 0.05) == 199
