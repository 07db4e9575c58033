"""Configurations of TorchEsegeta: what each entry becomes, what the notes list, and that all methods exist."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from esegeta_monai.bundle.torchesegeta import RULES, read_torchesegeta
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.methods import METHODS

WORDS = {
    "layer": "net[0].block:3",
    "filter_pos": 2,
    "n_samples": 4,
    "contrast_layer": "stem",
    "sliding_window_shapes": "1,5,6,7",
    "strides": 3,
    "num_samples": 8,
    "affine_size": 4,
}


def entry(name: str, use: bool = True, **keywords: Any) -> dict[str, Any]:
    """An entry with all sections of a method."""
    return {
        "method_name": name,
        "library": "any",
        "inpt_transform_req": False,
        "visualize_method": "heat_map",
        "sign": "positive",
        "show_colorbar": True,
        "title": "A title",
        "device_id": "cuda:6",
        "patch_required": True,
        "use": use,
        "uncertainity_metrics": False,
        "uncertainity_cascading": 0,
        "keywords": keywords,
    }


def write(folder: Path, *entries: dict[str, Any], **more: Any) -> Path:
    """Write a configuration with all sections."""
    config = {
        "model_nature": "Segmentation",
        "model_name": "Some_net",
        "is_3d": True,
        "dataset": "some",
        "resize": 64,
        "mean_vec": [0.5],
        "patch_overlap": 8,
        "patch_size": 32,
        "log_level": "INFO",
        "output_path": "/nowhere",
        "amp_enbled": True,
        "share_gpu_threads": 2,
        "timeout_enabled": False,
        "timeout_time": 60,
        "methods": list(entries),
        "explain_methods": [],
        **more,
    }
    file = folder / "esegeta.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


def test_every_function_of_theirs_becomes_a_method_that_can_be_built(tmp_path):
    for name in RULES:
        imported = read_torchesegeta(write(tmp_path, entry(name, **WORDS)))
        (text,) = imported.methods
        method = METHODS.create(text)
        assert method.name == text.split("(")[0]
        if "Layer" in text or "Cam" in text:
            assert getattr(method, "layer", "net.0.block").startswith("net.0.block"), text


@pytest.mark.parametrize(
    ("name", "keywords", "expected"),
    [
        ("captum_Saliency", {"abs": False}, "Saliency(abs=False)"),
        (
            "captum_Saliency",
            {"abs": True, "nt_type": "smoothgrad", "n_samples": 10},
            "SmoothGrad(method=Saliency(abs=True), n_samples=10)",
        ),
        (
            "captum_deep_lift",
            {"nt_type": "vargrad", "n_samples": 3},
            "VarGrad(method=DeepLift(baseline='zero'), n_samples=3)",
        ),
        (
            "captum_occlusion",
            {"sliding_window_shapes": "1,11,11,11", "strides": 3},
            "Occlusion(window=[11, 11, 11], stride=3, baseline='zero')",
        ),
        (
            "captum_LayerDeepLift",
            {"layer": "Conv5.conv[0]", "attribute_to_layer_input": True},
            "LayerDeepLift(layer='Conv5.conv.0:input', baseline='zero')",
        ),
        ("lucent_render_vis", {"layer": "Conv3_conv:4"}, "FeatureVisualization(layer='Conv3.conv', channel=4)"),
        (
            "torchray_contrast_excitation_backprop",
            {"layer": "a", "contrast_layer": "b", "classifier_layer": "c"},
            "LayerExcitationBackprop(layer='a', contrast_layer='a')",
        ),
        ("lime_segmentation", {"num_samples": 1, "num_features": 5}, "Lime(n_samples=2, num_features=5)"),
    ],
)
def test_what_an_entry_becomes(name, keywords, expected, tmp_path):
    assert read_torchesegeta(write(tmp_path, entry(name, **keywords))).methods == [expected]


def test_layers_by_other_names_targets_and_the_time_limit(tmp_path):
    entries = [entry("cnn_vis_grad_cam", layer="Conv5"), {**entry("captum_guided_backprop"), "target": [2, "all"]}]
    file = write(tmp_path, *entries, timeout_enabled=True)
    imported = read_torchesegeta(file, layers={"Conv5": "model.4"})
    assert imported.methods == ["GradCam(layer='model.4')", "GuidedBackprop"]
    assert (imported.targets, imported.time_limit) == (["MultiClassMask(2)"], 60.0)
    assert any(note.startswith("target 'all'") for note in imported.notes)
    other = write(tmp_path, *entries, model_nature="Classification")
    assert read_torchesegeta(other).targets == ["ClassScore(2)"]
    assert read_torchesegeta(other).time_limit is None


def test_what_has_no_counterpart_is_listed(tmp_path):
    entries = [
        entry("captum_guided_backprop", affine_size=4),
        entry("cnn_vis_guided_backprop", firstLayer="Conv1"),
        entry("captum_deconvolution", nt_type="other"),
        entry("their_own_method"),
        entry("cnn_vis_grad_cam"),
        entry("captum_input_x_gradient", use=False),
    ]
    imported = read_torchesegeta(write(tmp_path, *entries))
    assert imported.methods == ["GuidedBackprop", "Deconvolution"]
    output = "\n".join(imported.notes)
    for words in (
        "captum_guided_backprop, cnn_vis_guided_backprop: the same map",
        "no noise tunnel 'other'",
        "their_own_method: no counterpart",
        "cnn_vis_grad_cam: not imported, since its keywords cannot be read (KeyError: 'layer')",
        "(--all imports them): captum_input_x_gradient",
        "model_nature, model_name, is_3d, dataset: network and scans",
        "patch_size 32, patch_overlap 8",
        "log_level: use -v",
        "output_path: use --explain_output_dir",
        "timeout_time: not imported",
        "affine_size: maps are not made smaller",
        "visualize_method, show_colorbar: pictures",
    ):
        assert words in output, words
    everything = read_torchesegeta(write(tmp_path, *entries), unused=True)
    assert everything.methods == ["GuidedBackprop", "Deconvolution", "InputXGradient"]


def test_bad_files(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(InputError, match="no such file"):
        read_torchesegeta(file)
    for text, reason in (("{", "as JSON"), ("[]", "no list 'methods'"), ('{"methods": [3]}', "no JSON object")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=reason):
            read_torchesegeta(file)
    with pytest.raises(UsageError, match="--all"):
        read_torchesegeta(write(tmp_path, entry("captum_Saliency", use=False)))


def test_each_function_of_theirs_is_documented():
    page = (Path(inspect.getfile(read_torchesegeta)).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")
    assert [name for name in RULES if f"`{name}`" not in page] == []
