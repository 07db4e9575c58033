"""Read a configuration of TorchEsegeta: its methods, targets and limits as ours, and what has no counterpart.

TorchEsegeta (Chatterjee et al., Applied Sciences 12(4), 2022, doi:10.3390/app12041834) is configured by one JSON file:
settings of model, data, patches and logging, and a list ``methods`` (and ``explain_methods``) with one entry for each
map. Network, data and preprocessing are those of the bundle here, so only methods, targets and the time limit are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.utils.files import parse_json

__all__ = ["ImportedConfig", "Translated", "read_torchesegeta"]


@dataclass(frozen=True)
class Translated:
    """A method of ours.

    Attributes:
        name: its class.
        parameters: its parameters; those that are None are left out.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = [f"{n}={v if isinstance(v, Translated) else repr(v)}" for n, v in self.parameters.items()]
        return f"{self.name}({', '.join(given)})" if given else self.name


@dataclass
class ImportedConfig:
    """The content of a configuration that has a counterpart here.

    Attributes:
        methods: our methods as text, in the order of the file, each once.
        targets: our targets as text; empty: the default of the bundle.
        time_limit: seconds for each method; None: no limit.
        notes: what was translated in another way than one to one, and what has no counterpart: one sentence each.
    """

    methods: list[str]
    targets: list[str]
    time_limit: float | None
    notes: list[str]


Words = Mapping[str, Any]
Rule = Callable[[Words, Callable[[str], str]], Translated]


def _plain(name: str, **fixed: Any) -> Rule:
    return lambda words, layer: Translated(name, fixed)


def _of_layer(name: str, **fixed: Any) -> Rule:
    def rule(words: Words, layer: Callable[[str], str]) -> Translated:
        return Translated(name, {"layer": _layer(words, layer), **fixed})

    return rule


def _of_unit(name: str) -> Rule:
    def rule(words: Words, layer: Callable[[str], str]) -> Translated:
        return Translated(name, {"layer": layer(str(words["layer"])), "channel": int(words.get("filter_pos", 0))})

    return rule


def _layer(words: Words, layer: Callable[[str], str]) -> str:
    return layer(str(words["layer"])) + (":input" if words.get("attribute_to_layer_input") else "")


def _saliency(words: Words, layer: Callable[[str], str]) -> Translated:
    return Translated("Saliency", {"abs": bool(words.get("abs", True))})


def _occlusion(words: Words, layer: Callable[[str], str]) -> Translated:
    shape = [int(n) for n in str(words.get("sliding_window_shapes", "1,16,16")).split(",")]
    strides = [int(n) for n in str(words.get("strides", 1)).split(",")]
    stride: Any = strides[0] if len(strides) == 1 else strides[-len(shape) + 1 :]
    return Translated("Occlusion", {"window": shape[1:], "stride": stride, "baseline": "zero"})


def _gradient_shap(words: Words, layer: Callable[[str], str]) -> Translated:
    given = {"baseline": "zero", "n_samples": max(2, int(words.get("n_samples", 5)))}
    return Translated("GradientShap", {**given, "std": float(words.get("stdiv", 0.0))})


def _integrated(words: Words, layer: Callable[[str], str]) -> Translated:
    return Translated("IntegratedGradients", {"baseline": "zero", "n_steps": int(words.get("n_samples", 50))})


def _contrast(words: Words, layer: Callable[[str], str]) -> Translated:
    name = _layer(words, layer)
    return Translated("LayerExcitationBackprop", {"layer": name, "contrast_layer": name})


def _rendered(words: Words, layer: Callable[[str], str]) -> Translated:
    name, _, channel = str(words["layer"]).partition(":")
    return Translated("FeatureVisualization", {"layer": layer(name.replace("_", ".")), "channel": int(channel or 0)})


def _shapley(words: Words, layer: Callable[[str], str]) -> Translated:
    return Translated(
        "ShapleyValueSampling", {"n_samples": max(2, int(words.get("n_samples", 25))), "baseline": "zero"}
    )


def _lime(words: Words, layer: Callable[[str], str]) -> Translated:
    given = {"n_samples": max(2, int(words.get("num_samples", 1000))), "num_features": words.get("num_features")}
    return Translated("Lime", {n: v for n, v in given.items() if v is not None})


RULES: dict[str, Rule] = {
    "captum_Saliency": _saliency,
    "captum_Integrated_Gradients": _plain("IntegratedGradients", baseline="zero", n_steps=50),
    "captum_Feature_Ablation": _plain("FeatureAblation", baseline="zero"),
    "captum_occlusion": _occlusion,
    "captum_guided_backprop": _plain("GuidedBackprop"),
    "captum_deep_lift": _plain("DeepLift", baseline="zero"),
    "captum_deconvolution": _plain("Deconvolution"),
    "captum_guided_grad_cam": _of_layer("GuidedGradCam"),
    "captum_layer_activaltion": _of_layer("LayerActivation", reduce="channels"),
    "captum_layer_activation": _of_layer("LayerActivation", reduce="channels"),
    "captum_layer_conductance": _of_layer("LayerConductance", baseline="zero", n_steps=50),
    "captum_layer_grad_shap": _of_layer("LayerGradientShap", baseline="zero", n_samples=5),
    "captum_gradient_shap": _gradient_shap,
    "captum_internal_influence": _of_layer("InternalInfluence", baseline="zero", n_steps=50),
    "captum_input_x_gradient": _plain("InputXGradient"),
    "captum_deep_lift_shap": _plain("DeepLiftShap", baseline="zero"),
    "captum_LayerGradientXActivation": _of_layer("LayerGradientXActivation"),
    "captum_LayerDeepLift": _of_layer("LayerDeepLift", baseline="zero"),
    "captum_LayerGradCam": _of_layer("LayerGradCam"),
    "captum_ShapleyValueSampling": _shapley,
    "cnn_vis_guided_backprop": _plain("GuidedBackprop"),
    "cnn_vis_integrated_grad": _integrated,
    "cnn_vis_guided_grad_cam": _of_layer("GuidedGradCam"),
    "cnn_vis_score_cam": _of_layer("ScoreCam", baseline="zero"),
    "cnn_vis_vanilla_backprop": _plain("VanillaBackprop"),
    "cnn_vis_grad_cam": _of_layer("GradCam"),
    "cnn_vis_grad_times_image": _plain("InputXGradient"),
    "cnn_vis_layer_activation_guided_backprop": _of_unit("LayerActivationGuidedBackprop"),
    "cnn_vis_layer_visualization": _of_unit("FeatureVisualization"),
    "cnn_vis_DeepDream": _of_unit("DeepDream"),
    "torchray_excitation_backprop": _of_layer("LayerExcitationBackprop"),
    "torchray_contrast_excitation_backprop": _contrast,
    "torchray_Rise": _plain("Rise"),
    "torchray_Deconv": _plain("Deconvolution"),
    "torchray_Gradcam": _of_layer("GradCam"),
    "torchray_Gradient": _saliency,
    "torchray_Guidedbackprop": _plain("GuidedBackprop"),
    "torchray_Linearapprox": _of_layer("LinearApproximation"),
    "lucent_render_vis": _rendered,
    "lime_segmentation": _lime,
}
"""Our method for each function of TorchEsegeta."""

_TUNNELS = {"smoothgrad": "SmoothGrad", "smoothgrad_sq": "SmoothGradSquared", "vargrad": "VarGrad"}

_OF_METHOD: dict[str, str] = {
    "captum_Feature_Ablation": "Captum ablates each voxel alone; ours are supervoxels (feature_mask='grid(size=1)' for "
    "voxels)",
    "captum_ShapleyValueSampling": "Captum's players are voxels; ours are supervoxels",
    "torchray_contrast_excitation_backprop": "the contrast is formed at the layer itself, which is the map of any "
    "contrast layer above it that no path leads around; the last weights are texts (no classifier_layer)",
    "lucent_render_vis": "underscores of the layer's name are read as dots; the shape is that of a window",
    "cnn_vis_DeepDream": "the dream begins with the scan, not with random intensities of a given shape",
    "captum_layer_activaltion": "all channels are kept (no neuron_start, neuron_end)",
    "lime_segmentation": "the labels are those of the targets (no top_labels); the volume is explained at once, not "
    "slice by slice",
}
"""Notes on translations that are not one to one, by function."""

_NO_COUNTERPART: dict[str, str] = {
    **dict.fromkeys(
        ("model_nature", "model_name", "is_3d", "isDepthFirst", "batch_dim_present", "default", "dataset", "test_run"),
        "network and scans are those of the bundle",
    ),
    **dict.fromkeys(
        ("resize", "centre_crop", "mean_vec", "std_vec"), "preprocessing is that of the bundle; maps are on the scan"
    ),
    "log_level": "use -v of esegeta-monai explain, or --logging_file of monai.bundle run",
    "output_path": "use --explain_output_dir",
    "amp_enbled": "maps use the precision of the prediction (amp of the bundle's evaluator)",
    "share_gpu_threads": "methods run one after the other and share passes over the windows",
}
"""Settings that are not translated, and what to use."""

_NO_WORD: dict[str, str] = {
    "inpt_transform_req": "preprocessing is that of the bundle",
    "visualize_method": "pictures are made by the report",
    "sign": "maps keep their sign; the report shows both",
    "show_colorbar": "pictures are made by the report",
    "device_id": "use --device, or torchrun",
    "share_gpu": "use --device, or torchrun",
    "uncertainity_metrics": "use esegeta-monai evaluate",
    "uncertainity_cascading": "use esegeta-monai evaluate",
    "uncertainity": "use esegeta-monai evaluate",
}
"""Entries of a method that are not translated, and what to use."""


def read_torchesegeta(
    file: str | Path, *, unused: bool = False, layers: Mapping[str, str] | None = None
) -> ImportedConfig:
    """Read a configuration of TorchEsegeta.

    Args:
        file: its JSON file.
        unused: True: also methods with ``"use": false``.
        layers: our names of layers, by theirs.

    Raises:
        InputError: the file cannot be read, or is no configuration of TorchEsegeta.
        UsageError: no method is left.
    """
    config = _content(Path(file))
    entries = [*config.get("methods", ()), *config.get("explain_methods", ())]
    methods: dict[str, list[str]] = {}
    targets: dict[str, None] = {}
    notes: list[str] = []
    off = [str(e.get("method_name")) for e in entries if not unused and not e.get("use")]
    for entry in entries:
        if not unused and not entry.get("use"):
            continue
        name = str(entry.get("method_name"))
        translated = _method(name, entry, layers or {}, notes)
        if translated is not None:
            methods.setdefault(str(translated), []).append(name)
            targets.update(dict.fromkeys(_targets(entry.get("target"), str(config.get("model_nature")), notes)))
    for text, names in methods.items():
        if len(names) > 1:
            notes.append(f"{', '.join(names)}: the same map, written once as {text}")
    if not methods:
        more = f': all {len(off)} have "use": false, so give --all' if off else ""
        raise UsageError(f"{file} has no method to import{more}")
    if off:
        notes.append(f'not imported since "use" is false (--all imports them): {", ".join(off)}')
    used = [e for e in entries if unused or e.get("use")]
    notes += _of_settings(config, used)
    limit = config.get("timeout_time") if config.get("timeout_enabled") else None
    return ImportedConfig(list(methods), list(targets), None if limit is None else float(limit), notes)


def _content(file: Path) -> dict[str, Any]:
    try:
        config = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict) or not isinstance(config.get("methods"), list):
        raise InputError(f"{file}: no configuration of TorchEsegeta: it has no list 'methods'")
    entries = [*config["methods"], *(config.get("explain_methods") or ())]
    if not all(isinstance(e, dict) and isinstance(e.get("keywords", {}), dict) for e in entries):
        raise InputError(f"{file}: an entry of 'methods' is no JSON object with keywords")
    return config


def _method(name: str, entry: Words, layers: Mapping[str, str], notes: list[str]) -> Translated | None:
    """Return our method for an entry, and add notes; None: there is none."""
    words: Words = entry.get("keywords", {})
    if name not in RULES:
        notes.append(f"{name}: no counterpart is known")
        return None
    try:
        translated = RULES[name](words, lambda text: layers.get(text, _dotted(text)))
    except (KeyError, TypeError, ValueError) as error:
        notes.append(f"{name}: not imported, since its keywords cannot be read ({type(error).__name__}: {error})")
        return None
    if name in _OF_METHOD:
        notes.append(f"{name}: {_OF_METHOD[name]}")
    tunnel = str(words.get("nt_type") or "")
    if tunnel in _TUNNELS:
        notes.append(
            f"{name}: {_TUNNELS[tunnel]} with noise of 0.15 standard deviations of each channel (Captum: 1.0 in units "
            "of the image)"
        )
        return Translated(_TUNNELS[tunnel], {"method": translated, "n_samples": int(words.get("n_samples", 5))})
    if tunnel:
        notes.append(f"{name}: there is no noise tunnel {tunnel!r}; the method is imported without it")
    return translated


def _dotted(layer: str) -> str:
    """Return a layer's dotted name from the text of a Python expression.

    >>> _dotted("net[0].conv1")
    'net.0.conv1'
    """
    return re.sub(r"\[(\w+)\]", r".\1", layer)


def _targets(given: Any, nature: str, notes: list[str]) -> list[str]:
    """Return our targets for an entry's ``target``: a number, a list of numbers, or nothing."""
    numbers: Sequence[Any] = given if isinstance(given, list) else [given]
    kind = "MultiClassMask" if nature == "Segmentation" else "ClassScore"
    texts = []
    for number in numbers:
        if isinstance(number, int) and not isinstance(number, bool):
            texts.append(f"{kind}({number})")
        elif number is not None:
            notes.append(f"target {number!r}: not a class number; name targets with --explain_targets")
    return texts


def _of_settings(config: Words, used: Sequence[Words]) -> list[str]:
    """Return a sentence for each reason why settings and entries are not translated."""
    reasons: dict[str, list[str]] = {}
    for key, reason in _NO_COUNTERPART.items():
        if key in config:
            reasons.setdefault(reason, []).append(key)
    for key, reason in _NO_WORD.items():
        if any(e.get(key) not in (None, False, "", 0) for e in used):
            reasons.setdefault(reason, []).append(key)
    words = {w for e in used for w in e.get("keywords", {})}
    for key, reason in (
        ("affine_size", "maps are not made smaller"),
        ("perturbations_per_eval", "batches are chosen by memory"),
        ("device_ids", "use torchrun"),
        ("firstLayer", "gradients are read at the image itself"),
    ):
        if key in words:
            reasons.setdefault(reason, []).append(key)
    size = config.get("patch_size", -1)
    notes = [f"{', '.join(keys)}: {reason}" for reason, keys in reasons.items()]
    if isinstance(size, int) and size > 0:
        notes.append(
            f"patch_size {size}, patch_overlap {config.get('patch_overlap', 0)}: maps use the windows that make the "
            "prediction; --inferer#roi_size and --inferer#overlap of monai.bundle run change both"
        )
    if config.get("timeout_time") and not config.get("timeout_enabled"):
        notes.append("timeout_time: not imported since timeout_enabled is false")
    return notes
