"""Relevance propagated from the output to the image, operation by operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained, Method, completeness

__all__ = ["LRP", "ExcitationBackprop", "absorbed_notes", "input_range"]


class _Relevance(Method):
    """Base class: adds windows, records relevance absorbed by biases (``booked``), its share of the score
    (``absorbed_share``) and the conservation gap."""

    produces = "input map"
    additive = True

    full_precision = True
    needs_linear = True
    repeats_in_float64 = True
    gap_bound = 1e-3

    def passes(self, objective: Objective) -> int:
        """One pass, and a second one of the first window, to compare its output under the rules with the plain one."""
        return len(objective.windows) + 1

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        absorbed = torch.zeros(objective.n_targets, dtype=torch.float64)
        total = torch.zeros_like(absorbed)

        def of(batch: Batch) -> torch.Tensor:
            cotangents = batch.stacked_cotangents()
            relevance = self._relevance(objective, batch, cotangents)
            absorbed.add_(relevance.absorbed.sum(1, dtype=torch.float64).cpu())
            total.add_(self._expected(batch, cotangents, relevance).cpu())
            return relevance.input

        maps, padding = objective.scatter(of, sums=[absorbed, total])
        lost = padding.sum(1, dtype=torch.float64).cpu()
        notes = {**absorbed_notes(absorbed, total), "sum_in_padding": lost}
        return Explained(maps, {**notes, **completeness(maps, total, lost + absorbed)})

    def _relevance(self, objective: Objective, batch: Batch, cotangents: torch.Tensor) -> rules.Relevance:
        raise NotImplementedError

    def _expected(self, batch: Batch, cotangents: torch.Tensor, relevance: rules.Relevance) -> torch.Tensor:
        """Return the required sum of map and absorbed relevance, (k,), float64."""
        return batch.scores(relevance.output).sum(1)


class CompositeMethod(Method, registered=False):
    """A method whose relevance follows the rules of a composite."""

    units = "target per voxel"
    additive = True
    full_precision = True
    needs_linear = True
    repeats_in_float64 = True
    gap_bound = 1e-3

    composite: str | Mapping[str, Any] = "EpsilonPlus"
    epsilon: float = 1e-6
    gamma: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        rules.composite_of(self.composite, epsilon=self.epsilon, gamma=self.gamma, low=0.0, high=1.0)

    def passes(self, objective: Objective) -> int:
        """One pass, and a second one of the first window, to compare its output under the rules with the plain one."""
        return len(objective.windows) + 1

    def limits(self, objective: Objective) -> dict[str, Any]:
        """Return the parameters of the rules: epsilon, gamma, and the least and greatest value of the windows."""
        low, high = input_range(objective)
        return {"epsilon": self.epsilon, "gamma": self.gamma, "low": low, "high": high}


class LRP(CompositeMethod, _Relevance):
    """Layer-wise relevance propagation (Bach et al. 2015): ``Σ a + absorbed relevance = F(x)``.

    Convolutions and linear layers follow the rules of a composite (Kohlbrenner et al. 2020), norms have a constant σ,
    attention follows AttnLRP (Achtibat et al. 2024). Biases absorb relevance (``booked`` in the record, and
    ``absorbed_share``, its share of F, with a warning above one half). Linear scores only (``output="logit"``).

    Args:
        composite: ``"EpsilonPlus"``, ``"EpsilonPlusFlat"``, ``"EpsilonGammaBox"``, ``"EpsilonAlpha2Beta1"``,
            ``"DeepTaylor"``, or a mapping of operation to rule, see `esegeta_monai.engine.rules.lrp`.
        epsilon, gamma: parameters of the rules of these names.

    Example:
        >>> LRP(composite="EpsilonPlusFlat").name
        'LRP'
    """

    map_check = "relevance"
    reference = "Bach et al., PLoS ONE 2015, doi:10.1371/journal.pone.0130140; Kohlbrenner et al., IJCNN 2020"

    def _relevance(self, objective: Objective, batch: Batch, cotangents: torch.Tensor) -> rules.Relevance:
        limits = self.limits(objective)
        return rules.lrp(batch.forwards, batch.image, cotangents, self.composite, compare=batch.compares, **limits)


def absorbed_notes(absorbed: torch.Tensor, total: torch.Tensor) -> dict[str, Any]:
    """Return the notes on relevance that biases absorb, (k,), and its share of the score ``total`` (k,)."""
    shares = [float(a / t) if t != 0 else None for a, t in zip(absorbed, total)]
    return {"booked": absorbed, "absorbed_share": shares}


def input_range(objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest value of the image's windows, including constant padding, as scalars."""
    low, high = objective.image.min(), objective.image.max()
    if objective.plan.padded and objective.plan.padding_mode == "constant":
        low, high = low.clamp(max=objective.plan.cval), high.clamp(min=objective.plan.cval)
    return low.to(objective.model.device), high.to(objective.model.device)


class ExcitationBackprop(_Relevance):
    """Excitation backpropagation: the marginal winning probability of each voxel (Zhang et al. 2018).

    The prior is the target's weights (sum 1 for a class); the values of the map are never negative and add up to
    the prior, except for the share that only biases excite (``booked`` in the record). Linear scores only.
    """

    reference = "Zhang et al., IJCV 2018, doi:10.1007/s11263-017-1059-x"
    units = "share of the prior"

    @property
    def signed(self) -> bool:
        return False

    def _relevance(self, objective: Objective, batch: Batch, cotangents: torch.Tensor) -> rules.Relevance:
        return rules.excitation(batch.forward, batch.image, cotangents, compare=batch.compare)

    def _expected(self, batch: Batch, cotangents: torch.Tensor, relevance: rules.Relevance) -> torch.Tensor:
        return cotangents.flatten(1).sum(1, dtype=torch.float64)
