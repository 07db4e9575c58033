"""Features of a layer replaced: equal to Captum on one window, and to hooks through MONAI's inferer."""

from __future__ import annotations

import captum.attr
import pytest
import torch
from torch import Tensor

from esegeta_monai.engine.feature_masks import Grid
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import LayerFeatureAblation, LayerFeaturePermutation
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import Setting, setting
from tests.support.networks import plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_captum(dims):
    network, image = plain(dims)
    objective = objective_of(network, image[0], [ClassScore(1)])
    method = captum.attr.LayerFeatureAblation(network, network.act)
    given = {"target": 1, "layer_baselines": 0.3}
    channels = torch.arange(4).reshape(1, 4, *[1] * dims).expand(1, 4, *[6] * dims)
    expected = method.attribute(image, layer_mask=channels, **given)
    close(explain(LayerFeatureAblation("act", "channels", 0.3), objective).maps, expected.detach())
    regions = Grid(3).of(objective)
    expected = method.attribute(image, layer_mask=regions.labels[None].expand(1, 4, *[6] * dims), **given)
    explained = explain(LayerFeatureAblation("act", "grid(size=3)", 0.3), objective)
    close(explained.maps, expected[:, :1].detach())
    assert [row["feature"] for row in explained.notes["features"][0]] == regions.names

    at_input = captum.attr.LayerFeatureAblation(network, network.second)
    expected = at_input.attribute(image, layer_mask=channels, attribute_to_layer_input=True, **given)
    close(explain(LayerFeatureAblation("second:input", "channels", 0.3), objective).maps, expected.detach())


def test_exchange_equals_captum():
    """With two cases, a permutation that exchanges them gives each the other's feature."""
    network, image = plain(2)
    other = torch.randn_like(image)
    objective = objective_of(network, image[0], [ClassScore(1)])
    method = captum.attr.LayerFeaturePermutation(lambda x: network(x)[:, 1], network.act)
    method.perm_func = lambda x, mask: torch.where(mask, x.flip(0), x)
    channels = torch.arange(4).reshape(1, 4, 1, 1).expand(1, 4, 6, 6)
    expected = method.attribute(torch.cat([image, other]), layer_mask=channels)[:1]
    result = explain(LayerFeaturePermutation("act", "channels", cases=[other[0], other[0]]), objective)
    close(result.maps, expected.detach())
    assert max(row["standard_deviation"] for row in result.notes["features"][0]) == 0


def _value(s: Setting, edit) -> Tensor:
    """F where ``edit`` changes the layer's output in each window, by MONAI's inferer."""
    starts = [tuple(p.start for p in place) for place in s.objective.plan.slices]
    count = 0

    def hook(module: object, args: object, out: Tensor) -> Tensor:
        nonlocal count
        rows = out.clone()
        for row in rows:
            edit(row, starts[count])
            count += 1
        return rows

    handle = s.network.get_submodule(s.layer).register_forward_hook(hook)
    with torch.no_grad():
        prediction = s.inferer(s.image[None], s.model)[0]
    handle.remove()
    score = s.objective.scores[0]
    return score.value(score.crop(prediction))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("output", ["logit", "probability"])
def test_regions_through_windows_equal_hooks_through_the_inferer(dims, output):
    s = setting("UNet_batch", dims, MultiClassMask(1, output=output))
    labels = Grid(size=8).of(s.objective).labels[0]
    whole = _value(s, lambda row, start: None)
    result = explain(LayerFeatureAblation(s.layer, "grid(size=8)", 0.5), s.objective)
    assert result.notes["n_features"] > 3
    for feature in range(result.notes["n_features"]):

        def edit(row: Tensor, start: tuple[int, ...], feature: int = feature) -> None:
            cells = row.shape[1:]
            for at in torch.cartesian_prod(*map(torch.arange, cells)).reshape(-1, dims).tolist():
                centre = tuple(a + int((i + 0.5) * n / p) for a, i, n, p in zip(start, at, s.roi, cells))
                if labels[centre] == feature:
                    row[(slice(None), *at)] = 0.5

        voxel = tuple((labels == feature).nonzero()[0].tolist())
        close(result.maps[0, 0][voxel], whole - _value(s, edit), 1e-9)


def test_channels_of_other_cases_through_windows():
    s = setting("SegResNet")
    others = [s.image.flip(-1), s.image / 2]
    kept: list[list[Tensor]] = []
    for other in others:
        module, rows = s.network.get_submodule(s.layer), []
        handle = module.register_forward_hook(lambda m, a, out, rows=rows: rows.extend(out.clone()))
        with torch.no_grad():
            s.inferer(other[None], s.model)
        handle.remove()
        kept.append(rows)
    whole, channel = _value(s, lambda row, start: None), 2
    values = []
    for rows in kept:
        queue = iter(rows)

        def edit(row: Tensor, start: tuple[int, ...], queue=queue) -> None:
            row[channel] = next(queue)[channel]

        values.append(whole - _value(s, edit))
    result = explain(LayerFeaturePermutation(s.layer, "channels", cases=others), s.objective)
    close(result.maps[0, channel].mean(), torch.stack(values).mean(), 1e-9)
    close(torch.tensor(result.notes["features"][0][channel]["standard_deviation"]), torch.stack(values).std(), 1e-6)


def test_bad_input():
    network, image = plain(2)
    objective = objective_of(network, image[0], [ClassScore(1)])
    with pytest.raises(MethodError, match="regions of single image channels"):
        explain(LayerFeatureAblation("act", "grid(size=3, per_channel=True)"), objective)
    with pytest.raises(MethodError, match="no spatial map"):
        explain(LayerFeatureAblation("head", "channels"), objective)
    with pytest.raises(UsageError, match="at least two"):
        LayerFeaturePermutation("act", cases=[image[0]])
