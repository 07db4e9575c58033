"""Class activation maps against naive hooks through MONAI's inferer, and Captum; more libraries in tests/peers."""

from __future__ import annotations

import pytest
import torch

from esegeta_monai import Explainer
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import (
    AblationCam,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    HiResCam,
    LayerCam,
    ScoreCam,
    XGradCam,
)
from esegeta_monai.targets import ClassScore
from tests.support.layers import flat, position_weights, setting
from tests.support.networks import pooled
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close

NAMES = ["UNet_batch", "UNet_instance", "SegResNet", "UNETR", "ViTAutoEnc", "ResNet18", "ViT"]


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_weighted_maps_equal_naive_whole_volume(name, dims):
    s = setting(name, dims)
    a, g = (flat(v) for v in s.pass_())
    share = position_weights(s).flatten()
    overlap = torch.Size(s.objective.plan.padded_shape).numel() / torch.Size(s.roi).numel()
    close(share.sum() / (len(share) / len(s.objective.plan)), torch.tensor(overlap, dtype=DOUBLE))

    positions = len(share) / len(s.objective.plan) * overlap
    close(explain(GradCam(s.layer), s.objective).maps[0], s.blend(g.sum(1) / positions).relu())

    alpha = g**2 / (2 * g**2 + g**3 * (a * share).sum(1, keepdim=True))
    weights = (alpha.nan_to_num() * g.relu()).sum(1)
    close(explain(GradCamPlusPlus(s.layer, relu=False), s.objective).maps[0], s.blend(weights))

    weights = (a * g).sum(1) / (a * share).sum(1)
    close(explain(XGradCam(s.layer, relu=False), s.objective).maps[0], s.blend(weights.nan_to_num()), 1e-8)

    direction = torch.linalg.svd(a * share.sqrt(), full_matrices=False).U[:, 0]
    result = explain(EigenCam(s.layer, relu=False), s.objective).maps[0]
    naive = s.blend(direction)
    close(result, naive if (naive * result).sum() > 0 else -naive, 1e-8)
    assert float(direction @ (a * share).sum(1)) * float((naive * result).sum()) > 0


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_scattered_maps_equal_naive_whole_volume(name, dims):
    s = setting(name, dims)
    a, g = s.pass_()
    result = explain(HiResCam(s.layer, relu=False), s.objective).maps[0]
    close(result, s.scatter((a * g).sum(1, keepdim=True)))
    close(result.sum(), (a * g).sum())
    close(explain(HiResCam(s.layer), s.objective).maps[0], s.scatter((a * g).sum(1, keepdim=True)).relu())
    close(explain(LayerCam(s.layer, relu=False), s.objective).maps[0], s.scatter((a * g.relu()).sum(1, keepdim=True)))


METHODS = [GradCam, GradCamPlusPlus, XGradCam, EigenCam, HiResCam, LayerCam, ScoreCam, AblationCam]


@pytest.mark.parametrize("method", METHODS)
def test_wrong_layers_are_named(method):
    network, image = pooled(2)
    objective = objective_of(network, image[0], [ClassScore(1)])
    with pytest.raises(MethodError, match="no spatial map"):
        explain(method("head"), objective)
    with pytest.raises(UsageError, match=r"near matches: features"):
        explain(method("feature"), objective)
    with pytest.raises(UsageError, match="dotted name"):
        method([])
    with pytest.raises(UsageError, match="layer=''"):
        explain(method(""), objective)


def test_zero_gradients_are_recorded_as_zero():
    network, image = pooled(2)
    network.head.weight.data.zero_()
    (result,) = Explainer(network)(image, [GradCam("features.2")], [ClassScore(1)])
    assert result.status == "zero"
