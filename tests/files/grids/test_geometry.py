"""The place of an image against its scan: right through any change of intensity, refused for each flip."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    Flip,
    HistogramNormalize,
    LoadImage,
    NormalizeIntensity,
    Orientation,
    Resize,
    ScaleIntensityRange,
    Spacing,
    SpatialCrop,
    SpatialPad,
    Zoom,
)

from esegeta_monai.files.grids.geometry import check_geometry
from esegeta_monai.files.grids.resample import geometry_of, unrecorded
from tests.support import real

SIZES = {2: (76, 66), 3: (40, 34, 32)}
FLIPS = {d: [c for n in range(1, d + 1) for c in itertools.combinations(range(d), n)] for d in (2, 3)}
REAL = ["t1_head_1.75mm.nii.gz", "ct_torso_3mm.nii.gz", "stroke_t1.nii.gz", "tumour_brain1_image.nii.gz"]


def phantom(d: int, seed: int = 0, channels: int = 1) -> MetaTensor:
    """Smooth blobs inside an ellipsoid, with an empty surround, anisotropic voxels and the first axis to the left."""
    generator = torch.Generator().manual_seed(seed)
    sizes = SIZES[d]
    coarse = torch.rand(1, channels, *[6] * d, generator=generator)
    blobs = F.interpolate(coarse, size=sizes, mode="bilinear" if d == 2 else "trilinear", align_corners=True)[0]
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in sizes], indexing="ij")
    values = torch.where(sum(a**2 for a in axes) < 0.9, 0.3 + blobs, 0.0)
    affine = torch.diag(torch.tensor([-1.2, 1.5, 2.0, 1.0]))
    return MetaTensor(values, affine=affine if d == 3 else affine[[0, 1, 3]][:, [0, 1, 3]])


def changed(image: MetaTensor, values: torch.Tensor) -> MetaTensor:
    """Other voxels with the same metadata: a transform that records nothing."""
    return MetaTensor(values, meta=image.meta, applied_operations=image.applied_operations)


def scaled(factor: float) -> Callable[[MetaTensor], MetaTensor]:
    mode = {3: "bilinear", 4: "trilinear"}
    return lambda x: Resize([max(2, round(n * factor)) for n in x.shape[1:]], mode=mode[x.ndim])(x)


def cropped(x: MetaTensor) -> MetaTensor:
    sizes = x.shape[1:]
    return SpatialCrop(roi_start=[n // 5 for n in sizes], roi_end=[3 * n // 4 for n in sizes])(x)


def classes(x: MetaTensor) -> MetaTensor:
    values = x.as_tensor()
    return changed(x, torch.cat([values > 0.9, (values < 0.9) & (values > 0.5)]))


CHAINS: dict[str, Callable[[MetaTensor], MetaTensor]] = {
    "as it is": lambda x: x,
    "inversion": lambda x: changed(x, x.as_tensor().max() - x.as_tensor()),
    "z-score": NormalizeIntensity(),
    "clip": lambda x: ScaleIntensityRange(*np.percentile(x.numpy(), (10, 90)), 0, 1, clip=True)(x),
    "histogram equalisation": HistogramNormalize(),
    "half": scaled(0.5),
    "quarter": scaled(0.25),
    "crop": cropped,
    "padding": lambda x: SpatialPad([n + 7 for n in x.shape[1:]])(x),
    "recorded flip": Flip(0),
    "orientation": Orientation("RAS", labels=None),
    "absolute values": lambda x: changed(x, (x.as_tensor() - 0.7).abs()),
    "two classes": classes,
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("d", [2, 3])
def test_right_geometry_is_never_refused_and_each_flip_always(name: str, d: int) -> None:
    scan = phantom(d)
    image = CHAINS[name](scan) if (name, d) != ("orientation", 2) else scan
    for additive in (False, True)[name != "orientation" :]:
        right = geometry_of(image, scan, additive=additive)
        assert right.verdict == "passed", right
        assert right.text == "the preprocessed image, brought back to the scan's grid, fits the scan"
        for axes in FLIPS[d] if name == "as it is" else FLIPS[d][:d]:
            flipped = changed(image, image.as_tensor().flip([a + 1 for a in axes]))
            wrong = geometry_of(flipped, scan, additive=additive)
            assert wrong.verdict == "refused", (axes, wrong)
            assert f"flipped along {'axis' if len(axes) == 1 else 'axes'} {' and '.join(map(str, axes))}:" in wrong.text


@pytest.mark.parametrize("seed", range(10))
def test_no_false_alarm_over_seeds(seed: int) -> None:
    """Smooth, noisy and half-covered images of other phantoms."""
    scan = phantom(3, seed)
    noise = torch.randn(scan.shape, generator=torch.Generator().manual_seed(seed))
    noisy = changed(scan, scan.as_tensor() + 0.3 * noise)
    for image in (scan, noisy, scaled(0.4)(noisy), SpatialCrop(roi_start=(0, 0, 0), roi_end=(20, 34, 32))(noisy)):
        assert geometry_of(image, scan, additive=True).verdict != "refused"
        flipped = changed(image, image.as_tensor().flip(2))
        assert geometry_of(flipped, scan, additive=True).verdict == "refused"


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_exchanged_axes_are_refused(order: tuple[int, ...]) -> None:
    scan = phantom(3)[:, :32, :32]
    wrong = check_geometry(scan, scan.as_tensor().permute(0, *(1 + k for k in order)), np.eye(4))
    assert wrong.verdict == "refused"
    assert "exchanged" in wrong.text or "in the order" in wrong.text


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("d", [2, 3])
def test_turns_are_refused(d: int, turns: int) -> None:
    scan = phantom(d)
    assert check_geometry(scan, torch.rot90(scan.as_tensor(), turns, (1, 2)), np.eye(d + 1)).verdict == "refused"


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("shift", [1, -2, 5])
def test_shifts_beyond_half_a_coarse_voxel_are_refused(shift: int, factor: float) -> None:
    scan = phantom(3)
    image = scaled(factor)(scan)
    for axis in range(3):
        rolled = changed(image, torch.roll(image.as_tensor(), shift, axis + 1))
        wrong = geometry_of(rolled, scan, additive=False)
        assert wrong.verdict == "refused"
        assert f"along axis {axis}:" in wrong.text


def test_shifts_of_less_than_half_a_coarse_voxel_pass() -> None:
    scan = phantom(3)
    image = Zoom(0.5, mode="trilinear", align_corners=True, keep_size=False)(scan)
    assert geometry_of(image, scan, additive=False).verdict == "passed"


def test_a_mirrored_phantom_cannot_decide_along_its_axis() -> None:
    scan = phantom(3)
    mirrored = changed(scan, (scan.as_tensor() + scan.as_tensor().flip(2)) / 2)
    for image in (mirrored, changed(mirrored, mirrored.as_tensor().flip(2)), scaled(0.5)(mirrored)):
        result = geometry_of(image, mirrored, additive=True)
        assert result.verdict == "warned"
        assert "cannot decide" in result.text
        assert "symmetric along axis 1," in result.text
    other = changed(mirrored, mirrored.as_tensor().flip(1))
    assert geometry_of(other, mirrored, additive=True).verdict == "refused"


@pytest.mark.parametrize("values", ["constant scan", "constant image", "noise", "tiny"])
def test_images_without_evidence_cannot_decide(values: str) -> None:
    scan = phantom(3)
    image = scan.as_tensor()
    if values == "constant scan":
        scan = changed(scan, torch.full_like(scan.as_tensor(), 3.0))
    elif values == "constant image":
        image = torch.zeros_like(image)
    elif values == "noise":
        image = torch.rand(image.shape, generator=torch.Generator().manual_seed(1))
    else:
        image = image[:, 10:12, 10:12, 10:12]
    result = check_geometry(scan, image, np.eye(4))
    assert result.verdict == "warned"
    assert "cannot decide" in result.text


def test_the_channel_that_fits_is_compared() -> None:
    scan = phantom(3)
    noise = torch.rand(scan.shape, generator=torch.Generator().manual_seed(1))
    image = torch.cat([noise, torch.ones_like(noise), scan.as_tensor()])
    assert check_geometry(scan, image, np.eye(4)).verdict == "passed"
    assert check_geometry(scan, image.flip(3), np.eye(4)).verdict == "refused"


def test_planes_in_files_with_a_third_axis() -> None:
    scan = phantom(2)
    assert check_geometry(scan[..., None], scan, np.eye(3)).verdict == "passed"
    assert check_geometry(phantom(3), scan, np.eye(3)).verdict == "warned"


@real.needs_real_data
@pytest.mark.parametrize("name", REAL)
def test_real_scans(name: str) -> None:
    """Every chain of intensities and grids passes with a statistic above 0.2, and each flip is refused."""
    scan = Compose([LoadImage(), EnsureChannelFirst()])(real.image(name))
    for chain in ("inversion", "z-score", "clip", "histogram equalisation", "half", "quarter", "crop", "orientation"):
        image = CHAINS[chain](scan)
        right = geometry_of(image, scan, additive=True)
        assert right.verdict == "passed", chain
        assert right.value is not None
        assert right.value > 0.2
        for axis in range(3):
            flipped = changed(image, image.as_tensor().flip(axis + 1))
            assert geometry_of(flipped, scan, additive=True).verdict == "refused", (chain, axis)


def test_the_cost_of_a_large_volume(tmp_path: Path) -> None:
    """The number of sampling points does not grow with the volume."""
    from esegeta_monai.files.grids.geometry import POINTS, _Pair

    small, large = phantom(3), F.interpolate(phantom(3).as_tensor()[None], scale_factor=4)[0]
    pairs = [_Pair(torch.as_tensor(x), torch.as_tensor(x), np.eye(4)) for x in (small, large)]
    assert all(pair.points.shape[1] <= POINTS[3] ** 3 for pair in pairs)


RESIZED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "resampled": lambda x: x[:, ::2],
    "interpolated": lambda x: F.interpolate(x[None], scale_factor=(1, 0.6, 1), mode="nearest")[0],
    "cropped at the start": lambda x: x[:, 4:],
    "cropped at the end": lambda x: x[..., :-1],
    "padded": lambda x: F.pad(x, (3, 3)),
}
RECORDED: dict[str, Callable[[MetaTensor], MetaTensor]] = {
    "nothing": lambda x: x,
    "crop": cropped,
    "crop at the end": SpatialCrop(roi_start=(0, 0, 0), roi_end=(36, 30, 30)),
    "padding at the end": SpatialPad((48, 48, 48), method="end"),
    "flip": Flip(1),
    "orientation": Orientation("RAS", labels=None),
    "half": scaled(0.5),
    "spacing": Spacing((1.5, 1.5, 2.0)),
}


@pytest.mark.parametrize("change", RESIZED)
@pytest.mark.parametrize("before", RECORDED)
@pytest.mark.parametrize("after", ["nothing", "flip", "orientation", "half"])
def test_a_change_of_size_without_a_record_is_refused(before: str, change: str, after: str) -> None:
    """Before, after and between recorded transforms; after a resampling the sizes show nothing, but contents do."""
    scan = phantom(3)
    image = RECORDED[before](scan)
    assert unrecorded(RECORDED[after](image), scan) is None
    assert geometry_of(RECORDED[after](image), scan, additive=False).verdict == "passed"
    wrong = RECORDED[after](changed(image, RESIZED[change](image.as_tensor())))
    text, result = unrecorded(wrong, scan), geometry_of(wrong, scan, additive=False)
    if before not in ("half", "spacing"):
        assert text is not None
        assert "record" in text
        assert result.text == text
    elif change == "cropped at the end":  # the voxels that are left lie where they should
        assert (text, result.verdict) == (None, "passed")
    else:
        assert text is None
        assert result.verdict == "refused" or (before, after) == ("half", "half")  # ten voxels, which cannot decide
        assert result.verdict != "passed"
        if result.verdict == "refused" and change in ("resampled", "interpolated"):
            assert f"stretched by {'2' if change == 'resampled' else '1.7'} along axis" in result.text
