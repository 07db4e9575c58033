"""Cases of a batch: images, further inputs and conditions of each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from esegeta_monai import Explainer
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.methods import (
    GradCam,
    IntegratedGradients,
    Saliency,
)
from esegeta_monai.targets import MultiClassMask, ThresholdMask
from tests.explain.support import RECORDED, SLIDING, Spy, autograd, image, only


def test_a_batch_is_explained_case_by_case() -> None:
    explainer, x = Explainer(Spy(), SLIDING), image(3)
    together = list(explainer(x, [Saliency(), GradCam()], [MultiClassMask(1)]))
    assert [a.case for a in together] == [0, 0, 1, 1, 2, 2]
    for i in range(3):
        for a, b in zip(together[2 * i : 2 * i + 2], explainer(x[i : i + 1], "Saliency,GradCam", "MultiClassMask(1)")):
            assert torch.equal(a.map, b.map)


def test_a_batch_of_metatensors_keeps_each_place() -> None:
    singles = [MetaTensor(image()[0], affine=torch.diag(torch.tensor([s, s, s, 1.0]))) for s in (1.0, 2.0)]
    from monai.data import list_data_collate

    batch = list_data_collate([{"image": s} for s in singles])["image"]
    result = list(Explainer(Spy(), SLIDING)(batch, [Saliency()], [MultiClassMask(1)]))
    assert [float(a.map.affine[0, 0]) for a in result] == [1.0, 2.0]


def test_a_bad_case_leaves_the_others() -> None:
    x = image(3)
    x[1, 0, 3, 3, 3] = torch.nan
    explainer = Explainer(Spy(), SLIDING, on_error="record")
    result = list(explainer(x, [Saliency(), GradCam()], [MultiClassMask(1)]))
    assert [(a.case, a.status) for a in result] == [
        *[(0, "ok")] * 2,
        *[(1, "failed")] * 2,
        *[(2, "ok")] * 2,
    ]
    assert "NaN" in result[2].record["reason"]
    assert isinstance(result[2].error, InputError)
    assert set(result[2].record) >= RECORDED
    with pytest.raises(InputError, match="image 1: 1 of 1728 voxels are NaN"):
        list(Explainer(Spy(), SLIDING)(x, [Saliency()], [MultiClassMask(1)]))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Spy(channels=3)

    def forward(self, x: Tensor, *, pet: Tensor) -> Tensor:
        return self.net(torch.cat([x, 2 * pet], 1))


def test_several_image_inputs_get_a_map_each() -> None:
    network, mr, pet = TwoInputs(), image(1, 2), image(1, 1) + 0.5
    explainer = Explainer(network, SLIDING)
    result = list(explainer({"mr": mr, "pet": pet}, [Saliency(abs=False), GradCam()], [MultiClassMask(1)]))
    assert [(a.method.name, a.input) for a in result] == [("Saliency", "mr"), ("Saliency", "pet"), ("GradCam", None)]
    a, b = mr.clone().requires_grad_(True), pet.clone().requires_grad_(True)
    joined = SLIDING(torch.cat([a, b], 1), lambda x: network(x[:, :2], pet=x[:, 2:]))
    score = joined[0, 1][joined[0].argmax(0) == 1].sum()
    for attribution, expected in zip(result, torch.autograd.grad(score, [a, b])):
        assert attribution.map.shape == expected[0].shape
        assert (attribution.map.as_tensor() - expected[0]).abs().max() < 1e-5 * expected.abs().max()
    with pytest.raises(InputError, match="'pet' has shape"):
        list(explainer({"mr": mr, "pet": pet[..., :6]}, [Saliency()], [MultiClassMask(1)]))


class WithMore(Spy):
    """Further inputs: one per case, one for all, and MONAI's condition volume."""

    def forward(self, x: Tensor, scale: Any = 1.0, *, shift: Any = 0.0, condition: Tensor | None = None) -> Tensor:
        out = super().forward(x) * scale + shift
        return out if condition is None else out * condition


def test_network_args_and_kwargs_are_passed_through() -> None:
    x, scale, shift = image(2), torch.tensor([[2.0], [3.0]]).reshape(2, 1, 1, 1, 1), torch.tensor(0.25)
    explainer = Explainer(WithMore(), SimpleInferer())
    more = {"network_args": [scale], "network_kwargs": {"shift": shift}}
    result = list(explainer(x, [Saliency(abs=False), IntegratedGradients(n_steps=3)], [MultiClassMask(1)], **more))
    for a in result[::2]:
        i = a.case
        expected = autograd(WithMore(), x[i : i + 1], lambda z, net, i=i: net(z, scale[i], shift=shift), 1)
        assert (a.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_condition_is_cut_to_the_windows_as_monai_does() -> None:
    x, condition = image(), image(1, 1) + 0.5
    network = WithMore()
    explainer = Explainer(network, SLIDING)
    result = only(explainer(x, [Saliency(abs=False)], [MultiClassMask(1)], network_kwargs={"condition": condition}))
    inferer = lambda z, net: SLIDING(z, net, condition=condition)  # noqa: E731
    expected = autograd(network, x, inferer, 1)
    assert (result.map.as_tensor() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert result.record["blend_deviation"] < 1e-6


class Inflated(nn.Module):
    """2D images in, 3D convolutions inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x[:, :, None])[:, :, 0]


@pytest.mark.parametrize("given", [False, True])
def test_a_volume_without_its_batch_axis_is_refused(given: bool) -> None:
    """torch takes it for one image without a batch: the map had the volume's first axis for channels."""
    network, image = nn.Conv3d(1, 1, 3, padding=1), torch.rand(1, 6, 6, 6)
    prediction = network(image).detach() if given else None
    target = ThresholdMask(-100.0, 0, value="raw")
    with pytest.raises(InputError, match=r"has shape \(6, 6, 6\).*convolutions are 3D.*EnsureChannelFirstd"):
        list(Explainer(network)(image, [Saliency()], [target], prediction=prediction))
    assert not network._forward_pre_hooks
    (result,) = Explainer(network)(image[None], [Saliency()], [target])
    assert tuple(result.map.shape) == (1, 6, 6, 6)
    (flat,) = Explainer(inflated := Inflated())(torch.rand(1, 1, 6, 6), [Saliency()], [ThresholdMask(-100.0, 0)])
    assert tuple(flat.map.shape) == (1, 6, 6)
    assert not inflated.conv._forward_pre_hooks


def test_data_of_another_length_is_refused() -> None:
    with pytest.raises(UsageError, match="data has 1 entries for 2 images"):
        list(Explainer(Spy(), SLIDING)(image(2), [Saliency()], [MultiClassMask(1)], data=[{}]))
