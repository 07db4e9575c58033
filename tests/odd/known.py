"""Cells of the six methods that are silently wrong, or errors, at present: their tests are expected to fail.

An entry that no longer holds must go; the tests are strict.
"""

from __future__ import annotations

from tests.odd.truth import INDEPENDENT

__all__ = ["KNOWN"]

ALL = tuple(INDEPENDENT)
LAYER = ("GradCam",)
INPUT = tuple(m for m in ALL if m not in LAYER)

#: by reason: case and methods
_WRONG: dict[str, dict[str, tuple[str, ...]]] = {
    "a state that the first image sets goes unnoticed": {
        "subtracts the first image's mean": (
            "VanillaBackprop",
            "InputXGradient",
            "Occlusion",
            "FeatureAblation",
            "GradCam",
        ),
    },
    "a layer that runs several times is read at its last call": {
        "mirrored passes, segmentation": LAYER,
        "mirrored passes, classification": LAYER,
        "only the mirrored pass": LAYER,
        "four mirrored passes": LAYER,
        "turned passes, classification": LAYER,
        "shared encoder of two channels": LAYER,
        "one side against the other": LAYER,
        "pyramid of resolutions": LAYER,
        "recurrent block": LAYER,
        "one activation used twice": LAYER,
    },
    "axes or tokens of a layer are read wrongly": {
        "channels last, 2D": LAYER,
        "channels last, 3D": LAYER,
        "channels last, 2D, as many channels as rows": LAYER,
        "positions flattened, as many channels as positions": LAYER,
        "tokens and registers make a square": LAYER,
        "shifted windows, channels last": LAYER,
        "rows and columns exchanged": LAYER,
        "turns its image first": LAYER,
        "flips its image first": LAYER,
        "shifts its image first": LAYER,
    },
    "the head is not recognised": {
        "sigmoid inside, one channel": ALL,
        "sigmoid inside, overlapping channels": ALL,
        "sigmoid inside, threshold on probability": ALL,
        "mean of sigmoids": ALL,
        "softmax inside, probability": ALL,
        "softmax inside, threshold on probability": ALL,
        "softmax inside, log-probability": ALL,
        "softmax in evaluation mode only, probability": ALL,
        "sigmoid inside, probability": ALL,
        "softmax inside, probability, classifier": ALL,
        "one logit, name of the negative class": ("VanillaBackprop", "InputXGradient", "Occlusion", "FeatureAblation"),
        "multi-label, no label is predicted": ALL,
    },
    "the output is read wrongly, or none was chosen": {
        "tuple, auxiliary first, not chosen": ALL,
        "complex numbers": ALL,
        "labels instead of logits": ALL,
        "one number an image (B,)": ALL,
        "squeezed to ()": ALL,
        "deep supervision, coarsest first": ALL,
        "stacked heads (B, heads, K, h, w)": ALL,
    },
    "the input is not checked": {
        "network of a dictionary": ALL,
        "network of a list": ALL,
        "complex image": ALL,
        "sparse image": ALL,
    },
    "not caught, or not named": {
        "checkpointing, reentrant": ALL,
        "weights that are not initialised": ALL,
    },
    "the pipeline does not say where the voxels went": {
        "flip by Lambdad": ("VanillaBackprop", "InputXGradient", "Occlusion", "FeatureAblation", "GradCam"),
        "flip by Lambdad, axes of equal length": ALL,
        "flip in numpy": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "flip without metadata": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "metadata lost, voxels in place": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "numpy in between": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "axes exchanged by Transposed": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "axes exchanged by Transposed, of equal length": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "crop by Lambdad": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "every other slice by Lambdad": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
        "resampled by Lambdad": ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam"),
    },
}

KNOWN: dict[tuple[str, str], str] = {
    (case, method): reason for reason, cases in _WRONG.items() for case, methods in cases.items() for method in methods
}
"""Reason of a failure, by the name of the case and the method."""
