"""What other libraries give for the rows of the table, on one window, since they know no windows.

They get the target as a module (`TargetWrapper`), float64 where they would round to float32, the same noise and draws
as we, and any interpolation is done for them as we do it: their figure is that of their mathematics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import captum.attr
import monai.visualize
import numpy as np
import torch
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule
from torch import Tensor, nn

from esegeta_monai.methods import LRP
from esegeta_monai.targets import TargetWrapper
from tests.compatibility.checks import Answer, Check, Figure, Row, _of, draws, equals, through_units
from tests.compatibility.sight import Sight, target_of
from tests.methods.whole import UP, explain

__all__ = ["PEERS", "Peer", "measure_peer", "wrapped"]

Map = Callable[..., Tensor]
MANY = 256


@dataclass(frozen=True)
class Peer:
    """Another library.

    Attributes:
        title: in the table.
        maps: row -> function of the sight and the check's parameters that gives the map (C, *spatial).
        checks: rows where it follows another convention that is as good: what must hold there.
        found: whether it is installed.
        dims: that it can do.
    """

    title: str
    maps: Mapping[str, Map]
    checks: Mapping[str, Check] = field(default_factory=dict)
    found: bool = True
    dims: tuple[int, ...] = (2, 3)


def wrapped(sight: Sight) -> TargetWrapper:
    """The network with the target as its last layer."""
    target = target_of(sight.case, sight.class_index)
    return TargetWrapper(sight.network, target, output=sight.s.output).freeze(sight.image[None]).eval()


def measure_peer(whose: str, row: Row, sight: Sight) -> Figure:
    """One cell of another library, by the same check."""
    peer = PEERS[whose]

    def ask(sight: Sight, **parameters: Any) -> Answer:
        with _fair(sight):
            found = peer.maps[row.name](sight, **_of({**row.parameters, **parameters}, sight))
        return Answer(found.detach(), {"steps": MANY})

    return peer.checks.get(row.name, row.check)(sight, ask)


@contextmanager
def _fair(sight: Sight) -> Iterator[None]:
    """Captum rounds step sizes by ``.float()``, which alone costs 1e-8; noise and draws are ours."""
    default = torch.get_default_dtype()
    noises: list[Tensor] = []

    def normal(mean: Any, std: Any, *args: Any, size: Any = None, **kwargs: Any) -> Tensor:
        if size is None and not bool(std.any()):
            return torch.zeros_like(std)
        if size is None:  # Captum: all samples at once
            return torch.stack(noise(sight, len(std)))
        if not noises:  # MONAI: one after the other
            noises.extend(noise(sight, 3))
        return noises.pop(0)[None]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        stack.enter_context(mock.patch.object(torch, "normal", normal))
        stack.enter_context(mock.patch.object(np.random, "uniform", lambda low, high, n: np.array(draws(sight, n))))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def noise(sight: Sight, n: int) -> list[Tensor]:
    """What `SmoothGrad` adds to the image."""
    return [x - sight.image for x in sight.noisy(n, 0.15)]


# -- Captum ---------------------------------------------------------------------------------------------------------


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
    """Captum's words for the parameters of a path; where ours would refine it, many steps."""
    if "tolerance" in parameters:
        return {"n_steps": MANY}
    found = {name: parameters[name] for name in ("n_steps", "method", "n_samples") if name in parameters}
    return {**found, "stdevs": 0.0} if "n_samples" in found else found


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
        found = method.attribute(sight.image[None].clone(), **given)
        found = sight.s.as_map(found[0] if isinstance(found, tuple) else found)
        if scattered:
            return sight.s.scatter(found.sum(1, keepdim=True))
        return sight.upsampled(found.mean(1, keepdim=True)[0])

    return attribute


def _captum_grad_cam(sight: Sight, layer: str, relu: bool = True, **parameters: Any) -> Tensor:
    found = captum.attr.LayerGradCam(wrapped(sight), _module(sight, layer)).attribute(sight.image[None], target=0)
    found = sight.upsampled(found[0])
    return found.relu() if relu else found


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
    found = captum.attr.LayerLRP(network, _module(sight, layer)).attribute(sight.image[None].clone(), target=0)
    return sight.s.scatter(sight.s.as_map(found).sum(1, keepdim=True))


def _neuron(name: str) -> Map:
    def attribute(sight: Sight, baseline: Any = None, **parameters: Any) -> Tensor:
        method = getattr(captum.attr, name)(wrapped(sight), _module(sight, sight.layer))
        given: dict[str, Any] = {} if baseline is None else {"baselines": _batch(baseline), **_steps(parameters)}
        return method.attribute(sight.image[None].clone(), _unit(sight), **given)[0]

    return attribute


def _unit(sight: Sight) -> tuple[int, ...]:
    """The neuron in the layer's own indices."""
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


CAPTUM: dict[str, Map] = {
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


# -- MONAI ----------------------------------------------------------------------------------------------------------


def _monai_gradient(name: str, reduce: Callable[[Tensor], Tensor] = lambda g: g) -> Map:
    def attribute(sight: Sight, **parameters: Any) -> Tensor:
        return reduce(getattr(monai.visualize, name)(wrapped(sight))(sight.image[None].clone(), index=0)[0])

    return attribute


def _monai_smooth_grad(sight: Sight, n_samples: int, **parameters: Any) -> Tensor:
    method = monai.visualize.SmoothGrad(wrapped(sight), n_samples=n_samples, magnitude=False, verbose=False)
    return method(sight.image[None].clone(), index=0)[0]


def _monai_cam(name: str) -> Map:
    def attribute(sight: Sight, layer: str, **parameters: Any) -> Tensor:
        sight.network.requires_grad_(True)  # MONAI asks for gradients of the parameters only
        up: dict[str, Any] = {"upsampler": lambda size: nn.Upsample(size, mode=UP[sight.dims])}
        method = getattr(monai.visualize, name)(wrapped(sight), f"network.{layer}", postprocessing=lambda m: m, **up)
        return method(sight.image[None].clone(), class_idx=0)[0]

    return attribute


def _relu_first(sight: Sight) -> Tensor:
    """Grad-CAM as the paper has it, ReLU before the map is interpolated; over windows it can only come last."""
    a, g = sight.at_image
    weights = g.flatten(2).mean(2)
    return sight.upsampled(torch.einsum("nc,nc...->n...", weights, a).relu())


MONAI: dict[str, Map] = {
    "Saliency": _monai_gradient("VanillaGrad", torch.abs),
    "VanillaBackprop": _monai_gradient("VanillaGrad"),
    "GuidedBackprop": _monai_gradient("GuidedBackpropGrad"),
    "SmoothGrad": _monai_smooth_grad,
    "GradCam": _monai_cam("GradCAM"),
    "GradCamPlusPlus": _monai_cam("GradCAMpp"),
}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _our_relevance(composite: str) -> Check:
    """Captum does not book what biases keep, so it is compared with the map of our rules, which are proved apart."""

    def truth(sight: Sight) -> Tensor:
        clean = Sight(sight.name, sight.dims, windows=False)  # Captum leaves its rules in the network
        return explain(LRP(composite), clean.s.objective).maps[0]

    return equals(truth, 1e-8)


PEERS: dict[str, Peer] = {
    "captum": Peer(
        "Captum",
        CAPTUM,
        {
            "LRP EpsilonPlus": _our_relevance("EpsilonPlus"),
            "LRP Epsilon": _our_relevance("Epsilon"),
            "GuidedGradCam": equals(lambda sight: _relu_first(sight) * sight.modified("guided")),
            "NeuronConductance": equals(lambda sight: through_units(sight, one=True)),
        },
    ),
    "monai": Peer("MONAI", MONAI, {"GradCam": equals(_relu_first)}),
}
