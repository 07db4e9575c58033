"""Found concepts on networks with four planted objects, against the effect of removing each object (CaCE)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.concept_cases import case_activations, objectives_of
from esegeta_monai.explain.concept_discovery import case_units, concept_effects, find_concepts
from esegeta_monai.explain.tcav import examples_of_masks, tcav
from tests.support.concepts import WEIGHTS, ordered, ordered_case

SLOW = pytest.mark.slow  # these take as long again
SETTINGS = [(2, True), pytest.param(2, False, marks=SLOW), pytest.param(3, True, marks=SLOW), (3, False)]
IDS = ["2D classification", "2D segmentation", "3D classification", "3D segmentation"]
CASES = 6


def cace(dims: int, pooled: bool) -> np.ndarray:
    """Mean of F(with) − F(without) over cases, for each object removed from the image: (4,)."""
    explainer, target = ordered(dims, pooled)
    rows = []
    for number in range(CASES):
        objective, _ = objectives_of(explainer, ordered_case(dims, number)[0], [target])
        gone = torch.stack([ordered_case(dims, number, without=j)[0].as_tensor()[0] for j in range(4)])
        rows.append((objective.image_values()[:, None] - objective.value(gone))[0].numpy())
    return np.mean(rows, 0)


@pytest.mark.parametrize(("dims", "pooled"), SETTINGS, ids=IDS)
@pytest.mark.parametrize("finder", ["CRAFT", "ACE"])
def test_planted_objects_are_found_and_ordered_as_their_removal(dims, pooled, finder):
    explainer, target = ordered(dims, pooled)
    cases = [
        case_units(explainer, ordered_case(dims, n)[0], f"case{n}", [target], "layer", "grid(size=4)")
        for n in range(CASES)
    ]
    concepts = find_concepts(cases, finder, 4 if finder == "CRAFT" else 5)
    truth = cace(dims, pooled)
    assert np.argsort(truth).tolist() == np.argsort(WEIGHTS).tolist()
    by_object = {int(np.abs(c.direction).argmax()): c for c in concepts if np.abs(c.direction).max() > 0.9}
    assert sorted(by_object) == [0, 1, 2, 3]
    assert all(c.named for c in by_object.values())
    for j, concept in by_object.items():  # the strongest part is the object's cell
        for number, case in enumerate(cases):
            best = int(concept.strength[case.case].argmax())
            mask = ordered_case(dims, number)[1][str(j)] > 0
            assert bool((case.labels[mask] == best).all())
    (name,) = by_object[0].mean
    assert spearmanr([by_object[j].mean[name] for j in range(4)], truth).statistic == 1
    if finder == "CRAFT":
        objects = [by_object[j] for j in range(4)]
        (effect,) = concept_effects(
            explainer, ordered_case(dims, 0)[0], "case0", [target], "layer", objects, n_samples=32
        )
        assert spearmanr(effect.removal, truth).statistic == 1
        assert np.argsort(effect.sobol).tolist() == np.argsort(np.abs(WEIGHTS)).tolist()
        assert effect.sobol[2] < 1e-3  # the ignored object
        assert effect.passes >= 32 * 5 + 6


@pytest.mark.parametrize(("dims", "pooled"), SETTINGS, ids=IDS)
def test_tcav_orders_concepts_as_the_removal_of_their_objects(dims, pooled):
    explainer, target = ordered(dims, pooled)
    cases = []
    for n in range(16 if dims == 2 else CASES):  # random masks of a 2D image often meet other objects
        image, masks = ordered_case(dims, n)
        body = torch.ones(image.shape[2:])
        cases += case_activations(explainer, image, f"case{n}", [target], ["layer"], masks, randoms=108, body=body)
    tests = tcav([examples_of_masks(cases, str(j), 100) for j in range(4)], cases, alpha=0.2, statistic="mean")
    assert spearmanr([t.mean for t in tests], cace(dims, pooled)).statistic == 1
    assert [t.score for t in tests][:2] == [1, 1]
    assert tests[3].score == 0


def test_chance_is_not_named():
    """Activations without structure: the halves find other concepts."""
    explainer, target = ordered(2, True)
    cases = [
        case_units(explainer, ordered_case(2, n)[0], f"case{n}", [target], "layer", "grid(size=4)")
        for n in range(CASES)
    ]
    rng = np.random.default_rng(0)
    # negative parts too: a factorisation of noise of 30 channels
    chance = [replace(c, parts=np.abs(rng.normal(size=(16, 60))), derivatives={}) for c in cases]
    for finder in ("CRAFT", "ACE"):
        assert not any(c.named for c in find_concepts(chance, finder, 4))


def test_units_of_single_channels_and_few_cases_are_refused():
    explainer, target = ordered(2, True)
    image = ordered_case(2, 0)[0]
    with pytest.raises(UsageError, match="all channels together"):
        case_units(explainer, image, "a", [target], "layer", "grid(size=4, per_channel=True)")
    case = case_units(explainer, image, "a", [target], "layer", "grid(size=4)")
    with pytest.raises(InputError, match="at least 4"):
        find_concepts([case] * 3)
    with pytest.raises(UsageError, match="ACE or CRAFT"):
        find_concepts([case] * 4, "PCA")
