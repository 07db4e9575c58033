"""Targets: the scalar of the prediction that is explained, and the public names for custom targets."""

from __future__ import annotations

from esegeta_monai.engine.score import Case, Score, WeightedScore
from esegeta_monai.targets.base import TARGETS, Target, need_map, resolve_class
from esegeta_monai.targets.classes import ClassScore, MultiClassMask, PredictedClasses, ThresholdMask
from esegeta_monai.targets.contrast import Contrast
from esegeta_monai.targets.detection import DetectedBox, DetectorMap
from esegeta_monai.targets.difference import Difference
from esegeta_monai.targets.neuron import LayerNeuron
from esegeta_monai.targets.regions import Box, Component, Errors, LabelMask, OutputValue, Voxel
from esegeta_monai.targets.wrapper import TargetWrapper

__all__ = [
    "TARGETS",
    "Box",
    "Case",
    "ClassScore",
    "Component",
    "Contrast",
    "DetectedBox",
    "DetectorMap",
    "Difference",
    "Errors",
    "LabelMask",
    "LayerNeuron",
    "MultiClassMask",
    "OutputValue",
    "PredictedClasses",
    "Score",
    "Target",
    "TargetWrapper",
    "ThresholdMask",
    "Voxel",
    "WeightedScore",
    "need_map",
    "resolve_class",
]
