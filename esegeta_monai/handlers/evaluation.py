"""An Ignite handler that evaluates the explanations of an evaluator's predictions by metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents
from monai.utils import CommonKeys
from torch import Tensor

from esegeta_monai.bundle.provenance import bundle_provenance
from esegeta_monai.engine.head import HeadKind
from esegeta_monai.engine.labels import label_on_grid
from esegeta_monai.engine.score import Case
from esegeta_monai.errors import EsegetaError, InputError, RankLost, named_reason
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.evaluation import Evaluator, Known, alarm_share, value_of_label
from esegeta_monai.explain.formats import format_of
from esegeta_monai.explain.metric_choice import chosen_metrics
from esegeta_monai.explain.record import Record
from esegeta_monai.handlers.base import CaseHandler, numbered
from esegeta_monai.handlers.explanation import ExplanationHandler
from esegeta_monai.handlers.tracking import Tracker
from esegeta_monai.metrics.regions import OUTSIDE_ALARM
from esegeta_monai.output.evaluation_writer import EvaluationWriter
from esegeta_monai.utils.distributed import Share
from esegeta_monai.utils.types import flag
from esegeta_monai.utils.upstream import attached_handlers

__all__ = ["EvaluationHandler"]


class EvaluationHandler(CaseHandler):
    """A handler that evaluates the maps of each case by metrics, next to control maps, after its prediction.

    It writes the files of ``esegeta-monai evaluate``: ``metrics.csv``, and for each case ``<case>_metrics.json`` and
    ``<case>_regions.csv``. The report shows them if an `ExplanationHandler` writes to the same folder. Maps that an
    `ExplanationHandler` attached to the same engine before has computed for the batch are reused if everything that
    determines them is equal (`esegeta_monai.explain.record.Record.decisive`, weights); they are kept until evaluated.

    Args:
        methods, targets, output_dir, bundle_root, image_key, pred_key, output: see `ExplanationHandler`.
        class_names, epochs, cases, share, checks, name, seed, time_limit, window_batch: see `ExplanationHandler`.
        volume_device, progress, head, layer_axes, memory_format: see `ExplanationHandler`.
        metrics: names, configs or instances; ``"quick"``, ``"full"`` or ``"all"``, see
            `esegeta_monai.explain.metric_choice`, with localisation metrics for cases with a label; None: ``"quick"``.
        label_key: key of a label map in the case's data that marks the known cause. A case without it, or with a label
            that is not a map (the class of an image), is evaluated without a label. None: no label.
        label_value: value of the label that marks the cause: a number, or ``"class"`` for the target's class; None: all
            above 0.
        regions_key: key of a label map for the region tables; None: the label.
        region_names: number to name.
        body_key: key of a mask of the patient; None: the image's foreground.
        controls: evaluate the control maps (random, Sobel, constant) as well.
        outside_alarm: share of a map outside the body, 0 to 1, above which a region table raises an alarm.

    A failed case, method or metric is recorded and logged, and the evaluation continues.

    Raises:
        UsageError, NetworkError: see `ExplanationHandler`; also for an unknown metric.

    Example (in a bundle's config, as in ``explain_metrics.json``)::

        "+handlers": [{"_target_": "esegeta_monai.handlers.EvaluationHandler",
                       "methods": ["Saliency"], "metrics": ["Deletion", "RelevanceMass"], "output_dir": "@output_dir"}]
    """

    def __init__(
        self,
        methods: Any = ("Saliency", "GradCam"),
        targets: Any = None,
        metrics: Any = None,
        output_dir: str | Path | None = None,
        bundle_root: str | Path | None = None,
        *,
        label_key: str | None = CommonKeys.LABEL,
        label_value: int | Literal["class"] | None = None,
        regions_key: str | None = None,
        region_names: Mapping[int, str] | None = None,
        body_key: str | None = None,
        controls: bool = True,
        outside_alarm: float = OUTSIDE_ALARM,
        image_key: str = CommonKeys.IMAGE,
        pred_key: str = CommonKeys.PRED,
        output: int | str | None = None,
        class_names: Mapping[int, str] | None = None,
        seed: int = 0,
        time_limit: float | None = None,
        window_batch: int | None = None,
        volume_device: torch.device | str | None = None,
        progress: bool = False,
        epochs: int = 1,
        cases: int | Sequence[str] | None = None,
        share: Share | Literal["auto"] = "auto",
        checks: bool = True,
        track: str | Tracker | None = None,
        name: str | None = None,
        head: HeadKind | None = None,
        layer_axes: Mapping[str, str] | None = None,
        memory_format: str | None = None,
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
            checks=flag("checks", checks),  # there are no maps of its own that "maps" could check
            track=track,
            name=name,
            seed=seed,
            time_limit=time_limit,
            window_batch=window_batch,
            volume_device=volume_device,
            progress=flag("progress", progress),
            head=head,
            layer_axes=layer_axes,
            memory_format=format_of(memory_format),
        )
        self.label_key, self.regions_key, self.body_key = label_key, regions_key, body_key
        self.label_value, self.region_names = value_of_label(label_value), None
        if region_names is not None:
            self.region_names = numbered("region_names", region_names)
        self.metrics = chosen_metrics(metrics)
        self.controls, self.outside_alarm = flag("controls", controls), alarm_share(outside_alarm)
        self.writer: EvaluationWriter | None = None
        self._explained: dict[str, Tensor] = {}
        self._batch: tuple[int, int] | None = None

    def _begin(self, engine: Any) -> None:
        super()._begin(engine)
        attached = attached_handlers(engine, IterationEvents.FORWARD_COMPLETED)
        for other in attached[: attached.index(self)]:
            if isinstance(other, ExplanationHandler) and self._keep_map not in other.listeners:
                other.listeners.append(self._keep_map)

    def __call__(self, engine: Any) -> None:
        """Evaluate the batch whose raw predictions are in ``engine.state.output``."""
        super().__call__(engine)
        self._explained.clear()

    def _keep_map(self, engine: Any, attribution: Attribution, weights: str | None) -> None:
        """Keep a map of the `ExplanationHandler` until this batch is evaluated."""
        batch = (engine.state.epoch, engine.state.iteration)
        if batch != self._batch:
            self._batch, self._explained = batch, {}
        if attribution.map is not None and attribution.input is None:
            self._explained[_fingerprint(Record.from_json(attribution.record), weights)] = attribution.map.as_tensor()

    def _known(self, engine: Any) -> Known | None:
        """Return the lookup of the maps that were kept for this batch, or None."""
        if self._batch != (engine.state.epoch, engine.state.iteration):
            return None
        return lambda record: self._explained.get(_fingerprint(record, self._weights))

    def open(self, engine: Any, folder: Path) -> None:
        """Create the writer of a folder."""
        assert self.targets is not None
        self.writer = EvaluationWriter(
            folder,
            self.methods,
            self.targets,
            bundle_provenance(self.bundle_root) if self.bundle_root else {},
            ranks=self._ranks,
            share=self._share,
        )

    def look(self, engine: Any, image: MetaTensor, case: str, data: Mapping[str, Any], **more: Any) -> None:
        """Evaluate a case and write the results."""
        assert self.writer is not None
        assert self._explainer is not None
        evaluator = Evaluator(
            self._explainer,
            self.metrics,
            with_controls=self.controls,
            outside_alarm=self.outside_alarm,
            tell_costs=False,  # no pass besides those that the metrics need
        )
        self.writer.provenance["weights_sha256"] = self._weights
        masks, problems = self._masks(image, data)
        try:
            self.writer.evaluate(
                evaluator,
                image,
                case,
                problems=problems,
                data=data,
                label_value=self.label_value,
                region_names=self.region_names,
                known=self._known(engine),
                **masks,
                **more,
            )
        except RankLost:
            raise
        except Exception as error:  # recorded with its reason; a failed case must not end the engine's run
            self.writer.failed(case, named_reason(error))
            self.logger.debug("traceback", exc_info=error)

    def _masks(self, image: MetaTensor, data: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return label, regions and body on the image's grid, and the reasons why one cannot be used."""
        context = Case(torch.as_tensor(image.affine).double().cpu(), data, {})
        masks: dict[str, Any] = {}
        problems: dict[str, str] = {}
        for what, key in (("label", self.label_key), ("regions", self.regions_key), ("body", self.body_key)):
            value = None if key is None else data.get(key)
            no_map = not isinstance(value, str) and (value is None or torch.as_tensor(value).ndim < image.ndim - 1)
            if key is None or (no_map and what == "label"):
                continue
            try:
                if no_map:
                    raise InputError(f"the data has no label map {key!r}")
                if isinstance(value, Tensor) and value.ndim == image.ndim and len(value) > 1:
                    raise InputError(
                        f"{key!r} has {len(value)} channels: convert it to one label map in the preprocessing "
                        f"(AsDiscreted with argmax=True if it is one-hot), or set {what}_key=None"
                    )
                masks[what] = label_on_grid(key, image.as_tensor(), context)
            except EsegetaError as error:
                problems[what] = str(error)
        return masks, problems

    def close(self) -> None:
        """Write the table of all processes, and log failures."""
        assert self.writer is not None
        self.writer.join()
        if not self._ranks.rank:
            for problem in self.writer.problems:
                self.logger.error(problem)
            for text in self.writer.not_beating:
                self.logger.warning(f"no better than a control: {text}")
            self.logger.info(f"{self.writer.done} case(s) evaluated: {self.writer.path}")


def _fingerprint(record: Record, weights: str | None) -> str:
    """Return all entries that determine a map, as canonical JSON."""
    return json.dumps({**record.decisive(), "weights_sha256": weights}, sort_keys=True)
