"""Small calibrated networks for every test: the architectures of MONAI with nothing left at its initial value.

Fresh networks hide bugs: running means of 0, slopes that all channels share, outputs of 1e-15. Here every bias, affine
parameter, PReLU slope (one per channel) and batch-norm statistic is random, and the last layer is scaled so that the
mean logit of each class differs by about 1 between `image` and `reference`.

    case = build("UNet_instance", spatial_dims=3)
    logits = case.logits(case.image)                         # (1, classes, *roi), whatever the network returns
    delta = case.score(case.image) - case.score(case.reference)   # mean logit of class 1: about 1

`build` is cached by its arguments and returns copies: a test may change the network it got.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cache

import torch
from monai.networks.blocks import MemoryEfficientSwish, PatchEmbeddingBlock, Swish
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from tests.networks.architectures import CLASSES, CLASSIFICATION, SEGMENTATION, SPECS, Spec

__all__ = ["CLASSES", "CLASSIFICATION", "NAMES", "SEGMENTATION", "NetworkCase", "build"]

NAMES: list[str] = list(SPECS)
Head = nn.Linear | _ConvNd  # the last layer with weights

# The most intensity-invariant norm decides `NetworkCase.norm`: f(αx) = f(x) where "instance" or "group" comes first.
_NORMS = {"instance": _InstanceNorm, "group": nn.GroupNorm, "layer": nn.LayerNorm, "batch": _BatchNorm}
_ACTIVATIONS = ("relu", "leaky_relu", "prelu", "elu", "gelu", "silu", "mish", "softplus", "sigmoid", "tanh", "softmax")


@dataclass(frozen=True)
class NetworkCase:
    """One network in eval mode, with inputs on which it has something to say.

    Attributes:
        name: the entry of `NAMES`.
        network: in eval mode, of dtype `image.dtype`.
        image: (1, C, *roi), a body with a bright lesion, tissue contrast and fine texture; intensities about 0 to 2.
        reference: (1, C, *roi), another body with finer tissue, more noise and a dark lesion elsewhere; not a
            constant, and not the same distribution: under instance norm the means would agree to three digits.
        kind: "segmentation" (logits (B, 3, *roi)) or "classification" (logits (B, 3)).
        roi: spatial shape of one window.
        norm: "instance", "group", "layer", "batch" or "none": the most intensity-invariant one that the network has.
        activations: the kinds that run in a forward pass, functional calls included ("swish" is MONAI's own).
        output: key or index of the logits where the network returns a dict, list or tuple, else None.
        probability: whether `logits` are probabilities, softmax being inside the network.
        cam_layer: dotted name of a deep layer that still has a grid (or tokens) of at least 4 positions an axis.
    """

    name: str
    network: nn.Module
    image: torch.Tensor
    reference: torch.Tensor
    kind: str
    roi: tuple[int, ...]
    norm: str
    activations: frozenset[str]
    output: str | int | None
    probability: bool
    cam_layer: str

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The entry of the network's output that is to be explained (probabilities for `SoftmaxInside`)."""
        return _select(self.network(x), self.output)

    def score(self, x: torch.Tensor, class_index: int = 1) -> torch.Tensor:
        """Mean logit of one class over all voxels, (B,): the linear target that the network is calibrated for."""
        return (
            self.logits(x)[:, class_index].flatten(1).mean(1)
            if self.kind == SEGMENTATION
            else (self.logits(x)[:, class_index])
        )


def build(
    name: str, spatial_dims: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0, in_channels: int = 1
) -> NetworkCase:
    """The network `name` of `NAMES` (all exist in 2D and 3D), built, randomised and calibrated once per process.

    Args:
        name: an entry of `NAMES`.
        spatial_dims: 2 or 3.
        dtype: of parameters, buffers and inputs; the calibration is done in float32, in a tenth of the time.
        seed: of weights and inputs; the global random state is left as it was.
        in_channels: image channels (VNet: a divisor of 4).

    Raises:
        KeyError: `name` is not in `NAMES`.
    """
    case = _build(name, spatial_dims, seed, in_channels)
    return replace(
        case,
        network=copy.deepcopy(case.network).to(dtype),
        image=case.image.to(dtype, copy=True),
        reference=case.reference.to(dtype, copy=True),
    )


@cache
def _build(name: str, spatial_dims: int, seed: int, in_channels: int) -> NetworkCase:
    """The first draw that speaks; random networks are sometimes mute in a corner or say one class everywhere."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(1000 * seed + 10 * NAMES.index(name) + spatial_dims)
        for _ in range(20):
            case = _draw(name, spatial_dims, in_channels)
            if _speaks(case):
                with torch.no_grad():  # DynUNet keeps its last heads, and has no copy while they have a graph
                    case.network(case.image)
                case.network.double()
                return replace(case, image=case.image.double(), reference=case.reference.double())
    raise RuntimeError(f"no usable {name} in {spatial_dims}D within 20 draws of seed {seed}")


def _draw(name: str, spatial_dims: int, in_channels: int) -> NetworkCase:
    spec = SPECS[name]
    size = spec.sizes[spatial_dims - 2]
    roi = (size,) * spatial_dims
    image = _scan(roi, in_channels, lesion=1.0, frequency=3, noise=0.05)
    reference = _scan(roi, in_channels, lesion=-0.5, frequency=6, noise=0.15)
    pair = torch.cat([image, reference])
    network = spec.make(spatial_dims, in_channels, size).eval()
    _randomise(network, pair)
    network.requires_grad_(False)
    head, activations = _trace(network, image)
    _calibrate(network, head, spec, pair)
    network.requires_grad_(True)
    return NetworkCase(
        name,
        network,
        image,
        reference,
        spec.kind,
        roi,
        _norm(network),
        activations,
        spec.output,
        spec.probability,
        spec.cam_layer,
    )


def _speaks(case: NetworkCase) -> bool:
    """Return True if F differs between image and reference for all classes and the frozen prediction, every class is
    predicted somewhere, logits stay within hundreds, and the gradient reaches the voxels."""
    image = case.image.clone().requires_grad_()
    logits = torch.cat([case.logits(image), case.logits(case.reference)])
    (gradient,) = torch.autograd.grad(case.score(image).sum(), image)
    logits = logits.detach().reshape(2, CLASSES, -1)
    predicted = logits[0].argmax(0)
    pairs = [*logits.mean(2).T]
    if case.kind == SEGMENTATION:
        shares = torch.bincount(predicted, minlength=CLASSES) / predicted.numel()
        if shares.min() < 0.03 or shares.max() > 0.9 or logits.std() > 100:
            return False
        pairs.append(logits[:, 1, predicted == 1].mean(1))
    return (gradient != 0).float().mean().item() > 0.92 and all(
        abs(value - start) > max(0.12 * abs(value), 0.03 if case.probability else 0.35) for value, start in pairs
    )


def _select(output: object, key: str | int | None) -> torch.Tensor:
    return output if key is None else output[key]  # type: ignore[index, return-value]


def _scan(roi: tuple[int, ...], channels: int, lesion: float, frequency: float, noise: float) -> torch.Tensor:
    """A body (ellipsoid) of smooth tissue contrast with one lesion, and noise, in float32."""
    grid = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in roi), indexing="ij"))
    axes = (slice(None), *(None,) * len(roi))

    def ball(centre: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
        distance = ((grid - centre[axes]) / radius[axes]).square().sum(0).sqrt()
        return torch.sigmoid(12 * (1 - distance))

    body = ball(0.1 * _normal(len(roi)), 0.7 + 0.2 * torch.rand(len(roi), dtype=torch.float64))
    spot = ball(0.35 * _normal(len(roi)).clamp(-1, 1), 0.25 + 0.1 * torch.rand(len(roi), dtype=torch.float64))
    scan = []
    for _ in range(channels):
        waves = (frequency * _normal(4, len(roi)) @ grid.flatten(1) + 3 * _normal(4, 1)).cos().mean(0).view(roi)
        scan.append(body * (0.8 + 0.4 * waves + lesion * spot) + noise * _normal(*roi))
    return torch.stack(scan)[None].float()


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@torch.no_grad()
def _randomise(network: nn.Module, inputs: torch.Tensor) -> None:
    """Every bias, affine parameter, slope and running statistic away from its initial value; activity kept alive.

    Running statistics are those of the data first (else deep networks go silent or explode), then shifted at random.
    """
    _slopes_per_channel(network, inputs)
    for module in network.modules():
        bias = getattr(module, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.normal_(0, 0.2)
        if isinstance(module, tuple(_NORMS.values())) and isinstance(module.weight, nn.Parameter):
            module.weight.uniform_(0.5, 1.5)
        if isinstance(module, PatchEmbeddingBlock):
            # Else the tokens are mostly their random biases, whatever the image.
            module.get_parameter("patch_embeddings.weight").mul_(5)
    batch_norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in batch_norms]
    for module in batch_norms:
        module.momentum = 1.0
        module.train()
    if batch_norms:  # noisy copies: deep layers of a small window have one voxel left
        network(torch.cat([inputs, inputs + 0.2 * torch.randn_like(inputs)]))
    for module, momentum in zip(batch_norms, momenta):
        module.momentum = momentum
        module.eval()
        mean, variance = module.get_buffer("running_mean"), module.get_buffer("running_var")
        mean += 0.3 * variance.sqrt() * torch.randn_like(mean)
        variance *= torch.empty_like(variance).uniform_(0.6, 1.6)


def _slopes_per_channel(network: nn.Module, inputs: torch.Tensor) -> None:
    """MONAI gives a PReLU one slope; here each channel has its own, the channels being seen in one forward pass."""

    def widen(module: nn.PReLU, args: tuple[torch.Tensor, ...]) -> None:
        module.num_parameters = args[0].shape[1]
        module.weight = nn.Parameter(torch.empty(module.num_parameters).uniform_(0.05, 0.6))

    hooks = [m.register_forward_pre_hook(widen) for m in network.modules() if isinstance(m, nn.PReLU)]
    if hooks:
        network(inputs)
    for hook in hooks:
        hook.remove()


def _calibrate(network: nn.Module, head: Head, spec: Spec, pair: torch.Tensor) -> None:
    """Turn and shift the last layer so that class c has mean logit ±1/2 on the image and ∓1/2 on the reference.

    Scaling a random last layer until its mean differs by 1 would leave logits that vary by hundreds over the volume.
    Its weights are scaled to logits of unit deviation instead, then moved along the gradient g of the difference Δ of
    means: all is affine in the weights, so Δ(w) = Δ(w₀) + <g, w − w₀>, and likewise in the bias. Odd classes rise from
    reference to image, even ones fall.
    """
    if head.bias is None:
        head.bias = nn.Parameter(torch.zeros(CLASSES), requires_grad=False)
    per_class = [1] * head.weight.ndim
    per_class[1 if isinstance(head, _ConvTransposeNd) else 0] = CLASSES
    other_axes = tuple(axis for axis, length in enumerate(per_class) if length == 1)
    goal = 0.5 * torch.tensor([-1.0, 1.0]).repeat(CLASSES)[:CLASSES]

    head.weight.requires_grad_(True)
    head.bias.requires_grad_(True)
    logits = _logits(network, spec, pair)
    means = logits.mean(2)
    difference = means[0] - means[1]
    gradient = torch.autograd.grad(difference.sum(), head.weight, retain_graph=True)[0]
    bias_slope = torch.autograd.grad(means[0].sum(), head.bias)[0]
    head.weight.requires_grad_(False)
    head.bias.requires_grad_(False)

    scale = logits.detach().std(dim=(0, 2)) if logits.shape[2] > 1 else torch.ones(CLASSES)
    step = head.weight * (1 / scale - 1).view(per_class)
    missing = 2 * goal - difference.detach() - (gradient * step).sum(other_axes)
    head.weight += step + gradient * (missing / gradient.square().sum(other_axes)).view(per_class)
    means = _logits(network, spec, pair).mean(2)
    head.bias += (goal + spec.lift - means[0]) / bias_slope


def _logits(network: nn.Module, spec: Spec, x: torch.Tensor) -> torch.Tensor:
    """Logits (B, class, voxel), taken before an activation that ends the network."""
    if spec.before is None:
        logits = _select(network(x), spec.output)
    else:
        kept: list[torch.Tensor] = []
        # A clone, since the activation that follows may work in place.
        hook = network.get_submodule(spec.before).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        network(x)
        hook.remove()
        logits = kept[0]
    return logits.reshape(len(x), CLASSES, -1)


def _norm(network: nn.Module) -> str:
    modules = list(network.modules())
    return next((name for name, kind in _NORMS.items() if any(isinstance(m, kind) for m in modules)), "none")


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = getattr(func, "__name__", "").removesuffix("_")
        if name in _ACTIVATIONS:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def _trace(network: nn.Module, image: torch.Tensor) -> tuple[Head, frozenset[str]]:
    """The convolution or linear layer that runs last, and the kinds of activation that run."""
    ran: list[Head] = []
    heads = [m for m in network.modules() if isinstance(m, (nn.Linear, _ConvNd))]
    hooks = [m.register_forward_hook(lambda m, i, o: ran.append(m)) for m in heads]
    with _Recorder() as recorder:
        network(image)
    for hook in hooks:
        hook.remove()
    swish = {"swish"} if any(isinstance(m, (Swish, MemoryEfficientSwish)) for m in network.modules()) else set()
    return ran[-1], frozenset(recorder.seen | swish)
