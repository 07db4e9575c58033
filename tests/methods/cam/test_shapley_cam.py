"""ShapleyCam: weights from the whole Hessian of the network above the layer, and Seg-XRes-CAM from pooled gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import GradCam, HiResCam, LayerGradCam, SegXResCam, ShapleyCam
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import setting
from tests.support.networks import CONV, plain
from tests.support.objectives import explain, objective_of
from tests.support.tensors import close


class Curved(nn.Module):
    """A classifier that is not piecewise linear above ``act``."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        torch.manual_seed(dims)
        self.first, self.act = CONV[dims](1, 3, 3, padding=1), nn.ReLU()
        self.second, self.head = CONV[dims](3, 4, 3, padding=1), nn.Linear(4, 3)

    def above(self, a: Tensor) -> Tensor:
        return self.head(F.silu(self.second(a)).flatten(2).mean(2) ** 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.act(self.first(x)))


@pytest.mark.parametrize("dims", [2, 3])
def test_equals_the_dense_hessian(dims):
    network, image = Curved(dims).double().eval(), torch.randn(1, 1, *[4] * dims, dtype=torch.float64)
    o = objective_of(network, image[0], [ClassScore(1), ClassScore(2)])
    a = network.act(network.first(image)).detach()
    result = explain(ShapleyCam("act", relu=False), o).maps
    for k, cls in enumerate((1, 2)):

        def score(flat: Tensor, cls: int = cls) -> Tensor:
            return network.above(flat.reshape(a.shape))[0, cls]

        gradient = torch.autograd.functional.jacobian(score, a.flatten())
        hessian = torch.autograd.functional.hessian(score, a.flatten())
        weights = (gradient - hessian @ a.flatten() / 2).reshape(a.shape)
        expected = (weights.mean(tuple(range(2, 2 + dims)), keepdim=True) * a).sum(1)
        close(result[k], expected)
    plain_cam = explain(GradCam("act", relu=False), o).maps
    assert float((result - plain_cam).abs().max()) > 0.05 * float(plain_cam.abs().max())


def test_is_grad_cam_above_rectifiers():
    network, image = plain(2)
    o = objective_of(network, image[0], [ClassScore(1)])
    close(explain(ShapleyCam("act"), o).maps, explain(GradCam("act"), o).maps)


@pytest.mark.parametrize("name", ["UNet_instance", "ViTAutoEnc"])
def test_windows_equal_double_backward_through_the_inferer(name):
    s = setting(name)
    kept: list[Tensor] = []
    handle = s.network.get_submodule(s.layer).register_forward_hook(lambda m, i, o: kept.append(o) or o.clone())
    prediction = s.inferer(s.image[None].clone().requires_grad_(True), s.model)[0]
    handle.remove()
    score = s.objective.scores[0]
    gradients = torch.autograd.grad(score.value(score.crop(prediction)), kept, create_graph=True)
    products = torch.autograd.grad(gradients, kept, [a.detach() for a in kept])
    second = torch.cat([g.detach() - h / 2 for g, h in zip(gradients, products)])
    values = s.as_map(second)
    positions = values[0, 0].numel() * s.image[0].numel() / torch.Size(s.roi).numel()
    expected = s.blend(values.movedim(1, 0).flatten(1).sum(1) / positions)
    close(explain(ShapleyCam(s.layer, relu=False), s.objective).maps[0], expected, 1e-8)


def test_scores_that_are_not_linear_are_refused():
    s = setting("UNet_batch", target=MultiClassMask(1, output="probability"))
    target = MultiClassMask(1, output="probability")
    with pytest.raises(MethodError, match="output='logit'"):
        list(Explainer(s.network, s.inferer)(s.image[None], [ShapleyCam()], [target]))


@pytest.mark.parametrize(("dims", "block", "pooling"), [(2, 2, "max"), (2, 3, "mean"), (3, 2, "mean"), (3, 3, "max")])
def test_pooled_gradients_equal_loops_over_blocks(dims, block, pooling):
    s = setting("UNet_batch", dims)
    a, g = s.pass_()
    pooled = torch.zeros_like(g)
    for start in torch.cartesian_prod(*(torch.arange(0, n, block) for n in g.shape[2:])).reshape(-1, dims).tolist():
        place = (slice(None), slice(None), *(slice(i, i + block) for i in start))
        flat = g[place].flatten(2)
        value = flat.amax(2) if pooling == "max" else flat.mean(2)
        pooled[place] = value.reshape(*value.shape, *[1] * dims)
    result = explain(SegXResCam(s.layer, relu=False, block=block, pooling=pooling), s.objective).maps[0]
    close(result, s.scatter((a * pooled).sum(1, keepdim=True)))


def test_its_limits_are_other_maps():
    s = setting("SegResNet")
    close(explain(SegXResCam(s.layer, block=1), s.objective).maps, explain(HiResCam(s.layer), s.objective).maps)
    network, image = plain(2)
    o = objective_of(network, image[0], [ClassScore(1)])
    close(explain(SegXResCam("act", False, 6, "mean"), o).maps, explain(LayerGradCam("act"), o).maps)
    for bad in ({"block": 0}, {"pooling": "sum"}):
        with pytest.raises(UsageError):
            SegXResCam(**bad)
    with pytest.raises(MethodError, match="no spatial map"):
        explain(ShapleyCam("head"), o)
