"""Modified backward passes at activations."""

from __future__ import annotations

from torch import Tensor

import esegeta_monai.engine.rules as rules
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.objective import Objective
from esegeta_monai.methods.base import Explained, Method

__all__ = ["Deconvolution", "GuidedBackprop"]


class GuidedBackprop(Method):
    """The gradient with ``g_in = max(max(g_out, 0) · a′(x), 0)`` at every activation a (Springenberg et al. 2015).

    It acts on all rectifiers (ReLU, LeakyReLU, PReLU, ELU, GELU, SiLU, Mish, …), as modules or calls. The importance
    map of the windows is never negative, so the sum of the windows' maps is the map of the whole volume.

    Linear targets that fall with an output (the negative of a logit) are refused: their signal starts negative.

    The maps are sharp, but insensitive to the upper layers' weights (Adebayo et al. 2018): do not use it alone.
    """

    reference = "Springenberg et al., ICLR workshop 2015, arXiv:1412.6806"
    produces = "input map"
    additive = False
    units = "modified gradient"
    full_precision = True
    needs_positive = True

    def passes(self, objective: Objective) -> int:
        """Count one pass, and a plain one of the first window, whose output is compared with that under the rules."""
        return len(objective.windows) + 1

    def attribute(self, objective: Objective) -> Explained:
        """(k, C, *spatial)."""

        def of(batch: Batch) -> Tensor:
            return self._rule(batch.forward, batch.image, batch.stacked_cotangents(), compare=batch.compare).input

        return Explained(objective.scatter(of)[0])

    _rule = staticmethod(rules.guided)


class Deconvolution(GuidedBackprop):
    """The gradient with ``g_in = max(g_out, 0)`` at every activation of any kind (Zeiler & Fergus 2014)."""

    reference = "Zeiler & Fergus, ECCV 2014, arXiv:1311.2901"

    _rule = staticmethod(rules.deconvolution)
