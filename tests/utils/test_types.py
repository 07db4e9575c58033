"""Parameters of another kind than declared: refused in one line that names what to give, before any work."""

from __future__ import annotations

import dataclasses
import inspect
from typing import get_type_hints

import numpy as np
import pytest
import torch

from esegeta_monai import methods as m
from esegeta_monai.engine.baselines import BASELINES, Baseline
from esegeta_monai.engine.feature_masks import FEATURES, FeatureSpec, Grid
from esegeta_monai.errors import UsageError
from esegeta_monai.methods import METHODS
from esegeta_monai.metrics import Metric
from esegeta_monai.targets import TARGETS, Box, Component, Target, ThresholdMask, Voxel


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


BY_HAND = [
    (
        m.Method,
        {"produces": "input map", "additive": False, "units": "u", "attribute": lambda self, objective: None},
    ),
    (Metric, {"group": "complexity", "higher_is_better": None, "meaning": "m", "measure": lambda self, subject: None}),
    (Target, {"bind": lambda self, prediction, case: []}),
    (Baseline, {"draw": lambda self, objective, generator: objective.image}),
    (FeatureSpec, {"of": lambda self, objective: None}),
]


@pytest.fixture
def _registries(monkeypatch):
    """Baselines and features register themselves wherever they are defined: gone after the test."""
    for registry in (BASELINES, FEATURES):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize(
    "how", ["plain", "decorated", "plain, checks nothing", "decorated, checks nothing", "own __init__"]
)
@pytest.mark.parametrize(("base", "body"), BY_HAND, ids=lambda b: getattr(b, "__name__", ""))
def test_instances_made_by_hand_are_checked_whatever_the_base(base, body, how):
    def own(self, steps: int = 8, name: str | None = None) -> None:
        self.steps, self.name = steps, name

    if how == "own __init__":
        cls = type("Mine", (base,), {**body, "__init__": own, "__module__": __name__})
    else:
        silent = {"__post_init__": lambda self: None} if "nothing" in how else {}
        annotations = {"steps": int, "name": str | None}
        cls = type("Mine", (base,), {**body, **silent, "__annotations__": annotations, "steps": 8, "name": None})
        if how.startswith("decorated"):
            cls = dataclasses.dataclass(eq=False, repr=False)(cls)
    assert list(inspect.signature(cls).parameters)[:2] == ["steps", "name"]
    assert type(cls(4.0).steps) is int
    assert (cls().name, cls().given_name, cls(name="n").given_name) == ("Mine", None, "n")
    for wrong in ("8", 2.5, None):
        with pytest.raises(UsageError, match=f"^Mine: steps={wrong!r}: give a whole number$"):
            cls(wrong)


def test_a_parameter_that_is_not_kept_is_refused():
    def forgets(self, steps: int = 8) -> None:
        self.n = steps

    cls = type("Forgetful", (Target,), {"bind": lambda self, prediction, case: [], "__init__": forgets})
    with pytest.raises(UsageError, match=r"^Forgetful: __init__ must keep its parameter as self\.steps"):
        cls()


STATED = {"produces": "input map", "additive": True, "units": "target per voxel"}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("produces", "input", "='input': give 'input map', 'layer map', 'synthesised image' or 'activation'"),
        ("produces", None, "=None: give 'input map', 'layer map', 'synthesised image' or 'activation'"),
        ("produces", ..., " is missing: give 'input map', 'layer map', 'synthesised image' or 'activation'"),
        ("additive", 1, "=1: give true or false"),
        ("additive", "true", "='true': give true or false"),
        ("additive", ..., " is missing: give true or false"),
        ("units", 5, "=5: give text or a property"),
        ("units", ..., " is missing: give text or a property"),
    ],
)
def test_a_method_states_what_its_map_is_when_it_is_defined(name, value, message):
    stated = {k: v for k, v in {**STATED, name: value}.items() if v is not ...}
    with pytest.raises(UsageError) as caught:
        type("Mine", (m.Method,), {**stated, "attribute": lambda self, objective: None})
    assert str(caught.value) == f"Mine.{name}{message}"


def test_a_family_base_may_leave_open_what_its_classes_state():
    for bases, body in [("_Family", {"attribute": lambda self, objective: None}), ("Family", {})]:
        family = type(bases, (m.Method,), {"additive": True, **body})
        rest = {"produces": "layer map", "units": property(lambda self: "u"), "attribute": lambda self, objective: None}
        made = type("Mine", (family,), rest)()
        assert (made.additive, made.produces, made.units) == (True, "layer map", "u")
        with pytest.raises(UsageError, match=r"^Mine\.produces is missing"):
            type("Mine", (family,), {k: v for k, v in rest.items() if k != "produces"})
        with pytest.raises(UsageError, match=r"^_Wrong\.additive='yes'"):
            type("_Wrong", (family,), {"additive": "yes"})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("group", "speed", "='speed': give 'faithfulness', 'robustness', .* or 'modality'$"),
        ("higher_is_better", "yes", "='yes': give true or false or None$"),
        ("meaning", ..., " is missing: give text or a property$"),
        ("needs", {"mask"}, "={'mask'}: give a set of 'objective', 'method', 'label', 'spacing'$"),
        ("needs", "label", "='label': give a set of 'objective', 'method', 'label', 'spacing'$"),
    ],
)
def test_a_metric_states_what_its_value_means_when_it_is_defined(name, value, message):
    stated = {"group": "complexity", "higher_is_better": True, "meaning": "m", "measure": lambda self, subject: None}
    stated[name] = value
    with pytest.raises(UsageError, match=rf"^Mine\.{name}{message}"):
        type("Mine", (Metric,), {k: v for k, v in stated.items() if v is not ...})


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
    """``monai.bundle run --explain_methods '[{..., "abs": false}]'`` passes the text "false"."""
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
