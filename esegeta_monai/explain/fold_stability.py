"""MeGe and ReCo (Fel et al. 2022, arXiv:2009.04521): whether maps stay the same when the training set changes a little.

The networks of k folds explain the same cases. Compared are two networks for a case that one has seen in its training
and the other has not: the maps should be alike if both are right, and differ if one is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from esegeta_monai.errors import InputError

__all__ = ["FoldStability", "fold_stability", "map_distance"]


@dataclass(frozen=True)
class FoldStability:
    """Stability of a method over folds.

    Attributes:
        mege: mean generalisability, ``1/(1 + mean distance of two right networks)``, 0.5 to 1 (all maps alike).
        reco: relative consistency, ``max over γ of TPR(γ) + TNR(γ) − 1``, 0 (chance) to 1: how well a threshold of
            the distance divides pairs that are both right from pairs with one wrong network; None: no pair of a kind.
        agreeing: distances of the pairs that are both right.
        disagreeing: distances of the pairs with one wrong network.
    """

    mege: float
    reco: float | None
    agreeing: np.ndarray
    disagreeing: np.ndarray


def map_distance(first: Tensor, second: Tensor) -> float:
    """Return ``√(1 − |ρ|)``, ρ the rank correlation (Spearman) of the maps' voxels; 1 if a map is constant.

    Channels are averaged before, as in the publication's code.

    Args:
        first, second: (C, *spatial), of equal shape.

    Raises:
        InputError: the shapes differ.
    """
    if first.shape != second.shape:
        raise InputError(f"maps of {tuple(first.shape)} and {tuple(second.shape)}: give maps on one grid")
    ranks = [rankdata(m.as_subclass(Tensor).detach().double().mean(0).cpu().numpy().ravel()) for m in (first, second)]
    a, b = (r - r.mean() for r in ranks)
    lengths = float(np.sqrt((a @ a) * (b @ b)))
    correlation = float(a @ b) / lengths if lengths > 0 else 0.0
    return float(np.sqrt(max(0.0, 1 - abs(correlation))))


def fold_stability(
    maps: Sequence[Sequence[Tensor]], right: Sequence[Sequence[bool]], folds: Sequence[int]
) -> FoldStability:
    """Compute MeGe and ReCo over all cases and all pairs of networks with exactly one that has seen the case.

    Args:
        maps: maps (C, *spatial) of each network (k of them) for each case (n), explaining the true class.
        right: whether each network predicts each case rightly, (k, n).
        folds: number of the network whose training left the case out, for each case, 0 to k − 1.

    Raises:
        InputError: numbers differ, there are fewer than two networks, or no pair is right.
    """
    count = len(folds)
    if len(maps) < 2 or len(right) != len(maps) or any(len(row) != count for row in (*maps, *right)):
        raise InputError("give at least two networks, and for each one map and one verdict for every case")
    if not all(0 <= fold < len(maps) for fold in folds):
        raise InputError(f"a fold is the number of the network that has not seen the case, 0 to {len(maps) - 1}")
    alike: list[float] = []
    apart: list[float] = []
    for n, unseen in enumerate(folds):
        for other in (k for k in range(len(maps)) if k != unseen):
            verdicts = bool(right[unseen][n]), bool(right[other][n])
            if any(verdicts):
                (alike if all(verdicts) else apart).append(map_distance(maps[unseen][n], maps[other][n]))
    if not alike:
        raise InputError("no case is predicted rightly by two networks: there is nothing to compare")
    agreeing, disagreeing = np.array(alike), np.array(apart)
    reco = None
    if len(disagreeing):
        gammas = np.concatenate([agreeing, disagreeing])
        below = (agreeing[None] <= gammas[:, None]).mean(1)
        above = (disagreeing[None] > gammas[:, None]).mean(1)
        reco = max(0.0, float((below + above - 1).max()))
    return FoldStability(1 / (1 + float(agreeing.mean())), reco, agreeing, disagreeing)
