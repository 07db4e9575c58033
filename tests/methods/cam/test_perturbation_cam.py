"""Score-CAM and Ablation-CAM equal masking and switching channels off through MONAI's inferer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from esegeta_monai.errors import UsageError
from esegeta_monai.methods import (
    AblationCam,
    ScoreCam,
)
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.support.layers import flat, position_weights, setting
from tests.support.objectives import explain
from tests.support.tensors import DOUBLE, close


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
    result = explain(AblationCam(s.layer, relu=False), s.objective).maps[0]
    close(result, s.blend(weights))
    close(explain(AblationCam(s.layer, max_channels=1000, relu=False), s.objective).maps[0], result)


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
    result = explain(ScoreCam(s.layer, relu=False, baseline="zero"), s.objective).maps[0]
    close(result[0], torch.einsum("c,c...->...", weights, maps))

    share = position_weights(s).flatten()
    mean = (flat(a) * share).sum(1) / share.sum()
    variance = (flat(a) ** 2 * share).sum(1) / share.sum() - mean**2
    few = variance.topk(3).indices
    weights = torch.stack(values)[few].softmax(0)
    result = explain(ScoreCam(s.layer, relu=False, baseline="zero", max_channels=3), s.objective).maps[0]
    close(result[0], torch.einsum("c,c...->...", weights, maps[few]))


def test_max_channels_must_be_positive():
    with pytest.raises(UsageError, match="max_channels=0"):
        ScoreCam(max_channels=0)
