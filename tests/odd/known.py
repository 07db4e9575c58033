"""Cells of the six methods that are silently wrong, or errors, at present: their tests are expected to fail.

An entry that no longer holds must go; the tests are strict.
"""

from __future__ import annotations

from tests.odd.truth import INDEPENDENT

__all__ = ["KNOWN"]

ALL = tuple(INDEPENDENT)
NO_SUM = ("VanillaBackprop", "Occlusion", "FeatureAblation", "GradCam")

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
    "the type of the output is not checked": {
        "complex numbers": ALL,
        "labels instead of logits": ALL,
    },
    "passes run in inference mode": {
        "gradient inside forward": ("IntegratedGradients", "Occlusion", "FeatureAblation", "GradCam"),
    },
    "the input is not checked": {
        "network of a dictionary": ALL,
        "network of a list": ALL,
        "sparse image": ALL,
    },
    "not caught, or not named": {
        "checkpointing, reentrant": ALL,
        "weights that are not initialised": ALL,
    },
    "a resampling without trace is not found by the check of the geometry": {
        "resampled by Lambdad": NO_SUM,
    },
}

KNOWN: dict[tuple[str, str], str] = {
    (case, method): reason for reason, cases in _WRONG.items() for case, methods in cases.items() for method in methods
}
"""Reason of a failure, by the name of the case and the method."""
