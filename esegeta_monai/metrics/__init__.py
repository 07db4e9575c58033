"""How far an explanation can be trusted: one small class a metric, one file a group, and the control maps."""

from __future__ import annotations

from esegeta_monai.metrics.base import METRICS, Measured, Metric, Subject, better
from esegeta_monai.metrics.controls import ConstantControl, Control, RandomControl, SobelControl, controls
from esegeta_monai.metrics.localisation import (
    DistanceProfile,
    LocalisationAUC,
    PointingGame,
    RelevanceMass,
    RelevanceRank,
    TopKIntersection,
)

__all__ = [
    "METRICS",
    "ConstantControl",
    "Control",
    "DistanceProfile",
    "LocalisationAUC",
    "Measured",
    "Metric",
    "PointingGame",
    "RandomControl",
    "RelevanceMass",
    "RelevanceRank",
    "SobelControl",
    "Subject",
    "TopKIntersection",
    "better",
    "controls",
]
