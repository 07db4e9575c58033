"""MONAI transforms: thin doors to the explainer, and the way back to the scan's grid."""

from __future__ import annotations

from esegeta_monai.transforms.invert import (
    InvertAttribution,
    InvertAttributionD,
    InvertAttributiond,
    InvertAttributionDict,
)

__all__ = ["InvertAttribution", "InvertAttributionD", "InvertAttributionDict", "InvertAttributiond"]
