"""An Ignite handler that explains an evaluator's predictions and saves the maps next to them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.utils import CommonKeys

from esegeta_monai.bundle.provenance import bundle_provenance
from esegeta_monai.engine.head import HeadKind
from esegeta_monai.errors import EsegetaError, UsageError
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.costs import Cost, table
from esegeta_monai.explain.formats import format_of
from esegeta_monai.explain.settings import Checks
from esegeta_monai.files.layout import LAYOUTS, LayoutName
from esegeta_monai.files.maps import picture_path
from esegeta_monai.handlers.base import CaseHandler
from esegeta_monai.handlers.cases import pipeline_of
from esegeta_monai.handlers.series import ExplanationSeries
from esegeta_monai.handlers.tracking import Tracker
from esegeta_monai.output.report.page import write_report
from esegeta_monai.output.writer import ResultWriter
from esegeta_monai.utils.distributed import Share
from esegeta_monai.utils.types import flag

__all__ = ["ExplanationHandler"]


class ExplanationHandler(CaseHandler):
    """A handler that explains each case after its prediction and writes maps on the scan's own grid.

    It uses the engine's network, inferer, AMP settings and further inputs; the prediction is the engine's raw output.
    The bundle's postprocessing of the prediction is not affected. A trainer predicts in training mode, so there the
    network is run once more in evaluation mode, in which every method runs.

    Args:
        methods: names, configs or instances; default Saliency and GradCam.
        targets: names, configs or instances; None: every predicted class except the background, or the first value of
            a regression (by metadata.json).
        output_dir: output folder; None: that of the engine's ``SaveImaged``. ``{epoch}`` in it is replaced by the epoch
            (``"explained/epoch{epoch:03d}"``); without it, maps of a later epoch replace the earlier ones.
        bundle_root: bundle directory, for class and channel names, version and hashes; None: no bundle.
        image_key, pred_key: keys of ``engine.state.output``.
        output: the explained output, if the network has several.
        class_names: class number to name; None: from the bundle's metadata.json.
        seed, time_limit, window_batch, volume_device: see `esegeta_monai.Explainer`.
        dry_run: log the cost of each method and target (see `esegeta_monai.explain.costs.Cost`) without explaining or
            writing anything.
        allow_costly: see `esegeta_monai.Explainer`.
        overwrite: compute finished maps again.
        map_format: ``"nifti"``, or ``"input"``: NRRD and MHA scans get maps in their own format, all others NIfTI; or
            ``"dicom"``: map, target and picture of a DICOM series also as DICOM.
        layout: ``"bids"``: BIDS derivatives; ``"plain"``; None: as the folder is. `SaveImaged` writes in its own
            layout, so give a folder of its own with ``"bids"``.
        pictures: write a PNG next to every map, and the copy of the scan for the report.
        report: write the HTML report (`esegeta_monai.output.report.page.write_report`) after the run or after the
            last case of an epoch's folder.
        progress: show a progress bar.
        epochs: on a trainer or a validating evaluator, explain only the first epoch that the engine runs in each block
            of ``epochs``: with 5, epochs 1, 6, …; with a validation every fifth epoch, each validation.
        cases: names of the cases to explain, or the number of cases per epoch (and process); None: all.
        series: an `ExplanationSeries`, which records how explanations change over epochs.
        share: how several processes of ``torch.distributed`` share the work. ``"cases"``: each explains the cases of
            its data loader. ``"windows"``: all get the same cases and compute each of them together, for large
            volumes. ``"methods"``: all get the same cases, and each computes its own methods and targets. ``"auto"``:
            cases if the loader has a ``DistributedSampler``, else windows.
        checks: check what maps take for granted; the network is checked once, at the first epoch. ``"maps"``: check
            each finished map as well, and the network whenever its weights have changed.
        track: ``"mlflow"`` or ``"wandb"``: log each finished folder to the run that is active, see
            `esegeta_monai.handlers.tracking`; or a `Tracker`.
        name: name of the logger; None: ``engine.logger``.
        head: the meaning of the network's output, see `esegeta_monai.Explainer`; None: determined from the network and
            the engine's postprocessing.
        layer_axes: axes of layers where they cannot be found out, see `esegeta_monai.Explainer`.
        memory_format: order of values in memory, see `esegeta_monai.Explainer`.
        agreement: also write where the networks of an ensemble agree, see `esegeta_monai.Explainer`.
        local: compute perturbed windows in parts, see `esegeta_monai.Explainer`.

    A failed method or case is recorded in ``run.json`` and logged; files that can no longer be written (a full disk,
    say) are logged. The evaluation continues in both cases.

    Raises:
        UsageError: on construction or at the engine's start, before any work: an unknown method, target or parameter,
            equal names, a folder that cannot be written, an engine without a network.
        NetworkError: at the engine's start: a network that cannot be explained (half-precision weights).

    Example (in a bundle's config, as in ``explain.json``)::

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
        layout: LayoutName | None = None,
        report: bool = False,
        progress: bool = False,
        epochs: int = 1,
        cases: int | Sequence[str] | None = None,
        series: ExplanationSeries | None = None,
        share: Share | Literal["auto"] = "auto",
        checks: Checks = True,
        track: str | Tracker | None = None,
        name: str | None = None,
        head: HeadKind | None = None,
        layer_axes: Mapping[str, str] | None = None,
        memory_format: str | None = None,
        agreement: bool = False,
        local: bool = True,
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
            checks=checks,
            track=track,
            name=name,
            seed=seed,
            allow_costly=flag("allow_costly", allow_costly),
            time_limit=time_limit,
            window_batch=window_batch,
            volume_device=volume_device,
            progress=flag("progress", progress),
            head=head,
            layer_axes=layer_axes,
            memory_format=format_of(memory_format),
            agreement=flag("agreement", agreement),
            local=flag("local", local),
        )
        for what, given in (("methods", self.methods), ("targets", self.targets)):
            if given == []:
                raise UsageError(f"{what}=[]: there is nothing to explain; omit {what} for the defaults")
        self.dry_run = flag("dry_run", dry_run)
        self._costs: list[tuple[str, Cost]] = []
        self.overwrite, self.pictures = flag("overwrite", overwrite), flag("pictures", pictures)
        if map_format not in ("nifti", "input", "dicom"):
            raise UsageError(f"map_format={map_format!r}: give 'nifti', 'input' or 'dicom'")
        if layout not in (None, *LAYOUTS):
            raise UsageError(f"layout={layout!r}: give 'plain' or 'bids'")
        self.map_format, self.layout = map_format, layout
        self.report, self.series = flag("report", report), series
        self.writer: ResultWriter | None = None
        self.listeners: list[Callable[[Any, Attribution, str | None], None]] = []
        """Functions called with the engine, each attribution and the hash of the network's weights."""

    def attach(self, engine: Any) -> None:
        """Register with a MONAI evaluator or trainer."""
        from ignite.engine import Events

        super().attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._end_epoch)

    def _enter(self, engine: Any, epoch: int) -> None:
        if not self.dry_run:  # a dry run writes nothing
            super()._enter(engine, epoch)

    def open(self, engine: Any, folder: Path) -> None:
        """Create the writer of a folder."""
        assert self.targets is not None
        separate, extension = self._saved(engine, "parent"), str(self._saved(engine, "ext") or "").lstrip(".")
        self.writer = ResultWriter(
            folder,
            self.methods,
            self.targets,
            provenance=bundle_provenance(self.bundle_root) if self.bundle_root else {},
            separate_folder=True if separate is None else bool(separate),
            extension="input" if self.map_format == "input" else ".nii" if extension == "nii" else ".nii.gz",
            layout=self.layout,
            dicom=self.map_format == "dicom",
            overwrite=self.overwrite,
            pictures=self.pictures,
            ranks=self._ranks,
            together=self._share == "windows",
            checks=bool(self.checks),
        )

    def look(self, engine: Any, image: MetaTensor, case: str, data: Mapping[str, Any], **more: Any) -> None:
        """Explain a case and write the results, or estimate its cost in a dry run."""
        assert self._explainer is not None
        assert self.targets is not None
        if self.dry_run:
            costs = self._explainer.costs(image[None], self.methods, self.targets, data=data, **more)
            self._costs += [(case, cost) for cost in costs]
            return
        assert self.writer is not None
        self.writer.provenance["weights_sha256"] = self._weights

        def notify(attribution: Attribution) -> None:
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
                pipeline=pipeline_of(engine, image, self.image_key),
                data=data,
                on_explained=notify,
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
        with self._logged("the series is not written"):
            self.series.close_epoch(engine.state.epoch, folder)

    def _end(self, engine: Any) -> None:
        super()._end(engine)
        if self.dry_run:
            for line in table(self._costs):
                self.logger.info(line)
            self._costs = []

    def close(self) -> None:
        """Finish the run record of the folder, and write its report."""
        assert self.writer is not None
        self.writer.run.join(self._ranks)
        summary = ", ".join(f"{n} {status}" for status, n in self.writer.run.summary.items()) or "nothing to do"
        self.writer.run.__exit__(None, None, None)
        level = logging.ERROR if self.writer.run.exit_code else logging.INFO
        self.logger.log(level, f"explanations in {self.writer.output_dir}: {summary}")
        self._write_report()

    def _write_report(self) -> None:
        """Write the report of a finished folder; failure to write it does not end the engine's run."""
        if not self.report or self._ranks.rank or self.writer is None or not self.writer.run.summary:
            return
        try:
            written = write_report(self.writer.output_dir)
        except EsegetaError as error:
            self.logger.error(f"no report: {error}")
        else:
            self.logger.info(f"report: {written.index}")
