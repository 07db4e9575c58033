"""Relevance for the target minus relevance for its opposite: specific to the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import torch
from torch import Tensor

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained, Method, completeness
from esegeta_monai.methods.relevance.lrp import CompositeMethod

__all__ = ["ContrastiveExcitationBackprop", "ContrastiveLRP"]


class _Contrastive(Method):
    """Base class: sums target and opposite over the windows, then compares them."""

    produces = "input map"
    additive = True

    full_precision = True
    needs_linear = True

    positive: bool = True

    @property
    def signed(self) -> bool:
        return not self.positive

    def passes(self, objective: Objective) -> int:
        """Count one pass, and a plain one of the first window, whose output is compared with that under the rules."""
        return len(objective.windows) + 1

    def _both(self, objective: Objective) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return maps (2, k, C, *spatial) of target and opposite, sums on padding and `Sides.kept` (2, k), the total
        (k,)."""
        maps = torch.stack([objective.new_maps(), objective.new_maps()])
        padding = torch.zeros(2, objective.n_targets, dtype=torch.float64)
        kept = torch.zeros_like(padding)
        total = torch.zeros_like(padding[0])

        def run(batch: Batch) -> None:
            sides = self._sides(objective, batch)
            kept.add_(sides.kept.cpu())
            total.add_(sides.total.cpu())
            for i, values in enumerate((sides.target, sides.opposite)):
                padding[i] += objective.add(maps[i], batch, values).sum(1, dtype=torch.float64).cpu()

        objective.each([(0, w) for w in objective.windows], run, sums=[maps, padding, kept, total])
        return maps, padding, kept, total

    def _sides(self, objective: Objective, batch: Batch) -> rules.Sides:
        raise NotImplementedError

    def _shown(self, contrast: Tensor) -> Tensor:
        return contrast.clamp(min=0) if self.positive else contrast


class ContrastiveExcitationBackprop(_Contrastive):
    """``Σ prior · (T / t − A / a)``: excitation backpropagation of the target minus that of its opposite (Zhang 2018).

    The opposite is the target with the signs of the last weights changed. t and a are the sums that the last weights of
    the whole volume pass down (each side is divided by its own), so that the contrast sums to zero there. Linear scores
    only (``output="logit"``).

    Args:
        positive: True keeps positive values only, as Zhang does; False gives the signed contrast.

    The record has ``kept_target`` and ``kept_opposite``, t and a as shares of the prior.

    Example:
        >>> ContrastiveExcitationBackprop(positive=False).signed
        True
    """

    reference = "Zhang et al., IJCV 2018, doi:10.1007/s11263-017-1059-x"
    units = "share of the prior"

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        maps, padding, kept, prior = self._both(objective)
        factors = torch.where(kept > 0, prior / torch.where(kept > 0, kept, 1.0), 0.0)
        factors[1] *= -1
        wide = factors.reshape(2, -1, *(1,) * (maps.ndim - 2)).to(maps)
        contrast = (maps * wide).sum(0)
        notes = {
            "sum_in_padding": (padding * factors).sum(0),
            "kept_target": kept[0] / prior,
            "kept_opposite": kept[1] / prior,
        }
        return Explained(self._shown(contrast), notes)

    def _sides(self, objective: Objective, batch: Batch) -> rules.Sides:
        return rules.contrastive_excitation(
            batch.forward, batch.image, batch.stacked_cotangents(), compare=batch.compare
        )


class ContrastiveLRP(CompositeMethod, _Contrastive):
    """``max(R − R_dual, 0)``: LRP of the target minus LRP of its opposite (Gu, Yang & Tresp 2018, CLRP2).

    The opposite is the target with the signs of the last weights changed; it starts with the same relevance F(x). The
    last weights use the z⁺ rule (under epsilon both sides would be equal), the operations below use the composite.
    The sum of R − R_dual and of the absorbed relevance (``booked`` in the record) is 0. Linear scores only
    (``output="logit"``).

    Args:
        composite, epsilon, gamma: see `LRP`; for the operations below the last weights. Gu et al. use z⁺ everywhere.
        positive: True keeps positive values only, as Gu et al. do; False gives the signed contrast.

    Example:
        >>> ContrastiveLRP().parameters["composite"]
        {'convolution': 'ZPlus', 'dense': 'ZPlus'}
    """

    reference = "Gu, Yang & Tresp, ACCV 2018, arXiv:1812.02100"

    composite: str | Mapping[str, Any] = field(default_factory=lambda: {"convolution": "ZPlus", "dense": "ZPlus"})

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""
        maps, padding, kept, total = self._both(objective)
        contrast = maps[0] - maps[1]
        absorbed, lost = kept[0] - kept[1], padding[0] - padding[1]
        # both sides begin with F, so the difference of their sums is 0 and its gap is measured relative to F
        of_map = completeness(contrast, torch.zeros_like(lost), lost + absorbed)["completeness_gap_of_map"]
        gap = contrast.flatten(1).sum(1, dtype=torch.float64).cpu() + lost + absorbed
        notes = {
            "booked": absorbed,
            "sum_in_padding": lost,
            "completeness_gap": [abs(float(g / v)) if v else None for g, v in zip(gap, total)],
            "completeness_gap_of_map": of_map,
        }
        return Explained(self._shown(contrast), notes)

    def _sides(self, objective: Objective, batch: Batch) -> rules.Sides:
        composite = rules.composite_of(self.composite, **self.limits(objective))
        return rules.contrastive_lrp(
            batch.forward, batch.image, batch.stacked_cotangents(), composite, compare=batch.compare
        )
