"""Cases whose perfect map is known: networks that are linear in the image, under several windows."""

from __future__ import annotations

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from esegeta_monai.engine.network.state import frozen
from esegeta_monai.methods import InputXGradient, Method, run
from esegeta_monai.metrics import (
    Metric,
    MetricInput,
    controls,
)
from esegeta_monai.targets import Box, ClassScore, MultiClassMask
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import noise

SEGMENTATION = {2: (2, 16, 20), 3: (2, 8, 10, 12)}


class LinearClassifier(nn.Module):
    """Two classes; a weight for each voxel, great in one corner, none in most of the image."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        weight = torch.randn((2, *shape), generator=generator, dtype=torch.float64)
        corner = torch.zeros(shape[1:], dtype=torch.float64)
        corner[tuple(slice(0, n // 2) for n in shape[1:])] = 1
        self.weight = nn.Parameter(weight * corner)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("n...,k...->nk", x.flatten(1), self.weight.flatten(1))


def classification(dims: int) -> Naive:
    """A linear classifier of the whole image."""
    shape = (2, 16, 20) if dims == 2 else (2, 8, 10, 12)
    return Naive(LinearClassifier(shape), noise(*shape), [ClassScore(1)], SimpleInferer())


def segmentation(dims: int) -> Naive:
    """A convolution under overlapping windows of 8 voxels; the target is a box in a corner."""
    torch.manual_seed(3)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    net = conv(2, 3, 3, padding=1, bias=False).double().eval()
    shape = SEGMENTATION[dims]
    return Naive(net, noise(*shape), [Box(1, (1,) * dims, (4,) * dims)])


def linear_case(kind: str, dims: int) -> Naive:
    return (classification if kind == "classification" else segmentation)(dims)


def subject_of(case: Naive, method: Method | None = None, values: Tensor | None = None, **more) -> MetricInput:
    """A method's map of the first target; ``values`` in its place."""
    method = method or InputXGradient()
    if values is None:
        with frozen(case.net):
            values = run(method, case.objective).maps[0]
    dims = case.image.ndim - 1
    return MetricInput(values, case.objective, 0, method, spacing=(1.0,) * dims, **more)


def ranked(metric: Metric, case: Naive, **more) -> dict[str, float | None]:
    """The metric for the perfect map of a linear network (from baseline zero), the controls, and a zero map."""
    shared: dict = {}
    result = {"perfect": metric.update(subject_of(case, shared=shared, **more)).value}
    for control in controls():
        result[str(control.name)] = metric.update(subject_of(case, control, shared=shared, **more)).value
    zero = torch.zeros_like(case.image)
    result["zero"] = metric.update(subject_of(case, values=zero, shared=shared, **more)).value
    return result


def windowed(dims: int, output: str = "logit") -> Naive:
    shape = (2, 11, 15) if dims == 2 else (2, 9, 8, 12)
    targets = [MultiClassMask(1, output=output), Box(2, (1,) * dims, (5,) * dims, output=output)]
    return Naive(small(dims, 2), noise(*shape), targets)
