"""An Ignite handler that explains what an evaluator predicts, and saves maps beside the predictions."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from monai.data import MetaTensor, decollate_batch
from monai.engines.utils import IterationEvents
from monai.networks.utils import eval_mode
from monai.transforms import Activationsd, Compose, SaveImaged
from monai.utils import CommonKeys
from torch.utils.data.distributed import DistributedSampler

from esegeta_monai.attribution import Attribution
from esegeta_monai.bundle.extensions import register_extensions
from esegeta_monai.bundle.metadata import BundleMetadata
from esegeta_monai.bundle.provenance import bundle_provenance
from esegeta_monai.cases import cases_of
from esegeta_monai.costs import Cost, table
from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.explainer import Explainer
from esegeta_monai.handlers.calls import InfererCalls, plain_inferer, watched
from esegeta_monai.handlers.cases import CaseNames, file_of, files_of
from esegeta_monai.handlers.series import ExplanationSeries
from esegeta_monai.methods.base import METHODS
from esegeta_monai.network import unwrap, weights_hash
from esegeta_monai.ranks import SHARES, Ranks, Share
from esegeta_monai.report.page import write_report
from esegeta_monai.storage import picture_path
from esegeta_monai.targets.base import TARGETS, Target
from esegeta_monai.targets.classes import PredictedClasses
from esegeta_monai.writer import ResultWriter

__all__ = ["ExplanationHandler"]


class ExplanationHandler:
    """Explains each case when its prediction is there, and writes maps on the scan's own grid.

    Network, inferer, AMP settings and further inputs are the engine's; the prediction is the engine's raw output. What
    the bundle does with the prediction afterwards stays as it is. On a trainer, whose predictions come from the network
    in training mode, the network is run once more in evaluation mode, as every method does.

    Args:
        methods: names, configs or instances; default Saliency and GradCam.
        targets: names, configs or instances; None: every predicted class, background aside.
        output_dir: None: that of the engine's ``SaveImaged``. ``{epoch}`` in it stands for the epoch
            (``"explained/epoch{epoch:03d}"``); without it a later epoch's maps replace the earlier ones.
        bundle_root: of the bundle, for class and channel names, version and hashes; None: none are known.
        image_key, pred_key: of ``engine.state.output``.
        output: which of several outputs of the network is explained.
        class_names: class number to name; None: from the bundle's metadata.json.
        seed, time_limit, window_batch, volume_device: see `esegeta_monai.Explainer`.
        dry_run: nothing is explained or written; the log says what each method and target would cost, see
            `esegeta_monai.costs.Cost`.
        allow_costly: see `esegeta_monai.Explainer`.
        overwrite: explain again what is finished.
        map_format: ``"nifti"``, or ``"input"``: NRRD and MHA scans get maps in their own format, all others NIfTI.
        pictures: a PNG beside every map, and what the report shows of the scan.
        report: write the HTML report (`esegeta_monai.report.write_report`) when the run or an epoch's folder is done.
        progress: show a progress bar.
        epochs: on a trainer or a validating evaluator, only every so many epochs, from the first.
        cases: only these, by name; or the first so many of an epoch (of each process); None: all.
        series: an `ExplanationSeries`, which shows how explanations change from epoch to epoch.
        share: what the processes share, where ``torch.distributed`` has several. ``"cases"``: each explains those that
            its data loader gives it. ``"windows"``: all get the same cases and compute each of them together, for large
            volumes. ``"methods"``: all get the same cases, each takes methods and targets of its own. ``"auto"``: cases
            where the loader has a ``DistributedSampler``, else windows.
        name: of the logger; None: ``engine.logger``.

    A method or case that fails is recorded in ``run.json`` and logged; the evaluation goes on.

    Raises:
        UsageError: on construction or at the engine's start, before any work: an unknown method, target or parameter,
            names that clash, a folder that cannot be written, an engine without a network.
        NetworkError: at the engine's start: a network that cannot be explained (half-precision weights).

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
        dry_run: bool = False,
        allow_costly: bool = False,
        time_limit: float | None = None,
        window_batch: int | None = None,
        volume_device: torch.device | str | None = None,
        overwrite: bool = False,
        pictures: bool = True,
        map_format: str = "nifti",
        report: bool = False,
        progress: bool = False,
        epochs: int = 1,
        cases: int | Sequence[str] | None = None,
        series: ExplanationSeries | None = None,
        share: Share | Literal["auto"] = "auto",
        name: str | None = None,
    ) -> None:
        if bundle_root is not None:
            register_extensions(bundle_root)
        self.methods = METHODS.create_all(methods)
        self.targets: list[Target] | None = None if targets is None else TARGETS.create_all(targets)
        if output_dir is not None and not isinstance(output_dir, (str, Path)):
            raise UsageError(
                f"output_dir={output_dir!r} is no folder name: on the command line write ./NAME, since 1_0 is 10"
            )
        self.output_dir, self.bundle_root = output_dir, None if bundle_root is None else Path(bundle_root)
        self.image_key, self.pred_key, self.output = image_key, pred_key, output
        self.metadata = BundleMetadata.read(self.bundle_root) if self.bundle_root else BundleMetadata({})
        self.class_names = {int(k): v for k, v in (class_names or self.metadata.class_names).items()}
        self.options: dict[str, Any] = {
            "seed": seed,
            "allow_costly": _flag("allow_costly", allow_costly),
            "time_limit": time_limit,
            "window_batch": window_batch,
            "volume_device": volume_device,
            "progress": _flag("progress", progress),
        }
        self.dry_run = _flag("dry_run", dry_run)
        self._costs: list[tuple[str, Cost]] = []
        self.overwrite, self.pictures = _flag("overwrite", overwrite), _flag("pictures", pictures)
        if map_format not in ("nifti", "input"):
            raise UsageError(f"map_format={map_format!r}: give 'nifti' or 'input'")
        self.map_format = map_format
        self.report = _flag("report", report)
        if epochs < 1:
            raise UsageError(f"epochs={epochs}: at least 1, every epoch")
        if isinstance(cases, (str, bool)) or (isinstance(cases, int) and cases < 1):
            raise UsageError(f"cases={cases!r}: give a list of names, or how many of an epoch (at least 1)")
        self.cases, self.series, self._seen = cases, series, 0
        if share not in ("auto", *SHARES):
            raise UsageError(f"share={share!r}: give auto, {', '.join(SHARES)}")
        self.epochs, self.name = epochs, name
        self.share = share
        self._ranks, self._share = Ranks(), cast(Share, "cases")
        self.logger = logging.getLogger(name or "esegeta_monai")
        self.writer: ResultWriter | None = None
        self._explainer: Explainer | None = None
        self._calls: InfererCalls | None = None
        self._names = CaseNames()
        self._weights: str | None = None

    def attach(self, engine: Any) -> None:
        """Registers with a MONAI evaluator or trainer."""
        from ignite.engine import Events

        if self.name is None:
            self.logger = engine.logger
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(IterationEvents.FORWARD_COMPLETED, self)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin_epoch)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)
        engine.add_event_handler(Events.COMPLETED, self._end)

    def _begin(self, engine: Any) -> None:
        """Names, folders and the network are looked at before any work, so that a mistake costs nothing."""
        if not isinstance(getattr(engine, "network", None), torch.nn.Module):
            raise UsageError(
                f"ExplanationHandler: {type(engine).__name__} has no single network to explain; attach the handler to "
                "a SupervisedEvaluator or SupervisedTrainer"
            )
        if self.targets is None:
            self.targets = [PredictedClasses(activation="sigmoid" if self._sigmoid(engine) else "auto")]
        self._ranks, self._share = Ranks.current(), self._shared(engine)
        self._explainer = Explainer(
            engine.network,
            plain_inferer(engine),
            engine.state.device,
            bool(getattr(engine, "amp", False)),
            amp_kwargs=getattr(engine, "amp_kwargs", None),
            output=self.output,
            class_names=self.class_names,
            channel_names=[n for _, n in sorted(self.metadata.channel_names.items())],
            distributed=self._share == "windows",
            on_error="record",
            **self.options,
        )
        self._calls = watched(engine)
        root = self._saved(engine, "data_root_dir")
        self._names = CaseNames(files_of(engine.data_loader, self.image_key), root)
        self._weights = None
        self._open(engine, max(engine.state.epoch, 1))

    def _open(self, engine: Any, epoch: int) -> None:
        """The writer of an epoch's folder; none in a dry run."""
        if self.dry_run:
            return
        folder = self.output_dir or self._saved(engine, "output_dir")
        if folder is None:
            raise UsageError(
                "ExplanationHandler: the engine has no SaveImaged that says where predictions go: give output_dir "
                "(with the overlay: --explain_output_dir DIR)"
            )
        folder = Path(str(folder).format(epoch=epoch) if "{epoch" in str(folder) else folder)
        if self.writer is not None and self.writer.output_dir == folder:
            return
        self._write_report()
        assert self.targets is not None
        separate, extension = self._saved(engine, "parent"), str(self._saved(engine, "ext") or "").lstrip(".")
        self.writer = ResultWriter(
            folder,
            self.methods,
            self.targets,
            provenance=bundle_provenance(self.bundle_root) if self.bundle_root else {},
            separate_folder=True if separate is None else bool(separate),
            extension="input" if self.map_format == "input" else ".nii" if extension == "nii" else ".nii.gz",
            overwrite=self.overwrite,
            pictures=self.pictures,
            ranks=self._ranks,
            together=self._share == "windows",
        )

    def __call__(self, engine: Any) -> None:
        """Explains the batch whose raw predictions are in ``engine.state.output``."""
        if (engine.state.epoch - 1) % self.epochs:
            return
        self._open(engine, engine.state.epoch)
        assert self._explainer is not None
        assert self.targets is not None
        training = getattr(engine, "mode", None) is not eval_mode
        if self._weights is None or training:
            self._weights = weights_hash(unwrap(engine.network))
        if self.writer is not None:
            self.writer.provenance["weights_sha256"] = self._weights
        images = self._images(engine)
        names = self._cases(images, engine)
        wanted = [self._wanted(name) for name in names]
        if not any(wanted):
            return
        batch = engine.state.batch
        data = decollate_batch(batch) if isinstance(batch, Mapping) else [{}] * len(images)
        predictions = None if training else engine.state.output.get(self.pred_key)
        args, kwargs = self._further_inputs(engine)
        self._explainer.class_names = self._names_of_prompts(kwargs) or self.class_names
        for i, (image, case) in enumerate(zip(images, names)):
            if not wanted[i]:
                continue
            more = {"prediction": predictions, "network_args": args, "network_kwargs": kwargs}
            of_case = {k: _entry(v, i, len(images)) for k, v in more.items()}
            if self.dry_run:
                found = self._explainer.costs(image[None], self.methods, self.targets, data=data[i], **of_case)
                self._costs += [(case, cost) for cost in found]
                continue
            assert self.writer is not None
            for methods, targets in self._ranks.part(self._share, self.methods, self.targets):
                self.writer.explain(
                    self._explainer,
                    image,
                    case,
                    methods,
                    targets,
                    data=data[i],
                    on_written=self._noted(case, engine.state.epoch, data[i]),
                    **of_case,
                )

    def _wanted(self, case: str) -> bool:
        if isinstance(self.cases, int):
            self._seen += 1
            return self._seen <= self.cases
        return self.cases is None or case in self.cases

    def _noted(
        self, case: str, epoch: int, data: Mapping[str, Any]
    ) -> Callable[[Attribution, Path | None], None] | None:
        if self.series is None:
            return None
        series = self.series

        def note(attribution: Attribution, path: Path | None) -> None:
            series.add(attribution, case, epoch, data, None if path is None else picture_path(path))

        return note

    def _begin_epoch(self, engine: Any) -> None:
        self._seen = 0

    def _end_epoch(self, engine: Any) -> None:
        if self.series is None or self.writer is None or not self.writer.writes:
            return
        folder = self.writer.output_dir
        if "{epoch" in str(self.output_dir or ""):
            folder = Path(str(self.output_dir).split("{epoch")[0] + "x").parent
        self.series.close_epoch(engine.state.epoch, folder)

    def _end(self, engine: Any) -> None:
        engine.inferer = plain_inferer(engine)
        if self.dry_run:
            for line in table(self._costs):
                self.logger.info(line)
            self._costs = []
        if self.writer is None:
            return
        self.writer.run.join(self._ranks)
        summary = ", ".join(f"{n} {status}" for status, n in self.writer.run.summary.items()) or "nothing to do"
        self.writer.run.__exit__(None, None, None)
        level = logging.ERROR if self.writer.run.exit_code else logging.INFO
        self.logger.log(level, f"explanations in {self.writer.output_dir}: {summary}")
        self._write_report()

    def _write_report(self) -> None:
        """Of the folder that is done; a report that cannot be written does not end the engine's run."""
        if not self.report or self._ranks.rank or self.writer is None or not self.writer.run.summary:
            return
        try:
            written = write_report(self.writer.output_dir)
        except EsegetaError as error:
            self.logger.error(f"no report: {error}")
        else:
            self.logger.info(f"report: {written.index}")

    # -- what the engine knows ----------------------------------------------------------------------------------

    def _images(self, engine: Any) -> list[MetaTensor]:
        """The images of the batch; a list of them, as detection has it, are images of a batch each."""
        image = engine.state.output[self.image_key]
        if isinstance(image, torch.Tensor):
            return cases_of(image)
        return [one for item in image for one in cases_of(item[None])]

    def _names_of_prompts(self, kwargs: Mapping[str, Any]) -> dict[int, str]:
        """The names of a promptable network's channels, which are those of the classes it was asked for (VISTA3D)."""
        asked = kwargs.get("class_vector")
        if not isinstance(asked, torch.Tensor):
            return {}
        return {i: self.class_names.get(c, f"class{c}") for i, c in enumerate(asked.flatten().tolist())}

    def _further_inputs(self, engine: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._calls is not None:
            return self._calls.args, self._calls.kwargs
        batch = engine.prepare_batch(
            engine.state.batch, engine.state.device, engine.non_blocking, **getattr(engine, "to_kwargs", {})
        )
        return (tuple(batch[2]), dict(batch[3])) if len(batch) == 4 else ((), {})

    def _cases(self, images: list[MetaTensor], engine: Any) -> list[str]:
        """A name each. Crops of one scan in a batch, as trainers draw them, are numbered."""
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
        """The engine's postprocessing, which MONAI keeps nowhere but in the function that it registers."""
        for function, _, _ in engine._event_handlers.get(IterationEvents.MODEL_COMPLETED, []):
            found = (
                inspect.getclosurevars(function).nonlocals.get("posttrans") if inspect.isfunction(function) else None
            )
            if found is not None:
                return list(found.flatten().transforms) if isinstance(found, Compose) else [found]
        return []

    def _shared(self, engine: Any) -> Share:
        """What the processes share in this engine's run.

        Raises:
            UsageError: the data loader gives each process other cases, and they should compute each case together.
        """
        sampled = isinstance(getattr(engine.data_loader, "sampler", None), DistributedSampler)
        if self._ranks.size == 1:
            return "cases"
        if sampled and self.share in ("windows", "methods"):
            raise UsageError(
                f"share={self.share!r}, but the data loader has a DistributedSampler, which gives every process other "
                "cases: take it away, or share='cases'"
            )
        if not sampled and self.share == "cases":
            raise UsageError(
                "share='cases', but the data loader has no DistributedSampler, so every process gets the same cases: "
                "give it one (multi_gpu_explain.json does), or share='windows'"
            )
        return ("cases" if sampled else "windows") if self.share == "auto" else self.share

    def _saved(self, engine: Any, what: str) -> Any:
        savers = [t for t in self._transforms(engine) if isinstance(t, SaveImaged)]
        for transform in sorted(savers, key=lambda t: self.pred_key not in t.keys):
            return getattr(transform.saver.folder_layout, what, None)
        return None

    def _sigmoid(self, engine: Any) -> bool:
        found = [t for t in self._transforms(engine) if isinstance(t, Activationsd)]
        return any(on for t in found for key, on in zip(t.keys, t.sigmoid) if key == self.pred_key)


def _flag(name: str, value: Any) -> bool:
    """A switch, also as the command line hands it over: ``false`` there is text."""
    known = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in known:
        raise UsageError(f"{name}={value!r}: give true or false")
    return known[str(value).lower()]


def _entry(values: Any, index: int, n: int) -> Any:
    """One case of a batch of n, whatever the structure; a tensor that is no batch belongs to every case."""
    if isinstance(values, torch.Tensor):
        one = values.as_subclass(torch.Tensor)
        return one[index : index + 1] if one.ndim and len(one) == n else one
    if isinstance(values, Mapping):
        return {k: _entry(v, index, n) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [_entry(v, index, n) for v in values]
    return values
