"""Every localisation and faithfulness metric of the registry, with parameters for these cases."""

from __future__ import annotations

from esegeta_monai.metrics import METRICS, Metric

__all__ = ["FAITHFULNESS", "LOCALISATION", "OTHER", "metric_of"]

#: Computed on the positive part of a map, the evidence for a lesion. Maps without sign are positive everywhere.
LOCALISATION = {
    "pointing game": "PointingGame(sign='positive')",
    "pointing game, 8 mm": "PointingGame(sign='positive', tolerance_mm=8)",
    "top 20": "TopKIntersection(k=20, sign='positive')",  # the smallest cause has 64 voxels
    "relevance mass": "RelevanceMass(sign='positive')",
    "relevance rank": "RelevanceRank(sign='positive')",
    "AUC": "LocalisationAUC(sign='positive')",
    "distance": "DistanceProfile(sign='positive')",
}
FAITHFULNESS = {
    "deletion": "Deletion",
    "insertion": "Insertion",
    "region perturbation": "RegionPerturbation",
    "IROF": "IROF",
    "ROAD": "ROAD",
    "infidelity": "Infidelity",
    "faithfulness correlation": "FaithfulnessCorrelation",
    "sensitivity-n": "SensitivityN",
    "average drop": "AverageDrop",
    "average increase": "AverageIncrease",
    "average gain": "AverageGain",
}
OTHER = "other: "
"""Prefix of a localisation metric: measured on the object that the network does not use."""


def metric_of(name: str) -> Metric:
    """Return the metric of a column; it is the same for both objects.

    Raises:
        KeyError: the column does not exist.
    """
    return METRICS.create((LOCALISATION | FAITHFULNESS)[name.removeprefix(OTHER)])
