"""Modified backward passes: guided backpropagation, DeepLIFT, layer-wise relevance and excitation, on any network.

See :mod:`esegeta_monai.engine.rules.mode` for the engine. To extend it, `register_rule` adds a rule for operations with
weights to the names that LRP composites accept, `register_operation` adds an operation that the engine does not know,
and `Run` accepts the rules of a custom method.
"""

from __future__ import annotations

from esegeta_monai.engine.rules.composites import COMPOSITES, RULES, Composite, composite_of
from esegeta_monai.engine.rules.contrast import Sides, contrastive_excitation, contrastive_lrp, layer_contrast
from esegeta_monai.engine.rules.excitation import excitation
from esegeta_monai.engine.rules.finite_differences import deep_lift, deep_lift_multiplier
from esegeta_monai.engine.rules.guided import deconvolution, guided
from esegeta_monai.engine.rules.kinds import Kind
from esegeta_monai.engine.rules.lrp import lrp
from esegeta_monai.engine.rules.mode import PARTS, PLAIN, Family, Rule, Rules, local_gradient
from esegeta_monai.engine.rules.operations import Operation
from esegeta_monai.engine.rules.pattern_sums import Pattern
from esegeta_monai.engine.rules.patterns import PatternFit, Way, back_project
from esegeta_monai.engine.rules.registration import register_operation, register_rule
from esegeta_monai.engine.rules.run import LayerRelevance, Relevance, Run, check_network
from esegeta_monai.engine.rules.through import Through, lrp_through
from esegeta_monai.engine.rules.weighted import Part, distribute_shares

__all__ = [
    "COMPOSITES",
    "PARTS",
    "PLAIN",
    "RULES",
    "Composite",
    "Family",
    "Kind",
    "LayerRelevance",
    "Operation",
    "Part",
    "Pattern",
    "PatternFit",
    "Relevance",
    "Rule",
    "Rules",
    "Run",
    "Sides",
    "Through",
    "Way",
    "back_project",
    "check_network",
    "composite_of",
    "contrastive_excitation",
    "contrastive_lrp",
    "deconvolution",
    "deep_lift",
    "deep_lift_multiplier",
    "distribute_shares",
    "excitation",
    "guided",
    "layer_contrast",
    "local_gradient",
    "lrp",
    "lrp_through",
    "register_operation",
    "register_rule",
]
