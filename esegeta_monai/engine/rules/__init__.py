"""Modified backward passes: guided backpropagation, DeepLIFT, layer-wise relevance and excitation, on any network.

See :mod:`esegeta_monai.engine.rules.mode` for the engine.
"""

from __future__ import annotations

from esegeta_monai.engine.rules.composites import COMPOSITES, RULES, Composite, composite_of
from esegeta_monai.engine.rules.contrast import Sides, contrastive_excitation, contrastive_lrp
from esegeta_monai.engine.rules.excitation import excitation
from esegeta_monai.engine.rules.finite_differences import deep_lift, deep_lift_multiplier
from esegeta_monai.engine.rules.guided import deconvolution, guided
from esegeta_monai.engine.rules.lrp import lrp
from esegeta_monai.engine.rules.pattern_sums import Pattern
from esegeta_monai.engine.rules.patterns import PatternFit, Way, back_project
from esegeta_monai.engine.rules.run import LayerRelevance, Relevance, check_network

__all__ = [
    "COMPOSITES",
    "RULES",
    "Composite",
    "LayerRelevance",
    "Pattern",
    "PatternFit",
    "Relevance",
    "Sides",
    "Way",
    "back_project",
    "check_network",
    "composite_of",
    "contrastive_excitation",
    "contrastive_lrp",
    "deconvolution",
    "deep_lift",
    "deep_lift_multiplier",
    "excitation",
    "guided",
    "lrp",
]
