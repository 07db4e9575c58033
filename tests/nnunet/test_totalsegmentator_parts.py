"""Scans that TotalSegmentator splits into three parts: its own file, and F and maps of the parts together."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")
pytest.importorskip("totalsegmentator", reason="needs TotalSegmentator: make test-nnunet")

from esegeta_monai import Explainer
from esegeta_monai.bundle.nnunet import PROPERTIES, TotalSegmentatorReader, totalsegmentator_parts
from esegeta_monai.bundle.nnunet.totalsegmentator_parts import parts_of
from esegeta_monai.bundle.nnunet.totalsegmentator_task import TotalSegmentatorTask
from esegeta_monai.engine.resampled import OUTPUT_GRID
from esegeta_monai.engine.windows.inferers import plan_windows
from esegeta_monai.errors import InputError, NetworkError
from esegeta_monai.transforms import InvertAttribution
from tests.nnunet.folders import CT, scan
from tests.nnunet.test_nnunet import plain_loop, predictor_of
from tests.nnunet.test_totalsegmentator import carried, own_file, weights

TOTAL = (291, 292, 293, 294, 295)
PATCH = (12, 10, 8)


def split_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let TotalSegmentator split every scan, by its own option, and the window plan too."""
    from totalsegmentator import nnunet

    known = nnunet.nnUNet_predict_image
    monkeypatch.setattr(nnunet, "nnUNet_predict_image", lambda *a, **k: known(*a, **k | {"force_split": True}))
    monkeypatch.setattr(totalsegmentator_parts, "SPLIT_ABOVE", 0)
    monkeypatch.setattr(totalsegmentator_parts, "SPLIT_LENGTH", 0)


def large(folder: Path) -> Path:
    """Write a scan (of 66 slices after resampling) without voxels of 0, which nnU-Net does not crop."""
    (file,) = scan(folder, shape=(14, 13, 67))
    image: Any = nib.load(file)
    values = np.asarray(image.dataobj) + 40 + 30 * np.sin(np.arange(67) / 5)
    nib.save(nib.Nifti1Image(values.astype(np.float32), image.affine), file)
    return file


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 2, 0)], ids=str)
def test_the_segmentation_and_the_gradient(
    transpose: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 voxels from TotalSegmentator's file, and the gradient and an occluder of the plain loop over the parts."""
    patch = [PATCH[axis] for axis in transpose]
    root = weights(tmp_path / "weights", *TOTAL, monkeypatch=monkeypatch, changes=CT, transpose=transpose, patch=patch)
    file = large(tmp_path / "scans")
    expected = own_file(file, tmp_path / "own.nii.gz", root, monkeypatch, task="total", force_split=True)
    if transpose == (0, 1, 2):  # the parts matter
        whole = own_file(file, tmp_path / "whole.nii.gz", root, monkeypatch, task="total")
        assert np.count_nonzero(whole != expected) > 0
    split_by_force(monkeypatch)
    counts = np.bincount(expected.ravel().astype(int))
    number = int(counts[1:].argmax()) + 1
    name = TotalSegmentatorTask.read("total").classes[number]
    reader = TotalSegmentatorReader("total", [name])
    data = reader.preprocessing({"image": str(file)})
    given = reader.case_arguments(data["image"], data, tmp_path / "ours")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "ours.nii.gz").dataobj), expected)
    masks = given["data"][OUTPUT_GRID]
    axis = reader.split_axis
    assert (transpose[axis], data["image"].shape[axis + 1]) == (0, 67)
    assert masks.record["parts"] == [[0, 42, 0, 22], [3, 64, 22, 44], [25, 67, 44, 67]]
    assert masks.record["mask_grid"] == "scan"
    assert masks.record["voxels_of_another_class"] < 0.01 * masks.record["voxels"]
    label = next(k for k, of in reader.class_names.items() if of == name)
    mask = torch.as_tensor(expected == number)
    assert int(masks.masks(label).sum()) == int(mask.sum()) > 0

    def loop(x: Tensor) -> Tensor:
        """Each part by itself, as TotalSegmentator cuts and joins them."""
        n = x.shape[axis + 1]
        third, margin = n // 3, 20
        own = predictor_of(reader, step=reader.step, mirroring=False)

        def part(first: int, last: int) -> Tensor:
            done = plain_loop(own, x.narrow(axis + 1, first, last - first))
            own.network = copy.deepcopy(own.network)
            return done.movedim(axis + 1, 1)

        kept = [
            part(0, third + margin)[:, :-margin],
            part(third + 1 - margin, third * 2 + margin)[:, margin - 1 : -margin],
            part(third * 2 + 1 - margin, n)[:, margin - 1 :],
        ]
        return torch.cat(kept, 1).movedim(1, axis + 1)

    logits = loop(data["image"].as_tensor()).detach()
    ours = given["prediction"][0]
    assert float((ours - logits).abs().max() / logits.abs().max()) <= 1e-5
    inferer = reader.inferer
    inferer.members = tuple({key: value.double() for key, value in member.items()} for member in inferer.members)
    x = data["image"].as_tensor().double().requires_grad_(True)
    prediction = loop(x)
    explainer = Explainer(reader.network.double(), inferer, class_names=reader.class_names)
    vanilla, occlusion = explainer(
        data["image"][None].double(),
        ["VanillaBackprop", "Occlusion(window=6, baseline=0.0)"],
        [f"MultiClassMask({name!r})"],
        **given | {"prediction": prediction[None].detach()},
    )
    assert vanilla.record["target_voxels"] == int(mask.sum())

    def on_the_scan(logits: Tensor) -> Tensor:
        turned = logits[label].permute(*reader.plans.transpose_backward)
        whole_box = {"bbox_used_for_cropping": [[0, n] for n in turned.shape]}
        return carried(reader, {**data, PROPERTIES: whole_box}, turned)[mask].sum()

    score = on_the_scan(prediction)
    assert vanilla.record["value"] == pytest.approx(float(score.detach()), rel=1e-9)
    (gradient,) = torch.autograd.grad(score, x)
    assert float((vanilla.map.as_tensor() - gradient).abs().max() / gradient.abs().max()) <= 1e-10
    for first in (18, 24, 42):  # voxels that two parts read
        corner = [0, 0, 0]
        corner[axis] = first
        changed = x.detach().clone()
        changed[(slice(None), *(slice(a, a + 6) for a in corner))] = 0
        effect = float(score.detach() - on_the_scan(loop(changed).detach()))
        bound = 1e-10 * abs(float(score.detach()))
        assert float(occlusion.map[(0, *corner)]) == pytest.approx(effect, rel=0, abs=bound)

    back = InvertAttribution()(vanilla.map.as_tensor().double(), data["image"])
    np.testing.assert_allclose(np.asarray(back.affine), nib.load(file).affine, atol=1e-6)
    assert float(back.sum()) + float(np.sum(back.meta["sum_in_padding"])) == pytest.approx(
        float(vanilla.map.sum()), rel=0, abs=1e-6 * float(vanilla.map.abs().sum())
    )


def test_the_rule_is_that_of_the_package() -> None:
    """A scan below the limits, or of a task with one model, is not split."""
    assert len(parts_of((512, 512, 901), 2, True)) == 3
    assert parts_of((512, 512, 900), 2, True) == ()
    assert parts_of((512, 512, 901), 2, False) == ()
    assert parts_of((2000, 2000, 200), 2, True) == ()
    from totalsegmentator import nnunet

    source = Path(nnunet.__file__).read_text(encoding="utf-8")
    assert "nr_voxels_thr = 512*512*900\n" in source
    assert "np.prod(ss) > nr_voxels_thr and ss[2] > 200 and multimodel" in source


def test_parts_that_make_no_single_image_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Intensities of each part, a crop to nonzero, slices fewer than a window, and another version of the package."""
    root = weights(tmp_path / "weights", *TOTAL, monkeypatch=monkeypatch)

    def cause(file: Path) -> str:
        with pytest.raises(RuntimeError) as caught:  # MONAI's Compose wraps it
            TotalSegmentatorReader("total", ["liver"]).preprocessing({"image": str(file)})
        assert isinstance(caught.value.__cause__, (InputError, NetworkError))
        return str(caught.value.__cause__)

    file = large(tmp_path / "scans")
    with monkeypatch.context() as forced:
        split_by_force(forced)
        assert "normalises each part by the intensities in this part" in cause(file)
        forced.setattr(totalsegmentator_parts, "SPLIT_ABOVE", 10**9)
        assert "splits the scan into parts of [42, 61, 42] slices, and not [67]" in cause(file)
    weights(tmp_path / "ct", *TOTAL, monkeypatch=monkeypatch, changes=CT)
    (cropped,) = scan(tmp_path / "zeros", shape=(14, 13, 67))
    with monkeypatch.context() as forced:
        split_by_force(forced)
        assert "crops part 1 to its voxels that are not 0" in cause(cropped)
    weights(tmp_path / "long", *TOTAL, monkeypatch=monkeypatch, changes=CT, patch=(50, 10, 8))
    with monkeypatch.context() as forced:
        split_by_force(forced)
        reader = TotalSegmentatorReader("total", ["liver"])
        image = reader.preprocessing({"image": str(file)})["image"]
        with pytest.raises(NetworkError, match="parts of 42 slices, which nnU-Net pads to windows of 50"):
            plan_windows(reader.inferer, image.shape[1:])
    assert root.exists()
