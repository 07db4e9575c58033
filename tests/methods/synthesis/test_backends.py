"""The 2D back-ends against the packages themselves, called on a plain network with autograd through all of it."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer, SlidingWindowInferer
from torch import Tensor, nn

from esegeta_monai.errors import MethodError, UsageError
from esegeta_monai.methods import ExtremalPerturbation, FeatureVisualization
from esegeta_monai.methods.synthesis.backends import _Scene
from esegeta_monai.targets import ClassScore, MultiClassMask
from tests.methods.synthesis.test_visualization import explained
from tests.support.networks import small
from tests.support.objectives import Naive
from tests.support.tensors import assert_equal, noise


def missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


class Classifier(nn.Module):
    """Sees where a 32x40 image is bright, in its upper left quarter most."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return 10 * self.linear(torch.relu(self.conv(x))[..., :16, :20].mean((2, 3)))


def classified() -> Naive:
    image = noise(1, 32, 40).float().abs()
    image[:, 4:12, 6:14] += 2
    return Naive(Classifier().eval(), image, [ClassScore("predicted")], SimpleInferer())


def test_a_scene_is_differentiable_and_hides_the_network():
    case = Naive(small(), noise(1, 8, 12))
    scene = _Scene(
        lambda image: (lambda g: (float(g.values[0, 0]), g.maps[0, 0]))(case.objective.gradient(image[None]))
    )
    images = torch.stack([case.image, 2 * case.image]).requires_grad_(True)
    out = scene(images)
    assert out.shape == (2, 1)
    (gradient,) = torch.autograd.grad(out.sum(), images)
    for image, value, slope in zip(images.detach(), out.flatten().tolist(), gradient):
        x = image.clone().requires_grad_(True)
        score = case.scores[0]
        whole = score.value(score.crop(case.inferer(x[None], case.net)[0]))
        assert value == pytest.approx(float(whole), rel=1e-10)
        assert_equal(slope, torch.autograd.grad(whole, x)[0])
    assert case.net not in list(scene.modules())


@pytest.mark.parametrize(
    ("method", "package"),
    [
        (FeatureVisualization(n_iter=2, backend="lucent"), "lucent"),
        (ExtremalPerturbation(n_iter=2, backend="torchray"), "torchray"),
    ],
)
def test_in_3d_or_without_the_package_the_error_names_the_remedy(method, package):
    with pytest.raises(MethodError, match="2D images only: omit it"):
        explained(method, Naive(small(3), noise(1, 8, 8, 8)))
    if missing(package):
        with pytest.raises(UsageError, match=rf"pip install esegeta-monai\[{package}\]"):
            explained(method, Naive(small(2), noise(1, 8, 8)))


def test_what_torchray_has_no_baseline_for():
    with pytest.raises(UsageError, match="'blur' or 'zero'"):
        ExtremalPerturbation(backend="torchray", baseline="mean")
    with pytest.raises(UsageError, match="backend"):
        ExtremalPerturbation(backend="captum")
    with pytest.raises(UsageError, match="odd"):
        ExtremalPerturbation(backend="torchray", step=4)


@pytest.mark.peers
@pytest.mark.parametrize("baseline", ["blur", "zero"])
@pytest.mark.parametrize("variant", ["preserve", "delete"])
def test_torchray_masks_are_torchrays_own(variant, baseline):
    """The same mask as TorchRay's, given the module itself and its own reward."""
    peer = pytest.importorskip("torchray.attribution.extremal_perturbation")
    case = classified()
    options = {"n_iter": 60, "step": 5, "sigma": 6}
    result = explained(ExtremalPerturbation(0.2, variant, baseline, backend="torchray", **options), case)
    with torch.enable_grad():
        masks, _ = peer.extremal_perturbation(
            case.net,
            case.image[None],
            int(case.scores[0].class_index),
            areas=[0.2],
            perturbation="fade" if baseline == "zero" else "blur",
            max_iter=60,
            step=5,
            sigma=6,
            jitter=False,
            variant=variant,
            resize=True,
        )
    assert_equal(result.maps[0, 0], masks[0, 0], 1e-4)  # 60 steps of float32
    (notes,) = result.note(0)["areas_found"]
    assert notes["area_reached"] == pytest.approx(float(masks.mean()), rel=1e-4)


@pytest.mark.peers
def test_torchray_finds_what_the_native_one_finds():
    pytest.importorskip("torchray")
    from tests.methods.perturbation.test_extremal import BlobDetector, blob

    image, inside = blob(48, 60)
    case = Naive(BlobDetector(2), image, [MultiClassMask(1)], SlidingWindowInferer((32, 32), 4, 0.5, "gaussian"))
    options = {"areas": 0.17, "variant": "preserve", "baseline": "zero", "step": 3}
    actual = explained(ExtremalPerturbation(**options, n_iter=60, lr=0.1), case).maps[0, 0]
    expected = explained(ExtremalPerturbation(**options, n_iter=200, sigma=6, backend="torchray"), case)
    mask = expected.maps[0, 0]
    assert expected.note(0)["areas_found"][0]["kept"] > 0.9
    assert float(mask[inside].mean()) > 2 * float(mask.mean())
    assert float(torch.corrcoef(torch.stack([actual.flatten(), mask.flatten()]))[0, 1]) > 0.5


@pytest.mark.peers
@pytest.mark.parametrize("parametrisation", ["fourier", "voxel"])
def test_lucent_images_are_lucents_own(parametrisation):
    """The same image as `render_vis` gives for the module itself, asked by its own channel objective."""
    pytest.importorskip("lucent")
    from lucent.optvis import objectives, param, render

    case = classified()
    method = FeatureVisualization(
        "conv", 2, parametrisation=parametrisation, n_iter=12, intensity=(0, 1), backend="lucent"
    )
    state = torch.random.get_rng_state()
    result = explained(method, case)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m._forward_hooks for m in case.net.modules())
    make = param.spatial.fft_image if parametrisation == "fourier" else param.spatial.pixel_image

    def unit():
        numbers, image = make((1, 1, 32, 40))
        return numbers, lambda: torch.sigmoid(image())

    network = nn.Sequential(case.net.conv)
    torch.manual_seed(case.objective.seed)
    np.random.seed(case.objective.seed)
    with torch.enable_grad():
        (image,) = render.render_vis(
            network,
            objectives.channel("0", 2),
            unit,
            optimizer=lambda numbers: torch.optim.Adam(numbers, lr=method.lr),
            thresholds=(12,),
            preprocess=False,
            progress=False,
            show_image=False,
            fixed_image_size=(32, 40),
        )
    assert_equal(result.maps[0], torch.from_numpy(image[0]).movedim(-1, 0), 1e-4)  # 12 steps of float32
    assert result.note(0)["objective_end"] > result.note(0)["objective_start"]
    assert len(result.note(0)["curve"]) == 12


@pytest.mark.peers
def test_both_lucent_and_the_native_one_raise_the_objective():
    pytest.importorskip("lucent")
    case = classified()
    rises = [
        explained(FeatureVisualization("conv", 2, n_iter=100, intensity=(0, 1), backend=b), case).note(0)
        for b in ("native", "lucent")
    ]
    assert all(r["objective_rise"] > 0.25 for r in rises), rises
    assert rises[0]["objective_end"] >= 0.9 * rises[1]["objective_end"]
