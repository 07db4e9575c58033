"""SMOE scale: the formula on hooks through MONAI's inferer, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from esegeta_monai.methods import SmoeScale
from esegeta_monai.targets import ClassScore
from tests.support.layers import UP, setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", ["UNet_batch", "SegResNet"])
def test_equals_the_formula_blended_by_monais_inferer(name, dims):
    s = setting(name, dims)

    def statistic(x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        handle = s.network.get_submodule(s.layer).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
        s.model(x)
        handle.remove()
        values = np.maximum(s.as_map(kept[0]).numpy(), 0) + 1e-7
        arithmetic, geometric = values.mean(1), np.exp(np.log(values).mean(1))
        scale = torch.from_numpy(arithmetic * np.log2(arithmetic / geometric))[:, None]
        return F.interpolate(scale, size=s.roi, mode=UP[dims])

    with torch.no_grad():
        expected = s.inferer(s.image[None], statistic)[0]
    explained = explain(SmoeScale(s.layer), s.objective)
    close(explained.maps[0], expected)
    assert float(explained.maps.min()) >= 0


def test_zero_where_all_channels_agree_and_for_every_target_the_same():
    network, image = plain(2)
    with torch.no_grad():
        network.first.weight[:] = network.first.weight[:1]
        network.first.bias[:] = network.first.bias[:1]
    o = objective_of(network, image[0], [ClassScore(0), ClassScore(1)])
    maps = explain(SmoeScale("act"), o).maps
    assert float(maps.abs().max()) < 1e-14
    maps = explain(SmoeScale(["act", "then"]), o).maps
    assert maps.shape[:2] == (2, 2)
    assert torch.equal(maps[0], maps[1])
    assert float(maps[0, 1].max()) > 0.01
