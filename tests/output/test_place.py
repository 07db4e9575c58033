"""Preprocessing whose maps would lie in the wrong place: refused, or written on another grid with a warning."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    EnsureChannelFirst,
    EnsureType,
    Flip,
    Lambda,
    LoadImage,
    Orientation,
    Spacing,
    SpatialCrop,
    Transform,
    Transpose,
)
from torch import nn

from esegeta_monai import Explainer
from esegeta_monai.files.grids.resample import to_scan_grid
from esegeta_monai.files.journal import read_run
from esegeta_monai.files.scans import read_scan
from esegeta_monai.methods import InputXGradient, LayerActivation
from esegeta_monai.methods.base import Method
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.targets import Box, ClassScore
from tests.support import oblique

GRADIENT, LAYER = InputXGradient(), LayerActivation(layer="0", reduce="abs")
"""An additive map, brought back by the trace, and one that follows the affine."""


class Mirror(Transform):
    """A flip of the first axis; ``affine`` moves the affine with it, and nothing records it."""

    def __init__(self, affine: bool) -> None:
        self.affine = affine

    def __call__(self, image: MetaTensor) -> MetaTensor:
        flipped = MetaTensor(image.as_tensor().flip(1), meta=image.meta, applied_operations=image.applied_operations)
        if self.affine:
            matrix = torch.eye(4, dtype=torch.float64)
            matrix[0, 0], matrix[0, 3] = -1, image.shape[1] - 1
            flipped.affine = image.affine @ matrix
        return flipped


class Arrays(Transform):
    """The voxels as a NumPy array, as a function of another library returns them."""

    def __call__(self, image: Any) -> Any:
        return np.asarray(image)


LOAD = (LoadImage(image_only=True), EnsureChannelFirst())
GRID = (*LOAD, Orientation("RAS", labels=None), Spacing((1.6, 1.6, 1.6)))


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scans") / "alpha.nii.gz")


def write(path: Path, change: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> Path:
    """An oblique scan that is asymmetric along every axis."""
    image = nib.load(oblique.write_scan(path))
    values = np.asarray(image.dataobj)
    for axis, n in enumerate(values.shape):
        shape = [1, 1, 1]
        shape[axis] = n
        values = values * np.linspace(0.5, 1.5, n).reshape(shape)
    nib.save(nib.Nifti1Image(change(values).astype(np.float32), image.affine, image.header), path)
    return path


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return nn.Sequential(nn.Conv3d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 3, padding=1))


def explained(
    folder: Path, image: Any, scan: Path, method: Method = GRADIENT, target: Any = None, **options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry of run.json and the sidecar, {} if there is none."""
    target = target or Box(1, (2, 2, 2), (8, 8, 8))
    writer = ResultWriter(folder, [method], [target], **{"pictures": False, **options})
    image = image if isinstance(image, MetaTensor) else MetaTensor(torch.as_tensor(image))
    writer.explain(Explainer(network(), on_error="record"), image, "alpha", [method], [target], scan=scan)
    (entry,) = read_run(writer.output_dir).results
    assert writer.run.summary == {entry["status"]: 1}
    sidecars = [json.loads(p.read_text(encoding="utf-8")) for p in folder.rglob("*_attr.json")]
    return entry, sidecars[0] if sidecars else {}


def verdict(entry: dict[str, Any]) -> str:
    """The verdict of the check in an entry of run.json."""
    (check,) = [c for c in entry["checks"] if c["check"] == "geometry"]
    return check["verdict"]


# ---- transforms that record nothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GRADIENT, LAYER])
@pytest.mark.parametrize("chain", [LOAD, GRID])
def test_a_recorded_preprocessing_passes(scan: Path, tmp_path: Path, chain: tuple[Any, ...], method: Method) -> None:
    entry, record = explained(tmp_path, Compose(chain)(scan), scan, method)
    assert (entry["status"], record["grid"], verdict(entry)) == ("ok", "scan", "passed")
    (check,) = [c for c in record["checks"] if c["check"] == "geometry"]
    assert check["verdict"] == "passed"
    assert check["value"] > 0.2


@pytest.mark.parametrize("method", [GRADIENT, LAYER])
@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("flip", [Lambda(lambda x: x.flip(1)), Mirror(False)])
def test_flips_without_a_record_are_refused(scan: Path, tmp_path: Path, flip: Any, where: str, method: Method) -> None:
    chain = [*LOAD, flip, *GRID[2:]] if where == "before" else [*GRID, flip]
    image = Compose(chain)(scan)
    entry, record = explained(tmp_path, image, scan, method)
    assert entry["status"] == "failed"
    assert "fits the scan better when flipped along axis 0: a transform" in entry["reason"]
    assert "Flipd" in entry["reason"]
    assert verdict(entry) == "refused"
    assert record == {}
    assert not list(tmp_path.rglob("*.nii.gz"))


@pytest.mark.parametrize("method", [GRADIENT, LAYER])
def test_a_flip_that_moves_the_affine_is_right(scan: Path, tmp_path: Path, method: Method) -> None:
    """Resampling is inverted from the affines before and after, so the flip is known."""
    image, volume = Compose([*GRID, Mirror(True)])(scan), read_scan(scan)
    entry, _ = explained(tmp_path, image, scan, method)
    assert (entry["status"], verdict(entry)) == ("ok", "passed")
    back, _ = to_scan_grid(image, volume, additive=bool(method.additive))
    assert np.corrcoef(back.flatten(), volume.flatten())[0, 1] > 0.9


def test_a_flip_that_moves_the_affine_misleads_a_trace_of_flips(scan: Path, tmp_path: Path) -> None:
    image = Compose([*LOAD, Flip(1), Mirror(True)])(scan)
    entry, _ = explained(tmp_path / "affine", image, scan, LAYER)
    assert (entry["status"], verdict(entry)) == ("ok", "passed")
    entry, record = explained(tmp_path / "trace", image, scan, GRADIENT)
    assert (entry["status"], record) == ("failed", {})
    assert "flipped along axis 0" in entry["reason"]
    untraced = Compose([*LOAD, Mirror(True)])(scan)
    entry, record = explained(tmp_path / "untraced", untraced, scan, GRADIENT)
    assert (entry["status"], record) == ("failed", {})
    assert "left no trace" in entry["reason"]


@pytest.mark.parametrize("method", [GRADIENT, LAYER])
def test_exchanged_axes_are_refused(tmp_path: Path, method: Method) -> None:
    scan = write(tmp_path / "in" / "alpha.nii.gz", lambda x: x[:14, :14, :14])
    image = Compose([*LOAD, Transpose((0, 2, 1, 3))])(scan)
    image = image if isinstance(image, MetaTensor) else MetaTensor(image)
    entry, record = explained(tmp_path / "out", image, scan, method)
    if entry["status"] == "ok":  # MONAI's version returns a plain tensor
        assert record["grid"] == "network"
    else:
        assert "axes 0 and 1 are exchanged" in entry["reason"]


def test_without_checks_it_is_written(scan: Path, tmp_path: Path) -> None:
    image = Compose([*GRID, Mirror(False)])(scan)
    entry, record = explained(tmp_path, image, scan, checks=False)
    assert entry["status"] == "ok"
    assert not [c for c in record.get("checks", []) if c["check"] == "geometry"]
    entry, _ = explained(tmp_path, image, scan)  # an unchecked map does not count as finished
    assert entry["status"] == "failed"
    entry, _ = explained(tmp_path, image, scan, checks=False)
    assert entry["status"] == "skipped"


def test_a_mirrored_scan_is_written_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scan = write(tmp_path / "in" / "alpha.nii.gz", lambda x: x + x[::-1])
    with caplog.at_level(logging.WARNING, "esegeta_monai"):
        entry, record = explained(tmp_path / "out", Compose(LOAD)(scan), scan)
    assert (entry["status"], verdict(entry)) == ("ok", "warned")
    for texts in (entry["warnings"], record["warnings"], caplog.messages):
        assert any("cannot decide" in text and "along axis 0" in text for text in texts)


# ---- no metadata --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [GRADIENT, LAYER])
@pytest.mark.parametrize(
    "last",
    [
        (EnsureType(track_meta=False),),
        (Arrays(),),
        (Lambda(lambda x: np.flip(x, 1).copy()), EnsureType()),
        (Arrays(), Flip(0), SpatialCrop(roi_start=(1, 1, 1), roi_end=(12, 12, 12))),
    ],
)
def test_without_metadata_maps_stay_on_the_networks_grid(
    scan: Path, tmp_path: Path, last: tuple[Any, ...], method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    image = Compose([*GRID, *last])(scan)
    with caplog.at_level(logging.WARNING, "esegeta_monai"):
        entry, record = explained(tmp_path, image, scan, method, pictures=True)
    assert (entry["status"], record["grid"]) == ("ok", "network")
    for texts in (entry["warnings"], record["warnings"], caplog.messages):
        assert any("has no metadata" in text for text in texts)
    (path,) = tmp_path.rglob("*_attr.nii.gz")
    written = nib.load(path)
    assert written.shape == tuple(image.shape[1:])
    assert np.allclose(written.affine, getattr(image, "affine", np.eye(4)))
    assert record["scan_sha256"]


# ---- status after resampling --------------------------------------------------------------------------------------


class OneVoxel(nn.Module):
    """A score that one voxel of the network's grid changes."""

    def __init__(self, place: tuple[int, ...]) -> None:
        super().__init__()
        self.place, self.weight = place, nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[(slice(None), 0, *self.place)] * self.weight, x.flatten(1).sum(1) * 0], 1)


def test_a_map_that_vanishes_by_resampling_is_zero_and_says_why(scan: Path, tmp_path: Path) -> None:
    """One voxel between the scan's voxels, interpolated; and one outside the scan."""
    from monai.transforms import SpatialPad

    from esegeta_monai.methods import Saliency

    fine = Compose([*LOAD, Spacing((0.3, 0.3, 0.3), mode="nearest")])(scan)
    padded = Compose([*LOAD, SpatialPad((26, 24, 20))])(scan)
    for name, image, place, method in (
        ("between", fine, (2, 2, 2), Saliency()), ("outside", padded, (0, 0, 0), Saliency(abs=False)),
        ("additive", padded, (0, 0, 0), InputXGradient()),
    ):  # fmt: skip
        image = MetaTensor(image.as_tensor() + 0.5, meta=image.meta, applied_operations=image.applied_operations)
        folder, target = tmp_path / name, ClassScore(0)
        writer = ResultWriter(folder, [method], [target], pictures=False)
        explainer = Explainer(OneVoxel(place), on_error="record")
        writer.explain(explainer, image, "alpha", [method], [target], scan=scan)
        (entry,) = read_run(writer.output_dir).results
        (path,) = folder.rglob("*_attr.nii.gz")
        assert not np.asarray(nib.load(path).dataobj).any()
        record = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text(encoding="utf-8"))
        assert (entry["status"], record["status"], writer.run.summary) == ("zero", "zero", {"zero": 1}), name
        assert "zero everywhere on the scan's grid" in entry["reason"]
        assert record["reason"] == entry["reason"]


# ---- warnings -----------------------------------------------------------------------------------------------------


def test_warnings_of_resampling_are_recorded_once_and_logged(
    scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import esegeta_monai.output.writer as module

    def resampled(*arguments: Any, **options: Any) -> Any:
        warnings.warn("half of the map is outside", stacklevel=2)
        warnings.warn("old name", DeprecationWarning, stacklevel=2)
        return real(*arguments, **options)

    real = module.to_scan_grid
    monkeypatch.setattr(module, "to_scan_grid", resampled)
    with caplog.at_level(logging.WARNING, "esegeta_monai"), warnings.catch_warnings(record=True) as caught:
        entry, record = explained(tmp_path, Compose(GRID)(scan), scan)
    assert entry["warnings"] == record["warnings"]
    assert record["warnings"].count("half of the map is outside") == 1
    assert [m for m in caplog.messages if "half of the map" in m] == ["alpha: half of the map is outside"]
    assert "old name" not in " ".join(record["warnings"])
    assert not [w for w in caught if "half of the map" in str(w.message)]


def test_an_image_in_memory_is_its_own_grid(scan: Path, tmp_path: Path) -> None:
    """A recorded flip of an image without a file: the map lies on the image, as the network reads it."""
    volume = read_scan(scan)
    image = Flip(0)(MetaTensor(volume.as_tensor(), affine=volume.affine))
    method, target = GRADIENT, Box(1, (2, 2, 2), (8, 8, 8))
    writer = ResultWriter(tmp_path, [method], [target], pictures=False)
    (attribution,) = Explainer(network())(image[None], [method], [target])
    path = writer.write(attribution, "alpha", image)
    assert path is not None
    written = nib.load(path)
    assert np.allclose(written.affine, np.asarray(image.affine))
    assert np.array_equal(np.asarray(written.dataobj), attribution.map[0].numpy())


def test_a_crop_back_into_the_scan_keeps_its_place(scan: Path, tmp_path: Path) -> None:
    image = SpatialCrop(roi_start=(4, 2, 2), roi_end=(20, 16, 12))(Compose(LOAD)(scan))
    entry, _ = explained(tmp_path, image, scan)
    assert (entry["status"], verdict(entry)) == ("ok", "passed")
