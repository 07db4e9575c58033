"""Base class of handlers that process an engine's cases one by one: selects the cases and collects their inputs."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from monai.data import MetaTensor, decollate_batch
from monai.engines.utils import IterationEvents
from monai.networks.utils import eval_mode
from monai.transforms import Compose, SaveImaged
from monai.utils import CommonKeys
from torch.utils.data.distributed import DistributedSampler

from esegeta_monai.bundle.extensions import register_extensions
from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.errors import EsegetaError, RankLost, UsageError
from esegeta_monai.explain.case import cases_of
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.layers import check_layers
from esegeta_monai.explain.settings import Checks, checks_of
from esegeta_monai.handlers.calls import InfererCalls, plain_inferer, watched
from esegeta_monai.handlers.cases import CaseNames, file_of, files_of
from esegeta_monai.handlers.networks import EngineNetworks
from esegeta_monai.handlers.tracking import Tracker, tracker_of
from esegeta_monai.methods.base import METHODS
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.targets.classes import PredictedClasses
from esegeta_monai.targets.regions import OutputValue
from esegeta_monai.utils.distributed import SHARES, Processes, Share
from esegeta_monai.utils.types import flag, number
from esegeta_monai.utils.upstream import attached_handlers, postprocessing_of

__all__ = ["CaseHandler", "numbered"]


class CaseHandler(ABC):
    """A handler that processes each case after its prediction, with the engine's network, inferer, AMP and inputs.

    Subclasses open a folder (`open`), explain or evaluate its cases (`look`) and close the folder (`close`).

    Args:
        methods, targets, output_dir, bundle_root, image_key, pred_key, output, class_names, epochs, cases, share,
            checks, track, name: see `esegeta_monai.handlers.ExplanationHandler`.
        options: further options of `Explainer`.

    Raises:
        UsageError: see `esegeta_monai.handlers.ExplanationHandler`.
    """

    def __init__(
        self,
        methods: Any,
        targets: Any,
        output_dir: str | Path | None,
        bundle_root: str | Path | None,
        *,
        image_key: str = CommonKeys.IMAGE,
        pred_key: str = CommonKeys.PRED,
        output: int | str | None = None,
        class_names: Mapping[int, str] | None = None,
        epochs: int = 1,
        cases: int | Sequence[str] | None = None,
        share: Share | Literal["auto"] = "auto",
        checks: Checks = True,
        track: str | Tracker | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        if bundle_root is not None:
            register_extensions(bundle_root)
        self.methods = METHODS.create_all(methods)
        self.targets: list[Target] | None = None if targets is None else TARGETS.create_all(targets)
        if output_dir is not None and not isinstance(output_dir, (str, Path)):
            raise UsageError(
                f"output_dir={output_dir!r} is not a folder name: on the command line write ./NAME, since 1_0 is 10"
            )
        self.output_dir, self.bundle_root = output_dir, None if bundle_root is None else Path(bundle_root)
        self.image_key, self.pred_key, self.output = image_key, pred_key, output
        self.metadata = BundleMetadata.read(self.bundle_root) if self.bundle_root else BundleMetadata({})
        self.class_names = numbered("class_names", class_names or self.metadata.class_names)
        self.options, self.checks, self.tracker = options, checks_of(checks), tracker_of(track)
        epochs = number("epochs", epochs, int, 0)
        if isinstance(cases, (str, bool)) or (isinstance(cases, int) and cases < 1):
            raise UsageError(f"cases={cases!r}: give a list of names, or the number per epoch (at least 1)")
        self.cases, self._seen = cases, 0
        if share not in ("auto", *SHARES):
            raise UsageError(f"share={share!r}: give auto, {', '.join(SHARES)}")
        self.epochs, self.name = epochs, name
        self._last_due: int | None = None
        self._entered: int | None = None  # the epoch that the open folder was last used in
        self._folder_failed = False  # this epoch's folder cannot be written
        self.share = share
        self._ranks, self._share = Processes(), cast(Share, "cases")
        self.logger = logging.getLogger(name or "esegeta_monai")
        self.folder: Path | None = None
        self._explainer: Explainer | None = None
        self._calls: InfererCalls | None = None
        self._names = CaseNames()
        self._weights: str | None = None
        self._networks: EngineNetworks

    @abstractmethod
    def open(self, engine: Any, folder: Path) -> None:
        """Prepare to write into a folder; the previous one has been closed."""

    @abstractmethod
    def look(self, engine: Any, image: MetaTensor, case: str, data: Mapping[str, Any], **more: Any) -> None:
        """Explain or evaluate one case.

        Args:
            engine: the engine whose batch contains the case.
            image: the preprocessed image (C, *spatial).
            case: name of the case.
            data: data dictionary of the case.
            more: ``prediction``, ``network_args``, ``network_kwargs`` of `Explainer`, batch of one.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish the folder after all its cases have been processed."""

    # -- the engine's events ------------------------------------------------------------------------------------

    def attach(self, engine: Any) -> None:
        """Register with a MONAI evaluator or trainer."""
        from ignite.engine import Events

        if self.name is None:
            self.logger = engine.logger
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_STARTED, self._watch)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _begin(self, engine: Any) -> None:
        """Check names, folders and the network before any work, so that errors appear at once."""
        transforms = self._transforms(engine)
        self._networks = networks = EngineNetworks.of(engine, transforms, self.pred_key, self.metadata.declared)
        use = networks.use
        if self.targets is None:
            self.targets = [OutputValue() if self.metadata.declared == "regression" else PredictedClasses()]
        check_layers(networks.networks[0], [*self.methods, *self.targets])
        explained = self.metadata.explained_output
        self._ranks, self._share = Processes.current(), self._shared(engine)
        self._explainer = Explainer(
            networks.networks[0],
            networks.inferer,
            engine.state.device,
            self._amp(engine),
            amp_kwargs=getattr(engine, "amp_kwargs", None),
            output=self.output,
            class_names=self.class_names,
            channel_names=[n for _, n in sorted(self.metadata.channel_names.items())],
            distributed=self._share == "windows",
            on_error="record",
            checks="once" if self.checks is True else self.checks,
            postprocessing=use if explained is None else replace(use, keys=(explained, *use.keys)),
            **self.options,
        )
        root = self._saved(engine, "data_root_dir")
        self._names = CaseNames(files_of(engine.data_loader, self.image_key), root)
        self._weights = None
        if self._due(engine.state.epoch + 1):
            self._enter_due(engine, engine.state.epoch + 1)

    @staticmethod
    def _amp(engine: Any) -> bool:
        """Return True if the engine predicts under autocast: MONAI's engines do on CUDA devices only, by
        ``torch.autocast("cuda")``, which changes nothing on a CPU."""
        return flag("amp", getattr(engine, "amp", False)) and engine.state.device.type == "cuda"

    def _enter_due(self, engine: Any, epoch: int) -> None:
        """Open the folder of an epoch; after the first one, a folder that cannot be written does not end the run."""
        if self._last_due is None:
            self._enter(engine, epoch)
            return
        self._folder_failed = True
        with self._logged(f"epoch {epoch} is left out"):
            self._enter(engine, epoch)
            self._folder_failed = False

    @contextmanager
    def _logged(self, what: str) -> Iterator[None]:
        """Log an error and continue the engine's run, or raise it if other processes wait for this one."""
        try:
            yield
        except EsegetaError as error:
            if isinstance(error, RankLost) or self._ranks.size > 1:
                raise
            self.logger.error(f"{what}: {error}")
            self.logger.debug("traceback", exc_info=error)

    def _enter(self, engine: Any, epoch: int) -> None:
        """Open the folder of an epoch, and close the previous one."""
        folder = self.output_dir or self._saved(engine, "output_dir")
        if folder is None:
            raise UsageError(
                f"{type(self).__name__}: the engine has no SaveImaged whose folder could be used: give output_dir "
                "(with the overlay: --explain_output_dir DIR)"
            )
        try:
            folder = Path(str(folder).format(epoch=epoch) if "{epoch" in str(folder) else folder)
        except (LookupError, ValueError) as error:
            raise UsageError(
                f"output_dir={str(folder)!r}: only {{epoch}} is replaced, with a width as in {{epoch:03d}} ({error})"
            ) from error
        if folder == self.folder:
            return
        self._leave()
        self.open(engine, folder)
        self.folder = folder

    def _leave(self) -> None:
        if self.folder is not None:
            folder, self.folder = self.folder, None
            with self._logged(f"the record in {folder} could not be finished"):
                self.close()
            if self.tracker is not None and not self._ranks.rank:
                with self._logged(f"{folder} is not logged"):
                    self.tracker.log(folder, self._entered)

    def _begin_epoch(self, engine: Any) -> None:
        self._seen = 0
        epoch = engine.state.epoch
        if self._due(epoch):
            if self.tracker is not None and not self._ranks.rank:
                self.tracker.begin(engine)
            self._enter_due(engine, epoch)
            self._last_due = self._entered = epoch

    def _watch(self, engine: Any) -> None:
        """Record what the inferer gets, until the prediction is complete."""
        if not self._folder_failed and self._due(engine.state.epoch):
            self._calls = watched(engine)

    def _due(self, epoch: int) -> bool:
        """True for the first epoch seen in each block of ``epochs``; validation may run only on some."""
        last = self._last_due
        return last is None or epoch == last or (epoch - 1) // self.epochs != (last - 1) // self.epochs

    def wants_batch(self, epoch: int) -> bool:
        """Return True if a further batch of an epoch may have a case to process."""
        full = isinstance(self.cases, int) and self._seen >= self.cases
        return self._due(epoch) and not self._folder_failed and not full

    def __call__(self, engine: Any) -> None:
        """Process the batch whose raw predictions are in ``engine.state.output``."""
        engine.inferer = plain_inferer(engine)
        if self._folder_failed or not self._due(engine.state.epoch):
            return
        assert self._explainer is not None
        assert self._calls is not None
        training = getattr(engine, "mode", None) is not eval_mode
        if self._weights is None or training:
            self._weights = self._networks.weights_hash
        images = self._images(engine)
        names = self._cases(images, engine)
        wanted = [self._wanted(name) for name in names]
        if not any(wanted):
            return
        batch = engine.state.batch
        data = decollate_batch(batch) if isinstance(batch, Mapping) else [{}] * len(images)
        predictions = None if training else self._networks.predictions(engine.state.output)
        args, kwargs = self._calls.args, self._calls.kwargs
        class_names = self._names_of_prompts(kwargs) or self.class_names
        if class_names != self._explainer.settings.class_names:
            self._explainer.settings = replace(self._explainer.settings, class_names=class_names)
        for i, (image, case) in enumerate(zip(images, names)):
            if wanted[i]:
                more = {"prediction": predictions, "network_args": args, "network_kwargs": kwargs}
                with self._logged(case):
                    self.look(engine, image, case, data[i], **{k: _entry(v, i, len(images)) for k, v in more.items()})

    def _wanted(self, case: str) -> bool:
        if isinstance(self.cases, int):
            self._seen += 1
            return self._seen <= self.cases
        return self.cases is None or case in self.cases

    def _end(self, engine: Any) -> None:
        engine.inferer = plain_inferer(engine)
        self._leave()

    # -- data of the engine -------------------------------------------------------------------------------------

    def _images(self, engine: Any) -> list[MetaTensor]:
        """Return the images (C, *spatial) of the batch; detection has a list of images of different sizes."""
        if self.image_key not in engine.state.output:
            raise UsageError(
                f"image_key={self.image_key!r} is not in the engine's output, which has "
                f"{', '.join(map(str, engine.state.output))}: MONAI's engines always call the network's input 'image' "
                "there, also if it has another key in the batch"
            )
        assert self._calls is not None
        image = self._calls.before(engine.state.output[self.image_key])
        if isinstance(image, torch.Tensor):
            return cases_of(image)
        return [case for item in image for case in cases_of(item[None])]

    def _names_of_prompts(self, kwargs: Mapping[str, Any]) -> dict[int, str]:
        """Return the channel names of a promptable network: those of the prompted classes (VISTA3D)."""
        prompts = kwargs.get("class_vector")
        if not isinstance(prompts, torch.Tensor):
            return {}
        return {i: self.class_names.get(c, f"class{c}") for i, c in enumerate(prompts.flatten().tolist())}

    def _cases(self, images: list[MetaTensor], engine: Any) -> list[str]:
        """Return the name of each image. Crops of one scan in a batch, as trainers draw them, are numbered."""
        names = []
        for i, image in enumerate(images):
            file = file_of(image)
            names.append(f"iteration{engine.state.iteration}_{i}" if file is None else self._names[file])
        count = Counter(names)
        seen: Counter[str] = Counter()
        for i, name in enumerate(names):
            seen[name] += 1
            if count[name] > 1:
                names[i] = f"{name}-sample{seen[name]}"
        return names

    @staticmethod
    def _transforms(engine: Any) -> list[Any]:
        """Return the transforms of the engine's postprocessing."""
        for function in attached_handlers(engine, IterationEvents.MODEL_COMPLETED):
            postprocessing = postprocessing_of(function)
            if isinstance(postprocessing, Compose):
                return list(postprocessing.flatten().transforms)
            if postprocessing is not None:
                return [postprocessing]
        return []

    def _shared(self, engine: Any) -> Share:
        """Return how the processes share the work in this engine's run.

        Raises:
            UsageError: ``share`` does not fit the data loader, which gives all processes the same or different cases.
        """
        sampled = isinstance(getattr(engine.data_loader, "sampler", None), DistributedSampler)
        if self._ranks.size == 1:
            return "cases"
        if sampled and self.share in ("windows", "methods"):
            raise UsageError(
                f"share={self.share!r}, but the data loader has a DistributedSampler, which gives every process other "
                "cases: remove it, or set share='cases'"
            )
        if not sampled and self.share == "cases":
            raise UsageError(
                "share='cases', but the data loader has no DistributedSampler, so every process gets the same cases: "
                "add one (multi_gpu_explain.json does), or set share='windows'"
            )
        return ("cases" if sampled else "windows") if self.share == "auto" else self.share

    def _saved(self, engine: Any, what: str) -> Any:
        savers = [t for t in self._transforms(engine) if isinstance(t, SaveImaged)]
        for transform in sorted(savers, key=lambda t: self.pred_key not in t.keys):
            return getattr(transform.saver.folder_layout, what, None)
        return None


def numbered(name: str, names: Mapping[Any, str]) -> dict[int, str]:
    """Return names by number; the numbers may be text, as in JSON.

    Raises:
        UsageError: it is not a mapping of numbers to names.
    """
    try:
        return {int(k): v for k, v in names.items()}
    except (ValueError, AttributeError) as error:
        raise UsageError(f"{name}={names!r}: give numbers to names, such as {{1: 'liver'}}") from error


def _entry(values: Any, index: int, n: int) -> Any:
    """Slice nested inputs of a batch of n to one case; a tensor that is not batched belongs to every case."""
    if isinstance(values, torch.Tensor):
        tensor = values.as_subclass(torch.Tensor)
        return tensor[index : index + 1] if tensor.ndim and len(tensor) == n else tensor
    if isinstance(values, Mapping):
        return {k: _entry(v, index, n) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [_entry(v, index, n) for v in values]
    return values
