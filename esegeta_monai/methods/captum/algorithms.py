"""The algorithms of Captum that `esegeta_monai.methods.Captum` runs, and why others are refused."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from esegeta_monai.errors import UsageError

__all__ = ["ALGORITHMS", "Algorithm", "algorithm_for", "split_arguments"]

PREFIX = "captum.attr."


@dataclass(frozen=True)
class Algorithm:
    """How a class of `captum.attr` is called, and what it promises.

    Attributes:
        ours: the method of this package that computes the same.
        units: units of its values.
        hooks: True: it hooks the network's modules, so it runs on windows and their maps are summed; False: it calls a
            function of the whole volume.
        gradient: True: it needs gradients.
        additive: True: voxels are shares of a sum.
        gap: permitted completeness gap; None: it promises no sum.
        linear: True: for targets linear in the prediction only.
        positive: True: for targets that do not fall with an output.
        signed: True: values have a sign.
        baselines: ``""``: it takes none, ``"one"``, or ``"several"``: a distribution.
        features: True: it takes a feature mask.
        given: arguments of its ``attribute`` that differ from Captum's defaults, unless the user gives them.
    """

    ours: str
    units: str = "target per voxel"
    hooks: bool = False
    gradient: bool = True
    additive: bool = False
    gap: float | None = None
    linear: bool = False
    positive: bool = False
    signed: bool = True
    baselines: str = ""
    features: bool = False
    given: Mapping[str, Any] = field(default_factory=dict)


_REPLACED = "change of the target when the voxel's feature is replaced"
_FEATURES: dict[str, Any] = {"gradient": False, "baselines": "one", "features": True}
_ONE = {"internal_batch_size": 1}  # one point of the path at a time: Captum's default holds all in memory
_LIFT: dict[str, Any] = {"hooks": True, "additive": True, "gap": 1e-3, "linear": True}

ALGORITHMS: dict[str, Algorithm] = {
    "Deconvolution": Algorithm("Deconvolution", "modified gradient", hooks=True, positive=True),
    "DeepLift": Algorithm("DeepLift", baselines="one", **_LIFT),
    "DeepLiftShap": Algorithm("DeepLiftShap", baselines="several", **_LIFT),
    "FeatureAblation": Algorithm("FeatureAblation", _REPLACED, **_FEATURES),
    "GradientShap": Algorithm("GradientShap", additive=True, gap=5e-2, baselines="several"),
    "GuidedBackprop": Algorithm("GuidedBackprop", "modified gradient", hooks=True, positive=True),
    "InputXGradient": Algorithm("InputXGradient", additive=True),
    "IntegratedGradients": Algorithm("IntegratedGradients", additive=True, gap=5e-2, baselines="one", given=_ONE),
    "KernelShap": Algorithm("KernelShap", "target per feature", **_FEATURES),
    "Lime": Algorithm("Lime", "weight of the voxel's feature in a linear model of the target", **_FEATURES),
    "Occlusion": Algorithm(
        "Occlusion", "change of the target when the voxel is covered", gradient=False, baselines="one"
    ),
    "Saliency": Algorithm("Saliency", "target per unit of image intensity", signed=False),
    "ShapleyValueSampling": Algorithm("ShapleyValueSampling", "target per feature", **_FEATURES),
    "ShapleyValues": Algorithm("ShapleyValueSampling", "target per feature", **_FEATURES),
}
"""The algorithms by their name in `captum.attr`."""

_REFUSED = {
    "FeaturePermutation": "a case is one image, and it needs a batch: use FeaturePermutation(cases=…)",
    "GuidedGradCam": "it needs a layer, whose windows are blended and not added: use GuidedGradCam(layer=…)",
    "LRP": "it multiplies each map by the whole output, so that maps of windows do not add up: use LRP",
    "NoiseTunnel": "it wraps another algorithm: use SmoothGrad(Captum('Saliency')), SmoothGradSquared or VarGrad",
    "LayerGradCam": "it is one of a layer, whose windows are blended and not added: use LayerGradCam(layer=…)",
}
"""Why an algorithm is refused."""

_FOREIGN = ("inputs", "baselines", "target", "feature_mask", "additional_forward_args", "return_convergence_delta")
"""Arguments of ``attribute`` that the adapter gives."""

_INNER = ("forward_func", "model", "self", "device_ids", "layer", "custom_attribution_func")


def algorithm_for(name: str) -> tuple[str, Algorithm]:
    """Return the name in `captum.attr` and the entry of an algorithm; nothing is imported by this name.

    Args:
        name: ``"DeepLift"`` or ``"captum.attr.DeepLift"``.

    Raises:
        UsageError: it is no algorithm of Captum, or one that is refused; the message names the method to use.

    >>> algorithm_for("captum.attr.DeepLift")[0]
    'DeepLift'
    """
    plain = name.removeprefix(PREFIX)
    if plain in ALGORITHMS:
        return plain, ALGORITHMS[plain]
    if plain in _REFUSED:
        raise UsageError(f"Captum's {plain} is refused: {_REFUSED[plain]}")
    if plain.startswith(("Layer", "Neuron", "InternalInfluence")) and plain in _names_of_captum():
        kind = "a unit: explain the target LayerNeuron(…)" if plain.startswith("Neuron") else "a layer: use"
        ours = f" with {plain.removeprefix('Neuron')}" if plain.startswith("Neuron") else f" {plain}(layer=…)"
        raise UsageError(f"Captum's {plain} is refused: it is one of {kind}{ours} ('esegeta-monai methods' lists them)")
    near = difflib.get_close_matches(plain, ALGORITHMS, n=3, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(ALGORITHMS)}"
    raise UsageError(f"Captum has no algorithm {name!r} for images: {hint}")


def _names_of_captum() -> Iterable[str]:
    import captum.attr

    return captum.attr.__all__


def split_arguments(name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divide arguments into those of the class and those of its ``attribute``; lists become tuples, as Captum expects.

    Args:
        name: of the algorithm.
        arguments: as given by the user.

    Raises:
        UsageError: an argument that neither has, one that the adapter gives itself, or a missing one.

    >>> split_arguments("IntegratedGradients", {"n_steps": 8, "multiply_by_inputs": False})
    ({'multiply_by_inputs': False}, {'n_steps': 8, 'internal_batch_size': 1})
    """
    import captum.attr

    cls = getattr(captum.attr, name)
    of_class, of_call = (_parameters(f) for f in (cls.__init__, cls.attribute))
    if foreign := [n for n in arguments if n in _FOREIGN]:
        given = "give the parameters baseline, n_baselines and feature_mask, and the target as that of the run"
        raise UsageError(f"Captum's {name}: {', '.join(foreign)} cannot be an argument: {given}")
    if unknown := [n for n in arguments if n not in of_class and n not in of_call]:
        known = ", ".join([*of_class, *of_call]) or "none"
        raise UsageError(f"Captum's {name} has no argument {', '.join(map(repr, unknown))}: its arguments are {known}")
    if missing := [n for n, p in (of_class | of_call).items() if p.default is p.empty and n not in arguments]:
        example = " such as arguments={'sliding_window_shapes': (1, 8, 8, 8)}" if name == "Occlusion" else ""
        raise UsageError(f"Captum's {name} needs {', '.join(missing)}: give it in arguments{example}")
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in arguments.items()}
    call = {n: v for n, v in values.items() if n in of_call}
    return {n: v for n, v in values.items() if n in of_class}, call | {
        n: v for n, v in ALGORITHMS[name].given.items() if n not in call
    }


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    items = inspect.signature(function).parameters.items()
    return {n: p for n, p in items if p.kind not in kinds and n not in (*_FOREIGN, *_INNER)}
