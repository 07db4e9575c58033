"""The run of one case: its tasks, and their execution."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esegeta_monai.engine.checks.base import CheckResult
from esegeta_monai.engine.checks.layers import layer_findings
from esegeta_monai.engine.network.state import evaluating, weights_hash
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.perturbation.checkpoint import ScoreCheckpoint
from esegeta_monai.engine.progress import observer
from esegeta_monai.engine.sweep import sweep
from esegeta_monai.errors import EsegetaError, MethodError, MethodTimeout
from esegeta_monai.explain.agreement import Kind, compared, part_maps
from esegeta_monai.explain.attribution import Attribution
from esegeta_monai.explain.case import CaseInput
from esegeta_monai.explain.costs import check_cost
from esegeta_monai.explain.map_checks import FinishedMap, check_map
from esegeta_monai.explain.outcomes import NOTHING_THERE, BoundTarget, Outcomes, not_linear, not_positive
from esegeta_monai.explain.prediction import Prediction
from esegeta_monai.explain.record import Record, peak_memory, predicted_class, reset_peak_memory
from esegeta_monai.explain.settings import Settings
from esegeta_monai.methods.base import Explained, Method
from esegeta_monai.methods.run import grouped, run_together, shares_passes
from esegeta_monai.targets.base import Target

__all__ = ["CaseRun", "CaseTask", "JudgedCase", "OnBegin", "Skip"]

logger = logging.getLogger("esegeta_monai")

Skip = Callable[[Attribution], bool]
"""Return True to leave out an attribution, which has no map yet but the record of what would be computed."""

OnBegin = Callable[[Sequence[Attribution]], None]
"""Called before methods that share passes run, with their attributions, which have no map yet."""


DEVIATES = 0.1
"""Threshold of ``blend_deviation`` for a warning; half-precision windows of a float32 prediction stay below 0.05."""

ROUNDING = 1e-3
"""Largest ``blend_deviation`` of a prediction in float32."""


LAYER_MAPS = ("layer map", "activation")
"""Values of `produces` of methods whose maps show a layer."""

ONE_NETWORK = (
    "{}: a layer belongs to one of the two networks that are compared: use an input method, or explain one network"
)
ONE_CALL = (
    "{}: it is made for the weights of one network, as fitted patterns are, and an ensemble or mirrored views have "
    "several calls: explain one member without mirroring, or use LRP or a gradient method"
)

NOISE_PASSES = 8
"""How often F is computed to measure its noise, where equal passes differ."""


@dataclass
class CaseTask:
    """Methods that explain the same targets of a case.

    Attributes:
        methods: the methods.
        objective: objective of the targets' scores.
        bound: the targets, in the order of the objective's scores.
        predicted: the case after its prediction.
    """

    methods: list[Method]
    objective: Objective
    bound: list[BoundTarget]
    predicted: Prediction


@dataclass
class JudgedCase:
    """A case prepared for metrics.

    Attributes:
        case: index of the image in the batch.
        objective: objective of all targets that have a voxel; None if none has.
        targets, labels: target and label of each score of the objective.
        left_out: label and reason of each target that could not be bound.
        empty: label and reason of each target without a voxel.
        time_limit: seconds per method; None: no limit.
        record: function of a method and the index of a score that returns the record of its map before the run.
    """

    case: int
    objective: Objective | None
    targets: list[Target]
    labels: list[str]
    left_out: list[tuple[str, str]]
    empty: list[tuple[str, str]]
    time_limit: float | None
    record: Callable[[Method, int], Record]


class CaseRun:
    """The run of methods or metrics on one case.

    Args:
        settings: settings of the explainer.
        case: one image with its metadata, prediction and further inputs of the network.
    """

    def __init__(self, settings: Settings, case: CaseInput) -> None:
        self.settings, self.case = settings, case
        self.outcomes = Outcomes(settings, case)
        self._reported: set[str] = set()

    def explained(
        self,
        methods: Sequence[Method],
        targets: Sequence[Target],
        refused: Mapping[int, Exception],
        skip: Skip | None,
        scores_dir: str | os.PathLike[str] | None,
        on_begin: OnBegin | None = None,
    ) -> Iterator[Attribution]:
        """Yield the attributions of this case; arguments as in `esegeta_monai.Explainer` and `prepared`."""
        for task in self.prepared(methods, targets, refused, skip):
            if isinstance(task, Attribution):
                yield task
                continue
            if not shares_passes(task.methods[0]):  # otherwise the sweep of the methods compares
                with evaluating(self.settings.network, self.settings.device, task.objective.model.memory_format):
                    sweep(task.objective, [])
            for group in grouped(task.methods):
                checkpoint = None
                if scores_dir is not None and not group[0].needs_gradient:
                    checkpoint = ScoreCheckpoint(Path(scores_dir), self._checkpoint_key(group[0], task))
                task.objective.context.checkpoint = checkpoint
                if on_begin is not None:
                    on_begin(self._without_maps(group, task))
                yield from self._group(group, task)

    def _without_maps(self, group: Sequence[Method], task: CaseTask) -> list[Attribution]:
        """Return what a group of methods will explain, without maps."""
        return [
            Attribution(
                None, m, b.target, self.case.index, self.outcomes.record(m, b, task.objective.plan).to_json(), b.label
            )
            for m in group
            for b in task.bound
        ]

    def prepared(
        self,
        methods: Sequence[Method],
        targets: Sequence[Target],
        refused: Mapping[int, Exception],
        skip: Skip | None = None,
    ) -> Iterator[Attribution | CaseTask]:
        """Predict the case and yield its tasks, and attributions without a map for methods that do not run.

        Args:
            refused: errors of the methods (by id) that do not support the network.
            skip: see `esegeta_monai.Explainer`.
        """
        layers = list(dict.fromkeys(t.layer for t in targets))
        if len(layers) > 1:  # each layer replaces the prediction
            for layer in layers:
                yield from self.prepared(methods, [t for t in targets if t.layer == layer], refused, skip)
            return
        case, outcomes = self.case, self.outcomes
        predicted = Prediction(self.settings, case, layers[0] if layers else None)
        todo: dict[tuple[int, ...], list[Method]] = {}
        bound = list(predicted.bind(targets))
        for method in methods:
            left = []
            for j, b in enumerate(bound):
                record = outcomes.record(method, b, predicted.plan)
                if skip and skip(Attribution(None, method, b.target, case.index, record.to_json(), b.label)):
                    continue
                error = refused.get(id(method), b.error)
                if error is not None:
                    yield outcomes.failed(method, b, record, error)
                elif b.score is None or (b.score.empty and method.needs_voxels):
                    yield outcomes.empty(method, b, record)
                elif predicted.plan.calls and not all(m.for_ensembles for m in (method, *method.inside())):
                    yield outcomes.failed(method, b, record, MethodError(ONE_CALL.format(method.name)))
                elif predicted.pair and _reads_layer(method):
                    yield outcomes.failed(method, b, record, MethodError(ONE_NETWORK.format(method.name)))
                elif method.needs_linear and not b.score.linear:
                    yield outcomes.failed(method, b, record, not_linear(method, b))
                elif method.needs_positive and b.score.falls:
                    yield outcomes.failed(method, b, record, not_positive(method, b.label))
                else:
                    left.append(j)
            if left:
                todo.setdefault(tuple(left), []).append(method)
        for seen, together in todo.items():
            part = [bound[j] for j in seen]
            scores = [b.score for b in part if b.score is not None]
            objective = predicted.objective(scores)
            affordable = []
            for method in together:
                try:
                    if not self.settings.allow_costly:
                        check_cost(method, objective)
                    affordable.append(method)
                except EsegetaError as error:  # too costly, or the parameters do not fit the image
                    for b in part:
                        yield outcomes.failed(method, b, outcomes.record(method, b, predicted.plan), error)
            if affordable:
                yield CaseTask(affordable, objective, part, predicted)

    def judged(self, targets: Sequence[Target]) -> Iterator[JudgedCase]:
        """Yield this case prepared for metrics: for the prediction, and for each layer that replaces it."""
        for layer in dict.fromkeys(t.layer for t in targets):
            predicted = Prediction(self.settings, self.case, layer)
            bound = list(predicted.bind([t for t in targets if t.layer == layer]))
            seen = [b for b in bound if b.score is not None and not b.score.empty]
            left = [(b.label, str(b.error)) for b in bound if b.score is None]
            empty = [(b.label, NOTHING_THERE.format(b.label)) for b in bound if b.score is not None and b.score.empty]
            scores = [b.score for b in seen if b.score is not None]
            objective = predicted.objective(scores) if seen else None

            def record(
                method: Method, k: int, seen: list[BoundTarget] = seen, predicted: Prediction = predicted
            ) -> Record:
                return self.outcomes.record(method, seen[k], predicted.plan)

            at, names = [b.target for b in seen], [b.label for b in seen]
            yield JudgedCase(self.case.index, objective, at, names, left, empty, self.settings.time_limit, record)

    def _group(self, group: Sequence[Method], task: CaseTask) -> Iterator[Attribution]:
        """Run methods that share their forward and backward passes, and yield their attributions."""
        case, settings = self.case, self.settings
        objective, progress = task.objective, task.objective.context.progress
        progress.start(None if settings.time_limit is None else settings.time_limit * len(group))
        reset_peak_memory(settings.device)
        objective.context.local_note = None
        began = time.monotonic()
        names = ", ".join(m.name or type(m).__name__ for m in group)
        running = evaluating(settings.network, settings.device, objective.model.memory_format)
        with self._bar(names, group, objective), running:
            outcomes = run_together(group, objective)
        seconds = time.monotonic() - began
        shared = {
            "seconds": round(seconds, 3),
            "peak_memory_bytes": peak_memory(settings.device),
            "windows_used": len(objective.windows),
            "windows_total": len(objective.plan),
            "window_passes": sum(settings.processes.gather(progress.passes)),
            "ranks": settings.processes.size,
            "window_batch": objective.window_batch,
        }
        if (local := objective.context.local_note) is not None:
            shared["below_the_window"] = local
        if len(group) > 1:
            shared["passes_shared_with"] = [m.name for m in group]
        logger.info("case %d: %s took %.1f s, %d window passes", case.index, names, seconds, progress.passes)
        values = objective.image_values() if any(o.result is not None for o in outcomes) else None
        noise = self._noise(objective)
        layer_checks = self._layer_checks(group, objective)
        alone = self._alone(group, objective, [o.result is not None for o in outcomes])
        for method, outcome in zip(group, outcomes):
            for k, b in enumerate(task.bound):
                record = self.outcomes.record(method, b, objective.plan)
                record.update(shared)
                if layer_checks and method.produces in LAYER_MAPS:
                    record.checks = [*(record.checks or []), *layer_checks]
                others = [other.label for other in task.bound if other.label != b.label]
                checked = _warned(self.case.checks, method)
                record.warnings = [*task.predicted.notes, *checked, *progress.warnings_without(others)]
                record.blend_deviation = deviation = objective.blend_deviations()[k]
                if deviation is not None and not deviation <= DEVIATES:
                    record.warnings.append(self._deviates(b.label, deviation))
                if outcome.error is not None:
                    error = _with_resume_hint(outcome.error, objective.context.checkpoint)
                    yield self.outcomes.failed(method, b, record, error)
                    continue
                assert values is not None
                assert outcome.result is not None
                record.value, record.noise = float(values[k]), None if noise is None else float(noise[k])
                if b.target.layer is None:
                    predicted, activation = task.predicted, getattr(b.target, "activation", "auto")
                    entries = predicted_class(predicted.decided_by, settings.class_names, predicted.head, activation)
                    record.update(entries)
                if method.produces in LAYER_MAPS:
                    record.layer_spacing = self._layer_spacing(objective, outcome.result.note(k).get("layer"))
                if settings.checks:
                    result = _precision(objective, outcome.result.note(k), record)
                    record.checks = [*(record.checks or []), result.entry()]
                self._check_map(task, method, k, outcome.result, record)
                yield from self.outcomes.finished(
                    method, b, record, outcome.result, k, self._of_target(alone, method, k, record)
                )
        checkpoint = objective.context.checkpoint
        if checkpoint is not None and all(o.result is not None for o in outcomes):
            checkpoint.remove()  # not earlier, because the caller has now written the maps

    def _alone(
        self, group: Sequence[Method], objective: Objective, done: Sequence[bool]
    ) -> dict[Kind, tuple[list[float], dict[int, list[Tensor] | str]]]:
        """Compute the maps of the members and of the views alone, if they are to be compared.

        Returns:
            For each kind the shares, and by the method's id its maps (k, C, *spatial), or why there are none.
        """
        kinds = compared(objective.plan) if self.settings.agreement else []
        methods = [method for method, ok in zip(group, done) if ok]
        alone: dict[Kind, tuple[list[float], dict[int, list[Tensor] | str]]] = {}
        for kind in kinds if methods else []:
            with evaluating(self.settings.network, self.settings.device, objective.model.memory_format):
                shares, maps = part_maps(methods, objective, kind)
            alone[kind] = shares, {id(method): m for method, m in zip(methods, maps)}
        return alone

    @staticmethod
    def _of_target(
        alone: Mapping[Kind, tuple[list[float], dict[int, list[Tensor] | str]]],
        method: Method,
        k: int,
        record: Record,
    ) -> dict[Kind, tuple[Sequence[float], list[Tensor]]]:
        """Return the shares and maps (C, *spatial) of target k; a failure is written to the record."""
        result: dict[Kind, tuple[Sequence[float], list[Tensor]]] = {}
        for kind, (shares, maps) in alone.items():
            own = maps[id(method)]
            if isinstance(own, str):
                record.agreement = {**(record.agreement or {}), kind: {"failed": own}}
                record.warnings = [*record.warnings, f"the maps of the {kind} could not be computed alone: {own}"]
            else:
                result[kind] = shares, [m[k] for m in own]
        return result

    def _check_map(self, task: CaseTask, method: Method, k: int, explained: Explained, record: Record) -> None:
        """Check the map of target k, if the settings ask for it, and put the result into its record."""
        if self.settings.checks != "maps":
            return
        if any(check.name == "determinism" and check.verdict == "warned" for check in self.case.checks):
            result = CheckResult("map", "not checked", "not checked: equal passes of the network differ")
        else:
            done = FinishedMap(method, task.objective, k, explained.maps[k], explained.note(k), task.predicted.infer)
            with evaluating(self.settings.network, self.settings.device):
                result = check_map(done)
        record.checks = [*(record.checks or []), result.entry()]
        record.map_check = "none" if result.verdict == "not checked" else result.verdict
        if result.verdict == "warned":
            record.warnings.append(result.text)
            logger.warning("%s: %s: %s", record.target_name, method.name, result.text)

    def _layer_checks(self, group: Sequence[Method], objective: Objective) -> list[dict[str, Any]]:
        """Return the entries of the checks of layers for methods whose maps are those of a layer."""
        if not self.settings.checks or all(method.produces not in LAYER_MAPS for method in group):
            return []
        with evaluating(self.settings.network, self.settings.device):
            return [check.entry() for check in layer_findings(objective)]

    def _layer_spacing(self, objective: Objective, layer: Any) -> list[float] | None:
        """Return the distance of the positions of a layer per axis, in mm; None if its map was not read."""
        positions = objective.context.layer_positions.get(layer) if isinstance(layer, str) else None
        roi = objective.plan.roi
        if positions is None or len(positions) != len(roi):
            return None
        affine = torch.as_tensor(self.case.image.affine).double()
        spacing = affine[: len(roi), : len(roi)].norm(dim=0).tolist()
        return [size * n / p for size, n, p in zip(spacing, roi, positions)]

    def _noise(self, objective: Objective) -> Tensor | None:
        """Return the standard deviation of F (k,) over repeated passes; None if equal passes agree."""
        if all(check.name != "determinism" or check.verdict == "passed" for check in self.case.checks):
            return None

        def repeat() -> Tensor:
            with evaluating(self.settings.network, self.settings.device, objective.model.memory_format):
                return torch.cat([objective.value(objective.image[None]) for _ in range(NOISE_PASSES)], 1).std(1)

        return objective.memo("noise", repeat)

    def _deviates(self, label: str, deviation: float) -> str:
        """Return the warning that the explained prediction differs from the given one; log it once per target."""
        remedy = "give raw outputs (before softmax and the like), and the inferer and the weights that predicted"
        if self.settings.amp:
            remedy = "switch amp off, since this network's predictions differ in half precision; otherwise " + remedy
        text = (
            f"{label}: the network's output deviates from the prediction by {100 * deviation:.2g} %, so the map does "
            f"not explain the prediction that is shown: {remedy}"
        )
        if label not in self._reported:
            self._reported.add(label)
            logger.warning(text)
        return text

    def _checkpoint_key(self, method: Method, task: CaseTask) -> dict[str, Any]:
        """Return the key of a checkpoint: everything that changes a perturbation's score."""
        records = [self.outcomes.record(method, b, task.objective.plan) for b in task.bound]
        names = ["parameters", "amp", "seed", "inferer", "output", "network", "network_affine"]
        names += ["image_sha256", "inputs_sha256"]
        return {
            "method": type(method).__name__,
            "version": (records[0].versions or {})["esegeta_monai"],  # versions may order the pairs differently
            "weights_sha256": weights_hash(self.settings.network),
            "targets": [[r.target, r.target_parameters, r.target_sha256] for r in records],
            "memory_format": (records[0].memory_format or {}).get("used"),
            **{name: getattr(records[0], name) for name in names},
        }

    @contextmanager
    def _bar(self, names: str, group: Sequence[Method], objective: Objective) -> Iterator[None]:
        if (follows := observer()) is not None:
            follows.began(names, _total(group, objective))
        if not self.settings.progress:
            yield
            return
        from tqdm import tqdm

        with tqdm(total=_total(group, objective), desc=names[:60], unit="window", file=sys.stderr) as bar:
            objective.context.progress.on_pass = bar.update
            try:
                yield
            finally:
                objective.context.progress.on_pass = None


def _reads_layer(method: Method) -> bool:
    """Return True if a method, or one inside it, belongs to a layer."""
    return any(m.produces in LAYER_MAPS or hasattr(m, "layer") for m in (method, *method.inside()))


def _precision(objective: Objective, note: Mapping[str, Any], record: Record) -> CheckResult:
    """Return the check that a map is computed in the precision of the prediction.

    Args:
        objective: of the map.
        note: of the map; ``amp_fallback`` is the reason for float32.
        record: of the map, with ``amp`` and ``blend_deviation``.
    """
    asked, own = objective.model.autocast_dtype, str(objective.image.dtype).removeprefix("torch.")
    deviation, text = record.blend_deviation, f"the windows run in {own}, as the prediction"
    if deviation is not None and not deviation <= DEVIATES:
        return CheckResult("precision", "warned", "the windows deviate from the prediction, see the warning")
    if asked is None and deviation is not None and deviation > ROUNDING:
        text = "not checked: the given prediction deviates from the windows by more than float32 rounds"
        return CheckResult("precision", "not checked", text)
    if asked is None:
        return CheckResult("precision", "passed", text)
    half = str(asked).removeprefix("torch.")
    if record.amp is None or note.get("amp_fallback") is not None:
        reason = note.get("amp_fallback") or "the method needs it"
        text = f"the prediction runs under autocast ({half}), this map in {own}: {reason}"
        return CheckResult("precision", "handled", text)
    return CheckResult("precision", "passed", f"the windows run under autocast ({half}), as the prediction")


def _warned(checks: Sequence[CheckResult], method: Method) -> list[str]:
    """Return the texts of the checks that warn of a method's maps."""
    concerned = {"all": True, "gradient": method.needs_gradient, "layer": method.produces == "layer map"}
    return [check.text for check in checks if check.verdict == "warned" and concerned[check.concerns]]


def _with_resume_hint(error: Exception, checkpoint: ScoreCheckpoint | None) -> Exception:
    """Return an error; if the time limit ended a method with saved scores, it states that a new run resumes."""
    if checkpoint is None or not isinstance(error, MethodTimeout) or not checkpoint.stored:
        return error
    return MethodTimeout(f"{error}; its scores are saved: the same run continues from them")


def _total(group: Sequence[Method], objective: Objective) -> int | None:
    """Return the total of a progress bar in window passes; None if a method cannot count them."""
    try:
        return sum(m.passes(objective) for m in group)
    except Exception as error:  # a missing file, say; the run of the method raises it too, and it is recorded there
        logger.debug("%s: its passes cannot be counted: %s", group[0].name, error)
        return None
