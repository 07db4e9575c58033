"""A real network and a real scan that are not ours: the brain U-Net on a whole head, seen in slices only."""

from __future__ import annotations

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Compose, LoadImage, Orientation, ResizeWithPadOrCrop, Spacing

from esegeta_monai import Explainer
from esegeta_monai.methods import GradCam, GuidedBackprop, InputXGradient, Saliency
from esegeta_monai.targets import MultiClassMask
from tests.support import real

pytestmark = [real.needs_real_data, pytest.mark.slow]


def head() -> MetaTensor:
    """The head as the network was trained: RAS, 4 mm, z-scores over the voxels above the mean."""
    steps = [LoadImage(image_only=True, ensure_channel_first=True), Orientation("RAS", labels=None)]
    image = Compose([*steps, Spacing((4, 4, 4)), ResizeWithPadOrCrop((48, 60, 48))])(
        real.image("t1_head_1.75mm.nii.gz")
    )
    inside = image[image > image.mean()]
    return (image - inside.mean()) / inside.std()


def test_every_map_is_in_the_brain():
    network, image = real.brain_unet(), head()
    inferer = SlidingWindowInferer((48, 48, 48), 2, 0.5, "gaussian")
    explainer = Explainer(network, inferer, class_names={1: "brain"})
    with torch.no_grad():
        brain = inferer(image[None].as_tensor(), network)[0].argmax(0) == 1
    assert 1.1 < float(brain.sum()) * 4**3 / 1e6 < 1.7  # litres
    methods = [Saliency(), InputXGradient(), GradCam(), GuidedBackprop()]
    share = {}
    for result in explainer(image[None], methods, [MultiClassMask("brain")]):
        assert result.status == "ok"
        assert result.record["blend_deviation"] < 1e-5
        strength = result.map.as_tensor().abs().sum(0)
        share[result.method.name] = float((strength * brain).sum() / strength.sum())
    by_chance = float(brain.float().mean())
    assert share["GradCam"] > 0.9
    assert all(s > 1.3 * by_chance for s in share.values()), (share, by_chance)


def test_gradient_equals_autograd_through_the_inferer():
    network, image = real.brain_unet(), head()
    inferer = SlidingWindowInferer((48, 48, 48), 2, 0.5, "gaussian")
    (result,) = Explainer(network, inferer)(image[None], [Saliency(abs=False)], [MultiClassMask(1)])
    x = image[None].as_tensor().clone().requires_grad_(True)
    prediction = inferer(x, network)[0]
    (reference,) = torch.autograd.grad((prediction[1] * (prediction.argmax(0) == 1)).sum(), x)
    assert float((result.map.as_tensor() - reference[0]).abs().max() / reference.abs().max()) <= 1e-5
