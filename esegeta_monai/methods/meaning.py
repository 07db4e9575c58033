# ruff: noqa: E501 - one sentence per line
"""The meaning of a map: one sentence for each method, and the two ends of its colour scale in words."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Meaning", "meaning_of"]


class Meaning(NamedTuple):
    """The meaning of a map.

    Attributes:
        text: one sentence.
        low, high: what the two ends of the colour scale stand for; ``low`` is that of zero for a map without sign.
        effect: True if the map shows the effect of places on the score; False for activations, which need not have one.
    """

    text: str
    low: str
    high: str
    effect: bool = True


SHARE = ("lowers the score", "raises the score")
SLOPE = ("a higher value here lowers the score", "a higher value here raises the score")
STRENGTH = ("no influence", "strong influence in either direction")
HIDING = ("hiding this raises the score", "hiding this lowers the score")
SUPPORT = ("no support", "strong support in this layer")
ACTIVE = ("weak or negative activation", "strong activation")

_COARSE = "It is as coarse as the layer, and is no sharper where it is interpolated."

_MEANINGS: dict[str, tuple[str, tuple[str, str]]] = {
    "AblationCam": (f"Places where the layer's channels that matter are active: switching them off lowers the score. {_COARSE}", SUPPORT),
    "AttentionRelevance": (f"Where attention that speaks for the target comes from; skip connections and convolutions are not in it. {_COARSE}", ("no attention for the target", "most attention for the target")),
    "AttentionRollout": (f"How much each place is mixed into what the target reads, by attention alone. {_COARSE}", ("hardly mixed in", "most mixed in")),
    "BlurIG": ("How much each voxel adds to the score while the image goes from blurred to sharp; the voxels add up to the change of the score.", SHARE),
    "Cam": (f"How much each place of the last layer adds to the score of the class. {_COARSE}", SHARE),
    "ChannelShapley": ("How much each input channel adds to the score on average over all orders of adding channels; it shows no places.", SHARE),
    "ContrastiveExcitationBackprop": ("Where the evidence for the target exceeds that for its opposite.", ("no more than its opposite", "more evidence for the target")),
    "ContrastiveLRP": ("Where the relevance for the target exceeds that for its opposite.", ("no more than its opposite", "more relevance for the target")),
    "Deconvolution": ("Image structure to which the network's active units respond; it depends little on the target, and its sign is that of the pattern.", ("darker pattern", "brighter pattern")),
    "DeepLift": ("How much each voxel's difference from the baseline adds to the score; the voxels add up to the change of the score.", SHARE),
    "DeepLiftShap": ("How much each voxel's difference from typical cases adds to the score; the voxels add up to the change of the score.", SHARE),
    "EigenCam": (f"Where the layer's strongest common pattern is active; it does not depend on the target. {_COARSE}", ACTIVE),
    "ExcitationBackprop": ("The probability that a voxel is reached from the target along exciting connections.", ("not reached", "most often reached")),
    "ExtremalPerturbation": ("The smooth region of a given size that alone keeps the score highest.", ("may be removed", "needed for the score")),
    "FeatureAblation": ("How much the score falls when a region or channel is replaced.", HIDING),
    "FeaturePermutation": ("How much the score falls when a region or channel is taken from other cases.", HIDING),
    "FullGrad": ("How strongly input and biases of all layers react at each place, without direction.", STRENGTH),
    "GradCam": (f"Places where the layer's features speak for the target; features against it are left out. {_COARSE}", SUPPORT),
    "GradCamPlusPlus": (f"Places where the layer's features speak for the target, with more weight for small ones. {_COARSE}", SUPPORT),
    "GradientShap": ("How much each voxel's difference from typical images adds to the score, estimated from samples.", SHARE),
    "GuidedBackprop": ("Edges and textures that excite active units; it resembles the image, and depends little on the target.", ("darker pattern", "brighter pattern")),
    "GuidedGradCam": ("Edges and textures of guided backpropagation, only where Grad-CAM finds support for the target.", ("darker pattern", "brighter pattern")),
    "GuidedIG": ("How much each voxel adds to the score along a path that avoids steep gradients; the voxels add up to the change of the score.", SHARE),
    "HiResCam": (f"Places where the layer's features raise the score, position by position. {_COARSE}", SUPPORT),
    "Hsic": ("How much the score depends on whether a cell is visible, without direction.", STRENGTH),
    "InputXGradient": ("First-order estimate of how much each voxel's value adds to the score.", SHARE),
    "IntegratedGradients": ("How much each voxel adds to the score on the way from the baseline to the image; the voxels add up to the change of the score.", SHARE),
    "InternalInfluence": (f"How strongly the score depends on the layer on the way from the baseline to the image. {_COARSE}", SLOPE),
    "KernelShap": ("How much each region adds to the score on average over all combinations of regions, estimated by a regression.", SHARE),
    "LRP": ("How the score is divided among the voxels by passing it back layer by layer.", SHARE),
    "LayerActivation": ("Where the layer is active; this is no effect on the score, and is the same for every target.", ACTIVE),
    "LayerActivationGuidedBackprop": ("Edges and textures that excite the layer, whatever the target.", ("darker pattern", "brighter pattern")),
    "LayerCam": (f"Places where the layer's features raise the score; only positive gradients count. {_COARSE}", SUPPORT),
    "LayerExcitationBackprop": (f"The probability that a place of the layer is reached from the target along exciting connections. {_COARSE}", ("not reached", "most often reached")),
    "LayerFeatureAblation": ("How much the score falls when a part of the layer is replaced by a constant value.", HIDING),
    "LayerFeaturePermutation": ("How much the score falls when a part of the layer is taken from other cases.", HIDING),
    "LayerGradCam": (f"Places where the layer's features speak for or against the target. {_COARSE}", ("speaks against the target", "speaks for the target")),
    "LeGrad": (f"Where more attention would raise the score; skip connections and convolutions are not in it. {_COARSE}", ("no effect of attention", "attention here raises the score")),
    "Lime": ("The weight of each region in a linear model of the score.", HIDING),
    "Occlusion": ("How much the score falls when the place is covered; it is as coarse as the cover.", HIDING),
    "PatternAttribution": ("How much each voxel's learned signal contributes to the score.", SHARE),
    "PatternNet": ("The signal in the image to which the network responds, not its effect on the score.", ("darker signal", "brighter signal")),
    "PromptShapley": ("How much each prompt adds to the score on average over all orders of giving prompts; it shows prompts, not places of the image.", SHARE),
    "Rise": ("The mean score while the place is visible, over random smooth masks.", ("lower score where visible", "higher score where visible")),
    "Saliency": ("How strongly the score reacts to a small change of each voxel, without direction; it does not show what is there.", STRENGTH),
    "SalientRelevance": ("Areas in which relevance stands out from the rest of the map; it shows attention areas, not shares.", ("does not stand out", "stands out")),
    "ScoreCam": (f"Places where the channels are active that alone give a high score. {_COARSE}", SUPPORT),
    "ShapleyValueSampling": ("How much each region adds to the score on average over random orders of adding regions.", SHARE),
    "SegXResCam": (f"Places where the layer's features raise the score, with gradients pooled over small blocks. {_COARSE}", SUPPORT),
    "ShapleyCam": (f"Places where the layer's features speak for the target, by a second-order estimate of each channel's share. {_COARSE}", SUPPORT),
    "SmoeScale": (f"Where few of the layer's channels are strongly active; it does not depend on the target. {_COARSE}", ACTIVE),
    "SmoothGrad": ("The mean map over noisy copies of the image: it keeps what is stable under noise.", SHARE),
    "SmoothGradSquared": ("The mean square of the map over noisy copies of the image, without direction.", STRENGTH),
    "Sobol": ("The share of the score's variance that a cell causes, alone and with others, without direction.", STRENGTH),
    "VanillaBackprop": ("How the score reacts to a small increase of each voxel's value; it does not show what is there.", SLOPE),
    "VarGrad": ("How much the map varies over noisy copies of the image, without direction.", ("the same in all copies", "varies strongly")),
    "XGradCam": (f"Places where the layer's features speak for the target, weighted by their part of the score. {_COARSE}", SUPPORT),
    "XRAI": ("Regions in the order in which they explain the score; all voxels of a region share one value.", SHARE),
}  # fmt: skip
_SAME = {
    "LayerConductance": "How much of the score's change flows through each place of the layer.",
    "LayerDeepLift": "How much each place of the layer, as against the baseline, adds to the score.",
    "LayerDeepLiftShap": "How much each place of the layer, as against typical cases, adds to the score.",
    "LayerGradientShap": "How much each place of the layer, as against typical images, adds to the score, from samples.",
    "LayerGradientXActivation": "First-order estimate of how much each place of the layer adds to the score.",
    "LayerIntegratedGradients": "How much each place of the layer adds to the score on the way from the baseline.",
    "LayerLRP": "How the score is divided among the places of the layer by passing it back layer by layer.",
    "LinearApproximation": "First-order estimate of how much each place of the layer adds to the score.",
    "NeuronConductance": "How much each voxel adds to the score through the chosen units only.",
}
_MEANINGS |= {name: (text, SHARE) for name, text in _SAME.items()}
_WITHOUT_EFFECT = (
    *("LayerActivation", "EigenCam", "LayerActivationGuidedBackprop", "PatternNet", "SmoeScale"),
    *("Deconvolution", "GuidedBackprop", "GuidedGradCam"),
)
_KINDS = {
    "synthesised image": Meaning(
        "An image made by the method, not an attribution of the scan.", "dark", "bright", False
    ),
    "activation": Meaning("Where the layer is active; this is no effect on the score.", *ACTIVE, False),
}


def meaning_of(
    method: str | None, *, produces: str | None = None, signed: bool | None = None, additive: bool | None = None
) -> Meaning:
    """Return the meaning of a map.

    Args:
        method: class of the method; for a class that is not ours, the other arguments decide.
        produces, signed, additive: see `esegeta_monai.methods.Method`; None: unknown. For a map without sign of a
            method that usually has one, the ends of the scale are those of a strength.

    >>> meaning_of("Saliency").high, meaning_of("InputXGradient", signed=True).low
    ('strong influence in either direction', 'lowers the score')
    >>> meaning_of("OfAPlugIn", signed=True, additive=True).text
    'How much each voxel adds to the score.'
    """
    if method in _MEANINGS:
        text, (low, high) = _MEANINGS[method]
        if signed is False and low == SHARE[0]:
            low, high = STRENGTH
        if signed is True and low in (STRENGTH[0], SUPPORT[0]):
            low, high = SLOPE if low == STRENGTH[0] else ("speaks against the target", "speaks for the target")
        return Meaning(text, low, high, method not in _WITHOUT_EFFECT)
    if produces in _KINDS:
        return _KINDS[produces]
    where = "each place of the layer" if produces == "layer map" else "each voxel"
    if signed is False:
        return Meaning(f"How strongly {where} influences the score, without direction.", *STRENGTH)
    if additive:
        return Meaning(f"How much {where} adds to the score.", *SHARE)
    return Meaning(f"How {where} speaks for or against the target.", *SHARE)
