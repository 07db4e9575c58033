"""Tiny nnU-Net v2 model folders with random weights, and scans for them, made by nnU-Net's own classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

LABELS = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}


INTENSITIES = {"mean": 130.0, "std": 40.0, "percentile_00_5": 60.0, "percentile_99_5": 210.0}
"""Those of the training set, which the normalisation of CT uses."""
CT = {"normalization_schemes": ["CTNormalization"]}
ORDER3 = {"resampling_fn_probabilities_kwargs": RESAMPLING}
TORCH = {
    "resampling_fn_probabilities": "resample_torch_fornnunet",
    "resampling_fn_probabilities_kwargs": {"is_seg": False, "force_separate_z": False},
}


def plans(
    patch: Sequence[int],
    spacing: Sequence[float],
    transpose: Sequence[int],
    channels: int,
    name: str,
    residual: bool = False,
) -> dict[str, Any]:
    """Return the content of plans.json for a network of two resolutions."""
    dims = len(patch)
    kernel = [[3] * dims] * 2
    architecture: dict[str, Any] = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 2,
            "features_per_stage": [4, 8],
            "conv_op": f"torch.nn.modules.conv.Conv{dims}d",
            "kernel_sizes": kernel,
            "strides": [[1] * dims, [2] * dims],
            "n_conv_per_stage": [1, 1],
            "n_conv_per_stage_decoder": [1],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dims}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    if residual:
        architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
        architecture["arch_kwargs"]["n_blocks_per_stage"] = architecture["arch_kwargs"].pop("n_conv_per_stage")
    configuration = {
        "data_identifier": f"nnUNetPlans_{name}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(patch),
        "median_image_size_in_voxels": list(patch),
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [False] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": RESAMPLING,
        "resampling_fn_seg_kwargs": RESAMPLING | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities_kwargs": RESAMPLING | {"order": 1},
        "architecture": architecture,
        "batch_dice": False,
    }
    backward = [list(transpose).index(axis) for axis in range(3)]
    return {
        "dataset_name": "Dataset001_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": list(transpose),
        "transpose_backward": backward,
        "configurations": {name: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): INTENSITIES for i in range(channels)},
    }


def model_folder(
    root: Path,
    *,
    name: str = "3d_fullres",
    patch: Sequence[int] = (8, 10, 12),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    transpose: Sequence[int] = (0, 1, 2),
    channels: int = 1,
    labels: dict[str, Any] | None = None,
    folds: int = 2,
    mirror: Sequence[int] | None = (0, 1, 2),
    residual: bool = False,
    ending: str = ".nii.gz",
    changes: dict[str, Any] | None = None,
    dataset: str = "Dataset001_Tiny",
    trainer: str = "nnUNetTrainer",
    seed: int = 0,
    favoured: int | None = None,
    without_norm: bool = False,
) -> Path:
    """Write a model folder with random weights and return it.

    Args:
        changes: those of the configuration.
        favoured: a channel whose logits are raised, so that it is predicted in many voxels.
        without_norm: leave out the normalisation layers.
    """
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    labels = LABELS if labels is None else labels
    folder = root / dataset / f"{trainer}__nnUNetPlans__{name}"
    folder.mkdir(parents=True, exist_ok=True)
    content = plans(patch, spacing, transpose, channels, name, residual)
    content["configurations"][name] |= changes or {}
    if without_norm:
        architecture = content["configurations"][name]["architecture"]
        architecture["arch_kwargs"] |= {"norm_op": None, "norm_op_kwargs": None}
        architecture["_kw_requires_import"].remove("norm_op")
    description: dict[str, Any] = {
        "channel_names": {str(i): f"channel{i}" for i in range(channels)},
        "labels": labels,
        "numTraining": 3,
        "file_ending": ending,
    }
    if any(isinstance(label, list) for label in labels.values()):
        description["regions_class_order"] = [1, 2]
    (folder / "plans.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    manager = PlansManager(content)
    inputs = determine_num_input_channels(manager, name, description)
    heads = manager.get_label_manager(description).num_segmentation_heads
    for fold in range(folds):
        torch.manual_seed(100 * seed + fold)
        network = nnUNetTrainer.build_network_architecture(
            manager, manager.get_configuration(name), inputs, heads, enable_deep_supervision=False
        )
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            if favoured is not None:
                network.decoder.seg_layers[-1].bias[favoured] += 1.0
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": {},
            "grad_scaler_state": None,
            "logging": {"ema_fg_dice": [np.float64(0.5), np.float32(0.25)]},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {"plans": content, "configuration": name, "fold": fold, "dataset_json": description},
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": None if mirror is None else tuple(mirror),
        }
        (folder / f"fold_{fold}").mkdir()
        torch.save(checkpoint, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def scan(folder: Path, channels: int = 1, shape: Sequence[int] = (22, 19, 17), ending: str = ".nii.gz") -> list[Path]:
    """Write an oblique, anisotropic scan with a margin of zeros, one file per channel, by nibabel or SimpleITK."""
    angle = 0.2
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([1.0, 1.2, 1.5])
    affine[:3, 3] = [-10, 5, 30]
    random = np.random.default_rng(0)
    files = []
    folder.mkdir(exist_ok=True)
    for channel in range(channels):
        values = np.zeros(shape, np.float32)
        inner = tuple(slice(2, n - 1) for n in shape)
        grid = np.meshgrid(*(np.linspace(-1, 1, n - 3) for n in shape), indexing="ij")
        values[inner] = 100 + 50 * grid[0] + 20 * grid[1] * grid[2] + 30 * random.random(grid[0].shape)
        path = folder / f"case_{channel:04d}{ending}"
        files.append(path)
        if ending != ".nii.gz":
            import SimpleITK

            picture = SimpleITK.GetImageFromArray(values.transpose(2, 1, 0))
            lps = np.diag([-1.0, -1.0, 1.0]) @ affine[:3]
            picture.SetSpacing(np.linalg.norm(lps[:, :3], axis=0).tolist())
            picture.SetDirection((lps[:, :3] / np.linalg.norm(lps[:, :3], axis=0)).ravel().tolist())
            picture.SetOrigin(lps[:, 3].tolist())
            SimpleITK.WriteImage(picture, str(path))
            continue
        image = nib.Nifti1Image(values, affine)
        image.set_sform(affine, 1)
        image.set_qform(affine, 1)
        nib.save(image, path)
    return files
