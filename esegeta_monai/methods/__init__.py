"""How it is explained: one small class a method, one file a family."""

from __future__ import annotations

from esegeta_monai.methods.base import METHODS, Explained, Method, run, run_together
from esegeta_monai.methods.cam import GradCam
from esegeta_monai.methods.gradient import GradTimesImage, InputXGradient, Saliency, VanillaBackprop
from esegeta_monai.methods.guided import Deconvolution, GuidedBackprop
from esegeta_monai.methods.layer import LayerActivation
from esegeta_monai.methods.noise import SmoothGrad
from esegeta_monai.methods.occlusion import Occlusion
from esegeta_monai.methods.path import IntegratedGradients

__all__ = [
    "METHODS",
    "Deconvolution",
    "Explained",
    "GradCam",
    "GradTimesImage",
    "GuidedBackprop",
    "InputXGradient",
    "IntegratedGradients",
    "LayerActivation",
    "Method",
    "Occlusion",
    "Saliency",
    "SmoothGrad",
    "VanillaBackprop",
    "run",
    "run_together",
]
