"""nnU-Net folders: the same segmentation, and gradients equal to autograd through nnU-Net's own windows."""

from __future__ import annotations

import itertools
import json
import os
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("nnunetv2", reason="needs nnunetv2: make test-nnunet")

from esegeta_monai import Explainer
from esegeta_monai.bundle.nnunet import PROPERTIES, NnunetReader, is_nnunet_folder
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.cli.main import main
from esegeta_monai.engine.baselines import gaussian_blur
from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.files.scans import read_scan
from esegeta_monai.methods import Occlusion, VanillaBackprop
from esegeta_monai.targets import MultiClassMask
from esegeta_monai.transforms import InvertAttribution
from tests.nnunet.folders import LABELS, REGIONS, model_folder, scan

CASES: dict[str, dict[str, Any]] = {
    "two folds, mirrored": {},
    "one fold, not mirrored": {"folds": 1, "mirror": None},
    "resampled": {"spacing": (1.2, 1.0, 0.8)},
    "transposed axes": {"transpose": (1, 0, 2)},
    "two channels": {"channels": 2},
    "regions": {"labels": REGIONS},
    "2D": {"name": "2d", "patch": (12, 10), "spacing": (1.0, 1.0), "mirror": (0, 1)},
    "residual encoder": {"residual": True, "folds": 1, "mirror": (1,)},
    "low resolution": {"name": "3d_lowres", "spacing": (2.2, 2.0, 1.8), "folds": 1, "mirror": None},
    "ignore label": {"labels": {**LABELS, "ignore": 3}, "folds": 1, "mirror": None},
    "MHA": {"ending": ".mha", "transpose": (2, 0, 1), "folds": 1, "mirror": None},
    "NRRD": {"ending": ".nrrd", "folds": 1, "mirror": None},
}


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, list[Path]]:
    options = CASES[request.param]
    files = scan(tmp_path / "scans", options.get("channels", 1), ending=options.get("ending", ".nii.gz"))
    return model_folder(tmp_path / "model", **options), files


def predictor_of(reader: NnunetReader, step: float = 0.5, mirroring: bool = True) -> Any:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    own = nnUNetPredictor(step, True, mirroring, False, torch.device("cpu"), allow_tqdm=False)
    own.initialize_from_trained_model_folder(
        str(reader.bundle_dir), [int(f.parent.name[5:]) for f in reader.checkpoints]
    )
    return own


def test_the_segmentation_is_that_of_nnunet(model: tuple[Path, list[Path]], tmp_path: Path) -> None:
    folder, files = model
    reader = NnunetReader(folder)
    own = predictor_of(reader)
    own.predict_from_files_sequential([[str(f) for f in files]], [str(tmp_path / "own")], False, True)
    data = reader.preprocessing({"image": [str(f) for f in files]})
    prediction = reader.predict(data["image"], data, tmp_path / "ours")
    ending = reader.dataset["file_ending"]
    read = reader.plans.image_reader_writer_class().read_seg
    (ours, here), (expected, there) = (read(str(tmp_path / f"{name}{ending}")) for name in ("ours", "own"))
    np.testing.assert_array_equal(ours, expected)
    assert here == there
    assert len(np.unique(ours)) > 1
    assert prediction.logits.shape[1:] == data["image"].shape[1:]
    with torch.no_grad():
        again = plain_loop(own, torch.as_tensor(data["image"]).as_subclass(Tensor))
    torch.testing.assert_close(prediction.logits, again, rtol=0, atol=1e-5 * float(again.abs().max()))
    record = prediction.masks.record
    assert record["mask_grid"] == "scan"
    assert record["voxels"] == ours.size
    assert 0 < record["median_logit_difference"] < record["largest_logit_difference"] < record["largest_logit"]
    assert record["voxels_of_another_class"] < 0.01 * ours.size


def plain_loop(own: Any, x: Tensor) -> Tensor:
    """nnU-Net's own slicers, weights, mirrors and folds, without inference mode, in the precision of ``x``."""
    from acvl_utils.cropping_and_padding.padding import pad_nd_image
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    patch = tuple(own.configuration_manager.patch_size)
    gaussian = compute_gaussian(patch, 1.0 / 8, 10, device=torch.device("cpu")).to(x)
    data, back = pad_nd_image(x, patch, "constant", {"value": 0}, True, None)
    axes = own.allowed_mirroring_axes or ()
    views = [[a + 2 for a in c] for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    total: Any = 0
    for weights in own.list_of_parameters:
        own.network.load_state_dict(weights)
        own.network.to(x.dtype).eval()
        logits: Any = 0
        count = torch.zeros(data.shape[1:], dtype=x.dtype)
        for place in own._internal_get_sliding_window_slicers(data.shape[1:]):
            window = data[place][None]
            out = sum(own.network(window.flip(v)).flip(v) for v in views)[0] / len(views)
            part = torch.zeros((len(out), *data.shape[1:]), dtype=x.dtype)
            part[place] = out * gaussian
            logits = logits + part
            count[place[1:]] += gaussian
        # copies, because the next fold overwrites the weights that the backward pass needs
        total = total + (logits / count)[(slice(None), *back[1:])]
        own.network = _fresh(own.network)
    return total / len(own.list_of_parameters)


def _fresh(network: torch.nn.Module) -> torch.nn.Module:
    import copy

    return copy.deepcopy(network)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_gradient_is_that_of_a_plain_loop(
    model: tuple[Path, list[Path]], dtype: torch.dtype, tolerance: float
) -> None:
    folder, files = model
    reader = NnunetReader(folder)
    image = reader.preprocessing({"image": [str(f) for f in files]})["image"]
    inferer = reader.inferer
    inferer.members = tuple({name: value.to(dtype) for name, value in member.items()} for member in inferer.members)
    explainer = Explainer(reader.network.to(dtype), inferer, head="sigmoid" if reader.labels.has_regions else "softmax")
    own, x = predictor_of(reader), torch.as_tensor(image).as_subclass(Tensor).to(dtype).requires_grad_(True)
    prediction = plain_loop(own, x)
    predicted = prediction.argmax(0)
    c = 1 if reader.labels.has_regions or bool((predicted == 1).any()) else int(predicted.max())
    ours, occlusion = explainer(
        image[None].to(dtype), [VanillaBackprop(), Occlusion(window=6, baseline=0.0)], [MultiClassMask(c)]
    )
    mask = prediction[c] > 0 if reader.labels.has_regions else predicted == c
    assert ours.record["target_voxels"] == int(mask.sum()) > 0
    score = (prediction[c] * mask).sum()
    (expected,) = torch.autograd.grad(score, x)
    error = float((ours.map.as_tensor() - expected).abs().max() / expected.abs().max())
    assert error <= tolerance
    changed = x.detach().clone()
    changed[(slice(None), *(slice(0, 6) for _ in range(3)))] = 0
    with torch.no_grad():
        effect = float(score - (plain_loop(predictor_of(reader), changed)[c] * mask).sum())
    bound = (1e-6 if dtype == torch.float32 else 1e-10) * abs(float(score.detach()))
    assert float(occlusion.map[0, 0, 0, 0]) == pytest.approx(effect, rel=0, abs=bound)


def test_integrated_gradients_are_complete_over_folds_and_mirrors(tmp_path: Path) -> None:
    """The sum of the map is the difference of F, and the map the quadrature of the gradients, of the plain loop."""
    folder, files = model_folder(tmp_path / "model", mirror=(2,)), scan(tmp_path / "scans", shape=(18, 12, 10))
    reader = NnunetReader(folder)
    image = reader.preprocessing({"image": [str(f) for f in files]})["image"].double()
    inferer = reader.inferer
    inferer.members = tuple({name: value.double() for name, value in member.items()} for member in inferer.members)
    methods = ["IntegratedGradients(baseline='blur(sigma=2)', tolerance=1e-3)"]
    methods += ["IntegratedGradients(baseline='blur(sigma=2)', n_steps=3, name='three')"]
    complete, three = Explainer(reader.network.double(), inferer)(image[None], methods, [MultiClassMask(1)])
    assert complete.record["windows_total"] == 32  # 2 x 2 x 2 windows, two folds, two views
    x = image.as_tensor()
    x0 = gaussian_blur(x, 2)
    mask = plain_loop(predictor_of(reader), x).detach().argmax(0) == 1

    def score(at: Tensor) -> Tensor:
        return plain_loop(predictor_of(reader), at)[1][mask].sum()

    with torch.no_grad():
        change = float(score(x) - score(x0))
    assert abs(float(complete.map.sum()) - change) <= 1e-3 * abs(change)
    expected: Any = 0
    for node, weight in zip(*np.polynomial.legendre.leggauss(3)):
        at = (x0 + (node + 1) / 2 * (x - x0)).requires_grad_(True)
        expected = expected + weight / 2 * torch.autograd.grad(score(at), at)[0] * (x - x0)
    assert float((three.map.as_tensor() - expected).abs().max() / expected.abs().max()) <= 1e-10


def test_a_map_comes_back_to_the_scan(model: tuple[Path, list[Path]]) -> None:
    folder, files = model
    reader = NnunetReader(folder)
    image = reader.preprocessing({"image": [str(f) for f in files]})["image"]
    values = torch.rand(image.shape, dtype=torch.float64)
    back = InvertAttribution()(values, image)
    original = read_scan(files[0])
    assert back.shape[1:] == original.shape[1:]
    np.testing.assert_allclose(np.asarray(back.affine), original.affine, atol=1e-6)
    assert float(back.sum()) + float(np.sum(back.meta["sum_in_padding"])) == pytest.approx(
        float(values.sum()), rel=1e-6
    )


def test_the_command_explains_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, files = model_folder(tmp_path / "model"), scan(tmp_path / "scans")
    command = ["explain", "--nnunet", str(folder), "--input", str(files[0]), "--output", str(tmp_path / "out")]
    assert main([*command, "--methods", "Saliency,GradCam"]) == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert {entry["status"] for entry in run["results"]} == {"ok"}
    (segmentation,) = (tmp_path / "out").rglob("*_seg.nii.gz")
    assert nib.load(segmentation).shape == nib.load(files[0]).shape
    for what in ("info", "layers", "check"):
        assert main([what, "--nnunet", str(folder)]) == 0
    assert main(["info", "--bundle", str(folder)]) == 2
    assert "--nnunet" in capsys.readouterr().err


def test_folds_and_options_are_checked(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", folds=1)
    assert is_nnunet_folder(folder)
    with pytest.raises(UsageError, match=r"no checkpoint_final\.pth in fold 3; there are folds: 0"):
        NnunetReader(folder, [3])
    with pytest.raises(UsageError, match="--nnunet"):
        BundleReader(folder)


def test_a_checkpoint_with_code_is_refused_unread(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model", folds=1)

    class Code:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"network_weights": Code()}, folder / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(NetworkError, match="is code and no weight"):
        NnunetReader(folder)
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(pickle.dumps(Code()))
    with pytest.raises(NetworkError, match="cannot be read as weights"):
        NnunetReader(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"configurations": {}}'])
def test_broken_plans_are_one_line(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", folds=1)
    (folder / "plans.json").write_text(content, encoding="utf-8")
    assert main(["layers", "--nnunet", str(folder)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "plans.json" in line


def test_one_fold_given_twice_is_the_fold(tmp_path: Path) -> None:
    folder, files = model_folder(tmp_path / "model", folds=1), scan(tmp_path / "scans")
    reader = NnunetReader(folder)
    data = reader.preprocessing({"image": [str(files[0])]})
    assert PROPERTIES in data
    once = reader.inferer
    twice = EnsembleInferer(once._inferer, [reader.members[0]] * 2, once.mirror_axes)
    methods = ["VanillaBackprop", "GradCam"]
    for a, b in zip(
        Explainer(reader.network, once)(data["image"][None], methods, [MultiClassMask(1)]),
        Explainer(reader.network, twice)(data["image"][None], methods, [MultiClassMask(1)]),
        strict=True,
    ):
        torch.testing.assert_close(a.map.as_tensor(), b.map.as_tensor(), rtol=1e-4, atol=1e-6)
