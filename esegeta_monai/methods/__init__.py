"""Attribution methods, one small class each, and the public names for writing one."""

from __future__ import annotations

from esegeta_monai.baselines import baseline_for
from esegeta_monai.change import known_score_changes, score_changes
from esegeta_monai.layers import BlendedActivations
from esegeta_monai.methods.ablation import FeatureAblation, FeaturePermutation
from esegeta_monai.methods.base import METHODS, Explained, Method, Passes, run, run_together
from esegeta_monai.methods.cam import ChannelGradients, EigenCam, GradCam, GradCamPlusPlus, HiResCam, LayerCam, XGradCam
from esegeta_monai.methods.cam_perturbation import AblationCam, ScoreCam
from esegeta_monai.methods.contrastive import ContrastiveExcitationBackprop, ContrastiveLRP
from esegeta_monai.methods.deeplift import DeepLift, DeepLiftShap, LayerDeepLift, LayerDeepLiftShap
from esegeta_monai.methods.dream import DeepDream, InvertedRepresentation
from esegeta_monai.methods.extremal import ExtremalPerturbation
from esegeta_monai.methods.fullgrad import FullGrad
from esegeta_monai.methods.gradient import GradTimesImage, InputXGradient, Saliency, VanillaBackprop
from esegeta_monai.methods.guided import Deconvolution, GuidedBackprop
from esegeta_monai.methods.guided_cam import GuidedGradCam
from esegeta_monai.methods.layer import LayerActivation
from esegeta_monai.methods.layer_gradient import LayerActivationGuidedBackprop, LayerGradCam, LayerGradientXActivation
from esegeta_monai.methods.layer_path import InternalInfluence, LayerConductance, LayerIntegratedGradients
from esegeta_monai.methods.layer_relevance import LayerLRP
from esegeta_monai.methods.lime import Lime
from esegeta_monai.methods.linear import LinearApproximation
from esegeta_monai.methods.neuron import NeuronConductance
from esegeta_monai.methods.noise import SmoothGrad, SmoothGradSquared, VarGrad
from esegeta_monai.methods.occlusion import Occlusion
from esegeta_monai.methods.path import IntegratedGradients
from esegeta_monai.methods.path_variants import BlurIG, GuidedIG
from esegeta_monai.methods.patterns import PatternAttribution, PatternNet
from esegeta_monai.methods.perturbing import PerturbationMethod
from esegeta_monai.methods.pooled_cam import Cam
from esegeta_monai.methods.relevance import LRP, ExcitationBackprop
from esegeta_monai.methods.rise import Rise
from esegeta_monai.methods.sensitivity import Hsic, Sobol
from esegeta_monai.methods.shap import GradientShap, LayerGradientShap
from esegeta_monai.methods.shapley import ChannelShapley, KernelShap, ShapleyValueSampling
from esegeta_monai.methods.synthesis import ClassImage, FeatureVisualization
from esegeta_monai.methods.xrai import XRAI
from esegeta_monai.objective import Batch, InputGradient, Objective, Request, View
from esegeta_monai.perturbation import Boxes, Perturbations

__all__ = [
    "LRP",
    "METHODS",
    "XRAI",
    "AblationCam",
    "Batch",
    "BlendedActivations",
    "BlurIG",
    "Boxes",
    "Cam",
    "ChannelGradients",
    "ChannelShapley",
    "ClassImage",
    "ContrastiveExcitationBackprop",
    "ContrastiveLRP",
    "Deconvolution",
    "DeepDream",
    "DeepLift",
    "DeepLiftShap",
    "EigenCam",
    "ExcitationBackprop",
    "Explained",
    "ExtremalPerturbation",
    "FeatureAblation",
    "FeaturePermutation",
    "FeatureVisualization",
    "FullGrad",
    "GradCam",
    "GradCamPlusPlus",
    "GradTimesImage",
    "GradientShap",
    "GuidedBackprop",
    "GuidedGradCam",
    "GuidedIG",
    "HiResCam",
    "Hsic",
    "InputGradient",
    "InputXGradient",
    "IntegratedGradients",
    "InternalInfluence",
    "InvertedRepresentation",
    "KernelShap",
    "LayerActivation",
    "LayerActivationGuidedBackprop",
    "LayerCam",
    "LayerConductance",
    "LayerDeepLift",
    "LayerDeepLiftShap",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerLRP",
    "Lime",
    "LinearApproximation",
    "Method",
    "NeuronConductance",
    "Objective",
    "Occlusion",
    "Passes",
    "PatternAttribution",
    "PatternNet",
    "PerturbationMethod",
    "Perturbations",
    "Request",
    "Rise",
    "Saliency",
    "ScoreCam",
    "ShapleyValueSampling",
    "SmoothGrad",
    "SmoothGradSquared",
    "Sobol",
    "VanillaBackprop",
    "VarGrad",
    "View",
    "XGradCam",
    "baseline_for",
    "known_score_changes",
    "run",
    "run_together",
    "score_changes",
]
