"""An Ignite handler that explains what an evaluator predicts, and saves maps beside the predictions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor, decollate_batch
from monai.engines.utils import IterationEvents
from monai.transforms import Activationsd, SaveImaged
from monai.utils import CommonKeys

from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.provenance import bundle_provenance
from esegeta_monai.errors import EsegetaError, InputError, UsageError
from esegeta_monai.explainer import Explainer
from esegeta_monai.methods.base import METHODS
from esegeta_monai.network import unwrap, weights_hash
from esegeta_monai.storage import case_name
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.targets.classes import PredictedClasses
from esegeta_monai.writer import ResultWriter, scan_of

__all__ = ["ExplanationHandler"]


class ExplanationHandler:
    """Explains each case when its prediction is there, and writes maps on the scan's own grid.

    Network, inferer, AMP settings and further inputs are the engine's; the prediction is the engine's raw output. What
    the bundle does with the prediction afterwards stays as it is.

    Args:
        methods: names, configs or instances; default Saliency and GradCam.
        targets: names, configs or instances; None: every predicted class, background aside.
        output_dir: None: that of the engine's ``SaveImaged``.
        bundle_root: of the bundle, for class and channel names, version and hashes; None: none are known.
        image_key, pred_key: of ``engine.state.output``.
        output: which of several outputs of the network is explained.
        class_names: class number to name; None: from the bundle's metadata.json.
        seed, time_limit, window_batch, volume_device: see `esegeta_monai.Explainer`.
        overwrite: explain again what is finished.
        pictures: a PNG beside every map.
        progress: show a progress bar.
        epochs: on a trainer or a validating evaluator, only every so many epochs.
        name: of the logger; None: ``engine.logger``.

    A method or case that fails is recorded in ``run.json`` and logged; the evaluation goes on.

    Example (in a bundle's config, as ``explain.json`` does it)::

        "+handlers": [{"_target_": "esegeta_monai.handlers.ExplanationHandler",
                       "methods": ["Saliency"], "output_dir": "@output_dir"}]
    """

    def __init__(
        self,
        methods: Any = ("Saliency", "GradCam"),
        targets: Any = None,
        output_dir: str | Path | None = None,
        bundle_root: str | Path | None = None,
        *,
        image_key: str = CommonKeys.IMAGE,
        pred_key: str = CommonKeys.PRED,
        output: int | str | None = None,
        class_names: Mapping[int, str] | None = None,
        seed: int = 0,
        time_limit: float | None = None,
        window_batch: int | None = None,
        volume_device: torch.device | str | None = None,
        overwrite: bool = False,
        pictures: bool = True,
        progress: bool = False,
        epochs: int = 1,
        name: str | None = None,
    ) -> None:
        self.methods = METHODS.create_all(methods)
        self.targets: list[Target] | None = None if targets is None else TARGETS.create_all(targets)
        self.output_dir, self.bundle_root = output_dir, None if bundle_root is None else Path(bundle_root)
        self.image_key, self.pred_key, self.output = image_key, pred_key, output
        self.metadata = BundleMetadata.read(self.bundle_root) if self.bundle_root else BundleMetadata({})
        self.class_names = {int(k): v for k, v in (class_names or self.metadata.class_names).items()}
        self.options: dict[str, Any] = {
            "seed": seed,
            "time_limit": time_limit,
            "window_batch": window_batch,
            "volume_device": volume_device,
            "progress": progress,
        }
        self.overwrite, self.pictures, self.epochs = overwrite, pictures, epochs
        self.name = name
        self.logger = logging.getLogger(name or "esegeta_monai")
        self.writer: ResultWriter | None = None
        self._files: dict[str, str] = {}

    def attach(self, engine: Any) -> None:
        """Registers with a MONAI evaluator or trainer."""
        from ignite.engine import Events

        if self.name is None:
            self.logger = engine.logger
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _begin(self, engine: Any) -> None:
        """Names and folders are settled before any work, so that a mistake costs nothing."""
        if self.writer is not None:
            return
        folder = self.output_dir or self._saved(engine, "output_dir")
        if folder is None:
            raise UsageError(
                "ExplanationHandler: the engine has no SaveImaged that says where predictions go: give output_dir "
                "(with the overlay: --explain_output_dir DIR)"
            )
        if self.targets is None:
            self.targets = [PredictedClasses(activation="sigmoid" if self._sigmoid(engine) else "auto")]
        provenance = {
            **(bundle_provenance(self.bundle_root) if self.bundle_root else {}),
            "weights_sha256": weights_hash(unwrap(engine.network)),
        }
        separate = self._saved(engine, "parent")
        self.writer = ResultWriter(
            folder,
            self.methods,
            self.targets,
            provenance=provenance,
            separate_folder=True if separate is None else bool(separate),
            overwrite=self.overwrite,
            pictures=self.pictures,
        )

    def __call__(self, engine: Any) -> None:
        """Explains the batch whose raw predictions are in ``engine.state.output``."""
        if (engine.state.epoch - 1) % self.epochs:
            return
        assert self.writer is not None
        assert self.targets is not None
        image = engine.state.output[self.image_key]
        args, kwargs = self._further_inputs(engine)
        try:
            explainer = Explainer(
                engine.network,
                engine.inferer,
                engine.state.device,
                bool(getattr(engine, "amp", False)),
                amp_kwargs=getattr(engine, "amp_kwargs", None),
                output=self.output,
                class_names=self.class_names,
                channel_names=[n for _, n in sorted(self.metadata.channel_names.items())],
                on_error="record",
                **self.options,
            )
        except EsegetaError as error:
            raise UsageError(f"ExplanationHandler: {error}") from error
        data = decollate_batch(engine.state.batch) if isinstance(engine.state.batch, Mapping) else None
        images = self._images(image)
        names = [self._case(one, engine, i) for i, one in enumerate(images)]
        predictions = engine.state.output.get(self.pred_key)
        for i, one in enumerate(images):
            self._explain(explainer, one, names[i], _entry(predictions, i), data[i] if data else None, args, kwargs)

    def _explain(
        self,
        explainer: Explainer,
        image: MetaTensor,
        case: str,
        prediction: Any,
        data: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> None:
        assert self.writer is not None
        writer, scan, seed = self.writer, scan_of(image), explainer.seed
        try:
            for attribution in explainer(
                image[None],
                self.methods,
                self.targets,
                data=data,
                prediction=prediction,
                network_args=args,
                network_kwargs=kwargs,
                skip=lambda _, target, label, method: writer.is_done(case, target, label, method, seed, scan),
            ):
                writer.write(attribution, case, image, scan)
        except EsegetaError as error:
            writer.failed(case, error)

    def _end(self, engine: Any) -> None:
        assert self.writer is not None
        summary = ", ".join(f"{n} {status}" for status, n in self.writer.run.summary.items()) or "nothing to do"
        self.writer.run.__exit__(None, None, None)
        level = logging.ERROR if self.writer.run.exit_code else logging.INFO
        self.logger.log(level, f"explanations in {self.writer.output_dir}: {summary}")

    # -- what the engine knows ----------------------------------------------------------------------------------

    def _further_inputs(self, engine: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        batch = engine.prepare_batch(
            engine.state.batch, engine.state.device, engine.non_blocking, **getattr(engine, "to_kwargs", {})
        )
        return (tuple(batch[2]), dict(batch[3])) if len(batch) == 4 else ((), {})

    @staticmethod
    def _images(image: Any) -> list[MetaTensor]:
        if isinstance(image, MetaTensor):
            return list(decollate_batch(image))
        return [MetaTensor(one) for one in image]

    def _case(self, image: MetaTensor, engine: Any, index: int) -> str:
        """The scan's name; where another folder's scan has it already, with the folder's name before it."""
        file = image.meta.get("filename_or_obj")
        file = file[0] if isinstance(file, (list, tuple)) and file else file
        if not isinstance(file, (str, Path)):
            return f"iteration{engine.state.iteration}_{index}"
        path = str(Path(file).absolute())
        for root in (None, Path(path).parent.parent, Path(path).anchor):
            name = case_name(path, root)
            if self._files.setdefault(name, path) == path:
                return name
        raise InputError(f"{path}: no free name is left for this case")

    @staticmethod
    def _transforms(engine: Any) -> list[Any]:
        return list(getattr(getattr(engine, "postprocessing", None), "transforms", []))

    def _saved(self, engine: Any, what: str) -> Any:
        for transform in self._transforms(engine):
            if isinstance(transform, SaveImaged):
                return getattr(transform.saver.folder_layout, what, None)
        return None

    def _sigmoid(self, engine: Any) -> bool:
        return any(isinstance(t, Activationsd) and any(t.sigmoid) for t in self._transforms(engine))


def _entry(predictions: Any, index: int) -> Any:
    """One case of a batch of raw output, whatever its structure."""
    if predictions is None:
        return None
    if isinstance(predictions, torch.Tensor):
        return torch.as_tensor(predictions[index : index + 1])
    if isinstance(predictions, Mapping):
        return {k: _entry(v, index) for k, v in predictions.items()}
    return [_entry(v, index) for v in predictions]
