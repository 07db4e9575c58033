"""Reference inputs: what they are, and that `auto` takes one that works."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn

from esegeta_monai.engine.baselines import BASELINES, Auto, baseline_for, has_scale_free_norm, scale_invariant
from esegeta_monai.engine.network.state import frozen
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.methods import IntegratedGradients, LayerDeepLift, NeuronConductance
from esegeta_monai.targets import MultiClassMask
from tests.networks import NAMES, build
from tests.support.networks import network
from tests.support.objectives import objective
from tests.support.tensors import assert_equal


def image() -> torch.Tensor:
    base = torch.randn(2, 12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return base * torch.tensor([1.0, 10.0]).reshape(2, 1, 1) + 3


def case(norm: bool = True):
    net = network(2, 2, norm=norm)
    return objective(net, image(), None, [MultiClassMask(1)])[0]


def draw(spec, o=None) -> torch.Tensor:
    o = o or case()
    return baseline_for(spec).draw(o, o.generator())


def test_constants():
    x = image()
    assert not draw("zero").any()
    assert bool((draw(2) == 2).all())
    assert bool((draw("constant(2.5)") == 2.5).all())
    assert draw("constant(value=[1, 2])")[:, 0, 0].tolist() == [1, 2]
    for spec, expected in {
        "min": x.flatten(1).amin(1),
        "Minimum": x.flatten(1).amin(1),
        "mean": x.flatten(1).mean(1),
    }.items():
        assert torch.equal(draw(spec), expected[:, None, None].expand_as(x))
    with pytest.raises(UsageError, match="3 values for 2 channels"):
        draw("constant(value=[1, 2, 3])")


def test_background_is_the_median_of_the_faces():
    o = case()
    x = torch.rand(2, 12, 10, dtype=torch.float64)
    x[:, [0, -1]] = x[:, :, [0, -1]] = 0.125
    x[0, 0, 0] = 9
    assert bool((draw("background", o.derive(image=x)) == 0.125).all())


def test_blur_is_a_gaussian_in_voxels():
    drawn = draw("blur(sigma=1.5)")
    for blurred, channel in zip(drawn, image()):
        assert_equal(blurred, torch.from_numpy(gaussian_filter(channel.numpy(), 1.5, mode="nearest")), 1e-12)
    assert torch.equal(draw("blur(sigma=0)"), image())
    assert baseline_for("blur").record()["sigma_voxels"] is None
    blur = baseline_for("blur")
    blur.draw(case(), torch.Generator())
    assert blur.record()["sigma_voxels"] == pytest.approx(10 / 8)


def test_noise_is_seeded_and_in_units_of_each_channel():
    o = case()
    big = o.derive(image=image().repeat(1, 20, 20))
    drawn = draw("noise(std=0.5)", big)
    spread = big.image.flatten(1).std(1)
    assert_equal(drawn.flatten(1).std(1), 0.5 * spread, 0.02)
    assert_equal(drawn.flatten(1).mean(1), big.image.flatten(1).mean(1), 0.02)
    assert torch.equal(drawn, draw("noise(std=0.5)", big))
    assert not torch.equal(drawn, draw("noise(std=0.5)", big.derive(seed=1)))


def test_uniform_stays_between_smallest_and_largest():
    drawn, x = draw("uniform"), image()
    assert bool((drawn.flatten(1).amin(1) >= x.flatten(1).amin(1)).all())
    assert bool((drawn.flatten(1).amax(1) <= x.flatten(1).amax(1)).all())
    assert drawn.std() > 0


def test_files_and_tensors(tmp_path):
    volume = np.random.default_rng(0).random((12, 10, 2)).astype(np.float32)
    path = tmp_path / "reference.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume[..., None, :], np.eye(4)), path)
    tensor = torch.rand(2, 12, 10)
    assert torch.equal(draw(tensor), tensor.double())
    assert torch.equal(draw([tensor]), tensor.double())
    drawn = {float(draw([torch.full((2, 12, 10), float(i)) for i in range(3)]).mean()) for _ in range(3)}
    assert len(drawn) == 1  # seeded
    with pytest.raises(InputError, match=r"gone\.nii\.gz does not exist"):
        draw(str(tmp_path / "gone.nii.gz"))
    with pytest.raises(InputError, match="preprocess it like the image"):
        draw(torch.rand(2, 12, 11))
    with pytest.raises(UsageError, match="at least one file"):
        draw([])


def test_a_nifti_on_the_networks_grid(tmp_path):
    volume = np.random.default_rng(0).random((6, 5, 4)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "reference.nii.gz")
    net = network(3, 1)
    o, _ = objective(net, torch.rand(1, 6, 5, 4, dtype=torch.float64), None, [MultiClassMask(1)])
    drawn = draw(tmp_path / "reference.nii.gz", o)
    assert torch.equal(drawn, torch.from_numpy(volume)[None].double())


@pytest.mark.parametrize("bad", [None, True, "nothing", "blur(sigmoid=1)", []])
def test_what_is_no_baseline_is_refused(bad):
    with pytest.raises(UsageError):
        baseline_for(bad)
    for method in (IntegratedGradients, LayerDeepLift, NeuronConductance):  # before any work
        with pytest.raises(UsageError):
            method(baseline=bad)


@pytest.mark.parametrize("name", NAMES)
def test_auto_takes_zero_only_where_nothing_undoes_the_scale(name):
    made = build(name, 2)
    norms = has_scale_free_norm(made.network)
    assert bool(norms) == (made.norm in ("instance", "group", "layer"))


def test_auto_records_its_choice_and_the_reason():
    with_norm, without = case(norm=True), case(norm=False)
    auto = Auto()
    with frozen(with_norm.model.network):
        x0 = auto.draw(with_norm, with_norm.generator())
    record = auto.record()
    assert (record["name"], record["chosen_by"], record["std"]) == ("blur", "auto", 0.2)
    assert "InstanceNorm2d" in record["reason"]
    assert x0.std() > 0
    with frozen(without.model.network):
        assert not auto.draw(without, without.generator()).any()
    assert auto.record()["name"] == "zero"
    local = baseline_for("auto", local=True)
    local.draw(without, without.generator())
    assert local.record()["name"] == "background"


class ScaleFree(nn.Module):
    """A network that is invariant to scale without a norm layer, which only its output shows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1, bias=False)

    def forward(self, x):
        return self.conv(x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))


def test_invariance_without_a_norm_layer_is_found_by_looking():
    torch.manual_seed(0)
    net = ScaleFree().double()
    o, _ = objective(net, image(), None, [MultiClassMask(1)])
    assert has_scale_free_norm(net) == ""
    with frozen(net):
        assert scale_invariant(o)
        assert not scale_invariant(case(norm=False))
        auto = Auto()
        auto.draw(o, o.generator())
    assert auto.record()["name"] == "blur"
    assert "found to be invariant" in auto.record()["reason"]


def test_every_baseline_has_a_record_in_json():
    import json

    for cls in BASELINES:
        baseline = cls(*([[torch.rand(2, 12, 10)]] if cls.__name__ in ("Cases", "Image") else []))
        json.dumps(baseline.record())


def test_numbers_are_one_a_channel_and_wrong_ones_are_refused():
    assert baseline_for([1, 2.5]).parameters == {"value": [1, 2.5]}
    assert draw([1, 2.5]).flatten(1)[:, 0].tolist() == [1.0, 2.5]
    for bad in (float("inf"), "blur(sigma=-2)", "blur(std=-1)", "noise(std=-1)", [1.0, float("inf")]):
        with pytest.raises(UsageError, match=r"infinite|negative"):
            baseline_for(bad)
