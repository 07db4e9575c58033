"""Base class of perturbation methods: their perturbations, and the number of window passes."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.scoring import known_passes
from esegeta_monai.errors import MethodError
from esegeta_monai.methods.base import Method

__all__ = ["PerturbationMethod", "finite_scores"]


class PerturbationMethod(Method, registered=False):
    """A black-box method: it uses the change of the target under perturbations, never a gradient."""

    produces = "input map"
    additive = False

    needs_gradient = False

    @abstractmethod
    def perturbations(self, objective: Objective) -> Perturbations:
        """Return all perturbations that will be scored."""

    def predictions(self, objective: Objective) -> int:
        return len(self.perturbations(objective))

    def passes(self, objective: Objective) -> int:
        """Count the passes exactly: windows that a perturbation changes and whose scores are not known."""
        return known_passes(objective, self.perturbations(objective))


def finite_scores(method: Method, scores: Tensor) -> Tensor:
    """Check that the scores (k, m) are finite, for methods whose statistics would hide NaN.

    Raises:
        MethodError: some are not finite.
    """
    bad = int((~torch.isfinite(scores)).any(0).sum())
    if bad:
        raise MethodError(
            f"{method.name}: the target is not finite at {bad} of {scores.shape[1]} perturbed images: switch amp off, "
            "or choose another baseline"
        )
    return scores
