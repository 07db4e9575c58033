"""One case from its image to attributions, and how far these can be trusted."""

from __future__ import annotations

from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.augmentation import freeze_augmentation
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.explain.evaluation import Evaluator
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.pair import NetworkPair

__all__ = ["Attribution", "EnsembleInferer", "Evaluator", "Explainer", "NetworkPair", "freeze_augmentation"]
