"""An Ignite handler that explains what an evaluator predicts, and saves maps beside the predictions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.utils import CommonKeys

from esegeta_monai.bundle.provenance import bundle_provenance
from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.costs import Cost, table
from esegeta_monai.files.maps import picture_path
from esegeta_monai.handlers.base import CaseHandler, flag
from esegeta_monai.handlers.series import ExplanationSeries
from esegeta_monai.output.report.page import write_report
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.utils.distributed import Share

__all__ = ["ExplanationHandler"]


class ExplanationHandler(CaseHandler):
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
            `esegeta_monai.explain.costs.Cost`.
        allow_costly: see `esegeta_monai.Explainer`.
        overwrite: explain again what is finished.
        map_format: ``"nifti"``, or ``"input"``: NRRD and MHA scans get maps in their own format, all others NIfTI.
        pictures: a PNG beside every map, and what the report shows of the scan.
        report: write the HTML report (`esegeta_monai.output.report.page.write_report`) when the run or an epoch's
        folder is done.
        progress: show a progress bar.
        epochs: on a trainer or a validating evaluator, of every so many epochs only the first that the engine runs:
            with 5 the first, sixth, … epoch, and where there is a validation every fifth epoch, each of them.
        cases: only these, by name; or the first so many of an epoch (of each process); None: all.
        series: an `ExplanationSeries`, which shows how explanations change from epoch to epoch.
        share: what the processes share, where ``torch.distributed`` has several. ``"cases"``: each explains those that
            its data loader gives it. ``"windows"``: all get the same cases and compute each of them together, for large
            volumes. ``"methods"``: all get the same cases, each takes methods and targets of its own. ``"auto"``: cases
            where the loader has a ``DistributedSampler``, else windows.
        name: of the logger; None: ``engine.logger``.

    A method or case that fails is recorded in ``run.json`` and logged; what can no longer be written is logged (a full
    disk, say). The evaluation goes on in either case.

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
        super().__init__(
            methods,
            targets,
            output_dir,
            bundle_root,
            image_key=image_key,
            pred_key=pred_key,
            output=output,
            class_names=class_names,
            epochs=epochs,
            cases=cases,
            share=share,
            name=name,
            seed=seed,
            allow_costly=flag("allow_costly", allow_costly),
            time_limit=time_limit,
            window_batch=window_batch,
            volume_device=volume_device,
            progress=flag("progress", progress),
        )
        for what, given in (("methods", self.methods), ("targets", self.targets)):
            if given == []:
                raise UsageError(f"{what}=[]: there is nothing to explain; leave {what} away for the usual ones")
        self.dry_run = flag("dry_run", dry_run)
        self._costs: list[tuple[str, Cost]] = []
        self.overwrite, self.pictures = flag("overwrite", overwrite), flag("pictures", pictures)
        if map_format not in ("nifti", "input"):
            raise UsageError(f"map_format={map_format!r}: give 'nifti' or 'input'")
        self.map_format = map_format
        self.report, self.series = flag("report", report), series
        self.writer: ResultWriter | None = None
        self.listeners: list[Callable[[Any, Attribution, str | None], None]] = []
        """Told of each attribution, with the engine and the hash of its network's weights."""

    def attach(self, engine: Any) -> None:
        """Registers with a MONAI evaluator or trainer."""
        from ignite.engine import Events

        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def _enter(self, engine: Any, epoch: int) -> None:
        if not self.dry_run:  # which writes nothing
            super()._enter(engine, epoch)

    def open(self, engine: Any, folder: Path) -> None:
        """The writer of a folder."""
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

    def look(self, engine: Any, image: MetaTensor, case: str, data: Mapping[str, Any], **more: Any) -> None:
        """Explains a case and writes what comes out."""
        assert self._explainer is not None
        assert self.targets is not None
        if self.dry_run:
            costs = self._explainer.costs(image[None], self.methods, self.targets, data=data, **more)
            self._costs += [(case, cost) for cost in costs]
            return
        assert self.writer is not None
        self.writer.provenance["weights_sha256"] = self._weights

        def tell(attribution: Attribution) -> None:
            for listener in self.listeners:
                listener(engine, attribution, self._weights)

        for methods, targets in self._ranks.part(self._share, self.methods, self.targets):
            noted = self._noted(case, engine.state.epoch, data)
            self.writer.explain(
                self._explainer,
                image,
                case,
                methods,
                targets,
                data=data,
                on_explained=tell,
                on_written=noted,
                **more,
            )

    def _noted(
        self, case: str, epoch: int, data: Mapping[str, Any]
    ) -> Callable[[Attribution, Path | None], None] | None:
        if self.series is None:
            return None
        series, names = self.series, None if self.writer is None else self.writer.names

        def note(attribution: Attribution, path: Path | None) -> None:
            series.add(attribution, case, epoch, data, None if path is None else picture_path(path), names)

        return note

    def _end_epoch(self, engine: Any) -> None:
        if self.series is None or self.writer is None or not self.writer.writes:
            return
        folder = self.writer.output_dir
        if "{epoch" in str(self.output_dir or ""):
            folder = Path(str(self.output_dir).split("{epoch")[0] + "x").parent
        with self._going_on("the series is not written"):
            self.series.close_epoch(engine.state.epoch, folder)

    def _end(self, engine: Any) -> None:
        super()._end(engine)
        if self.dry_run:
            for line in table(self._costs):
                self.logger.info(line)
            self._costs = []

    def close(self) -> None:
        """The run record and the report of the folder that is done."""
        assert self.writer is not None
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
