"""How it is explained: one small class a method, one file a family."""

from __future__ import annotations

from esegeta_monai.methods.base import METHODS, Explained, Method, run, run_together
from esegeta_monai.methods.cam import EigenCam, GradCam, GradCamPlusPlus, HiResCam, LayerCam, XGradCam
from esegeta_monai.methods.cam_perturbation import AblationCam, ScoreCam
from esegeta_monai.methods.gradient import GradTimesImage, InputXGradient, Saliency, VanillaBackprop
from esegeta_monai.methods.guided import Deconvolution, GuidedBackprop
from esegeta_monai.methods.guided_cam import GuidedGradCam
from esegeta_monai.methods.layer import LayerActivation
from esegeta_monai.methods.noise import SmoothGrad
from esegeta_monai.methods.occlusion import Occlusion
from esegeta_monai.methods.path import IntegratedGradients
from esegeta_monai.methods.pooled_cam import Cam

__all__ = [
    "METHODS",
    "AblationCam",
    "Cam",
    "Deconvolution",
    "EigenCam",
    "Explained",
    "GradCam",
    "GradCamPlusPlus",
    "GradTimesImage",
    "GuidedBackprop",
    "GuidedGradCam",
    "HiResCam",
    "InputXGradient",
    "IntegratedGradients",
    "LayerActivation",
    "LayerCam",
    "Method",
    "Occlusion",
    "Saliency",
    "ScoreCam",
    "SmoothGrad",
    "VanillaBackprop",
    "XGradCam",
    "run",
    "run_together",
]
