"""Write attributions as files next to the prediction: map, picture, sidecar, run record.

Additive maps are brought back to the scan's grid by the sum-conserving adjoint of the preprocessing
(`InvertAttribution`), others by interpolation in world coordinates.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from monai.data import MetaTensor
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.engine.feature_masks import table_csv
from esegeta_monai.errors import EsegetaError, InputError, MethodError, OutputLost, RankLost, named_reason
from esegeta_monai.explain.explainer import Attribution, Explainer
from esegeta_monai.explain.formats import STORE
from esegeta_monai.explain.names import ResultNames
from esegeta_monai.explain.record import DECIDES, Record
from esegeta_monai.files.copies import save_mask, save_scan_copy
from esegeta_monai.files.dicom_out import DicomSource, check_dicom_writer, dicom_path
from esegeta_monai.files.grids.probe import Pipeline
from esegeta_monai.files.grids.resample import (
    _background,
    _cut_to_place,
    _image_on_scan,
    has_metadata,
    scan_of,
    to_scan_grid,
    unrecorded,
)
from esegeta_monai.files.layout import LayoutName, choose_layout
from esegeta_monai.files.maps import WITH_MAP
from esegeta_monai.files.pictures.picture import display_affine, save_picture
from esegeta_monai.files.pictures.scale import scale_of
from esegeta_monai.files.pictures.synthesis import save_curve, save_synthesised
from esegeta_monai.files.privacy import traceback_text
from esegeta_monai.files.runs import UNFINISHED, now
from esegeta_monai.methods.base import Method
from esegeta_monai.methods.meaning import meaning_of
from esegeta_monai.output.agreement import has_agreement, remove_spread, write_spread
from esegeta_monai.output.order import ResultOrder
from esegeta_monai.output.place import NO_METADATA, VANISHED, ZERO, PlaceChecks
from esegeta_monai.targets.base import Target
from esegeta_monai.utils.distributed import Processes
from esegeta_monai.utils.files import refuse_link_out
from esegeta_monai.utils.heartbeat import Heartbeat
from esegeta_monai.utils.leftovers import remove_leftovers
from esegeta_monai.utils.whole_files import check_sources

__all__ = [
    "ResultWriter",
]

logger = logging.getLogger("esegeta_monai")


class ResultWriter:
    """A writer of the results of a run: ``<output>/<case>/<case>_<target>_<Method>_attr.nii.gz``, ``.json``, ``.png``.

    Args:
        output_dir: output folder; it is created if it does not exist.
        methods, targets: those of the run; names of the same kind include the parameters that differ.
        provenance: further entries of every sidecar and of ``run.json``, JSON-ready (bundle, version, hashes); a map
            counts as finished only if all of them are equal.
        postfix, separate_folder, extension: file layout, see `esegeta_monai.utils.names.map_path`; the extension
            ``"input"`` stands for that of each scan (`esegeta_monai.utils.names.map_suffix`).
        layout: ``"bids"``: BIDS derivatives, see `esegeta_monai.files.layout`; ``"plain"``; None: as the folder is.
        dicom: also write map, target and picture as DICOM, see `esegeta_monai.files.dicom_out`; cases that are no DICOM
            series are refused.
        overwrite: compute and write finished maps again.
        pictures: write a PNG next to every map, and for the report a copy of the scan and a mask of each
            target (`esegeta_monai.files.copies`).
        ranks: the processes that write into this folder; None: this one.
        checks: check by their contents that image and scan lie in the same place
            (`esegeta_monai.files.grids.geometry.check_geometry`), and refuse maps where they do not.
        together: True if they compute each case together (`Explainer` with ``distributed=True``); the first one writes.
        part: see `esegeta_monai.files.runs.RunRecord`.
        heartbeat: that of a command which is watched; None: nobody watches.
        places: results of earlier checks that image and scan lie in the same place; None: there are none.
        cases: names of the run's cases in the order in which they were asked for; other cases follow as they come.

    Raises:
        UsageError: an unwritable folder or one with another layout, equal names, or DICOM without highdicom.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        methods: Sequence[Method],
        targets: Sequence[Target],
        *,
        provenance: Mapping[str, Any] | None = None,
        postfix: str = "attr",
        separate_folder: bool = True,
        extension: str = ".nii.gz",
        layout: LayoutName | None = None,
        dicom: bool = False,
        overwrite: bool = False,
        pictures: bool = True,
        checks: bool = True,
        ranks: Processes | None = None,
        together: bool = False,
        part: int | None = None,
        heartbeat: Heartbeat | None = None,
        places: PlaceChecks | None = None,
        cases: Sequence[str] = (),
    ) -> None:
        self.ranks, self.together = ranks or Processes(), together
        self.names = ResultNames(methods, targets)
        self.output_dir = storage.writable_folder(output_dir)
        self.provenance = dict(provenance or {})
        writes = not self.ranks.rank
        self.layout = choose_layout(self.output_dir, layout, write=writes, separate_folder=separate_folder)
        self.postfix, self.extension, self.dicom = postfix, extension, dicom
        if dicom:
            check_dicom_writer()
        self._sources: dict[str, DicomSource] = {}
        self.overwrite, self.pictures, self.checks = overwrite, pictures, checks
        rank = self.ranks.rank
        if not rank:
            remove_leftovers(self.output_dir)
        self.heartbeat = heartbeat or Heartbeat()
        started = self.ranks.gather(now())[0]
        self.run = storage.RunRecord(
            self.output_dir,
            self.provenance,
            rank=rank,
            part=part,
            run=self.heartbeat.run,
            writes=self.writes,
            started=started,
        )
        self._order = ResultOrder(methods, targets, cases)
        if self.run.journal is not None:
            self.heartbeat.journal = self.run.journal.path
        self._scans: dict[str, MetaTensor] = {}
        self._hashes: dict[str, str] = {}
        self._written: dict[str, str] = {}
        self._copied: tuple[str, dict[Path, Tensor]] = ("", {})
        self._places = places or PlaceChecks()
        self._pipeline: Pipeline | None = None

    @property
    def writes(self) -> bool:
        """True if this process writes the maps that it computes."""
        return not (self.together and self.ranks.rank)

    def path(self, attribution: Attribution, case: str, scan: Any = None) -> Path:
        """Return the path of a map."""
        extension = storage.map_suffix(scan) if self.extension == "input" else self.extension
        return self.layout.map(case, *self.names.of(attribution), self.postfix, extension)

    def key(self, attribution: Attribution, case: str, scan: Any) -> dict[str, Any]:
        """Return the entries that must be equal in a sidecar for its map to count as finished."""
        known = {name: attribution.record.get(name) for name in DECIDES}
        return {**self.provenance, "case": case, **known, "scan_sha256": self._scan_hash(scan)}

    def is_done(self, attribution: Attribution, case: str, scan: Any) -> bool:
        """Return True if an earlier run has computed the same map, and record it as skipped.

        Args:
            attribution: attribution without a map, as an `Explainer` passes it to ``skip``.
            case: name of the case, as given by the user.
            scan: file of the scan, or the scan as MetaTensor (C, *spatial).
        """
        path = self.path(attribution, case, scan)
        order = self._order.of(case, attribution)
        if self.run.is_known(case, *self.names.of(attribution)):  # this command was restarted
            self.run.add_order(case, *self.names.of(attribution), order)
            return True
        if self.overwrite or not storage.is_complete(path, self.key(attribution, case, scan)):
            return False
        if self.checks and not self._places.is_checked(path):
            return False
        if not has_agreement(path, attribution):
            return False
        if self.dicom and path.is_file() and not any(dicom_path(path, c).is_file() for c in (None, 0)):
            return False
        if self._clash(path, attribution, case):
            return False  # `write` reports it
        reason = "finished in an earlier run"
        written = path.relative_to(self.output_dir).as_posix() if path.is_file() else None
        self.run.set(case, *self.names.of(attribution), "skipped", reason, order=order, map=written)
        logger.info("%s: %s is finished, skipped", case, path.name)
        return True

    def explain(
        self,
        explainer: Explainer,
        image: MetaTensor,
        case: str,
        methods: Sequence[Method],
        targets: Sequence[Target],
        *,
        scan: Any = None,
        pipeline: Pipeline | None = None,
        on_explained: Callable[[Attribution], None] | None = None,
        on_written: Callable[[Attribution, Path | None], None] | None = None,
        training_folds: Mapping[str, str] | None = None,
        **more: Any,
    ) -> None:
        """Explain one case and write the results; finished maps are skipped, failures recorded.

        Args:
            explainer: explainer, usually with ``on_error="record"``; otherwise the first failure ends the case.
            image: the preprocessed image (C, *spatial), with its trace.
            case: name of the case, as given by the user.
            methods, targets: methods and targets of this writer, or a part of them.
            scan: see `write`.
            pipeline: the preprocessing of the case, for the check of its place if the contents cannot decide.
            on_explained: called with each attribution, in every process that computes it.
            on_written: called with each attribution and its map's path, None if there is no map.
            training_folds: for each fold of an ensemble, whether the case was in its training set, for the records.
            more: ``data``, ``prediction``, ``network_args``, ``network_kwargs`` of `Explainer`, batch of one.

        Raises:
            UsageError: a method is not one of this writer's.
        """
        for method in methods:
            self.names.method(method)
        scan, self._pipeline = scan if scan is not None else scan_of(image), pipeline

        done: set[tuple[str, str]] = set()
        """Results of this call."""
        chosen: list[tuple[str, str]] = []
        """The one result of a pass, where results run one by one."""
        one_by_one = case in self.heartbeat.separate

        def skip(attribution: Attribution) -> bool:
            if one_by_one:
                name = self.names.of(attribution)
                if name in done or (chosen and name != chosen[0]):
                    return True
            finished = self.writes and self.is_done(attribution, case, scan)
            if one_by_one and not finished:
                chosen.append(self.names.of(attribution))
            return self.ranks.gather(finished)[0] if self.together else finished

        def begin(attributions: Sequence[Attribution]) -> None:
            computed[:] = [self.names.of(attribution) for attribution in attributions]
            self.heartbeat.beat(case, computed, len({method for _, method in computed}))

        computed: list[tuple[str, str]] = []
        kept = self.output_dir / ".scores"
        explainer.settings.formats.path = self.output_dir / STORE
        try:
            refuse_link_out(self.layout.scan_copy(case).parent, self.output_dir)
            check_sources(image, more.get("data"))
            storage.check_contents(image, case)
            if self.dicom:
                self._source(scan)
            while True:
                chosen.clear()
                for attribution in explainer.stream(
                    image[None], methods, targets, skip=skip, scores_dir=kept, on_begin=begin, **more
                ):
                    name = self.names.of(attribution)
                    if one_by_one and name in done:
                        continue
                    if training_folds:
                        attribution.record["training_folds"] = dict(training_folds)
                    if on_explained is not None:
                        on_explained(attribution)
                    path = self.write(attribution, case, image, scan)
                    if on_written is not None and self.writes:
                        on_written(attribution, path)
                    done.add(name)
                    if name in computed:
                        computed.remove(name)
                        self.heartbeat.beat(case, computed, max(1, len({method for _, method in computed})))
                if not chosen:
                    break
                done.update(chosen)
        except (RankLost, OutputLost):
            raise
        except EsegetaError as error:
            self.failed(case, error)

    def write(self, attribution: Attribution, case: str, image: MetaTensor, scan: Any = None) -> Path | None:
        """Resample the map to the scan's grid and write map, picture and sidecar, in this order.

        If ``image`` has no metadata (``EnsureTyped(track_meta=False)``, arrays between transforms), the map stays on
        the network's grid. The entry ``grid`` of its record is ``scan`` or ``network``.

        Args:
            attribution: attribution of an `Explainer`.
            case: name of the case, as given by the user.
            image: the preprocessed image (C, *spatial) that was explained, with its trace.
            scan: file of the scan, or the scan as MetaTensor (C, *spatial); None: the file that ``image`` was loaded
                from, else ``image`` itself.

        Returns:
            The map's path; None if there is no map, or if another process writes it. The run record has an entry in
            any case.
        """
        if not self.writes:
            return None
        scan = scan if scan is not None else scan_of(image)
        path = self.path(attribution, case, scan)
        label, method_name = self.names.of(attribution)
        record = Record.from_json(attribution.record)
        record.result = {"target": label, "method": method_name}  # as run.json calls it
        failure: Exception | None = attribution.error
        clash = self._clash(path, attribution, case)
        if clash:
            record.status, record.reason = "failed", clash
            label = f"{label} of {attribution.target!r}"
        try:
            refuse_link_out(path.parent, self.output_dir)
            place = self._place(image, scan, record, case)
            if attribution.map is not None and not clash:
                record.update(self._write_map(path, attribution, record, case, image, place))
            elif record.status == "empty_target":
                # files of an earlier run explain another prediction
                for stale in (path, storage.picture_path(path), self._mask_path(attribution, case)):
                    stale.unlink(missing_ok=True)
                remove_spread(path)
            if self.pictures:
                self._copy_scan(case, image, place)
            if record.status in (*WITH_MAP, "empty_target"):
                sidecar = {**record.to_json(), **self.key(attribution, case, scan)}
                sidecar["class"] = sidecar.pop("class_name")
                storage.save_sidecar(path, sidecar)
        except Exception as error:  # a map that cannot be written must not affect the others
            record.status, record.reason = "failed", named_reason(error)
            failure = error
        if record.status in UNFINISHED:
            logger.error("%s: %s: %s", case, path.name, record.reason)
        written = attribution.map is not None and record.status not in UNFINISHED
        self.run.set(
            case,
            label,
            method_name,
            str(record.status),
            record.reason,
            order=self._order.of(case, attribution),
            map=path.relative_to(self.output_dir).as_posix() if written else None,
            seconds=record.seconds,
            warnings=record.warnings,
            **({"checks": record.checks} if record.checks else {}),
            **({} if failure is None else {"traceback": traceback_text(failure)}),
        )
        return path if written else None

    def failed(self, case: str, error: Exception) -> None:
        """Record a case that could not be explained at all."""
        if not self.writes:
            return
        text = named_reason(error)
        self.run.set(case, None, None, "failed", text, order=self._order.of(case), traceback=traceback_text(error))
        logger.error("%s: %s", case, text)
        logger.debug("traceback", exc_info=error)

    def _place(self, image: MetaTensor, scan: Any, record: Record, case: str) -> Any:
        """Return what the map is written on: the scan, or the image itself if nothing connects it with the scan."""
        placed = has_metadata(image, None if scan is image else self._scan(scan))
        record.grid = "scan" if placed and scan is not image else "network"
        self._places.add_doubts(record, scan)
        if not placed:
            with self._places.noted(record, case):
                warnings.warn(NO_METADATA.format("x".join(map(str, image.shape[1:]))), stacklevel=2)
        return scan if placed else image

    def _write_map(
        self, path: Path, attribution: Attribution, record: Record, case: str, image: MetaTensor, scan: Any
    ) -> dict[str, Any]:
        assert attribution.map is not None
        method = attribution.method
        grid = storage.Grid.of(scan)
        volume = self._scan(scan)
        on_cpu = cast(MetaTensor, attribution.map.cpu())
        synthesised = method.produces == "synthesised image"
        sums: dict[str, float] = {}
        with self._places.noted(record, case):
            if synthesised:
                values = _image_on_scan(on_cpu, volume, record.intensity_range)
            else:
                values, sums = to_scan_grid(on_cpu, volume, additive=method.additive)
            if record.grid == "scan" and (text := unrecorded(image, volume)) is not None and not self.checks:
                raise InputError(text)
            if record.grid == "scan" and self.checks:
                additive = method.additive and not synthesised
                self._places.check(record, case, image, volume, additive=additive, pipeline=self._pipeline)
        if not bool(torch.isfinite(values).all()):
            raise MethodError(f"{path.name}: the map has values that are not finite after resampling")
        more: dict[str, Any] = dict(sums)
        if record.sum_in_padding is not None:
            more["sum_in_padding"] = sums.get("sum_in_padding", 0.0) + record.sum_in_padding
        if record.status == "zero":
            more["reason"] = ZERO
        elif not bool(values.float().any()):  # as on disk
            more |= {"status": "zero", "reason": VANISHED}
            logger.warning("%s: %s: %s", case, path.name, VANISHED)
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = None if synthesised else self._mask_on_scan(attribution, case, volume, grid)
        if synthesised:  # the display window of an image is its intensity range
            ends = torch.tensor(record.intensity_range)
            shown = {"cal_min": float(ends.min()), "cal_max": float(ends.max())}
        else:
            shown = _display_window(values, method.signed, mask)
        storage.save_map(path, values, grid, method=method.name or type(method).__name__, **shown)
        more.update(write_spread(path, attribution, record, volume, grid))
        storage.picture_path(path).unlink(missing_ok=True)  # picture of an earlier map
        if record.features:
            with storage.atomic(storage.table_path(path)) as temporary:
                temporary.write_text(table_csv(record.features), encoding="utf-8")
        if self.pictures:
            affine, oriented = display_affine(volume)
            more["display"] = {
                "scan": self.layout.scan_copy(case).name,
                "mask": None,
                "affine": affine.tolist(),
                "oriented": oriented,
            }
        source = self._source(scan) if self.dicom else None
        if source is not None:
            for c, channel in enumerate(values):
                source.save_map(
                    dicom_path(path, c if len(values) > 1 else None),
                    channel.float().numpy(),
                    grid.affine,
                    method=method.name or type(method).__name__,
                    units=method.units,
                    target=attribution.label,
                    limit=shown["cal_max"],
                )
            if mask is not None:
                to = dicom_path(self._mask_path(attribution, case))
                source.save_mask(to, mask[0].numpy(), grid.affine, target=attribution.label)
        if self.pictures and synthesised:
            more["picture"] = self._draw_synthesised(path, values, attribution, record, case, volume)
        elif self.pictures:
            meaning = meaning_of(
                record.method, produces=method.produces, signed=method.signed, additive=method.additive
            )
            more["display"]["mask"] = None if mask is None else self._mask_path(attribution, case).name
            names = record.channel_names or []
            more["picture"] = save_picture(
                storage.picture_path(path),
                _background(values, volume, image),
                values,
                mask,
                signed=method.signed,
                case=case,
                method=method.name or type(method).__name__,
                target=attribution.label,
                class_name=record.class_name,
                units=method.units,
                channel_names=names if len(names) == len(values) else None,
                caption=meaning.text,
                ends=(meaning.low, meaning.high),
            )
        if source is not None and self.pictures:
            title = f"{method.name or type(method).__name__} of {attribution.label}"
            source.save_picture(dicom_path(path, picture=True), storage.picture_path(path), title=title)
        return more

    def _draw_synthesised(
        self, path: Path, values: Tensor, attribution: Attribution, record: Record, case: str, scan: MetaTensor
    ) -> dict[str, Any]:
        """Draw a synthesised image, cropped to its synthesised part, and its curve."""
        method = attribution.method
        name, subject = method.name or type(method).__name__, attribution.label
        if record.layer is not None:
            channel, neuron = record.channel, method.parameters.get("neuron")
            subject = f"layer {record.layer}"
            subject += "" if channel is None else f", channel {channel}"
            subject += "" if neuron is None else f", neuron {neuron}"
        elif record.class_name:
            subject = f"{record.class_name} ({attribution.label})"
        names = record.channel_names or []
        save_curve(
            storage.curve_path(path),
            record.curve or [],
            title=f"{name}: {subject}, case {case}",
            label="layer distance and penalties" if record.distance_end is not None else "objective",
        )
        return save_synthesised(
            storage.picture_path(path),
            _cut_to_place(values, record.to_json(), scan),
            record.intensity_range,
            case=case,
            method=name,
            subject=subject,
            units=method.units,
            channel_names=names if len(names) == len(values) else None,
        )

    def _mask_path(self, attribution: Attribution, case: str) -> Path:
        return self.layout.mask(case, self.names.of(attribution)[0])

    def _copies(self, case: str) -> dict[Path, Tensor]:
        """Return the copies that this run has written for the case; one case is kept at a time."""
        if self._copied[0] != case:
            self._copied = (case, {})
        return self._copied[1]

    def _mask_on_scan(
        self, attribution: Attribution, case: str, volume: MetaTensor, grid: storage.Grid
    ) -> Tensor | None:
        """Return the target's voxels (1, *scan), with pictures written once next to the maps; None for a class score.

        If nothing connects image and scan, the map is on the image's grid, as is its mask.
        """
        if attribution.mask is None:
            return None
        path, copies = self._mask_path(attribution, case), self._copies(case)
        if path not in copies:
            plain = MetaTensor(attribution.mask.as_tensor().float(), affine=attribution.mask.affine)
            with warnings.catch_warnings():  # the map's own way to the scan has given the same warnings
                warnings.simplefilter("ignore")
                copies[path] = to_scan_grid(plain, volume, additive=False, mode="nearest")[0]
            if self.pictures:
                save_mask(path, copies[path].numpy(), grid)
        return copies[path]

    def _copy_scan(self, case: str, image: MetaTensor, scan: Any) -> None:
        """Write the copy of the scan, once per case."""
        path, copies = self.layout.scan_copy(case), self._copies(case)
        if path not in copies:
            values = _background(image, self._scan(scan), image).as_tensor()
            save_scan_copy(path, values.numpy(), storage.Grid.of(scan))
            copies[path] = torch.empty(0)

    def _clash(self, path: Path, attribution: Attribution, case: str) -> str | None:
        """Reserve the path; return an error text if another map of this run has it."""
        what = f"{case!r}, {attribution.target!r}, {attribution.method!r}, {attribution.input}"
        before = self._written.setdefault(str(path).casefold(), what)
        if before == what:
            return None
        return f"{path.name} is the map of {before} in this run: give a target or method a name=, or rename the case"

    def _scan(self, scan: Any) -> MetaTensor:
        if isinstance(scan, MetaTensor):
            return cast(MetaTensor, scan.cpu())
        name = str(scan)
        if name not in self._scans:
            self._scans = {name: storage.read_scan(scan)}  # one scan is kept at a time
        return self._scans[name]

    def _source(self, scan: Any) -> DicomSource:
        """Return the DICOM series of a scan; one is kept at a time.

        Raises:
            InputError: it is none.
        """
        name = str(scan) if isinstance(scan, (str, os.PathLike)) else ""
        if name not in self._sources:
            self._sources = {name: DicomSource(scan)}
        return self._sources[name]

    def _scan_hash(self, scan: Any) -> str | None:
        if isinstance(scan, MetaTensor) or not Path(scan).is_file():
            return None
        name = str(scan)
        if name not in self._hashes:
            self._hashes[name] = storage.sha256_file(scan)
        return self._hashes[name]


def _display_window(values: Tensor, signed: bool, mask: Tensor | None) -> dict[str, float]:
    """Return the display window of a map file (C, *scan): the colour scale of its picture."""
    inside = None if mask is None else mask.reshape(mask.shape[-(values.ndim - 1) :]).numpy() > 0.5
    limit = scale_of(values.detach().float().numpy(), signed, inside).limit
    return {"cal_min": -limit if signed else 0.0, "cal_max": limit}
