"""Pooled activations against MONAI's inferer on the layer, derivatives along channels against the whole volume."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai.engine.layer_regions import (
    MaskedBox,
    PooledActivations,
    RegionGradients,
    SummedGradients,
    regions_of,
)
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.sweep import Request, sweep
from esegeta_monai.engine.windows.inferers import as_inferer
from esegeta_monai.errors import InputError
from esegeta_monai.targets import ClassScore, MultiClassMask, Target
from tests.support.layers import UP, Setting, setting
from tests.support.networks import CONV
from tests.support.objectives import objective_of
from tests.support.tensors import DOUBLE, close, noise


class Strided(nn.Module):
    """A segmentation network whose ``layer`` has half of the resolution along all axes."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = CONV[dims]
        self.layer, self.act = conv(2, 5, 3, stride=2, padding=1), nn.Tanh()
        self.head = conv(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.head(self.act(self.layer(x))), size=x.shape[2:])


class Pooling(nn.Module):
    """A classifier with a layer of half resolution."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = CONV[dims]
        self.layer, self.act, self.then = conv(2, 5, 3, stride=2, padding=1), nn.Tanh(), conv(5, 4, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.then(self.act(self.layer(x))).tanh().flatten(2).mean(2))


def build(kind: str, dims: int) -> tuple[nn.Module, Tensor, object, Target]:
    """Anisotropic volumes; the windows are padded along the first axis and overlap along the others."""
    torch.manual_seed(dims)
    shape = (7, 13, 11)[:dims]
    if kind == "classification":
        return Pooling(dims).double().eval(), noise(2, *shape), None, ClassScore(1)
    inferer = SlidingWindowInferer((8,) * dims, 3, 0.5, "gaussian")
    output = "probability" if kind == "probability" else "logit"
    return Strided(dims).double().eval(), noise(2, *shape), inferer, MultiClassMask(1, output=output)


def naive_map(net: nn.Module, image: Tensor, inferer: object, layer: str) -> Tensor:
    """The layer's activations, interpolated to each window and blended by MONAI: (C, *spatial)."""

    def activations(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o))
        net(x)
        handle.remove()
        return F.interpolate(kept[0], size=x.shape[2:], mode=UP[image.ndim - 1])

    with torch.no_grad():
        return as_inferer(inferer)(image[None], activations)[0]


def naive_derivative(
    net: nn.Module, objective: Objective, inferer: object, layer: str, vector: Tensor, mask: Tensor | None = None
) -> Tensor:
    """dF/dt where t · vector is added to the layer's output, by autograd through MONAI's whole inferer.

    With a mask (*spatial), the vector is multiplied by the share of each position in it; the mask is cut to the windows
    as a second image.
    """
    t = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    along = vector.reshape(-1, *(1,) * (objective.image.ndim - 1))
    if mask is not None:
        return masked_derivative(net, objective, inferer, layer, along, mask, t)
    handle = net.get_submodule(layer).register_forward_hook(lambda m, i, o: o + t * along)
    prediction = as_inferer(inferer)(objective.image[None], lambda x: net(x).clone())[0]
    handle.remove()
    (score,) = objective.scores
    return torch.autograd.grad(score.value(score.crop(prediction)), t)[0]


def masked_derivative(
    net: nn.Module, objective: Objective, inferer: object, layer: str, along: Tensor, mask: Tensor, t: Tensor
) -> Tensor:
    channels = len(objective.image)
    image = torch.cat([objective.image, mask[None].double()])

    def model(x: Tensor) -> Tensor:
        def edit(m: nn.Module, i: object, o: Tensor) -> Tensor:
            ones = torch.ones(1, 1, *o.shape[2:], dtype=DOUBLE, requires_grad=True)
            up = F.interpolate(ones.expand(len(o), 1, *o.shape[2:]), size=x.shape[2:], mode=UP[x.ndim - 2])
            q = [torch.autograd.grad(u, ones, x[j, channels:], retain_graph=True)[0] for j, u in enumerate(up)]
            (whole,) = torch.autograd.grad(up[0].sum(), ones)
            return o + t * torch.cat(q) / whole * along

        handle = net.get_submodule(layer).register_forward_hook(edit)
        out = net(x[:, :channels]).clone()
        handle.remove()
        return out

    prediction = as_inferer(inferer)(image[None], model)[0]
    (score,) = objective.scores
    return torch.autograd.grad(score.value(score.crop(prediction)), t)[0]


def regions(shape: tuple[int, ...]) -> list[Tensor]:
    """The whole, a single voxel at a corner, and scattered voxels."""
    corner = torch.zeros(shape, dtype=torch.bool)
    corner[(-1,) * len(shape)] = True
    return [torch.ones(shape, dtype=torch.bool), corner, noise(*shape, seed=5) > 1]


def swept(objective: Objective, *requests: Request) -> list[Tensor]:
    with frozen(objective.model.network):
        return sweep(objective, requests)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["segmentation", "probability", "classification"])
def test_equal_the_naive_computation_on_the_whole_volume(kind, dims):
    net, image, inferer, target = build(kind, dims)
    objective = objective_of(net, image, [target], inferer)
    masks, vector = regions(tuple(image.shape[1:])), noise(5, seed=9)
    boxes = [MaskedBox.of(m) for m in masks]
    pooled, parts, along, within = swept(
        objective,
        PooledActivations("layer", boxes),
        PooledActivations("layer", boxes, parts=True),
        SummedGradients("layer"),
        RegionGradients("layer", boxes),
    )
    whole = naive_map(net, image, inferer, "layer")
    close(pooled, torch.stack([whole[:, m].mean(1) for m in masks]))
    close(parts[:, :5] - parts[:, 5:], pooled)
    assert bool((parts >= 0).all())
    assert bool((parts[0] > 0).all())  # both signs occur in the whole image
    naive = naive_derivative(net, objective, inferer, "layer", vector)
    assert float(along[0] @ vector) == pytest.approx(float(naive), rel=1e-10)
    inside = [naive_derivative(net, objective, inferer, "layer", vector, m) for m in masks]
    close(within[0] @ vector, torch.stack(inside))


@pytest.mark.parametrize("name", ["UNet_batch", "SegResNet"])
def test_on_networks_of_monai_at_their_deepest_layer(name):
    s: Setting = setting(name, 3, target=MultiClassMask(1))
    mask = noise(*s.image.shape[1:], seed=1) > 1
    (pooled, along) = swept(s.objective, PooledActivations(s.layer, [MaskedBox.of(mask)]), SummedGradients(s.layer))
    close(pooled[0], naive_map(s.network, s.image, s.inferer, s.layer)[:, mask].mean(1))
    vector = noise(pooled.shape[1], seed=2)
    naive = naive_derivative(s.network, s.objective, s.inferer, s.layer, vector)
    assert float(along[0] @ vector) == pytest.approx(float(naive), rel=1e-9)


@pytest.mark.parametrize("dims", [2, 3])
def test_the_derivative_of_a_linear_head_is_its_weight_times_the_vector(dims):
    """F = Σ_mask (w · A + b) with the identity as the layer: dF/dt = voxels · w · v exactly."""
    conv = CONV[dims]
    net = nn.Sequential(conv(2, 4, 1), nn.Identity(), conv(4, 2, 1)).double().eval()
    image = noise(2, *(12,) * dims)
    inferer = SlidingWindowInferer((8,) * dims, 2, 0.5, "gaussian")
    objective = objective_of(net, image, [MultiClassMask(1)], inferer)
    (along,) = swept(objective, SummedGradients("1"))
    weight, vector = net[2].weight.detach().flatten(1)[1], noise(4, seed=3)
    voxels = int(objective.scores[0].mask.sum())
    scale = 1 / voxels if objective.scores[0].reduction == "mean" else 1.0
    assert float(along[0] @ vector) == pytest.approx(voxels * scale * float(weight @ vector), rel=1e-12)


def test_regions_of_a_label_map_and_an_empty_mask():
    labels = torch.tensor([[0, 0, -1], [1, 1, 0]])
    first, second = regions_of(labels, 2)
    assert first.box == (slice(0, 2), slice(0, 3))
    assert first.mask.tolist() == [[True, True, False], [False, False, True]]
    assert second.mask.tolist() == [[True, True]]
    with pytest.raises(InputError, match="no voxel"):
        regions_of(labels, 3)
    with pytest.raises(InputError, match="no voxel"):
        MaskedBox.of(torch.zeros(3, 3))
