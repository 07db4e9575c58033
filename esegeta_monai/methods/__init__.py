"""Attribution methods, one small class each, and the public names for writing one."""

from __future__ import annotations

from esegeta_monai.engine.baselines import baseline_for
from esegeta_monai.engine.batch import Batch
from esegeta_monai.engine.layer_maps import BlendedActivations
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.base import Perturbations
from esegeta_monai.engine.perturbation.boxes import Boxes
from esegeta_monai.engine.perturbation.scoring import known_score_changes, score_changes
from esegeta_monai.engine.sweep import InputGradient, Request, View
from esegeta_monai.methods.attention.rollout import AttentionRelevance, AttentionRollout, LeGrad
from esegeta_monai.methods.base import METHODS, Explained, Method, Passes
from esegeta_monai.methods.cam.gradient_cam import (
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    HiResCam,
    LayerCam,
    SegXResCam,
    XGradCam,
)
from esegeta_monai.methods.cam.guided_cam import GuidedGradCam
from esegeta_monai.methods.cam.perturbation_cam import AblationCam, ScoreCam
from esegeta_monai.methods.cam.pooled_cam import Cam
from esegeta_monai.methods.cam.requests import ChannelGradients
from esegeta_monai.methods.cam.shapley_cam import ShapleyCam
from esegeta_monai.methods.cam.statistic_cam import SmoeScale
from esegeta_monai.methods.captum.adapter import Captum
from esegeta_monai.methods.gradient.guided import Deconvolution, GuidedBackprop
from esegeta_monai.methods.gradient.noise import SmoothGrad, SmoothGradSquared, VarGrad
from esegeta_monai.methods.gradient.saliency import GradTimesImage, InputXGradient, Saliency, VanillaBackprop
from esegeta_monai.methods.layer.ablation import LayerFeatureAblation, LayerFeaturePermutation
from esegeta_monai.methods.layer.activation import LayerActivation
from esegeta_monai.methods.layer.gradient import (
    LayerActivationGuidedBackprop,
    LayerGradCam,
    LayerGradientXActivation,
    LinearApproximation,
)
from esegeta_monai.methods.layer.neuron import NeuronConductance
from esegeta_monai.methods.layer.path import InternalInfluence, LayerConductance, LayerIntegratedGradients
from esegeta_monai.methods.layer.relevance import LayerLRP
from esegeta_monai.methods.path.integrated_gradients import IntegratedGradients
from esegeta_monai.methods.path.shap import ExpectedGradients, GradientShap, LayerGradientShap
from esegeta_monai.methods.path.variants import BlurIG, GuidedIG
from esegeta_monai.methods.path.xrai import XRAI
from esegeta_monai.methods.perturbation.ablation import FeatureAblation, FeaturePermutation
from esegeta_monai.methods.perturbation.base import PerturbationMethod
from esegeta_monai.methods.perturbation.extremal import ExtremalPerturbation
from esegeta_monai.methods.perturbation.lime import Lime
from esegeta_monai.methods.perturbation.occlusion import Occlusion
from esegeta_monai.methods.perturbation.prompts import PromptShapley
from esegeta_monai.methods.perturbation.region_test import RegionTest
from esegeta_monai.methods.perturbation.rise import Rise
from esegeta_monai.methods.perturbation.sensitivity import Hsic, Sobol
from esegeta_monai.methods.perturbation.shapley import ChannelShapley, KernelShap, ShapleyValueSampling
from esegeta_monai.methods.relevance.concepts import ConceptRelevance
from esegeta_monai.methods.relevance.contrastive import ContrastiveExcitationBackprop, ContrastiveLRP
from esegeta_monai.methods.relevance.deeplift import DeepLift, DeepLiftShap, LayerDeepLift, LayerDeepLiftShap
from esegeta_monai.methods.relevance.fullgrad import FullGrad
from esegeta_monai.methods.relevance.layer_excitation import LayerExcitationBackprop
from esegeta_monai.methods.relevance.lrp import LRP, ExcitationBackprop
from esegeta_monai.methods.relevance.patterns import PatternAttribution, PatternNet
from esegeta_monai.methods.relevance.salient import SalientRelevance
from esegeta_monai.methods.run import run, run_together
from esegeta_monai.methods.synthesis.dream import DeepDream, InvertedRepresentation
from esegeta_monai.methods.synthesis.visualization import ClassImage, FeatureVisualization

__all__ = [
    "LRP",
    "METHODS",
    "XRAI",
    "AblationCam",
    "AttentionRelevance",
    "AttentionRollout",
    "Batch",
    "BlendedActivations",
    "BlurIG",
    "Boxes",
    "Cam",
    "Captum",
    "ChannelGradients",
    "ChannelShapley",
    "ClassImage",
    "ConceptRelevance",
    "ContrastiveExcitationBackprop",
    "ContrastiveLRP",
    "Deconvolution",
    "DeepDream",
    "DeepLift",
    "DeepLiftShap",
    "EigenCam",
    "ExcitationBackprop",
    "ExpectedGradients",
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
    "LayerExcitationBackprop",
    "LayerFeatureAblation",
    "LayerFeaturePermutation",
    "LayerGradCam",
    "LayerGradientShap",
    "LayerGradientXActivation",
    "LayerIntegratedGradients",
    "LayerLRP",
    "LeGrad",
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
    "PromptShapley",
    "RegionTest",
    "Request",
    "Rise",
    "Saliency",
    "SalientRelevance",
    "ScoreCam",
    "SegXResCam",
    "ShapleyCam",
    "ShapleyValueSampling",
    "SmoeScale",
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
