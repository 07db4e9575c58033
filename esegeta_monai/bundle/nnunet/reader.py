"""Read an nnU-Net v2 model folder: its plans, folds, preprocessing and windows, with nnU-Net's own code.

nnU-Net predicts ``P = 1/K Σ_k Σ_w ĝ_w · 1/M Σ_m T_m⁻¹ f_k(T_m x_w)`` over folds k, mirrored views m of each window and
windows w. `NnunetReader` gives the engine the same windows, weights, views and folds, so that maps are exact for the
whole volume.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from monai.transforms import Compose
from torch import Tensor, nn

from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.nnunet.cascade import PREVIOUS, FirstStageInput, previous_segmentation, sibling_folder
from esegeta_monai.bundle.nnunet.files import CHECKPOINT, PROPERTIES, is_nnunet_folder, nnunet_module
from esegeta_monai.bundle.nnunet.model import NnunetModel
from esegeta_monai.bundle.nnunet.prediction import NnunetPrediction, predict_case
from esegeta_monai.bundle.nnunet.preprocessing import NnunetPreprocessd
from esegeta_monai.bundle.nnunet.windows import NnunetWindows
from esegeta_monai.bundle.reader import BundleReader
from esegeta_monai.bundle.weights import WeightSource
from esegeta_monai.engine.head import Postprocessing
from esegeta_monai.engine.resampled import OUTPUT_GRID
from esegeta_monai.errors import NetworkError, UsageError
from esegeta_monai.explain.ensemble import EnsembleInferer
from esegeta_monai.utils.files import sha256_file

__all__ = ["NnunetReader"]

logger = logging.getLogger("esegeta_monai")


class NnunetReader(BundleReader):
    """A trained nnU-Net v2 model folder, with the interface of a bundle.

    Args:
        folder: the folder with ``plans.json``, ``dataset.json`` and ``fold_…/checkpoint_final.pth``.
        folds: numbers of the folds, or ``"all"``; None: all that are there.
        mirroring: use the mirrored views that the checkpoint allows, as nnU-Net does.
        device: device of the network.
        step: distance of windows in window sizes (``tile_step_size`` of nnU-Net).
        checkpoint: file name of the checkpoints.
        previous: for the second stage of a cascade: the model folder of the first stage, which then predicts with all
            its folds, or the folder of its segmentations, named as ``nnUNetv2_predict`` does; None: the model folder
            beside this one.

    Raises:
        UsageError: no such folder, fold or checkpoint; a damaged ``plans.json``; nnunetv2 is not installed.
        NetworkError: on use: a checkpoint holds code, or does not fit the plans.

    Example::

        reader = NnunetReader("Dataset001/nnUNetTrainer__nnUNetPlans__3d_fullres", folds=[0, 1])
        data = reader.preprocessing({"image": ["case_0000.nii.gz"]})
        given = reader.case_arguments(data["image"], data)
        explainer = Explainer(reader.network, reader.inferer, class_names=reader.class_names)
        maps = list(explainer(data["image"][None], ["Saliency"], ["MultiClassMask(1)"], **given))
    """

    def __init__(
        self,
        folder: str | Path,
        folds: Sequence[int] | str | None = None,
        mirroring: bool = True,
        device: str | torch.device = "cpu",
        step: float = 0.5,
        checkpoint: str = CHECKPOINT,
        previous: str | Path | None = None,
    ) -> None:
        self.bundle_dir = Path(folder).resolve()
        self.device, self.mirroring, self.step = torch.device(device), bool(mirroring), float(step)
        self.model = model = NnunetModel.read(self.bundle_dir, folds, checkpoint)
        self.config_files = (self.bundle_dir / "plans.json", self.bundle_dir / "dataset.json")
        self.plans, self.configuration, self.labels = model.plans, model.configuration, model.labels
        self.dataset, self.checkpoints, self.members = model.dataset, model.checkpoints, model.members
        self.mirror_axes = model.mirror_axes if self.mirroring else ()
        first, self.previous = self.configuration.previous_stage_name, None
        if first is None and previous is not None:
            raise UsageError(f"{self.bundle_dir.name} is no second stage of a cascade: leave out the previous stage")
        if first is not None:
            self.previous = sibling_folder(self.bundle_dir, first) if previous is None else Path(previous).resolve()
            if not self.previous.is_dir():
                raise UsageError(f"no folder of the previous stage at {previous}")
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
        find = nnunet_module("nnunetv2.utilities.find_objects").recursive_find_trainer_class_by_name
        count = nnunet_module("nnunetv2.utilities.label_handling.label_handling").determine_num_input_channels
        try:
            network = find(self.model.trainer).build_network_architecture(
                self.plans,
                self.configuration,
                count(self.plans, self.configuration, self.dataset),
                self.labels.num_segmentation_heads,
                enable_deep_supervision=False,
            )
            network.load_state_dict(self.members[0])
        except (AttributeError, ImportError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise NetworkError(f"{self.name}: the network of {self.model.trainer} cannot be built: {reason}") from error
        network = network.to(self.device).eval()
        return network if self.previous is None else FirstStageInput(network)

    @cached_property
    def inferer(self) -> EnsembleInferer:
        """nnU-Net's windows, folds and mirrored views."""
        patch, flat = tuple(self.configuration.patch_size), len(self.configuration.patch_size) == 2
        windows = self._windows(patch)
        axes = [axis + 1 if flat else axis for axis in self.mirror_axes]
        prefix = "" if self.previous is None else "network."
        members = [{prefix + name: value.to(self.device) for name, value in member.items()} for member in self.members]
        return EnsembleInferer(windows, members, axes)

    @cached_property
    def preprocessing(self) -> Compose:
        """nnU-Net's preprocessing as one transform that records the way back to the scan."""
        return Compose([NnunetPreprocessd(self.image_key, self.model, self._first_stage)])

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
            **({} if self.previous is None else {"previous_stage": self.previous.name}),
        }

    # -- nnU-Net's own prediction -----------------------------------------------------------------------------------

    def predict(self, image: Tensor, data: Mapping[Any, Any], path: Path | None = None) -> NnunetPrediction:
        """Predict with nnU-Net's own predictor and write its segmentation, as ``nnUNetv2_predict`` does.

        Args:
            image: the preprocessed image (C, *spatial).
            data: the data dictionary of the case, with nnU-Net's properties.
            path: file name without extension; the file gets that of the data set. None: write nothing.

        Raises:
            NetworkError: see `esegeta_monai.bundle.nnunet.prediction.predict_case`.
        """
        network, whole = self.network, torch.as_tensor(image).as_subclass(Tensor)
        if isinstance(network, FirstStageInput):
            network, whole = network.network, torch.cat([whole, data[PREVIOUS].to(whole)])
        return predict_case(
            self.model,
            network,
            whole,
            data[PROPERTIES],
            device=self.device,
            mirroring=self.mirroring,
            step=self.step,
            path=path,
        )

    def case_arguments(
        self, image: Tensor, data: Mapping[Any, Any], path: Path | None = None, *, predict: bool = True
    ) -> dict[str, Any]:
        """Return the arguments of `esegeta_monai.Explainer` for a case: nnU-Net's prediction, masks and first stage.

        Args:
            image: the preprocessed image (C, *spatial).
            data, path: see `predict`.
            predict: False: the explainer's own prediction is used, on the network's grid.
        """
        further = {"network_kwargs": {"condition": data[PREVIOUS][None]}} if self.previous is not None else {}
        if not predict:
            return {"data": data, **further}
        own = self.predict(image, data, path)
        record = own.masks.record
        logger.info(
            "nnU-Net's segmentation gives the masks, on the grid of the %s; sums in float32 give another class in %d "
            "of %d voxels",
            record["mask_grid"],
            record["voxels_of_another_class"],
            record["voxels"],
        )
        return {"data": {**data, OUTPUT_GRID: own.masks}, "prediction": own.logits[None], **further}

    def sample_condition(self, spatial: Sequence[int]) -> Tensor | None:
        """Return zeros in place of the first stage's segmentation, to run the network on noise (*spatial)."""
        return None if self.previous is None else torch.zeros(len(self.labels.foreground_labels), *spatial)

    # -- internals --------------------------------------------------------------------------------------------------

    def _windows(self, patch: tuple[int, ...]) -> NnunetWindows:
        """Return the windows of one fold and view."""
        return NnunetWindows(patch, self.step)

    @property
    def _first_stage(self) -> Callable[[list[str], Path], Path] | None:
        """Function from the files of a case to the first stage's segmentation; None: this is no second stage."""
        folder, ending = self.previous, self.dataset["file_ending"]
        if folder is None:
            return None
        if not is_nnunet_folder(folder):
            return lambda files, _: previous_segmentation(folder, files, ending)

        def predict(files: list[str], temporary: Path) -> Path:
            reader = NnunetReader(folder, None, self.mirroring, self.device, self.step)
            data = reader.preprocessing({reader.image_key: files})
            reader.predict(data[reader.image_key], data, temporary / "first")
            return temporary / f"first{reader.dataset['file_ending']}"

        return predict

    def _metadata(self) -> dict[str, Any]:
        channels, names = self.model.channel_names, self.model.class_names
        inputs = {"channel_def": dict(channels), "num_channels": len(channels)}
        return {
            "name": f"{self.bundle_dir.parent.name}_{self.model.configuration_name}",
            "task": self.dataset.get("description") or f"nnU-Net {self.model.configuration_name}",
            "network_data_format": {
                "inputs": {"image": inputs},
                "outputs": {"pred": {"channel_def": dict(enumerate(names))}},
            },
        }
