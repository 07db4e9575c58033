"""TorchIO: windows against its aggregator, and maps on the grid before the transforms against their definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from esegeta_monai import Attribution, Explainer
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.interop import torchio as ours
from esegeta_monai.interop.torchio import GridWindows, map_on_original, subject_image

tio = pytest.importorskip("torchio", reason='needs TorchIO: pip install "esegeta-monai[torchio]"')
AFFINE = np.array([[-1.5, 0, 0, 9.0], [0, 2.0, 0, -4.0], [0, 0, 3.0, 5.0], [0, 0, 0, 1.0]])
SHAPE = (8, 7, 6)
BOX = "Box(class_index=1, start=(0, 0, 0), stop=(2, 2, 2))"


def network(channels: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Conv3d(channels, 4, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv3d(4, 2, 1)]
    return torch.nn.Sequential(*layers).double()


def subject(affine: np.ndarray = AFFINE, shape: tuple[int, ...] = SHAPE, channels: int = 1) -> Any:
    values = torch.rand(channels, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return tio.Subject(t1=tio.ScalarImage(tensor=values, affine=affine))


def explain(of: Any, method: Any = "InputXGradient") -> Attribution:
    (attribution,) = Explainer(network())(subject_image(of, ["t1"]), [method], [BOX])
    assert attribution.map is not None
    return attribution


def aggregated(image: torch.Tensor, net: torch.nn.Module, mode: str) -> torch.Tensor:
    """The prediction (K, W, H, D) by TorchIO's own sampler, loader and aggregator."""
    whole = tio.Subject(image=tio.ScalarImage(tensor=image[0].detach()))
    sampler = tio.GridSampler(whole, (8, 6, 6), (2, 2, 4))
    aggregator = tio.GridAggregator(sampler, overlap_mode=mode)
    for location in torch.as_tensor(sampler.locations):
        place = tuple(slice(int(a), int(b)) for a, b in zip(location[:3], location[3:]))
        aggregator.add_batch(net(image[(..., *place)]), location[None])
    return aggregator.get_output_tensor()


@pytest.mark.parametrize("mode", ["average", "hann", "crop"])
def test_windows_are_those_of_the_sampler_and_aggregator(mode: Any) -> None:
    net, image = network(), torch.rand(1, 1, 13, 12, 10, dtype=torch.float64)
    windows = GridWindows((8, 6, 6), (2, 2, 4), mode)
    x = image.clone().requires_grad_(True)
    prediction = aggregated(x, net, mode)
    rtol = 1e-5 if mode == "hann" else 1e-10  # the aggregator adds Hann windows in float32
    own = windows(image, net)[0]
    torch.testing.assert_close(own, prediction.detach().to(own.dtype), rtol=rtol, atol=rtol * float(own.abs().max()))

    y = image.clone().requires_grad_(True)
    naive = windows(y, net)[0]  # in float64 in both modes
    mask = naive.argmax(0) == 1
    (expected,) = torch.autograd.grad(naive[1][mask].sum(), y)
    (attribution,) = Explainer(net, windows)(image, ["VanillaBackprop"], ["MultiClassMask(1)"])
    assert attribution.map is not None
    assert attribution.record["windows_total"] > 4
    largest = float(expected.abs().max())
    torch.testing.assert_close(attribution.map.as_tensor(), expected[0], rtol=0, atol=1e-10 * largest)
    (by_torchio,) = torch.autograd.grad(prediction[1][mask].sum(), x)
    torch.testing.assert_close(expected, by_torchio, rtol=0, atol=rtol * largest)


def test_other_windows_are_refused() -> None:
    with pytest.raises(UsageError, match="give 'average', 'hann' or 'crop'"):
        GridWindows(8, 2, "mean")  # type: ignore[arg-type]
    for size, overlap in ((20, 0), (8, 3)):
        with pytest.raises(InputError, match="GridSampler refuses the volume"):
            GridWindows(size, overlap).places((13, 12, 10))


def test_the_image_of_a_subject() -> None:
    both = subject(channels=2)
    both.add_image(tio.ScalarImage(tensor=torch.ones(1, *SHAPE, dtype=torch.int16), affine=AFFINE), "t2")
    image = subject_image(both, ["t1", "t2"])
    assert image.shape == (1, 3, *SHAPE)
    np.testing.assert_array_equal(np.asarray(image.affine), AFFINE)
    both.add_image(tio.ScalarImage(tensor=torch.ones(1, *SHAPE), affine=np.eye(4)), "t3")
    with pytest.raises(InputError, match="'t3' of the subject has another grid"):
        subject_image(both, ["t1", "t3"])
    with pytest.raises(InputError, match="no image 'flair': it has t1, t2, t3"):
        subject_image(both, ["flair"])


CHAINS = [
    [],
    [tio.Flip((0, 2))],
    [tio.Crop((1, 2, 0, 1, 1, 0)), tio.Flip(1), tio.ZNormalization()],
    [tio.Flip(0), tio.Pad((2, 1, 0, 3, 1, 0)), tio.Transpose(), tio.RandomNoise()],
    [tio.CropOrPad((6, 9, 6)), tio.Flip((0, 1, 2))],
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda c: "-".join(t.name for t in c) or "none")
def test_moves_of_voxels_are_inverted_exactly(chain: list[Any]) -> None:
    """The same transforms of the numbers of voxels tell where each value has to go."""
    before = subject()
    after = tio.Compose(chain)(before)
    attribution = explain(after)
    n = int(np.prod(SHAPE))
    numbered = tio.Subject(t1=tio.ScalarImage(tensor=1 + torch.arange(n).reshape(1, *SHAPE).double(), affine=AFFINE))
    spatial = [t for t in chain if t.name in ours.EXACT or t.name == "CropOrPad"]
    index = tio.Compose(spatial)(numbered).t1.data.long().flatten()
    expected = torch.zeros(n + 1, dtype=torch.float64).index_add_(0, index, attribution.map.as_tensor().flatten())
    back = map_on_original(attribution, after, "t1")
    assert torch.equal(back.data.flatten(), expected[1:])
    np.testing.assert_allclose(back.affine, AFFINE)
    assert back["sum_in_padding"] == pytest.approx(float(expected[0]), abs=1e-12)


@pytest.mark.parametrize(
    "chain",
    [[tio.ToOrientation("PIR")], [tio.Resample(2.2)], [tio.ToCanonical(), tio.Resample((1.1, 2.5, 4.0)), tio.Flip(0)]],
    ids=lambda c: "-".join(t.name for t in c),
)
def test_interpolation_is_inverted_by_its_adjoint(chain: list[Any], tmp_path: Path) -> None:
    """The matrix of the transforms, one column per voxel, by TorchIO itself: its transpose brings the map back."""
    shape = (5, 4, 4)
    before = subject(shape=shape)
    after = tio.Compose(chain)(before)
    attribution = explain(after)
    back = map_on_original(attribution, after, "t1", original=before.t1)
    exact = map_on_original(attribution, after, "t1", original=before.t1, spread=False)
    columns = []
    for number in range(int(np.prod(shape))):
        one = torch.zeros(shape, dtype=torch.float64).flatten()
        one[number] = 1
        unit = tio.Subject(t1=tio.ScalarImage(tensor=one.reshape(1, *shape), affine=AFFINE))
        columns.append(tio.Compose(chain)(unit).t1.data.double().flatten())
    matrix = torch.stack(columns, 1)
    values = attribution.map.as_tensor().flatten()
    expected = matrix.T @ values
    torch.testing.assert_close(exact.data.flatten(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(matrix), dtype=torch.float64), rtol=0, atol=1e-6)
    assert float(back.data.sum()) == pytest.approx(float(values.sum()), rel=1e-6)
    np.testing.assert_allclose(back.affine, AFFINE)
    before.t1.save(tmp_path / "t1.nii")
    read = tio.Compose(chain)(tio.Subject(t1=tio.ScalarImage(tmp_path / "t1.nii")))
    again = map_on_original(explain(read), read, "t1")  # the grid is that of the file
    torch.testing.assert_close(again.data, back.data, rtol=0, atol=1e-5 * float(back.data.abs().max()))


def test_an_affine_is_inverted_for_maps_that_are_interpolated() -> None:
    cube = subject(np.diag([2.0, 2.0, 2.0, 1.0]), (6, 6, 6))
    after = tio.Affine(1, (0, 0, 90), 0)(cube)
    attribution = explain(after, "GradCam(layer='1')")
    assert attribution.map.as_tensor().any()
    back = map_on_original(attribution, after, "t1").data
    turn = next(
        k for k in (1, -1) if torch.allclose(torch.rot90(after.t1.data, k, (1, 2)), cube.t1.data.float(), atol=1e-5)
    )
    torch.testing.assert_close(back, torch.rot90(attribution.map.as_tensor(), turn, (1, 2)).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("chain", "method", "text"),
    [
        ([tio.Affine(1.1, 5, 0)], "InputXGradient", "Affine .* for an additive map"),
        ([tio.RandomElasticDeformation(max_displacement=0.5)], "InputXGradient", "ElasticDeformation .* exactly"),
        ([tio.RandomSwap(2, 2)], "InputXGradient", "Swap .* cannot be inverted"),
        ([tio.Lambda(lambda x: x)], "GradCam(layer='1')", "Lambda .* cannot be inverted"),
        ([tio.Flip(0), tio.Resample(2.2)], "GradCam(layer='1')", "Resample after Flip"),
        ([tio.Crop(1), tio.Resample(2.2)], "InputXGradient", "Resample after Crop"),
        ([tio.Resample(2.5), tio.Resample(2.2)], "InputXGradient", "Resample after Resample"),
        ([tio.Resample(2.2, image_interpolation="bspline")], "InputXGradient", "bspline.* no known adjoint"),
        ([tio.Pad(1, padding_mode="reflect")], "InputXGradient", "Pad.*'reflect'.* fills with values of the image"),
    ],
)
def test_what_cannot_be_inverted_is_refused_by_name(chain: list[Any], method: str, text: str) -> None:
    before = subject()
    after = tio.Compose(chain)(before)
    with pytest.raises(InputError, match=text):
        map_on_original(explain(after, method), after, "t1", original=before.t1)


def test_transforms_of_other_images_count_for_nothing() -> None:
    after = tio.Flip(0, include=["t2"])(tio.Subject(t1=subject().t1, t2=subject().t1))
    attribution = explain(after)
    assert torch.equal(map_on_original(attribution, after, "t1").data, attribution.map.as_tensor())


def test_an_unknown_grid_and_a_missing_map() -> None:
    after = tio.Resample(2.2)(subject())
    with pytest.raises(UsageError, match=r"grid before Resample is not known.*give original="):
        map_on_original(explain(after), after, "t1")
    empty = explain(after)
    empty.map, empty.record["status"], empty.record["reason"] = None, "empty_target", "no voxel"
    with pytest.raises(UsageError, match=r"no map \(empty_target\): no voxel"):
        map_on_original(empty, after, "t1")
