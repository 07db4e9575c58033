"""Metrics of the quality of explanations, with one class per metric and one file per group; and the control maps."""

from __future__ import annotations

from esegeta_monai.metrics.axiomatic import Completeness, Conservation, InputInvariance
from esegeta_monai.metrics.base import (
    METRICS,
    Metric,
    MetricCost,
    MetricInput,
    MetricResult,
    better,
    bootstrap,
    magnitude,
    mean_interval,
    summarise,
    wilson,
)
from esegeta_monai.metrics.complexity import EffectiveComplexity, Entropy, Sparseness
from esegeta_monai.metrics.controls import ConstantControl, Control, RandomControl, SobelControl, controls
from esegeta_monai.metrics.faithfulness import (
    IROF,
    Deletion,
    FaithfulnessCorrelation,
    Infidelity,
    Insertion,
    RegionPerturbation,
    SensitivityN,
)
from esegeta_monai.metrics.localisation import (
    DistanceProfile,
    LocalisationAUC,
    PointingGame,
    RelevanceMass,
    RelevanceRank,
    TopKIntersection,
)
from esegeta_monai.metrics.masking import ROAD, AverageDrop, AverageGain, AverageIncrease
from esegeta_monai.metrics.modality import MSFI, ModalityImportance
from esegeta_monai.metrics.randomisation import (
    CascadingRandomisation,
    DataRandomisation,
    IndependentRandomisation,
    RandomLogit,
)
from esegeta_monai.metrics.robustness import (
    AverageSensitivity,
    LocalLipschitz,
    MaxSensitivity,
    RelativeInputStability,
    RelativeOutputStability,
)

__all__ = [
    "IROF",
    "METRICS",
    "MSFI",
    "ROAD",
    "AverageDrop",
    "AverageGain",
    "AverageIncrease",
    "AverageSensitivity",
    "CascadingRandomisation",
    "Completeness",
    "Conservation",
    "ConstantControl",
    "Control",
    "DataRandomisation",
    "Deletion",
    "DistanceProfile",
    "EffectiveComplexity",
    "Entropy",
    "FaithfulnessCorrelation",
    "IndependentRandomisation",
    "Infidelity",
    "InputInvariance",
    "Insertion",
    "LocalLipschitz",
    "LocalisationAUC",
    "MaxSensitivity",
    "Metric",
    "MetricCost",
    "MetricInput",
    "MetricResult",
    "ModalityImportance",
    "PointingGame",
    "RandomControl",
    "RandomLogit",
    "RegionPerturbation",
    "RelativeInputStability",
    "RelativeOutputStability",
    "RelevanceMass",
    "RelevanceRank",
    "SensitivityN",
    "SobelControl",
    "Sparseness",
    "TopKIntersection",
    "better",
    "bootstrap",
    "controls",
    "magnitude",
    "mean_interval",
    "summarise",
    "wilson",
]
