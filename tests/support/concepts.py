"""Networks that use one planted object and ignore another, and cases with the masks of both."""

from __future__ import annotations

import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.explain.concept_cases import CaseActivations, case_activations
from esegeta_monai.targets import ClassScore, MultiClassMask, Target
from tests.support.networks import CONV
from tests.support.tensors import DOUBLE

SIZE = {2: 20, 3: 14}
CONTEXT = 5
"""Channels of the layer that see texture; channel 0 sees the used object, channel 1 the ignored one."""


class UsesOne(nn.Module):
    """Its score rises with channel 0 of ``layer`` and with the squares of the texture channels; channel 1 is ignored.

    The derivative along a texture channel has the sign of its mean in the case, so that it differs between cases.
    """

    def __init__(self, dims: int, pooled: bool, where: str) -> None:
        super().__init__()
        self.layer = CONV[dims](3, 2 + CONTEXT, 3, padding=1, bias=False)
        self.pooled = pooled
        # means of texture over n voxels are about 1/√n: at the object, or in the whole image
        self.texture = 3 ** (dims / 2) if where == "mask" else 2 * SIZE[dims] ** (dims / 2)
        with torch.no_grad():
            self.layer.weight[:2] = 0
            self.layer.weight[2:, :2] = 0
            middle = (slice(None),) + (1,) * dims
            self.layer.weight[(0, *middle)] = torch.tensor([1.0, 0.0, 0.0])
            self.layer.weight[(1, *middle)] = torch.tensor([0.0, 1.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        a = self.layer(x)
        out = a[:, :1] + self.texture * a[:, 2:].square().sum(1, keepdim=True)
        out = torch.cat([torch.zeros_like(out), out], 1)
        return out.flatten(2).mean(2) if self.pooled else out


def build(dims: int, pooled: bool, where: str) -> tuple[Explainer, Target]:
    torch.manual_seed(10 * dims + pooled)
    net = UsesOne(dims, pooled, where).double().eval()
    if pooled:
        return Explainer(net, checks=False, seed=1), ClassScore(1)
    roi = (SIZE[dims],) * (dims - 1) + (10,)
    return Explainer(net, SlidingWindowInferer(roi, 4, 0.25, "gaussian"), checks=False, seed=1), MultiClassMask(1)


def case(dims: int, number: int) -> tuple[MetaTensor, dict[str, Tensor]]:
    """Noise with a used object in input channel 0 and an ignored one in input channel 1, both at random places;
    texture is in input channel 2."""
    generator = torch.Generator().manual_seed(number)
    shape = (SIZE[dims],) * dims
    x = torch.randn(3, *shape, generator=generator, dtype=DOUBLE)
    masks = {}
    for channel, name in enumerate(["used", "ignored"]):
        start = torch.randint(0, shape[0] - 3, (dims,), generator=generator).tolist()
        box = tuple(slice(s, s + 3) for s in start)
        x[(channel, *box)] += 20
        masks[name] = torch.zeros(shape)
        masks[name][box] = 1
    return MetaTensor(x[None], affine=torch.eye(4, dtype=DOUBLE)), masks


def activations(dims: int, pooled: bool, cases: int, randoms: int, where: str = "everywhere") -> list[CaseActivations]:
    explainer, target = build(dims, pooled, where)
    results = []
    for number in range(cases):
        image, masks = case(dims, number)
        body = torch.ones(image.shape[2:], dtype=torch.bool)
        results += case_activations(
            explainer, image, f"case{number}", [target], ["layer"], masks, randoms=randoms, body=body
        )
    return results


WEIGHTS = [3.0, 1.0, 0.0, -2.0]
"""How the score of `Ordered` depends on the four objects."""


class Ordered(nn.Module):
    """Four channels of ``layer`` see one object each; the score rises or falls with them by `WEIGHTS` and saturates."""

    def __init__(self, dims: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.first, self.layer = CONV[dims](4, 4, 3, padding=1, bias=False), nn.ReLU()
        with torch.no_grad():
            self.first.weight[:] = 0
            for j in range(4):
                self.first.weight[(j, j, *(slice(None),) * dims)] = 3.0**-dims

    def forward(self, x: Tensor) -> Tensor:
        a = self.layer(self.first(x)).movedim(1, -1)
        out = 5 + torch.tanh(a / 4) @ torch.tensor(WEIGHTS, dtype=x.dtype)
        out = torch.stack([torch.zeros_like(out), out], 1)
        return out.flatten(2).mean(2) if self.pooled else out


def ordered(dims: int, pooled: bool) -> tuple[Explainer, Target]:
    net = Ordered(dims, pooled).double().eval()
    if pooled:
        return Explainer(net, checks=False), ClassScore(1)
    roi = (16,) * (dims - 1) + (10,)
    return Explainer(net, SlidingWindowInferer(roi, 4, 0.25, "gaussian"), checks=False), MultiClassMask(1)


def ordered_case(dims: int, number: int, without: int | None = None) -> tuple[MetaTensor, dict[str, Tensor]]:
    """Four objects in four input channels, each in a corner region of its own cell of a grid of 4 voxels."""
    generator = torch.Generator().manual_seed(number)
    x = 0.05 * torch.randn(4, *(16,) * dims, generator=generator, dtype=DOUBLE)
    cells = torch.randperm(4**dims, generator=generator)[:4].tolist()
    masks = {}
    for j, cell in enumerate(cells):
        start = [4 * (cell // 4**d % 4) for d in range(dims)]
        box = tuple(slice(s, s + 4) for s in start)
        if j != without:
            x[(j, *box)] += 4
        masks[str(j)] = torch.zeros((16,) * dims)
        masks[str(j)][box] = 1
    return MetaTensor(x[None], affine=torch.eye(4, dtype=DOUBLE)), masks
