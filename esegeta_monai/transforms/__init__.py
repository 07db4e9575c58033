"""MONAI transforms that explain an image, and that bring maps back to the scan's grid."""

from __future__ import annotations

from esegeta_monai.transforms.explain import Explain, ExplainD, Explaind, ExplainDict
from esegeta_monai.transforms.invert import (
    InvertAttribution,
    InvertAttributionD,
    InvertAttributiond,
    InvertAttributionDict,
)

__all__ = [
    "Explain",
    "ExplainD",
    "ExplainDict",
    "Explaind",
    "InvertAttribution",
    "InvertAttributionD",
    "InvertAttributionDict",
    "InvertAttributiond",
]
