"""Modules whose weights, hooks, precision or calls are unusual."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.odd.base import Around, Classifier, OddCase, image, logit, seeded
from tests.support.tensors import DOUBLE

X = image(1, 12, 12)
BLACK_BOX = ("Occlusion", "FeatureAblation", "ShapleyValueSampling", "KernelShap", "Lime", "Rise", "Sobol", "Hsic")
SIX = ("VanillaBackprop", "InputXGradient", "IntegratedGradients", "Occlusion", "FeatureAblation", "GradCam")


class Direct(nn.Module):
    """A classifier whose parts are called in an unusual way.

    Args:
        features: from the network and the image to the features of its head.
    """

    def __init__(self, features: Callable[[Classifier, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.features = Classifier(), features

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.features(self.net, x).flatten(1))


def plain(odd: nn.Module) -> nn.Module:
    """The same weights in an ordinary network."""
    return Around(copy.deepcopy(odd.net))


def weights(name: str, change: Callable[[nn.Module], Any]) -> OddCase:
    """A classifier with changed modules, and a twin with the weights that result."""

    def make() -> nn.Module:
        network = seeded(lambda: Around(Classifier()))
        change(network)
        return network.double()

    def twin(odd: nn.Module) -> nn.Module:
        network = Around(Classifier()).double()
        with torch.no_grad():
            odd(X)  # hooks before a pass set the weights
            for name, module in network.named_modules():
                source = odd.get_submodule(name)
                for own in ("weight", "bias"):
                    if isinstance(getattr(module, own, None), Tensor):
                        getattr(module, own).copy_(getattr(source, own))
        return network

    return OddCase(name, "modules", make, X, logit(), twin=twin, layer="net.down")


def direct(name: str, features: Callable[[Classifier, Tensor], Tensor], **more: Any) -> OddCase:
    more.setdefault("twin", plain)
    more.setdefault("layer", "net.down")
    return OddCase(name, "modules", lambda: seeded(lambda: Direct(features)), X, logit(), **more)


def functionally(net: Classifier, x: Tensor) -> Tensor:
    """Use the weights of a module without a call of it."""
    x = F.relu(F.conv2d(x, net.stem[0].weight, net.stem[0].bias, padding=1))
    return F.relu(F.conv2d(x, net.down[0].weight, net.down[0].bias, 2, 1))


def by_forward(net: Classifier, x: Tensor) -> Tensor:
    """Call ``forward`` of the blocks, past their hooks."""
    return net.down.forward(net.stem.forward(x))


def new_activation(net: Classifier, x: Tensor) -> Tensor:
    """Replace a module in forward."""
    net.stem[1] = nn.ReLU()
    return net.down(net.stem(x))


def constant_grid(net: Classifier, x: Tensor) -> Tensor:
    """Set ``requires_grad`` of a constant in forward."""
    grid = torch.ones(12, 12).to(x)
    grid.requires_grad = False
    return net.down(net.stem(x * grid))


def freezes(net: Classifier, x: Tensor) -> Tensor:
    """Freeze weights in forward."""
    net.requires_grad_(False)
    return net.down(net.stem(x))


def in_float32(net: Classifier, x: Tensor) -> Tensor:
    return net.down(net.stem(x).float().double())


def vmapped(net: Classifier, x: Tensor) -> Tensor:
    return torch.func.vmap(lambda one: net.down(net.stem(one[None]))[0])(x)


def hooked(double_output: bool) -> nn.Module:
    network = seeded(lambda: Around(Classifier()))
    if double_output:
        network.net.stem.register_forward_hook(lambda m, i, o: 2 * o)
    else:
        network.net.down.register_forward_pre_hook(lambda m, i: (2 * i[0],))
    return network


class Doubled(nn.Module):
    """The twin of the hooks: the factor in between."""

    def __init__(self, odd: nn.Module) -> None:
        super().__init__()
        self.net = Classifier().double()
        self.net.load_state_dict({k.removeprefix("net."): v for k, v in odd.state_dict().items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.net.down(2 * self.net.stem(x)).flatten(1))


class Symmetric(nn.Module):
    """A parametrisation: weights that are symmetric along the rows."""

    def forward(self, w: Tensor) -> Tensor:
        return (w + w.flip(-2)) / 2


def old_weight_norm(net: nn.Module) -> None:
    nn.utils.weight_norm(net.net.stem[0])


def old_spectral_norm(net: nn.Module) -> None:
    nn.utils.spectral_norm(net.net.stem[0])


def compiled() -> nn.Module:
    return torch.compile(seeded(lambda: Around(Classifier())), backend="eager")


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(3, dtype=DOUBLE))


def traced() -> nn.Module:
    return torch.jit.trace(seeded(Classifier), X)


CASES = [
    weights("weight norm by hooks", old_weight_norm),
    weights("weight norm by parametrisation", lambda n: parametrizations.weight_norm(n.net.stem[0])),
    weights("spectral norm by hooks", old_spectral_norm),
    weights("spectral norm by parametrisation", lambda n: parametrizations.spectral_norm(n.net.stem[0])),
    weights("own parametrisation",
            lambda n: parametrize.register_parametrization(n.net.down[0], "weight", Symmetric())),
    weights("pruned weights", lambda n: prune.random_unstructured(n.net.down[0], "weight", 0.5)),
    weights("frozen weights", lambda n: n.requires_grad_(False)),
    direct("weights frozen in forward", freezes),
    direct("sets requires_grad of a constant", constant_grid),
    direct("modules called functionally", functionally, cause="not used|never|not run|does not"),
    direct("forward called directly, past the hooks", by_forward, cause="not used|never|not run|does not"),
    direct("module replaced in forward", new_activation),
    direct("checkpointing", lambda n, x: n.down(checkpoint(n.stem, x, use_reentrant=False))),
    direct("checkpointing, reentrant", lambda n, x: n.down(checkpoint(n.stem, x, use_reentrant=True)),
           cause="checkpoint|reentrant"),
    direct("vmap inside", vmapped, cause="vmap|functorch|transform"),
    direct("float32 inside", in_float32, twin=lambda odd: odd, tolerance=1e-5),
    OddCase("hook that changes an output", "modules", lambda: hooked(True), X, logit(), twin=Doubled, layer="net.down"),
    OddCase("hook that changes an input", "modules", lambda: hooked(False), X, logit(), twin=Doubled, layer="net.down"),
    OddCase("torch.compile", "modules", compiled, X, logit(), twin=lambda odd: copy.deepcopy(odd._orig_mod),
            layer="net.down", methods=SIX),
    OddCase("DataParallel", "modules", lambda: nn.DataParallel(seeded(lambda: Around(Classifier()))), X, logit(),
            twin=lambda odd: odd.module, layer="net.down"),
    OddCase("TorchScript", "modules", traced, X, logit(), twin=lambda odd: seeded(Classifier), layer="down",
            cause="TorchScript"),
    OddCase("weights that are not initialised", "modules", lazy, X, logit(), layer="0",
            cause="lazy|uninitiali[sz]ed|initiali[sz]e"),
    OddCase("half-precision weights", "modules", lambda: seeded(Classifier).half(), X, logit(), layer="down",
            cause="float16"),
    OddCase("no weights", "modules",
            lambda: Around(nn.Identity(), after=lambda y: torch.tanh(y).flatten(1)[:, 30:33]), X, logit(),
            twin=lambda odd: odd, methods=SIX),
]  # fmt: skip
