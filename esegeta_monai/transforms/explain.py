"""Transforms that add attribution maps to the data dictionary: the interface of the `Explainer` for pipelines."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from monai.utils import TransformBackends
from torch import nn
from torch.utils.data import get_worker_info

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.explain.explainer import Attribution, Explainer
from esegeta_monai.explain.record import Record
from esegeta_monai.methods.base import METHODS
from esegeta_monai.output.place import PlaceChecks
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.targets.classes import PredictedClasses
from esegeta_monai.utils.files import strict_json
from esegeta_monai.utils.names import check_clashes, distinct_names, safe_name
from esegeta_monai.utils.whole_files import check_sources

__all__ = ["Explain", "ExplainD", "ExplainDict", "Explaind"]

logger = logging.getLogger("esegeta_monai")


class Explain(Transform):
    """Transform that returns the attribution maps of an image by name: ``"{target}_{Method}"``.

    The names are those of the targets and methods. If several have the same kind, their names include the parameters
    that differ (`names` lists them). A target with several classes (`PredictedClasses`, ``ClassScore(top_k=3)``) gives
    one map per class, ``"{target}-{class}_{Method}"``; these names are known only after the prediction.

    Each map is a MetaTensor (C, *spatial) with the image's affine and trace, so that `InvertAttributiond` brings
    additive maps back to the scan's grid, and MONAI's ``Invertd`` the others. Its record is JSON text in
    ``meta["record"]``, because data loaders cannot collate arbitrary dictionaries. If the image comes from a file, its
    place is compared with the file's contents (`esegeta_monai.files.grids.geometry.check_geometry`); a map that would
    come back to another place, or an image without metadata, gives a warning in the log and in the record.

    Args:
        network: the network; its weights may be loaded later.
        inferer, device, amp: see `Explainer`.
        methods: names, configs or instances; default Saliency and GradCam.
        targets: names, configs or instances; None: every predicted class except the background.
        explainer: further options of `Explainer` (``class_names``, ``seed``, ``output``, ``on_error``, …).

    Raises:
        UsageError: an unknown name or parameter, equal names, or a CUDA device in a forked DataLoader worker.
        EsegetaError: any failure, see `Explainer`; with ``on_error="record"``, the map is left out instead.

    Example:
        >>> network = nn.Conv2d(1, 2, 3, padding=1)
        >>> explain = Explain(network, methods=["Saliency"], targets=["MultiClassMask(0)", "MultiClassMask(1)"])
        >>> explain.names
        ['MultiClassMask-class_index0_Saliency', 'MultiClassMask-class_index1_Saliency']
    """

    backend = [TransformBackends.TORCH]  # noqa: RUF012 - as in all transforms of MONAI

    def __init__(
        self,
        network: nn.Module,
        inferer: Any = None,
        methods: Any = ("Saliency", "GradCam"),
        targets: Any = None,
        device: torch.device | str | None = None,
        amp: bool = False,
        **explainer: Any,
    ) -> None:
        if not isinstance(network, nn.Module):
            raise UsageError(
                f"network is a {type(network).__name__}: give the module itself (in a config '@network'; from a "
                "bundle's folder esegeta_monai.bundle.BundleReader(folder).network)"
            )
        self.methods = METHODS.create_all(methods)
        self.targets: list[Target] = [PredictedClasses()] if targets is None else TARGETS.create_all(targets)
        self.explainer = Explainer(network, inferer, device, amp, **explainer)
        self.checks = bool(getattr(self.explainer.settings, "checks", True))
        self._method_names, self._target_names = distinct_names(self.methods), distinct_names(self.targets)
        check_clashes([], self._target_names, self._method_names)

    @property
    def names(self) -> list[str]:
        """The names of the maps, targets outermost; without names that depend on the prediction."""
        fixed = [name for name, target in zip(self._target_names, self.targets) if not _several(target)]
        return [f"{target}_{method}" for target in fixed for method in self._method_names]

    def __call__(
        self, image: torch.Tensor, case: Mapping[Hashable, Any] | None = None, prediction: torch.Tensor | None = None
    ) -> dict[str, MetaTensor]:
        """Return the maps (C, *spatial) by name; those of empty targets are left out, with a warning in the log.

        Args:
            image: preprocessed image (C, *spatial). It is not modified.
            case: data dictionary of the image, in which targets look up masks and labels.
            prediction: the network's raw output (K, …) for the image, if it is already known.
        """
        self._refuse_forked_cuda()
        try:
            check_sources(image, case)
        except InputError as error:
            if self.explainer.settings.on_error == "raise":
                raise
            logger.warning("no map, failed: %s", error)
            return {}
        places = PlaceChecks()
        maps: dict[str, MetaTensor] = {}
        batch = None if prediction is None else torch.as_tensor(prediction)[None]
        known = {str(k): v for k, v in (case or {}).items()}
        for attribution in self.explainer.stream(image[None], self.methods, self.targets, data=known, prediction=batch):
            name = self._name(attribution)
            if attribution.map is None:
                logger.warning("%s: no map, %s: %s", name, attribution.status, attribution.record.get("reason"))
                continue
            if name in maps:
                raise UsageError(f"{attribution.target!r} gives several maps called {name!r}: use one target per map")
            record = Record.from_json(attribution.record)
            record.grid = "network"
            places.describe(record, image, additive=attribution.method.additive, checks=self.checks)
            attribution.map.meta["record"] = strict_json(record.to_json())
            maps[name] = attribution.map
        return maps

    def _name(self, attribution: Attribution) -> str:
        # by identity and position, not by id(): the transform may have been pickled for a worker
        target = next(n for n, t in zip(self._target_names, self.targets) if t is attribution.target)
        method = next(n for n, m in zip(self._method_names, self.methods) if m is attribution.method)
        if _several(attribution.target) and attribution.record["class_name"] is not None:
            target = f"{target}-{safe_name(attribution.record['class_name'])}"
        return f"{target}_{method}"

    def _refuse_forked_cuda(self) -> None:
        settings = self.explainer.settings
        devices = {settings.device.type, settings.volume_device.type}
        if "cuda" in devices and get_worker_info() is not None and _forked():
            raise UsageError(
                "Explain on a CUDA device cannot run in a forked DataLoader worker, because CUDA cannot be used after "
                'a fork: set num_workers=0, or multiprocessing_context="spawn", or explain in the postprocessing'
            )


class Explaind(MapTransform):
    """Dictionary version of :class:`Explain`: adds maps under ``"{key}_{target}_{Method}"``.

    Args:
        keys: keys of preprocessed images (C, *spatial); each is explained separately.
        network, inferer, methods, targets, device, amp, explainer: see :class:`Explain`.
        output_keys: keys of the maps that replace the names above, ordered by key, target and method.
        pred_key: key of the network's raw output (K, …) for the image, if the dictionary has it (as in an evaluator's
            postprocessing); it saves a forward pass.
        allow_missing_keys: skip missing keys.

    Raises:
        UsageError: see :class:`Explain`; also if ``output_keys`` has another length than there are maps.

    Example:
        >>> explain = Explaind("image", nn.Conv2d(1, 2, 3, padding=1), methods="Saliency", targets="MultiClassMask(1)")
        >>> data = explain({"image": MetaTensor(torch.rand(1, 8, 8))})
        >>> sorted(data), explain.output_keys, tuple(data["image_MultiClassMask_Saliency"].shape)
        (['image', 'image_MultiClassMask_Saliency'], ['image_MultiClassMask_Saliency'], (1, 8, 8))
    """

    backend = Explain.backend

    def __init__(
        self,
        keys: KeysCollection,
        network: nn.Module,
        inferer: Any = None,
        methods: Any = ("Saliency", "GradCam"),
        targets: Any = None,
        device: torch.device | str | None = None,
        amp: bool = False,
        *,
        output_keys: Sequence[str] | str | None = None,
        pred_key: str | None = None,
        allow_missing_keys: bool = False,
        **explainer: Any,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.explain = Explain(network, inferer, methods, targets, device, amp, **explainer)
        self.pred_key = pred_key
        usual = [(key, name) for key in self.keys for name in self.explain.names]
        chosen = [output_keys] if isinstance(output_keys, str) else output_keys
        if chosen is None:
            chosen = [f"{key}_{name}" for key, name in usual]
        if len(chosen) != len(usual) or len(set(chosen)) != len(chosen):
            raise UsageError(
                f"output_keys must be {len(usual)} different names, for {', '.join(f'{k}_{n}' for k, n in usual)}"
            )
        self._keys_of = dict(zip(usual, chosen))

    @property
    def output_keys(self) -> list[str]:
        """Keys of the maps, for the ``keys`` of the next transforms; see `Explain.names`."""
        return list(self._keys_of.values())

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        result = dict(data)
        for key in self.key_iterator(result):
            prediction = None if self.pred_key is None else data[self.pred_key]
            for name, attribution in self.explain(data[key], data, prediction).items():
                result[self._keys_of.get((key, name), f"{key}_{name}")] = attribution
        return result


ExplainD = ExplainDict = Explaind


def _several(target: Target) -> bool:
    """Return True if a target may have several maps, one per class."""
    return isinstance(target, PredictedClasses) or getattr(target, "top_k", 1) != 1


def _forked() -> bool:
    """Return True if this process was forked."""
    kind = type(multiprocessing.current_process()).__name__
    if kind in ("SpawnProcess", "ForkServerProcess"):
        return False
    return kind == "ForkProcess" or multiprocessing.get_start_method() == "fork"
