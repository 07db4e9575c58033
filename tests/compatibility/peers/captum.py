"""Captum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import captum.attr
import numpy as np
import torch
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule
from torch import Tensor, nn

from esegeta_monai.targets import TargetWrapper
from tests.compatibility.checks import equals, through_units
from tests.compatibility.peers.base import MANY_STEPS, Map, Peer, our_relevance, relu_first, wrapped
from tests.compatibility.sight import Sight
from tests.support.layers import UP

__all__ = ["CAPTUM"]


def _input(name: str, **options: Any) -> Map:
    def attribute(sight: Sight, **parameters: Any) -> Tensor:
        method = getattr(captum.attr, name)(wrapped(sight))
        return method.attribute(sight.image[None].clone(), target=0, **options)[0]

    return attribute


def _from_baseline(name: str) -> Map:
    def attribute(sight: Sight, baseline: Any, **parameters: Any) -> Tensor:
        method = getattr(captum.attr, name)(wrapped(sight))
        return method.attribute(sight.image[None].clone(), _batch(baseline), target=0, **_steps(parameters))[0]

    return attribute


def _batch(baseline: Tensor | list[Tensor]) -> Tensor:
    return torch.stack(baseline) if isinstance(baseline, list) else baseline[None]


def _steps(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the parameters of a path; where ours would refine it, many steps in small batches."""
    names = ("n_steps", "method", "n_samples")
    options: dict[str, Any] = {name: parameters[name] for name in names if name in parameters}
    if "tolerance" in parameters:
        options = {"n_steps": MANY_STEPS}
    if options.get("n_steps", 0) > 8:
        options["internal_batch_size"] = 4
    return {**options, "stdevs": 0.0} if "n_samples" in options else options


def _noise_tunnel(kind: str) -> Map:
    def attribute(sight: Sight, n_samples: int, **parameters: Any) -> Tensor:
        tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(wrapped(sight)))
        x = sight.image[None].clone()
        return tunnel.attribute(x, nt_type=kind, nt_samples=n_samples, target=0, abs=False)[0]

    return attribute


def _module(sight: Sight, layer: str) -> nn.Module:
    return sight.network.get_submodule(layer)


def _layer(name: str, scattered: bool = True) -> Map:
    def attribute(sight: Sight, layer: str, baseline: Any = None, rule: str = "", **parameters: Any) -> Tensor:
        method = getattr(captum.attr, name)(wrapped(sight), _module(sight, layer))
        given: dict[str, Any] = {} if baseline is None else {"baselines": _batch(baseline)}
        steps = _steps(parameters)
        if name == "LayerConductance":
            steps["method"] = "riemann_trapezoid"
        if name != "LayerActivation":
            given |= {"target": 0, **steps}
        values = method.attribute(sight.image[None].clone(), **given)
        values = sight.s.as_map(values[0] if isinstance(values, tuple) else values)
        if scattered:
            return sight.s.scatter(values.sum(1, keepdim=True))
        return sight.upsampled(values.mean(1, keepdim=True)[0])

    return attribute


def _captum_grad_cam(sight: Sight, layer: str, relu: bool = True, **parameters: Any) -> Tensor:
    values = captum.attr.LayerGradCam(wrapped(sight), _module(sight, layer)).attribute(sight.image[None], target=0)
    values = sight.upsampled(values[0])
    return values.relu() if relu else values


def _captum_guided_grad_cam(sight: Sight, layer: str, **parameters: Any) -> Tensor:
    method = captum.attr.GuidedGradCam(wrapped(sight), _module(sight, layer))
    return method.attribute(sight.image[None].clone(), target=0, interpolate_mode=UP[sight.dims])[0]


def _epsilon() -> EpsilonRule:
    return EpsilonRule(1e-6)


def _with_rules(sight: Sight, convolution: Callable[[], Any], dense: Callable[[], Any]) -> TargetWrapper:
    for module in sight.network.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            module.rule = convolution()  # type: ignore[assignment]
        elif isinstance(module, nn.Linear):
            module.rule = dense()  # type: ignore[assignment]
    return wrapped(sight)


def _captum_lrp(convolution: Callable[[], Any], dense: Callable[[], Any]) -> Map:
    def attribute(sight: Sight, **parameters: Any) -> Tensor:
        network = _with_rules(sight, convolution, dense)
        return captum.attr.LRP(network).attribute(sight.image[None].clone(), target=0)[0]

    return attribute


def _captum_layer_lrp(sight: Sight, layer: str, **parameters: Any) -> Tensor:
    network = _with_rules(sight, Alpha1_Beta0_Rule, _epsilon)
    values = captum.attr.LayerLRP(network, _module(sight, layer)).attribute(sight.image[None].clone(), target=0)
    return sight.s.scatter(sight.s.as_map(values).sum(1, keepdim=True))


def _neuron(name: str) -> Map:
    def attribute(sight: Sight, baseline: Any = None, **parameters: Any) -> Tensor:
        method = getattr(captum.attr, name)(wrapped(sight), _module(sight, sight.layer))
        given: dict[str, Any] = {} if baseline is None else {"baselines": _batch(baseline), **_steps(parameters)}
        return method.attribute(sight.image[None].clone(), _unit(sight), **given)[0]

    return attribute


def _unit(sight: Sight) -> tuple[int, ...]:
    """Return the neuron in the layer's own indices."""
    (output,) = sight.record(sight.image, sight.layer)
    positions = sight.at_image[0].shape[2:]
    at = [i * p // n for i, p, n in zip(sight.unit, positions, sight.case.roi)]
    if output.ndim > 3:
        return (sight.channel, *at)
    tokens = int(np.ravel_multi_index(at, positions)) + output.shape[1] - torch.Size(positions).numel()
    return (tokens, sight.channel)


def _captum_neuron_conductance(sight: Sight, layer: str, channel: int, baseline: Tensor, **parameters: Any) -> Tensor:
    method = captum.attr.NeuronConductance(wrapped(sight), _module(sight, layer))
    x = sight.image[None].clone()
    return method.attribute(x, _unit(sight), baseline[None], target=0, **_steps(parameters))[0]


MAPS: dict[str, Map] = {
    "Saliency": _input("Saliency"),
    "VanillaBackprop": _input("Saliency", abs=False),
    "InputXGradient": _input("InputXGradient"),
    "IntegratedGradients": _from_baseline("IntegratedGradients"),
    "GuidedBackprop": _input("GuidedBackprop"),
    "Deconvolution": _input("Deconvolution"),
    "SmoothGrad": _noise_tunnel("smoothgrad"),
    "SmoothGradSquared": _noise_tunnel("smoothgrad_sq"),
    "VarGrad": _noise_tunnel("vargrad"),
    "GradientShap": _from_baseline("GradientShap"),
    "DeepLift": _from_baseline("DeepLift"),
    "DeepLiftShap": _from_baseline("DeepLiftShap"),
    "LRP EpsilonPlus": _captum_lrp(Alpha1_Beta0_Rule, _epsilon),
    "LRP Epsilon": _captum_lrp(_epsilon, _epsilon),
    "GradCam": _captum_grad_cam,
    "GuidedGradCam": _captum_guided_grad_cam,
    "LayerActivation": _layer("LayerActivation", scattered=False),
    "LayerConductance": _layer("LayerConductance"),
    "InternalInfluence": _layer("InternalInfluence"),
    "LayerGradientXActivation": _layer("LayerGradientXActivation"),
    "LayerIntegratedGradients": _layer("LayerIntegratedGradients"),
    "LayerDeepLift": _layer("LayerDeepLift"),
    "LayerDeepLiftShap": _layer("LayerDeepLiftShap"),
    "LayerGradientShap": _layer("LayerGradientShap"),
    "LayerGradCam": lambda sight, layer, **p: _captum_grad_cam(sight, layer, relu=False),
    "LayerLRP": _captum_layer_lrp,
    "NeuronConductance": _captum_neuron_conductance,
    "NeuronGradient": _neuron("NeuronGradient"),
    "NeuronIntegratedGradients": _neuron("NeuronIntegratedGradients"),
    "NeuronDeepLift": _neuron("NeuronDeepLift"),
    "NeuronDeepLiftShap": _neuron("NeuronDeepLiftShap"),
    "NeuronGradientShap": _neuron("NeuronGradientShap"),
    "NeuronGuidedBackprop": _neuron("NeuronGuidedBackprop"),
    "NeuronDeconvolution": _neuron("NeuronDeconvolution"),
}

CAPTUM = Peer(
    "Captum",
    MAPS,
    {
        "LRP EpsilonPlus": our_relevance("EpsilonPlus"),
        "LRP Epsilon": our_relevance("Epsilon"),
        "GuidedGradCam": equals(lambda sight: relu_first(sight) * sight.modified("guided")),
        "NeuronConductance": equals(lambda sight: through_units(sight, one=True)),
    },
)
