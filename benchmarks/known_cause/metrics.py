"""Every localisation and faithfulness metric of the registry, with the parameters that fit these cases."""

from __future__ import annotations

from esegeta_monai.metrics import METRICS, Metric

__all__ = ["FAITHFULNESS", "LOCALISATION", "OTHER", "metric_of"]

#: Of the positive part of a map: what speaks for a lesion. Maps without a sign are positive everywhere.
LOCALISATION = {
    "pointing game": "PointingGame(sign='positive')",
    "pointing game, 8 mm": "PointingGame(sign='positive', tolerance_mm=8)",
    "top 20": "TopKIntersection(k=20, sign='positive')",  # the smallest truth has 64 voxels
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
"""Before the name of a localisation metric: in the object that the network does not answer to."""


def metric_of(name: str) -> Metric:
    """The metric behind a column; the same for both objects.

    Raises:
        KeyError: no such column.
    """
    return METRICS.create((LOCALISATION | FAITHFULNESS)[name.removeprefix(OTHER)])
