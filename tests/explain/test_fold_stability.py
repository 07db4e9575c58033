"""MeGe and ReCo: against SciPy and an enumeration, and on networks of folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from esegeta_monai import Explainer
from esegeta_monai.errors import InputError
from esegeta_monai.explain.fold_stability import fold_stability, map_distance
from tests.support.scenes import fitted, network, scenes


def test_distance_is_that_of_scipy() -> None:
    first, second = torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    rho = spearmanr(first.mean(0).numpy().ravel(), second.mean(0).numpy().ravel()).statistic
    assert map_distance(first, second) == pytest.approx(np.sqrt(1 - abs(rho)), rel=1e-12)
    assert map_distance(first, -first) == pytest.approx(0, abs=1e-6)
    assert map_distance(first, torch.zeros_like(first)) == 1
    with pytest.raises(InputError, match="one grid"):
        map_distance(first, second[:, :4])


def test_both_figures_by_enumeration() -> None:
    """Every threshold, every pair in loops of its own."""
    rng = np.random.default_rng(0)
    k, n = 3, 7
    maps = [[torch.from_numpy(rng.normal(size=(1, 4, 4))) for _ in range(n)] for _ in range(k)]
    right = rng.random((k, n)) < 0.6
    folds = [i % k for i in range(n)]
    equal, different = [], []
    for i in range(k):
        for j in range(i + 1, k):
            for c in range(n):
                if folds[c] in (i, j) and (right[i, c] or right[j, c]):
                    rho = spearmanr(maps[i][c].numpy().ravel(), maps[j][c].numpy().ravel()).statistic
                    (equal if right[i, c] and right[j, c] else different).append(np.sqrt(1 - abs(rho)))
    best = 0.0
    for gamma in np.linspace(0, 1, 20001):
        best = max(best, np.mean(np.array(equal) <= gamma) + np.mean(np.array(different) > gamma) - 1)
    result = fold_stability(maps, right.tolist(), folds)
    assert sorted(result.agreeing) == pytest.approx(sorted(equal))
    assert sorted(result.disagreeing) == pytest.approx(sorted(different))
    assert result.mege == pytest.approx(1 / (1 + np.mean(equal)))
    assert result.reco == pytest.approx(best)


def test_extremes_and_refusals() -> None:
    same = torch.randn(1, 5, 5)
    other = torch.zeros(1, 5, 5)
    result = fold_stability([[same, same], [same, other]], [[True, True], [True, False]], [0, 1])
    assert (result.mege, result.reco) == (pytest.approx(1, abs=1e-6), 1.0)
    alone = fold_stability([[same], [same]], [[True], [True]], [0])
    assert alone.reco is None
    for maps, right, folds in (
        ([[same]], [[True]], [0]),
        ([[same], [same]], [[True], [True]], [2]),
        ([[same], [same]], [[True], [True, True]], [0]),
        ([[same], [same]], [[False], [True]], [0]),
    ):
        with pytest.raises(InputError):
            fold_stability(maps, right, folds)


@pytest.mark.parametrize("dims", [2, 3])
def test_folds_of_a_training_agree_more_than_random_maps(dims: int) -> None:
    data = scenes(90, dims, 0)
    folds = [n % 3 for n in range(90)]
    kept = [torch.tensor([f != k for f in folds]) for k in range(3)]
    networks = [fitted(network(dims, 0), data.images[rows], data.objects[rows], 100) for rows in kept]
    chosen = list(range(0, 90, 9))
    maps, right = [], []
    for model in networks:
        explainer = Explainer(model, checks=False)
        targets = [f"ClassScore({int(data.objects[n])})" for n in chosen]
        maps.append(
            [
                next(iter(explainer(data.images[n : n + 1], ["InputXGradient"], [t]))).map
                for n, t in zip(chosen, targets)
            ]
        )
        with torch.no_grad():
            right.append((model(data.images[chosen]).argmax(1) == data.objects[chosen]).tolist())
    result = fold_stability(maps, right, [folds[n] for n in chosen])
    rng = np.random.default_rng(1)
    random = [[torch.from_numpy(rng.normal(size=m.shape)) for m in row] for row in maps]
    control = fold_stability(random, right, [folds[n] for n in chosen])
    print(dims, result.mege, control.mege, result.reco)
    assert result.mege > control.mege + 0.02
