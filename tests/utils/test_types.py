"""Parameters of another kind than declared: refused in one line that says what to give, before any work."""

from __future__ import annotations

from typing import get_type_hints

import numpy as np
import pytest
import torch

from esegeta_monai import methods as m
from esegeta_monai.engine.baselines import BASELINES
from esegeta_monai.engine.feature_masks import FEATURES, Grid
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import METHODS
from esegeta_monai.targets import TARGETS, Box, Component, ThresholdMask, Voxel


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Occlusion(window='8')", r"Occlusion: window='8': give a whole number or a list of whole numbers$"),
        ("Occlusion(window=2.5)", "give a whole number"),
        ("Occlusion(window=None)", "give a whole number"),
        ("Occlusion(per_channel='no')", "give true or false"),
        ("Rise(n_masks='10')", "Rise: n_masks='10': give a whole number$"),
        ("Rise(p='0.5')", "give a number$"),
        ("Rise(score=nonsense)", "give 'value' or 'change'"),
        ("KernelShap(n_samples=64.5)", "give a whole number"),
        ("FeaturePermutation(cases='ab')", "give a list"),
        ("ChannelShapley(names='ab')", "give a list of texts or None"),
        ("Lime(distance_metric=nonsense)", "give 'cosine', .* or 'dice'"),
        ("Lime(feature_selection=nonsense)", "give 'auto'"),
        ("ExtremalPerturbation(areas='0.1')", "give a number or a list of numbers"),
        ("ExtremalPerturbation(areas=['0.1'])", "give a number or a list of numbers"),
        ("FeatureVisualization(jitter=2.5)", "give a whole number"),
        ("FeatureVisualization('a', channel='1')", "give a whole number or None"),
        ("FeatureVisualization('a', channel=1, neuron=[1.5, 2])", "neuron"),
        ("FeatureVisualization('a', channel=1, neuron=3)", "neuron"),
        ("FeatureVisualization(scale='11')", "give a list of numbers"),
        ("DeepDream(octaves=2.5)", "give a whole number"),
    ],
)
def test_what_is_given_in_another_kind_is_refused(text, message):
    with pytest.raises(UsageError, match=message) as caught:
        METHODS.create(text)
    assert "\n" not in str(caught.value)


def test_what_means_the_same_is_taken():
    assert type(m.Rise(n_masks=1e3).n_masks) is int
    assert m.Occlusion(window=(8.0, 4)).window == (8, 4)
    assert m.Occlusion(window=np.int64(8)).parameters["window"] == 8
    assert m.Occlusion(window=torch.tensor([4, 5])).window == [4, 5]
    assert m.ExtremalPerturbation(areas=[0.1, 0.2]).areas == [0.1, 0.2]
    assert Voxel(0, world=np.array([1.5, 2.0])).world == [1.5, 2.0]
    assert Box(torch.tensor(1), (0, 0), (2, 2)).class_index == 1
    assert Component("liver", which=[1.0, 2.0, 3.0]).which == [1.0, 2.0, 3.0]
    assert ThresholdMask("otsu").threshold == "otsu"


def test_json_s_words_from_a_shell():
    """``monai.bundle run --explain_methods '[{..., "abs": false}]'`` hands over the text "false"."""
    assert m.Saliency(abs="false").abs is False
    assert METHODS.create("Saliency(abs=true)").abs is True


def test_not_a_number_is_no_number():
    with pytest.raises(UsageError, match="lr=nan: give a number"):
        m.ExtremalPerturbation(lr=float("nan"))


def test_long_values_are_cut():
    with pytest.raises(UsageError) as caught:
        m.Lime(kernel_width=torch.zeros(100))
    assert len(str(caught.value)) < 120


def test_every_class_declares_its_parameters():
    for registry in (METHODS, TARGETS, FEATURES, BASELINES):
        for cls in registry:
            assert set(cls.parameter_names()) <= set(get_type_hints(cls)), cls


def test_a_baseline_or_features_inside_a_method_are_written_like_calls():
    inside = METHODS.create("FeatureAblation(grid(size=4), baseline=blur(sigma=2))")
    assert inside.parameters == m.FeatureAblation(Grid(4), BASELINES.create("blur(sigma=2)")).parameters
    config = {
        "_target_": "FeatureAblation",
        "feature_mask": {"_target_": "esegeta_monai.engine.feature_masks.Grid", "size": 4},
        "baseline": {"_target_": "blur", "sigma": 2},
    }
    assert METHODS.create(config).parameters == inside.parameters
    nested = METHODS.create("SmoothGrad(input-x-gradient(), n_samples=4)")
    assert nested.parameters["method"]["name"] == "InputXGradient"


def test_fused_names_may_have_parameters():
    assert METHODS.create("layer-visualization('a', channel=2)").parameters == m.FeatureVisualization("a", 2).parameters
    assert METHODS.create("input-x-gradient").name == "InputXGradient"
    with pytest.raises(UsageError, match="neither a value"):
        METHODS.create("Rise(n_masks=30-10)")
    with pytest.raises(UsageError, match="there is no method 'grad-cim': did you mean GradCam"):
        METHODS.create("grad-cim(layer='a')")
