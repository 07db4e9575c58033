"""Small synthetic inputs for every bundle of MONAI's Model Zoo, in the layout that the bundle expects.

Each function writes files below a folder and returns the options with their paths. No bundle is edited.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

__all__ = ["RECIPES", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Input and settings for the run of one bundle.

    Attributes:
        data: writes the input below a folder and returns the options (id to value) with its path.
        needs: overrides that the bundle itself needs to run on this MONAI; ``needs_why`` is the reason.
        speed: overrides that make it small enough for a laptop; ``speed_why`` is the reason.
        options: further options of the overlay, besides methods and target.
        methods: methods that explain it.
        crop: changes for the check on a crop.
        gigabytes: approximate memory; the run waits until it is free.
        cause: reason why no map can be computed at all.
        why: reason of a failure that the last line of the log does not show.
    """

    data: Callable[[Path], dict[str, Any]] = lambda folder: {}
    needs: dict[str, Any] = field(default_factory=dict)
    needs_why: str = ""
    speed: dict[str, Any] = field(default_factory=dict)
    speed_why: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    methods: str = "Saliency"
    crop: dict[str, Any] = field(default_factory=dict)
    gigabytes: float = 2
    cause: str = ""
    why: str = ""


def body(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Return an array of ``shape``: smooth texture in an ellipsoid, surrounded by air; values 0 to 1."""
    rng = np.random.default_rng(seed)
    texture = gaussian_filter(rng.normal(size=shape), 2.0)
    texture = 0.5 + 0.2 * texture / texture.std()
    axes = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return np.clip(texture, 0.05, 1) * (sum(a**2 for a in axes) < 0.9)


def scan(
    file: Path,
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    hounsfield: bool = True,
    seed: int = 0,
) -> str:
    """Write a NIfTI volume with axes left, posterior, superior and a shifted origin; ``spacing`` in mm."""
    file.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = (40.0, 30.0, -20.0)
    values = body(shape, seed)
    values = values * 400 - 200 if hounsfield else values * 1000
    image = nib.Nifti1Image(values.astype(np.int16), affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    nib.save(image, file)
    return str(file)


def picture(file: Path, size: tuple[int, int], channels: int = 3, seed: int = 0) -> str:
    """Write a PNG or JPEG of ``size`` (width, height)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    planes = [body((size[1], size[0]), seed + i) for i in range(channels)]
    values = (np.stack(planes, -1) if channels > 1 else planes[0]) * 255
    Image.fromarray(values.astype(np.uint8)).save(file)
    return str(file)


def scans_in(below: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], **options: Any) -> Callable:
    """Return a function that writes one scan into the folder `dataset_dir`."""

    def make(folder: Path) -> dict[str, Any]:
        scan(folder / below / "case_1.nii.gz", shape, spacing, **options)
        return {"dataset_dir": str(folder)}

    return make


def datalist(key: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], **options: Any) -> Callable:
    """Return a function that writes one scan and a Decathlon list."""

    def make(folder: Path) -> dict[str, Any]:
        file = scan(folder / "case_1.nii.gz", shape, spacing, **options)
        (folder / "list.json").write_text(json.dumps({key: [{"image": file}]}), encoding="utf-8")
        return {"data_list_file_path": str(folder / "list.json"), "dataset_dir": str(folder)}

    return make


def listed_files(folder: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    (folder / "samples.json").write_text(json.dumps(entries), encoding="utf-8")
    return {"test_json": str(folder / "samples.json")}


def classification_template(folder: Path) -> dict[str, Any]:
    return listed_files(folder, [{"image": picture(folder / "a.png", (128, 128), 1), "label": 1}])


def mammogram(folder: Path) -> dict[str, Any]:
    entry = {"image": picture(folder / "a.jpg", (320, 400)), "label": [1, 0, 0, 0]}
    (folder / "samples.json").write_text(json.dumps({"Test": [entry]}), encoding="utf-8")
    return {"data#filename": str(folder / "samples.json")}


def endoscopic_inbody(folder: Path) -> dict[str, Any]:
    return listed_files(folder, [{"image": picture(folder / "a.jpg", (320, 240)), "label": 1}])


def endoscopic_tool(folder: Path) -> dict[str, Any]:
    picture(folder / "test" / "a" / "frame_1.jpg", (320, 240))
    return {"dataset_dir": str(folder)}


def mednist(folder: Path) -> dict[str, Any]:
    for i in range(2):
        picture(folder / f"{i}.jpeg", (64, 64), 1, seed=i)
    return {"datalist": [str(folder / f"{i}.jpeg") for i in range(2)]}


def nuclei(folder: Path) -> dict[str, Any]:
    picture(folder / "Test" / "Images" / "a.png", (128, 128))
    mask = np.zeros((128, 128), np.uint8)
    mask[50:70, 55:80] = 1
    (folder / "Test" / "Labels").mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(folder / "Test" / "Labels" / "a.png")
    return {"dataset_dir": str(folder)}


def clicks(folder: Path) -> dict[str, Any]:
    picture(folder / "Test" / "Images" / "a.png", (256, 256))
    (folder / "Test" / "Centroids").mkdir(parents=True, exist_ok=True)
    (folder / "Test" / "Centroids" / "a.txt").write_text(json.dumps([[100, 120]]), encoding="utf-8")
    return {"dataset_dir": str(folder)}


def hovernet(folder: Path) -> dict[str, Any]:
    picture(folder / "a.png", (200, 164))
    return {"dataset_dir": str(folder)}


def four_mr_sequences(folder: Path) -> dict[str, Any]:
    files = [
        scan(folder / f"case_1_{name}.nii.gz", (64, 64, 48), (1.0, 1.0, 1.0), hounsfield=False, seed=i)
        for i, name in enumerate(("t1ce", "t1", "t2", "flair"))
    ]
    (folder / "list.json").write_text(json.dumps({"testing": [{"image": files}]}), encoding="utf-8")
    return {"data_list_file_path": str(folder / "list.json"), "dataset_dir": str(folder)}


def pediatric(folder: Path) -> dict[str, Any]:
    file = scan(folder / "case_1.nii.gz", (88, 88, 88), (1.6, 1.6, 3.2))
    (folder / "list.json").write_text(json.dumps({"validation": [{"image": file}]}), encoding="utf-8")
    return {"data_list_file_path": str(folder / "list.json")}


def prostate(folder: Path) -> dict[str, Any]:
    scan(folder / "train" / "t2.nii.gz", (68, 68, 30), (0.7, 0.7, 1.6), hounsfield=False)
    (folder / "test.csv").write_text("ID,t2\n1,train/t2.nii.gz\n", encoding="utf-8")
    return {"dataset_dir": f"{folder}/"}


def kidney_phases(folder: Path) -> dict[str, Any]:
    for i, name in enumerate(("12", "22-", "32-", "merged")):
        scan(folder / "case_1" / f"{name}.nii.gz", (84, 84, 84), (0.9, 0.9, 0.9), seed=i)
    return {"dataset_dir": str(folder)}


def vista3d(folder: Path) -> dict[str, Any]:
    file = scan(folder / "case_1.nii.gz", (80, 80, 80), (1.6, 1.6, 1.6))
    return {"input_dict": {"image": file, "label_prompt": [3]}}


def vista2d(folder: Path) -> dict[str, Any]:
    return {"input_dict": {"image": picture(folder / "a.png", (256, 256))}}


def lungs(folder: Path) -> dict[str, Any]:
    file = scan(folder / "case_1.nii.gz", (64, 64, 32), (0.703125, 0.703125, 1.25))
    entry = {"image": file, "box": [[10.0, 10.0, 10.0, 6.0, 6.0, 6.0]], "label": [0]}
    (folder / "list.json").write_text(json.dumps({"validation": [entry]}), encoding="utf-8")
    return {"data_list_file_path": str(folder / "list.json"), "dataset_dir": str(folder)}


def valves(folder: Path) -> dict[str, Any]:
    file = folder / "case_1.nii.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    values = np.stack([body((256, 256), i) * 1000 for i in range(3)], -1)[:, :, None, :]
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([1.4, 1.4, 8.0, 1.0])), file)
    return {"dataset_dir": str(folder)}


def slide(folder: Path) -> dict[str, Any]:
    (folder / "testing" / "images").mkdir(parents=True, exist_ok=True)
    picture(folder / "testing" / "images" / "a.png", (512, 512)).replace(".png", ".tif")
    Image.open(folder / "testing" / "images" / "a.png").save(folder / "testing" / "images" / "a.tif")
    (folder / "testing.csv").write_text("a\n", encoding="utf-8")
    return {"dataset_dir": str(folder), "testing_file": str(folder / "testing.csv")}


def searched(folder: Path) -> dict[str, Any]:
    """Write a Decathlon list, and an architecture file of DiNTS' search (which is part of the missing weights)."""
    options = datalist("testing", (64, 64, 64), (1.5, 1.5, 1.5))(folder)
    edges = np.ones((12, 10), np.int64)  # all paths are used, each with the first convolution
    code = {"arch_code_a": edges, "arch_code_c": edges, "node_a": np.ones((13, 4), np.int64)}
    torch.save(code, folder / "architecture.pt")
    return {**options, "arch_ckpt_path": str(folder / "architecture.pt")}


GENERATIVE = "generates images from noise: there is no input image to explain"

SEARCHED = "the searched architecture is part of the missing weights; a synthetic one fails or needs too much memory"

RECIPES: dict[str, Recipe] = {
    "brats_mri_axial_slices_generative_diffusion": Recipe(cause=GENERATIVE),
    "brats_mri_generative_diffusion": Recipe(cause=GENERATIVE),
    "maisi_ct_generative": Recipe(cause=GENERATIVE),
    "mednist_gan": Recipe(cause=GENERATIVE),
    "brats_mri_segmentation": Recipe(
        four_mr_sequences,
        methods="Occlusion(window=(32, 64, 48))",  # forward passes only: a backward pass of its window needs 15 GB
        crop={"overrides": {"inferer#roi_size": [64, 64, 48]}},
        gigabytes=4,
    ),
    "breast_density_classification": Recipe(mammogram),
    "classification_template": Recipe(classification_template),
    "endoscopic_inbody_classification": Recipe(endoscopic_inbody),
    "endoscopic_tool_segmentation": Recipe(endoscopic_tool),
    "lung_nodule_ct_detection": Recipe(
        lungs,
        why="boxes after non-maximum suppression, which has no gradient: no voxel-wise prediction to explain; in the "
        "bundle's run the handler records a named error and the run continues",
    ),
    "mednist_reg": Recipe(mednist),
    "multi_organ_segmentation": Recipe(
        searched,
        needs={
            "arch_ckpt": "$torch.load(@arch_ckpt_path, map_location=@device, weights_only=False)",
            "dints_space#device": "$@device",
        },
        needs_why="it uses cuda on every device, and its architecture file contains NumPy arrays",
        speed={"inferer#roi_size": [64, 64, 64]},
        speed_why="windows of 64x64x64 instead of 96x96x96",
        gigabytes=6,
        why=SEARCHED,
    ),
    "pancreas_ct_dints_segmentation": Recipe(
        searched,
        needs={
            "arch_ckpt": "$torch.load(@arch_ckpt_path, map_location=@device, weights_only=False)",
            "dints_space#device": "$@device",
        },
        needs_why="it uses cuda on every device, and its architecture file contains NumPy arrays",
        speed={"inferer#roi_size": [64, 64, 64]},
        speed_why="windows of 64x64x64 instead of 96x96x96",
        gigabytes=6,
        why=SEARCHED,
    ),
    "pathology_nuclei_classification": Recipe(nuclei),
    "pathology_nuclei_segmentation_classification": Recipe(
        hovernet,
        gigabytes=5,
        why="the gradient equals autograd, but the bundle ends in `SaveImage` without any overlay (MONAI 1.6.1)",
    ),
    "pathology_nuclick_annotation": Recipe(clicks),
    "pathology_tumor_detection": Recipe(
        slide,
        needs={"wsi_reader": "TiffFile"},
        needs_why="cuCIM is not available without an NVIDIA driver",
        why="needs cuCIM and a whole-slide pyramid with level 6; the synthetic picture has one level",
    ),
    "pediatric_abdominal_ct_segmentation": Recipe(pediatric, gigabytes=5),
    "prostate_mri_anatomy": Recipe(prostate),
    "renalStructures_CECT_segmentation": Recipe(kidney_phases, gigabytes=6),
    "renalStructures_UNEST_segmentation": Recipe(scans_in(".", (87, 87, 87), (1.1, 1.1, 1.1)), gigabytes=4),
    "segmentation_template": Recipe(scans_in(".", (64, 72, 48), (1.0, 1.0, 1.5))),
    "spleen_ct_segmentation": Recipe(scans_in("imagesTs", (100, 88, 88), (1.6, 1.6, 2.1))),
    "spleen_deepedit_annotation": Recipe(
        scans_in("imagesTs", (100, 90, 80), (1.6, 1.6, 2.1)), crop={"size": (64, 64, 64)}, gigabytes=7
    ),
    "swin_unetr_btcv_segmentation": Recipe(
        scans_in("imagesTs", (88, 88, 88), (1.6, 1.6, 2.1)),
        needs={"network_def": {"_target_": "SwinUNETR", "in_channels": 1, "out_channels": 14, "feature_size": 48}},
        needs_why="SwinUNETR's img_size was removed in MONAI 1.5",
        gigabytes=6,
    ),
    "valve_landmarks": Recipe(valves),
    "ventricular_short_axis_3label": Recipe(scans_in(".", (256, 256, 4), (1.4, 1.4, 8.0), hounsfield=False)),
    "vista2d": Recipe(vista2d, why="needs a second checkpoint (SAM, `sam_vit_b_01ec64.pth`), which is missing"),
    "vista3d": Recipe(
        vista3d,
        gigabytes=11,
        crop={"kwargs": {"class_vector": [[3]], "point_coords": None, "point_labels": None}, "sigmoid": True},
    ),
    "wholeBody_ct_segmentation": Recipe(scans_in("imagesTs", (87, 87, 87), (1.6, 1.6, 1.6)), gigabytes=7),
    "wholeBrainSeg_Large_UNEST_segmentation": Recipe(
        scans_in(".", (96, 96, 96), (1.0, 1.0, 1.0), hounsfield=False), gigabytes=5
    ),
}
