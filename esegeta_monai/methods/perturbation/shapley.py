"""Shapley values of features: their shares of ``F(x) − F(x₀)``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.game import Game
from esegeta_monai.engine.perturbation.masks import Segments
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods.base import Explained, completeness
from esegeta_monai.methods.perturbation.base import PerturbationMethod

__all__ = ["ChannelShapley", "KernelShap", "ShapleyValueSampling", "all_coalitions", "shapley_values"]


class _ShapleyMethod(PerturbationMethod):
    """Base class: spreads ``φ_j`` of each feature over its voxels, so that the map sums to F(x) − F(x₀)."""

    additive = True
    units = "target per voxel"

    def game(self, objective: Objective) -> Game:
        """Return the game whose players are the features."""
        own: Any = self  # each subclass has the parameters in its own order
        return Game.of(objective, own.feature_mask, own.baseline)

    def coalitions(self, game: Game) -> np.ndarray:
        """Return all required coalitions (m, n), bool."""
        raise NotImplementedError

    def perturbations(self, objective: Objective) -> Segments:
        """Return all coalitions."""
        game = self.game(objective)
        return game.segments(self.coalitions(game))

    @staticmethod
    def explained(game: Game, phi: Tensor, error: Tensor, empty: Tensor, notes: dict[str, Any]) -> Explained:
        """Build the result from values and standard errors (k, n), and ``F(x₀) − F(x)`` (k,)."""
        table = game.features.table(phi, standard_error=error)
        sums = {
            **completeness(phi, -empty),
            "baseline_value": (game.objective.image_values().cpu() + empty).tolist(),
        }
        maps = game.features.spread(phi).to(game.objective.image.dtype)
        return Explained(maps, {**game.notes(), **notes, **sums, "features": table})


class ShapleyValueSampling(_ShapleyMethod):
    """``φ_j = mean over orders of F(with j and all before it) − F(with all before it)`` (Castro et al. 2009).

    Complete: each order's shares add up to ``F(x) − F(x₀)``, x₀ being the image with all features off.

    Args:
        n_samples: random orders; if there are no more (n! ≤ n_samples), each is used once, which is exact.
        feature_mask, baseline: see `FeatureAblation`.

    The map's values are φ_j divided by the number of j's voxels; the record's table has φ_j and its standard error.

    Example:
        >>> ShapleyValueSampling(n_samples=10, feature_mask="channels").additive
        True
    """

    reference = "Castro et al., Comput. Oper. Res. 36(5), 2009; Strumbelj & Kononenko, JMLR 11, 2010"

    n_samples: int = 25
    feature_mask: Any = "supervoxels"
    baseline: Any = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_samples < 2:
            raise UsageError(f"n_samples={self.n_samples}: a standard error needs at least two orders")

    def coalitions(self, game: Game) -> np.ndarray:
        """Return (orders * (n + 1), n): for each order the coalitions from empty to full."""
        orders = self.orders(game)
        n = orders.shape[1]
        game.check_size(len(orders) * (n + 1))
        rank = np.argsort(orders, axis=1)
        return (rank[:, None, :] < np.arange(n + 1)[None, :, None]).reshape(-1, n)

    def orders(self, game: Game) -> np.ndarray:
        """Return the orders of features (orders, n)."""
        n = len(game.features)
        if self._exact(n):
            return np.array(list(itertools.permutations(range(n))))
        generator = game.objective.generator()
        return torch.stack([torch.randperm(n, generator=generator) for _ in range(self.n_samples)]).numpy()

    def _exact(self, n: int) -> bool:
        return n < 13 and math.factorial(n) <= self.n_samples

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) where features are channels."""
        game = self.game(objective)
        orders = torch.from_numpy(self.orders(game))
        values = game.values(self.coalitions(game)).reshape(objective.n_targets, *orders.shape[:1], -1)
        shares = torch.zeros(values.shape[0], *orders.shape, dtype=values.dtype)
        shares.scatter_(2, orders.expand_as(shares), values.diff(dim=2))
        exact = self._exact(orders.shape[1])
        error = torch.zeros_like(shares[:, 0]) if exact else shares.std(1) / math.sqrt(len(orders))
        notes = {"orders": len(orders), "exact": exact}
        return self.explained(game, shares.mean(1), error, values[:, 0, 0], notes)


class KernelShap(_ShapleyMethod):
    """Shapley values by weighted regression on coalitions (Lundberg & Lee 2017).

    ``min over φ of Σ_S π(S) (v(S) − v(∅) − Σ_{j∈S} φ_j)²`` with ``Σ φ = v(all) − v(∅)`` as a constraint and
    ``π(S) = (n−1) / (C(n,|S|) |S| (n−|S|))``. Coalitions are drawn by π, each with its complement (Covert & Lee 2021).

    Args:
        n_samples: coalitions; if all 2ⁿ − 2 fit, each is used once with its weight, which is exact.
        feature_mask, baseline: see `FeatureAblation`.

    The record's table has φ_j and its standard error (delete-a-group jackknife).
    """

    reference = "Lundberg & Lee, NeurIPS 2017, arXiv:1705.07874; Covert & Lee, AISTATS 2021, arXiv:2012.01536"

    n_samples: int = 512
    feature_mask: Any = "supervoxels"
    baseline: Any = "auto"

    def coalitions(self, game: Game) -> np.ndarray:
        """Return (2 + samples, n): empty, full, then samples; a sample is followed by its complement."""
        n = len(game.features)
        if self._exact(n):
            return all_coalitions(n)[[0, -1, *range(1, 2**n - 1)]]
        game.check_size(self.n_samples)
        if self.n_samples < max(2 * GROUPS, 2 * n):
            raise MethodError(
                f"KernelShap: {self.n_samples} samples for {n} features: at least {max(2 * GROUPS, 2 * n)} are needed, "
                "ten per feature are recommended"
            )
        generator = game.objective.generator()
        sizes = torch.arange(1, n, dtype=torch.float64)
        drawn = torch.multinomial(1 / (sizes * (n - sizes)), self.n_samples // 2, True, generator=generator) + 1
        chosen = np.zeros((2, n), dtype=bool)
        chosen[1] = True
        half = torch.rand(len(drawn), n, generator=generator).argsort(1).argsort(1) < drawn[:, None]
        return np.concatenate([chosen, torch.stack([half, ~half], 1).reshape(-1, n).numpy()])

    def _exact(self, n: int) -> bool:
        return n <= 20 and 2**n - 2 <= self.n_samples

    def attribute(self, objective: Objective) -> Explained:
        """(k, 1, *spatial), or (k, C, *spatial) where features are channels."""
        game = self.game(objective)
        sets = self.coalitions(game)
        n, exact = sets.shape[1], self._exact(sets.shape[1])
        values = game.values(sets).numpy()
        sizes = sets[2:].sum(1)
        weights = 1 / np.array([math.comb(n, s) * s * (n - s) for s in sizes]) if exact else np.ones(len(sizes))
        phi = _constrained(sets[2:], values, weights)
        error = np.zeros_like(phi)
        if not exact:
            parts = [_constrained(sets[2:], values, weights * keep) for keep in _without_a_group(len(sizes))]
            error = np.sqrt((GROUPS - 1) / GROUPS * ((np.stack(parts) - np.mean(parts, 0)) ** 2).sum(0))
        notes = {"coalitions": len(sets), "exact": exact}
        empty = torch.from_numpy(values[:, 0])
        return self.explained(game, torch.from_numpy(phi), torch.from_numpy(error), empty, notes)


GROUPS = 32
"""Groups of the jackknife."""


def _without_a_group(samples: int) -> Iterator[np.ndarray]:
    """Yield weights that leave out one group of pairs after the other."""
    group = np.arange(samples) // 2 % GROUPS
    for g in range(GROUPS):
        yield (group != g).astype(float)


def _constrained(sets: np.ndarray, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Solve the weighted regression under ``Σ φ = v(all) − v(∅)``: (k, n). ``values``: (k, 2 + m), empty and full
    first.

    The last feature is eliminated by the constraint.
    """
    total = values[:, 1] - values[:, 0]
    if sets.shape[1] == 1:
        return total[:, None]
    y = values[:, 2:] - values[:, :1] - sets[:, -1] * total[:, None]
    x = sets[:, :-1].astype(float) - sets[:, -1:]
    root = np.sqrt(weights)
    first = np.linalg.lstsq(x * root[:, None], (y * root).T, rcond=None)[0].T
    return np.concatenate([first, (total - first.sum(1))[:, None]], axis=1)


class ChannelShapley(_ShapleyMethod):
    """The exact Shapley value of each input channel, such as the contrasts of an MR examination: 2^C predictions.

    Args:
        baseline: replaces a channel that is off, see `esegeta_monai.engine.baselines`.
        names: channel names for the table; None: those of the case (a bundle's metadata.json).

    Raises:
        MethodError: more than 12 channels.
    """

    reference = "Shapley 1953; Lundberg & Lee, NeurIPS 2017, arXiv:1705.07874"

    baseline: Any = "auto"
    names: Sequence[str] | None = None

    def game(self, objective: Objective) -> Game:
        from esegeta_monai.engine.feature_masks import Channels

        channels = objective.image.shape[0]
        if channels > 12:
            raise MethodError(
                f"ChannelShapley needs 2^{channels} predictions for {channels} channels: use "
                "ShapleyValueSampling(feature_mask='channels')"
            )
        return Game.of(objective, Channels(self.names), self.baseline)

    def coalitions(self, game: Game) -> np.ndarray:
        """Return all 2^C coalitions (2^C, C)."""
        return all_coalitions(len(game.features))

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        game = self.game(objective)
        sets = self.coalitions(game)
        values = game.values(sets)
        phi = shapley_values(values)
        return self.explained(game, phi, torch.zeros_like(phi), values[:, 0], {"coalitions": len(sets), "exact": True})


def all_coalitions(n: int) -> np.ndarray:
    """Return all coalitions of n features (2ⁿ, n), bool: feature j is in row r where bit j of r is set."""
    return (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1


def shapley_values(values: Tensor) -> Tensor:
    """Compute exact Shapley values (k, n) from the values of all coalitions (k, 2ⁿ), in the order of `all_coalitions`.

    ``φ_j = Σ_{S ∌ j} |S|! (n−|S|−1)! / n! (v(S ∪ j) − v(S))``

    >>> shapley_values(torch.tensor([[0.0, 1.0, 2.0, 7.0]]))
    tensor([[3., 4.]])
    """
    n = int(values.shape[1]).bit_length() - 1
    sets = torch.from_numpy(all_coalitions(n))
    sizes = sets.sum(1)
    weight = torch.tensor([1 / (n * math.comb(n - 1, s)) for s in range(n)], dtype=values.dtype)
    values_of_features = []
    for j in range(n):
        without = torch.nonzero(~sets[:, j]).flatten()
        values_of_features.append(((values[:, without + 2**j] - values[:, without]) * weight[sizes[without]]).sum(1))
    return torch.stack(values_of_features, 1)
