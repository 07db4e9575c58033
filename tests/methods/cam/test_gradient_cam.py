"""Class activation maps against naive hooks through MONAI's inferer, and Captum; more libraries in tests/peers."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import (
    AblationCam,
    Cam,
    EigenCam,
    GradCam,
    GradCamPlusPlus,
    GuidedBackprop,
    GuidedGradCam,
    HiResCam,
    LayerCam,
    Saliency,
    ScoreCam,
    XGradCam,
    run_together,
)
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import setting
from tests.support.objectives import explain, objective_of
from tests.support.tensors import DOUBLE, close

NAMES = ["UNet_batch", "UNet_instance", "SegResNet", "UNETR", "ViTAutoEnc", "ResNet18", "ViT"]


def position_weights(s) -> Tensor:
    """ĝ_w averaged over each position's cell, (W, *positions), from MONAI's importance map."""
    plan, (activations, _) = s.objective.plan, s.pass_()
    grid = activations.shape[2:]
    if plan.whole:
        return torch.ones(1, *grid, dtype=DOUBLE)
    count = torch.zeros(plan.padded_shape, dtype=DOUBLE)
    for place in plan.slices:
        count[place] += plan.importance
    cells = [n // g for n, g in zip(plan.roi, grid)]
    pool = {2: F.avg_pool2d, 3: F.avg_pool3d}[len(grid)]
    return torch.stack([pool((plan.importance / count[p])[None], cells)[0] for p in plan.slices])


def flat(values: Tensor) -> Tensor:
    return values.movedim(1, 0).flatten(1)


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
    found = explain(EigenCam(s.layer, relu=False), s.objective).maps[0]
    naive = s.blend(direction)
    close(found, naive if (naive * found).sum() > 0 else -naive, 1e-8)
    assert float(direction @ (a * share).sum(1)) * float((naive * found).sum()) > 0


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_scattered_maps_equal_naive_whole_volume(name, dims):
    s = setting(name, dims)
    a, g = s.pass_()
    found = explain(HiResCam(s.layer, relu=False), s.objective).maps[0]
    close(found, s.scatter((a * g).sum(1, keepdim=True)))
    close(found.sum(), (a * g).sum())
    close(explain(HiResCam(s.layer), s.objective).maps[0], s.scatter((a * g).sum(1, keepdim=True)).relu())
    close(explain(LayerCam(s.layer, relu=False), s.objective).maps[0], s.scatter((a * g.relu()).sum(1, keepdim=True)))


@pytest.mark.parametrize("name", ["UNet_batch", "UNet_instance", "ViTAutoEnc", "ResNet18"])
def test_ablation_equals_switching_channels_off_in_the_inferer(name):
    s = setting(name)
    score = s.objective.scores[0]

    def value() -> Tensor:
        with torch.no_grad():
            return score.value(score.crop(s.inferer(s.image[None], s.model)[0]))

    whole, weights = value(), []
    last = name == "ViTAutoEnc"
    for c in range(s.pass_()[0].shape[1]):

        def off(module, args, out, c=c):
            out = out.clone()
            out.select(-1 if last else 1, c).zero_()
            return out

        handle = s.network.get_submodule(s.layer).register_forward_hook(off)
        weights.append((whole - value()) / whole.abs())
        handle.remove()
    weights = torch.stack(weights)
    found = explain(AblationCam(s.layer, relu=False), s.objective).maps[0]
    close(found, s.blend(weights))
    close(explain(AblationCam(s.layer, max_channels=1000, relu=False), s.objective).maps[0], found)


@pytest.mark.parametrize(("name", "output"), [("UNet_batch", "logit"), ("UNet_instance", "probability"),
                                              ("ResNet18", "logit"), ("ViT", "probability")])  # fmt: skip
def test_score_cam_equals_masking_the_volume(name, output):
    target = ClassScore(1, output=output) if name in ("ResNet18", "ViT") else MultiClassMask(1, output=output)
    s = setting(name, target=target)
    score, (a, _) = s.objective.scores[0], s.pass_()
    maps = s.blend(torch.eye(a.shape[1], dtype=DOUBLE))
    values = []
    with torch.no_grad():
        for m in maps:
            mask = (m - m.min()) / (m.max() - m.min())
            values.append(score.value(score.crop(s.inferer((s.image * mask)[None], s.model)[0])) / score.voxels)
    weights = torch.stack(values).softmax(0)
    found = explain(ScoreCam(s.layer, relu=False, baseline="zero"), s.objective).maps[0]
    close(found[0], torch.einsum("c,c...->...", weights, maps))

    share = position_weights(s).flatten()
    mean = (flat(a) * share).sum(1) / share.sum()
    variance = (flat(a) ** 2 * share).sum(1) / share.sum() - mean**2
    few = variance.topk(3).indices
    weights = torch.stack(values)[few].softmax(0)
    found = explain(ScoreCam(s.layer, relu=False, baseline="zero", max_channels=3), s.objective).maps[0]
    close(found[0], torch.einsum("c,c...->...", weights, maps[few]))


class Pooled(nn.Module):
    """Convolutions, global average pooling, one linear layer."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.features = nn.Sequential(conv(1, 5, 3, 2, 1), nn.ReLU(), conv(5, 6, 3, 2, 1), nn.ReLU(inplace=True))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(2).mean(2))


def pooled(dims: int) -> tuple[Pooled, Tensor]:
    torch.manual_seed(dims)
    return Pooled(dims).double().eval(), torch.randn(1, 1, *[16] * dims, dtype=DOUBLE)


def for_others(dims: int) -> tuple[Pooled, Tensor]:
    """For libraries that cannot do in-place activations, and that take ReLU before they interpolate: a positive map."""
    network, image = pooled(dims)
    network.features[3] = nn.ReLU()
    network.head.weight.data.abs_()
    return network, image


@pytest.mark.parametrize("dims", [2, 3])
def test_guided_grad_cam_is_the_product_and_equals_captum(dims):
    network, image = for_others(dims)
    objective = objective_of(network, image[0], [ClassScore(1)])
    found = explain(GuidedGradCam("features.3"), objective).maps
    close(found, explain(GradCam("features.3"), objective).maps * explain(GuidedBackprop(), objective).maps)
    theirs = captum.attr.GuidedGradCam(network, network.features[3])
    up = {2: "bilinear", 3: "trilinear"}[dims]
    close(found, theirs.attribute(image.clone(), target=1, interpolate_mode=up).detach())


@pytest.mark.parametrize(
    ("name", "dims"),
    [
        *[("pooled", 2), ("pooled", 3), ("ResNet18", 2), ("ResNet18", 3)],
        *[("SEResNet50", 3), ("DenseNet121", 2), ("EfficientNet", 2)],
    ],
)
def test_cam_mean_plus_bias_is_the_logit(name, dims):
    if name == "pooled":
        network, image = pooled(dims)
    else:
        s = setting(name, dims)
        network, image = s.network, s.image[None]
        image = F.interpolate(image, scale_factor=2 if image.shape[-1] > 16 else 3)  # else one position is pooled
    objective = objective_of(network, image[0], [ClassScore(1), ClassScore(2)])
    found = explain(Cam(), objective)
    layer = found.notes["layer"]
    kept: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda m, i, o: kept.append(o.clone()))
    logits = network(image)[0].detach()
    handle.remove()
    head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    small = torch.einsum("kc,nc...->nk...", head.weight[1:].detach(), kept[-1].detach())
    close(small.flatten(2).mean(2)[0] + head.bias[1:].detach(), logits[1:])
    up = {2: "bilinear", 3: "trilinear"}[dims]
    close(found.maps[:, 0], F.interpolate(small, image.shape[2:], mode=up)[0])


def test_cam_refuses_a_network_without_pooling():
    s = setting("UNet_batch")
    with pytest.raises(MethodError, match="global average pooling"):
        explain(Cam(), s.objective)
    s = setting("ViT")
    with pytest.raises(MethodError, match="GradCam"):
        explain(Cam(), s.objective)
    network, image = pooled(2)
    with pytest.raises(MethodError, match=r"features\.0"):
        explain(Cam("features.0"), objective_of(network, image[0], [ClassScore(1)]))


def test_a_list_of_layers_gives_a_channel_each_in_the_same_passes():
    s = setting("UNet_batch")
    other = "model.1.submodule.0"
    one, two = (explain(GradCam(layer), s.objective).maps for layer in (s.layer, other))
    before = s.objective.monitor.passes
    both = explain(GradCam([s.layer, other]), s.objective)
    assert s.objective.monitor.passes - before == len(s.objective.windows) + len(s.objective.plan)
    close(both.maps, torch.cat([one, two], 1))
    assert both.note(0)["layer"] == (s.layer, other)


def test_methods_share_their_passes():
    s = setting("UNet_batch")
    methods = [GradCam(s.layer), HiResCam(s.layer), LayerCam(s.layer), XGradCam(s.layer), GradCamPlusPlus(s.layer)]
    alone = [explain(m, s.objective).maps for m in methods]
    before = s.objective.monitor.passes
    with frozen(s.network):
        together = run_together(methods, s.objective)
    windows = len(s.objective.plan)
    assert s.objective.monitor.passes - before == 3 * windows
    for i, maps in enumerate(alone):
        close(together[i].maps, maps)


def test_gradients_wait_for_the_one_that_comes_later():
    """Grad-CAM++ looks at activations before it asks for gradients: one backward pass a window serves all."""
    s = setting("UNet_batch")
    methods = [Saliency(), GradCam(s.layer), EigenCam(s.layer), GradCamPlusPlus(s.layer)]
    alone = [explain(m, s.objective).maps for m in methods]
    backward = []
    vjp = s.objective.vjp

    def counted(out: Tensor, *args: Any, **kwargs: Any) -> Any:
        backward.append(len(out))
        return vjp(out, *args, **kwargs)

    s.objective.vjp = counted
    before = s.objective.monitor.passes
    with frozen(s.network):
        together = run_together(methods, s.objective)
    assert s.objective.monitor.passes - before == 3 * len(s.objective.plan)
    assert sum(backward) == len(s.objective.windows) * s.objective.n_targets
    for i, maps in enumerate(alone):
        close(together[i].maps, maps)


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
    (found,) = Explainer(network)(image, [GradCam("features.2")], [ClassScore(1)])
    assert found.status == "zero"


def test_max_channels_must_be_positive():
    with pytest.raises(UsageError, match="max_channels=0"):
        ScoreCam(max_channels=0)
