"""A block planted at one end of the volume: every layer map has its centroid there, with and without mirrored views."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.batch import Batch
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.methods.base import METHODS
from tests.explain.test_ensemble import Uneven
from tests.support.networks import ELSEWHERE

CELL = 4
SHAPE = (32, 16)
ENDS = [((0, 4), (8, 8)), ((24, 0), (32, 4))]
"""Corners of the block: its first voxel, and the voxel after its last one."""


def layer_methods() -> list[str]:
    """Return all layer methods for a segmentation network (`Cam` reads the head of a classifier)."""
    texts = []
    for method in METHODS:
        if method.produces not in ("layer map", "activation") or method.__name__ == "Cam":
            continue
        if method.__name__ in (*ELSEWHERE, "LayerFeatureAblation", "LayerFeaturePermutation"):  # attention; wide boxes
            continue
        names = {field.name for field in dataclasses.fields(method)}
        more = "".join(
            f", {text}" for name, text in (("baseline", "baseline=0.0"), ("std", "std=0.0")) if name in names
        )
        more += ", reduce='sum'" if "reduce" in names else ""
        texts.append(f"{method.__name__}(layer='1'{more})")
    return texts


def cells() -> list[nn.Module]:
    """Networks whose layer ``1`` has a position for each cell of 4 x 4 voxels and sees nothing else."""
    members = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(1, 3, CELL, CELL), nn.ReLU(), nn.ConvTranspose2d(3, 2, CELL, CELL)).double()
        for parameter in network.parameters():
            parameter.data = parameter.data.abs() if parameter.ndim > 1 else torch.zeros_like(parameter)
        members.append(network.eval())
    return members


def centroid(values: Tensor) -> Tensor:
    weights = values.abs().sum(0)
    grid = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in weights.shape), indexing="ij"))
    return (grid * weights).flatten(1).sum(1) / weights.sum()


def maps(axes: tuple[int, ...], around: bool, end: Any, methods: list[str]) -> list[Any]:
    start, stop = end
    image = torch.zeros(1, 1, *SHAPE, dtype=torch.float64)
    image[..., start[0] : stop[0], start[1] : stop[1]] = 1 + torch.rand(
        8, 4, generator=torch.Generator().manual_seed(0)
    )
    uneven = Uneven((16, 8), [(a, b) for a in (0, 4, 16) for b in (0, 8)])
    inferer = SlidingWindowInferer((16, 8), 2, 0.5, "gaussian") if around else uneven
    members = cells()
    explainer = Explainer(members[0], EnsembleInferer(inferer, members, axes, around=around))
    return list(explainer(image, methods, [f"Box(1, {start}, {stop})"]))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("axes", "around"), [((), False), ((0, 1), False), ((0, 1), True)])
def test_every_layer_map_lies_at_the_block(axes: tuple[int, ...], around: bool, end: Any) -> None:
    methods = layer_methods()
    assert len(methods) >= 18
    truth = torch.tensor([(a + b - 1) / 2 for a, b in zip(*end)], dtype=torch.float64)
    for attribution in maps(axes, around, end, methods):
        away = (centroid(attribution.map.as_tensor()) - truth).abs().max()
        assert float(away) <= CELL / 2, (attribution.method, float(away))


def test_maps_that_are_not_mirrored_back_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Batch, "unmirrored", lambda self, values: values)
    truth = torch.tensor([3.5, 5.5], dtype=torch.float64)
    for attribution in maps((0,), False, ENDS[0], ["LayerActivation('1', reduce='sum')", "HiResCam('1')"]):
        assert float((centroid(attribution.map.as_tensor()) - truth).abs().max()) > CELL / 2
