"""Read an nnU-Net v2 model folder: its plans, folds, preprocessing and windows, with nnU-Net's own code.

nnU-Net predicts ``P = 1/K Σ_k Σ_w ĝ_w · 1/M Σ_m T_m⁻¹ f_k(T_m x_w)`` over folds k, mirrored views m of each window and
windows w. `NnunetReader` gives the engine the same windows, weights, views and folds, so that maps are exact for the
whole volume.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import pickle
import re
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel as nib
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform, Orientation, Resize, SpatialCrop
from torch import Tensor, nn

from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.bundle.weights import WeightSource
from esegeta_monai.engine.head import Postprocessing
from esegeta_monai.engine.windows.plan import WindowPlan
from esegeta_monai.errors import InputError, NetworkError, UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.files.scans import read_scan
from esegeta_monai.utils.files import sha256_file

__all__ = ["NnunetPreprocessd", "NnunetReader", "NnunetWindows", "is_nnunet_folder"]

CHECKPOINT = "checkpoint_final.pth"
_RAS = (("L", "R"), ("P", "A"), ("I", "S"))
PROPERTIES = "nnunet_properties"
"""Key of nnU-Net's properties of a case in the data dictionary."""


def is_nnunet_folder(folder: str | Path) -> bool:
    """Return True if a folder has the plans, data set description and a fold of a trained nnU-Net v2 model."""
    root = Path(folder)
    return (root / "plans.json").is_file() and (root / "dataset.json").is_file() and any(root.glob("fold_*"))


class NnunetReader(BundleReader):
    """A trained nnU-Net v2 model folder, with the interface of a bundle.

    Args:
        folder: the folder with ``plans.json``, ``dataset.json`` and ``fold_…/checkpoint_final.pth``.
        folds: numbers of the folds, or ``"all"``; None: all that are there.
        mirroring: use the mirrored views that the checkpoint allows, as nnU-Net does.
        device: device of the network.
        step: distance of windows in window sizes (``tile_step_size`` of nnU-Net).
        checkpoint: file name of the checkpoints.

    Raises:
        UsageError: no such folder, fold or checkpoint; a damaged ``plans.json``; nnunetv2 is not installed.
        NetworkError: on use: a checkpoint holds code, or does not fit the plans.

    Example::

        reader = NnunetReader("Dataset001/nnUNetTrainer__nnUNetPlans__3d_fullres", folds=[0, 1])
        data = reader.preprocessing({"image": ["case_0000.nii.gz"]})
        maps = list(Explainer(reader.network, reader.inferer)(data["image"][None], ["Saliency"], ["MultiClassMask(1)"]))
    """

    def __init__(
        self,
        folder: str | Path,
        folds: Sequence[int] | str | None = None,
        mirroring: bool = True,
        device: str | torch.device = "cpu",
        step: float = 0.5,
        checkpoint: str = CHECKPOINT,
    ) -> None:
        self.bundle_dir = Path(folder).resolve()
        if not self.bundle_dir.is_dir():
            raise UsageError(f"no nnU-Net folder at {folder}: there is no such folder")
        self.device, self.mirroring, self.step = torch.device(device), bool(mirroring), float(step)
        self.config_files = (self.bundle_dir / "plans.json", self.bundle_dir / "dataset.json")
        plans, dataset = (_object(file) for file in self.config_files)
        self.checkpoints = self._checkpoints(folds, checkpoint)
        managers = _nnunet("nnunetv2.utilities.plans_handling.plans_handler")
        self.dataset: dict[str, Any] = dataset
        states = [_checkpoint(file) for file in self.checkpoints]
        try:
            self.plans = managers.PlansManager(plans)
            self.trainer, self.configuration_name = states[0]["trainer_name"], states[0]["init_args"]["configuration"]
            self.configuration = self.plans.get_configuration(self.configuration_name)
            self.labels = self.plans.get_label_manager(dataset)
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{self.bundle_dir.name}: plans.json, dataset.json and checkpoints do not fit each other or are "
                f"incomplete ({type(error).__name__}: {error})"
            ) from error
        self.members: list[dict[str, Tensor]] = [state["network_weights"] for state in states]
        axes = states[0].get("inference_allowed_mirroring_axes")
        self.mirror_axes = tuple(axes or ()) if self.mirroring else ()
        if self.configuration.previous_stage_name is not None:
            raise UsageError(
                f"{self.bundle_dir.name} is the second stage of a cascade, which also reads the first stage's "
                "segmentation: explain the first stage, or another configuration"
            )
        self.metadata = BundleMetadata(self._metadata())

    def __repr__(self) -> str:
        return f"NnunetReader({self.name!r}, folds={[file.parent.name for file in self.checkpoints]})"

    # -- what the engine needs ------------------------------------------------------------------------------------

    @cached_property
    def network(self) -> nn.Module:
        """The network of the first fold, on `device`, in evaluation mode; `inferer` has the weights of all folds.

        Raises:
            NetworkError: it cannot be built, or weights do not fit.
        """
        find = _nnunet("nnunetv2.utilities.find_objects").recursive_find_trainer_class_by_name
        count = _nnunet("nnunetv2.utilities.label_handling.label_handling").determine_num_input_channels
        try:
            network = find(self.trainer).build_network_architecture(
                self.plans,
                self.configuration,
                count(self.plans, self.configuration, self.dataset),
                self.labels.num_segmentation_heads,
                enable_deep_supervision=False,
            )
            network.load_state_dict(self.members[0])
        except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise NetworkError(f"{self.name}: the network of {self.trainer} cannot be built: {reason}") from error
        return network.to(self.device).eval()

    @cached_property
    def inferer(self) -> EnsembleInferer:
        """nnU-Net's windows, folds and mirrored views."""
        patch, flat = tuple(self.configuration.patch_size), len(self.configuration.patch_size) == 2
        windows = NnunetWindows(patch, self.step)
        axes = [axis + 1 if flat else axis for axis in self.mirror_axes]
        members = [{name: value.to(self.device) for name, value in member.items()} for member in self.members]
        return EnsembleInferer(windows, members, axes)

    @cached_property
    def preprocessing(self) -> Compose:
        """nnU-Net's preprocessing as one transform that records the way back to the scan."""
        return Compose([NnunetPreprocessd(self.image_key, self)])

    @cached_property
    def postprocessing(self) -> Compose:
        """Empty: nnU-Net exports its own segmentation, see `predict`."""
        return Compose([])

    @cached_property
    def amp(self) -> bool:
        """True: on CUDA nnU-Net predicts under autocast."""
        return True

    @cached_property
    def image_key(self) -> str:
        """The key of the image in the data dictionary."""
        return "image"

    @cached_property
    def weight_source(self) -> WeightSource:
        """The checkpoint of the first fold."""
        return WeightSource(self.checkpoints[0], ", ".join(file.parent.name for file in self.checkpoints))

    @cached_property
    def output_use(self) -> Postprocessing:
        """Overlapping regions, each a sigmoid of its own, or exclusive classes."""
        if self.labels.has_regions:
            return Postprocessing("sigmoid", thresholds=(0.5,))
        return Postprocessing("softmax", argmax=True)

    @property
    def roi(self) -> tuple[int, ...]:
        """Shape of a window: that of a slice for a 2D configuration."""
        patch = tuple(self.configuration.patch_size)
        return (1, *patch) if len(patch) == 2 else patch

    def has(self, part: str) -> bool:
        """Return True for the parts that a model folder has."""
        return part in ("network", "inferer", "preprocessing", "amp")

    def importable(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """A model folder has no code of its own to import."""
        return nullcontext()

    @property
    def provenance(self) -> dict[str, Any]:
        """Name, and the SHA-256 of plans, data set description and checkpoints."""
        return {
            "bundle": self.name,
            "bundle_version": None,
            "configs_sha256": {file.name: sha256_file(file) for file in self.config_files},
            "folds": {file.parent.name: sha256_file(file) for file in self.checkpoints},
            "mirror_axes": list(self.mirror_axes),
        }

    # -- nnU-Net's own prediction -----------------------------------------------------------------------------------

    def predict(self, image: Tensor, data: Mapping[Any, Any], path: Path) -> Tensor:
        """Predict with nnU-Net's own predictor and write its segmentation, as ``nnUNetv2_predict`` does.

        Args:
            image: the preprocessed image (C, *spatial).
            data: the data dictionary of the case, with nnU-Net's properties.
            path: file name without extension; the file gets that of the data set.

        Returns:
            Logits (K, *spatial) on the network's grid, which nnU-Net sums in float16.
        """
        predictor_class = _nnunet("nnunetv2.inference.predict_from_raw_data").nnUNetPredictor
        export = _nnunet("nnunetv2.inference.export_prediction").export_prediction_from_logits
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it chooses
            predictor = predictor_class(
                self.step, True, self.mirroring, self.device.type == "cuda", self.device, allow_tqdm=False
            )
        predictor.manual_initialization(
            copy.deepcopy(self.network),
            self.plans,
            self.configuration,
            self.members,
            self.dataset,
            self.trainer,
            self.mirror_axes or None,
        )
        plain = torch.as_tensor(image).as_subclass(Tensor).cpu()
        logits = predictor.predict_logits_from_preprocessed_data(plain)
        path.parent.mkdir(parents=True, exist_ok=True)
        export(logits.clone(), dict(data[PROPERTIES]), self.configuration, self.plans, self.dataset, str(path))
        return logits.float()

    # -- internals --------------------------------------------------------------------------------------------------

    def _checkpoints(self, folds: Sequence[int] | str | None, name: str) -> list[Path]:
        there = {
            file.parent.name.removeprefix("fold_"): file for file in sorted(self.bundle_dir.glob(f"fold_*/{name}"))
        }
        if folds is None:
            wanted = [fold for fold in there if fold != "all"] or list(there)
        else:
            wanted = [folds] if isinstance(folds, str) else [str(fold) for fold in folds]
        missing = [fold for fold in wanted if fold not in there]
        if missing or not wanted:
            raise UsageError(
                f"{self.bundle_dir.name} has no {name} in fold {', '.join(missing) or '0'}; there are folds: "
                f"{', '.join(there) or 'none'}"
            )
        return [there[fold] for fold in wanted]

    def _metadata(self) -> dict[str, Any]:
        channels = self.dataset.get("channel_names") or self.dataset.get("modality") or {}
        labels = self.dataset["labels"]
        if self.labels.has_regions:
            names = [name for name, label in labels.items() if name != "ignore" and label not in (0, [0])]
        else:
            names = [name for name, label in sorted(labels.items(), key=lambda item: item[1]) if name != "ignore"]
        inputs = {"channel_def": dict(channels), "num_channels": len(channels)}
        return {
            "name": f"{self.bundle_dir.parent.name}_{self.configuration_name}",
            "task": self.dataset.get("description") or f"nnU-Net {self.configuration_name}",
            "network_data_format": {
                "inputs": {"image": inputs},
                "outputs": {"pred": {"channel_def": dict(enumerate(names))}},
            },
        }


class NnunetWindows:
    """nnU-Net's windows: evenly spaced, with its Gaussian weights in float16.

    Args:
        patch: window size; two numbers for a 2D configuration, which sees one slice of the first axis at a time.
        step: distance of windows in window sizes.
    """

    def __init__(self, patch: Sequence[int], step: float = 0.5) -> None:
        self.patch, self.step = tuple(int(n) for n in patch), float(step)

    def declared_windows(self, spatial_shape: Sequence[int], dtype: torch.dtype) -> WindowPlan:
        """Return the windows of a volume; a volume smaller than a window is padded by zeros on both sides."""
        sliding = _nnunet("nnunetv2.inference.sliding_window_prediction")
        shape, flat = tuple(int(n) for n in spatial_shape), len(self.patch) == 2
        roi = (1, *self.patch) if flat and len(shape) == 3 else self.patch
        missing = [max(r - n, 0) for r, n in zip(roi, shape)]
        padded = tuple(n + m for n, m in zip(shape, missing))
        axes = padded[1:] if len(roi) > len(self.patch) else padded
        starts = sliding.compute_steps_for_sliding_window(axes, self.patch, self.step)
        if len(roi) > len(self.patch):
            starts = [list(range(padded[0])), *starts]
        gaussian = sliding.compute_gaussian(
            self.patch, sigma_scale=1.0 / 8, value_scaling_factor=10, device=torch.device("cpu")
        )
        return WindowPlan(
            shape,
            roi,
            tuple(tuple(slice(a, a + r) for a, r in zip(start, roi)) for start in itertools.product(*starts)),
            tuple((m // 2, m - m // 2) for m in missing),
            importance=gaussian.reshape(roi).to(dtype),
            slice_axis=0 if len(roi) > len(self.patch) else None,
        )

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Not used: the engine blends the windows itself."""
        raise NetworkError("nnU-Net's windows are blended by the engine; give the inferer of NnunetReader")


class NnunetPreprocessd(MapTransform):
    """nnU-Net's own reading and preprocessing, with a trace that brings maps back to the scan's grid.

    Args:
        keys: the key of the file names, one per channel; it becomes the image (C, *spatial).
        reader: the model folder.
    """

    def __init__(self, keys: str, reader: NnunetReader) -> None:
        super().__init__(keys)
        self.reader = reader

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Preprocess the files of one case.

        Raises:
            InputError: nnU-Net cannot read them, or its grid is not that of the scan.
        """
        result = dict(data)
        for key in self.key_iterator(result):
            files = [str(f) for f in ([data[key]] if isinstance(data[key], (str, Path)) else data[key])]
            result[key], result[PROPERTIES] = self._preprocess(files)
        return result

    def _preprocess(self, files: list[str]) -> tuple[MetaTensor, dict[str, Any]]:
        reader = self.reader
        wanted = len(reader.channel_names)
        if len(files) != wanted:
            names = ", ".join(reader.channel_names.values())
            raise InputError(f"{len(files)} file(s) for {wanted} channel(s) ({names}): give one file for each")
        preprocessor = reader.configuration.preprocessor_class(verbose=False)
        values, _, properties = preprocessor.run_case(files, None, reader.plans, reader.configuration, reader.dataset)
        image = torch.as_tensor(values).float()
        return self._traced(image, properties, read_scan(files[0])), properties

    def _traced(self, image: Tensor, properties: Mapping[str, Any], scan: MetaTensor) -> MetaTensor:
        """Return the image with the trace of nnU-Net's transpose, crop and resampling, from the scan's grid."""
        way: Any = scan[:1].clone()
        order = [2 - axis for axis in self.reader.plans.transpose_forward]  # nnU-Net reads (z, y, x)
        if "Reorient" in self.reader.plans.image_reader_writer_class.__name__:
            codes: tuple[str, ...] = ("R", "A", "S")
        else:
            codes = nib.aff2axcodes(way.affine.numpy())
        way = Orientation(axcodes="".join(codes[axis] for axis in order), labels=_RAS)(way)
        if tuple(way.shape[1:]) != tuple(properties["shape_before_cropping"]):
            raise InputError(
                f"nnU-Net reads the scan as {tuple(properties['shape_before_cropping'])}, and its axes give "
                f"{tuple(way.shape[1:])}: the axes of the file are ambiguous (an affine with shears); resample it"
            )
        box = properties["bbox_used_for_cropping"]
        way = SpatialCrop(roi_start=[b[0] for b in box], roi_end=[b[1] for b in box])(way)
        way = Resize(image.shape[1:], mode="trilinear", align_corners=False)(way)
        return MetaTensor(image, meta=way.meta, applied_operations=way.applied_operations)


def _nnunet(module: str) -> Any:
    """Import a module of nnunetv2.

    Raises:
        UsageError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"nnU-Net folders need the package nnunetv2 ({error}): pip install 'esegeta-monai[nnunet]'"
        ) from error


def _object(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UsageError: there is no such file, or it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file.parent.name}/{file.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{file.parent.name}/{file.name} must contain a JSON object")
    return content


def _checkpoint(file: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold.

    Raises:
        NetworkError: it holds other objects than weights and numbers, or is damaged.
    """
    import numpy as np

    allowed: list[Any] = [np.dtype, np.ndarray, *{type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "?")}]
    scalar = np.float64(0).__reduce__()[0]
    rebuild = np.zeros(1).__reduce__()[0]
    for function, name in ((scalar, "scalar"), (rebuild, "_reconstruct")):
        allowed += [(function, f"{module}.multiarray.{name}") for module in ("numpy.core", "numpy._core")]
    try:
        with torch.serialization.safe_globals(allowed):
            state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        if code := re.search(r"GLOBAL (\S+)", reason):
            reason = f"it refers to {code[1]}, which is code and no weight; it was not loaded"
        raise NetworkError(f"{file.parent.name}/{file.name} cannot be read as weights: {reason[:200]}") from error
    if not isinstance(state, dict) or not {"network_weights", "trainer_name", "init_args"} <= set(state):
        raise NetworkError(f"{file.parent.name}/{file.name} is no checkpoint of nnU-Net v2")
    return state
