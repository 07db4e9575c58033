"""Evaluate maps by metrics, next to control maps, for the `evaluate` command and the Ignite handler.

evaluator = Evaluator(explainer, ["Deletion", "PointingGame"])
result = evaluator(image, methods=["Saliency"], targets=["MultiClassMask(1)"], label=label)
result.rows[0]["value"], result.rows[0]["beats_controls"]
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

import esegeta_monai.files as storage
from esegeta_monai.engine.feature_masks import foreground
from esegeta_monai.engine.labels import label_problem
from esegeta_monai.engine.objective import Objective
from esegeta_monai.engine.score import Score
from esegeta_monai.errors import MetricError, RankLost, UsageError, named_reason
from esegeta_monai.explain.evaluation_costs import EvaluationCost, cost_of_evaluation, steps_of
from esegeta_monai.explain.explainer import Explainer
from esegeta_monai.explain.metric_choice import chosen_metrics, metrics_for
from esegeta_monai.explain.names import ResultNames
from esegeta_monai.explain.outcomes import not_positive
from esegeta_monai.explain.record import Record, tensor_hash
from esegeta_monai.explain.run import JudgedCase
from esegeta_monai.methods.base import METHODS, Explained, Method, Outcome
from esegeta_monai.methods.precision import full_precision
from esegeta_monai.methods.run import run_together
from esegeta_monai.metrics.base import Metric, MetricInput, asking, better
from esegeta_monai.metrics.controls import Control, controls
from esegeta_monai.metrics.regions import OUTSIDE_ALARM, region_table
from esegeta_monai.metrics.removal import used_parts
from esegeta_monai.targets.base import TARGETS
from esegeta_monai.utils.types import flag

__all__ = [
    "EvaluationResult",
    "Evaluator",
    "Known",
    "alarm_share",
    "value_of_label",
]

logger = logging.getLogger("esegeta_monai")

CONTROL = "control:"
"""Prefix of the names of control maps."""

Known = Callable[[Record], "Tensor | None"]
"""Return a map (C, *spatial) that has already been computed, or None. The argument is its record before the method
runs, whose entries `Record.decisive` determine the map."""


@dataclass
class EvaluationResult:
    """The metrics of one case.

    Attributes:
        rows: one per target, method and metric: the columns of ``metrics.csv`` except ``case``, and ``status`` (ok,
            undefined, not applicable, failed), ``reason``, ``meaning``, ``parameters``, ``notes``, ``curve``.
        regions: one per target, method and region.
        failed: reasons why a method has no map for a target, by ``target, method``.
        empty: reasons of the targets without a voxel, by target; these are not failures.
        measured_on: shape and affine (mm) of the preprocessed image, its SHA-256 and the seed: the metrics' grid.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    empty: dict[str, str] = field(default_factory=dict)
    measured_on: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Iterable[EvaluationResult]) -> EvaluationResult:
        """Merge the results of several processes for one case.

        Each process has its own methods and targets, and all have the same controls. The order is that of a single
        process: target by target, controls after the methods.
        """
        whole, seen = cls(), set()
        for part in parts:
            whole.failed |= part.failed
            whole.empty |= part.empty
            whole.measured_on |= part.measured_on
            for kept, further in ((whole.rows, part.rows), (whole.regions, part.regions)):
                keys = [(row["target"], row["method"], row.get("metric"), row.get("region")) for row in further]
                kept += [row for key, row in zip(keys, further) if key not in seen]
                seen |= set(keys)
        for rows in (whole.rows, whole.regions):
            order = {target: i for i, target in enumerate(dict.fromkeys(row["target"] for row in rows))}
            rows.sort(key=lambda row: (order[row["target"]], row["method"].startswith(CONTROL)))
        return whole


class Evaluator:
    """An evaluator of the maps of an explainer's cases.

    Args:
        explainer: holds network, inferer and devices.
        metrics: instances, names or configs; ``"quick"``, ``"full"`` or ``"all"``, see
            `esegeta_monai.explain.metric_choice`; None: ``"quick"``.
        with_controls: evaluate control maps as well; without them, ``beats_controls`` is None.
        tell_costs: log the estimated cost of each case before it is evaluated, for which a batch of windows is timed.
        outside_alarm: share of a map outside the body, 0 to 1, above which a region table raises an alarm.

    Raises:
        UsageError: a wrong metric or parameter, two metrics with the same name, or ``outside_alarm`` is not a share.
    """

    def __init__(
        self,
        explainer: Explainer,
        metrics: Any = None,
        *,
        with_controls: bool = True,
        tell_costs: bool = True,
        outside_alarm: float = OUTSIDE_ALARM,
    ) -> None:
        self.explainer, self.outside_alarm = explainer, alarm_share(outside_alarm)
        self.tell_costs = flag("tell_costs", tell_costs)
        self.metrics, self.with_controls = chosen_metrics(metrics), flag("with_controls", with_controls)

    def __call__(
        self,
        image: MetaTensor,
        methods: Any,
        targets: Any,
        *,
        label: Tensor | None = None,
        label_value: int | str | None = None,
        regions: Tensor | None = None,
        region_names: Mapping[int, str] | None = None,
        body: Tensor | None = None,
        maps: Mapping[tuple[str, str], Tensor] | None = None,
        known: Known | None = None,
        names: ResultNames | None = None,
        **more: Any,
    ) -> EvaluationResult:
        """Evaluate every method for every target of one case.

        Args:
            image: the preprocessed image (C, *spatial).
            methods, targets: instances, names or configs.
            label: label map (*spatial) or (1, *spatial) on the image's grid that marks the known cause.
            label_value: value of ``label`` that marks the cause: a number, or ``"class"`` for the number of the
                target's class; None: every value above zero. A label, regions or body map without a value above zero
                is recorded as failed; the body map is then left out.
            regions: label map (*spatial) or (1, *spatial) for the region tables; None: ``label``.
            region_names: names of its values.
            body: mask (*spatial) or (1, *spatial) of the patient; None: the image's foreground.
            maps: maps (C, *spatial) on the image's grid by (target name, method name), used instead of computing
                them; methods without a map are left out.
            known: function that returns maps that have already been computed, see `Known`; the others are computed.
            names: names of methods and targets, if these are a part of a run; None: names that distinguish them.
            more: ``data``, ``prediction``, ``network_args``, ``network_kwargs`` of `Explainer`, batch of one.

        Raises:
            UsageError: a wrong ``label_value``.
            EsegetaError: the case cannot be explained at all. Failures of a method or metric are in the result.
        """
        chosen, wanted = METHODS.create_all(methods), TARGETS.create_all(targets)
        names = names or ResultNames(chosen, wanted)
        result, dims = EvaluationResult(), image.ndim - 1
        label, regions, label_value = _plain(label, dims), _plain(regions, dims), value_of_label(label_value)
        for what, mask in (("label", label), ("regions", regions), ("body", body)):
            problem = None if mask is None else label_problem(what, torch.as_tensor(mask))
            if problem is not None:
                result.failed[what] = problem
        if body is None:
            body = foreground(image.as_tensor().detach().cpu())
        elif "body" in result.failed:  # of nobody, everything would be outside
            body = None
        for judged in self.explainer.judge(image[None], wanted, **more):
            result.failed |= dict(judged.left_out)
            result.empty |= dict(judged.empty)
            if judged.objective is None:
                continue
            result.measured_on = {
                "network_grid": list(image.shape[1:]),
                "network_affine": torch.as_tensor(image.affine).double().tolist(),
                "image_sha256": tensor_hash(judged.objective.image),
                "seed": judged.objective.seed,
            }
            case = _Case(judged, full_precision(judged.objective), image, label, label_value, _plain(body, dims), names)
            case.known = known
            self._case(case, chosen, maps, result, regions if regions is not None else label, region_names)
        return result

    def costs(
        self,
        image: MetaTensor,
        methods: Any,
        targets: Any,
        *,
        label: bool = False,
        given: bool = False,
        **more: Any,
    ) -> list[EvaluationCost]:
        """Estimate the cost of `__call__` without computing a map or a metric; the prediction is computed.

        Args:
            image, methods, targets, more: see `__call__`.
            label: True if there will be a label.
            given: True if ``maps`` will be given.

        Returns:
            One cost for each layer that replaces the prediction; one without such targets; [] if all targets are empty.

        Raises:
            EsegetaError: the case cannot be explained at all.
        """
        chosen = METHODS.create_all(methods)
        metrics = metrics_for(self.metrics, label=label)
        judged = self.explainer.judge(image[None], targets, **more)
        objectives = [full_precision(case.objective) for case in judged if case.objective is not None]
        return [self._cost(objective, chosen, metrics, given=given) for objective in objectives]

    def _cost(
        self, objective: Objective, methods: Sequence[Method], metrics: Sequence[Metric], *, given: bool
    ) -> EvaluationCost:
        maps = len(methods) + (len(controls()) if self.with_controls else 0)
        return cost_of_evaluation(metrics, objective, methods, maps, [] if given else methods)

    def _case(
        self,
        case: _Case,
        methods: Sequence[Method],
        maps: Mapping[tuple[str, str], Tensor] | None,
        result: EvaluationResult,
        regions: Tensor | None,
        region_names: Mapping[int, str] | None,
    ) -> None:
        control_methods: list[Method] = list(controls()) if self.with_controls else []
        metrics = metrics_for(self.metrics, label=case.label is not None)
        if self.tell_costs:
            logger.info("evaluation: %s", self._cost(case.objective, methods, metrics, given=maps is not None))
        all_names = [*map(case.names.method, methods), *(str(c.name) for c in control_methods)]
        judged_methods = [*methods, *control_methods]
        computed = case.explain(
            judged_methods if maps is None else control_methods, result, dict(zip(map(id, judged_methods), all_names))
        )
        titles = storage.distinct_names(metrics)
        # PredictedClasses and one of its classes have the same voxels and maps
        distinct = [k for k, target in enumerate(case.targets) if target not in case.targets[:k]]
        total = len(distinct) * len(judged_methods) * len(metrics)
        with steps_of(total, progress=self.explainer.settings.progress) as steps:
            for k in distinct:
                target = case.targets[k]
                rows: list[dict[str, Any]] = []
                for method, name in zip(judged_methods, all_names):
                    values = computed.get((id(method), k))
                    if values is None and maps is not None:
                        values = maps.get((target, name))
                    if values is None:
                        continue
                    subject = case.subject(values, k, method)
                    if isinstance(subject, str):
                        result.failed[f"{target}, {name}"] = subject
                        continue
                    for metric, title in zip(metrics, titles):
                        rows.append({"target": target, "method": name, **_measured(metric, title, subject)})
                        steps.measured(f"{target}, {name}, {title}")
                    if not isinstance(method, Control):
                        table = region_table(
                            subject,
                            regions=regions,
                            names=region_names,
                            origin=case.origin(k),
                            channel_names=list(self.explainer.settings.channel_names),
                            alarm=self.outside_alarm,
                        )
                        result.regions += [{"target": target, "method": name, **row} for row in table]
                _compare(rows, dict(zip(titles, metrics)))
                result.rows += rows


@dataclass
class _Case:
    """One case of one objective, with its label, body mask and names.

    Metrics run the network and repeat explanations without autocast, whose noise is as large as the differences that
    they measure. The evaluated maps themselves are computed in the precision of the run (``judged.objective``).
    """

    judged: JudgedCase
    objective: Objective
    image: MetaTensor
    label: Tensor | None
    label_value: int | str | None
    body: Tensor | None
    names: ResultNames
    known: Known | None = None
    shared: dict[Hashable, Any] = field(default_factory=dict)
    targets: list[str] = field(init=False)
    spacing: list[float] = field(init=False)

    def __post_init__(self) -> None:
        pairs = zip(self.judged.targets, self.judged.labels)
        self.targets = [self.names.target(target, text) for target, text in pairs]
        affine = torch.as_tensor(self.image.affine).double()
        dims = self.image.ndim - 1
        self.spacing = affine[:-1, :dims].norm(dim=0).tolist()

    def explain(
        self, methods: Sequence[Method], result: EvaluationResult, names: Mapping[int, str]
    ) -> dict[tuple[int, int], Tensor]:
        """Return maps (C, *spatial) by method (id) and index of the target; record failures in ``result``."""
        maps: dict[tuple[int, int], Tensor] = {}
        for method in methods:
            objective = self.judged.objective
            assert objective is not None
            earlier = self._earlier(method, objective)
            if earlier is not None:
                outcome = Outcome(earlier)
            elif method.needs_linear and not objective.linear:
                outcome = Outcome(
                    error=MetricError(f"{names[id(method)]} needs targets that are linear: use output='logit'")
                )
            elif method.needs_positive and any(score.falls for score in objective.scores):
                falling = ", ".join(score.label for score in objective.scores if score.falls)
                outcome = Outcome(error=not_positive(method, falling))
            else:
                objective.context.progress.start(self.judged.time_limit)
                with asking(objective):
                    (outcome,) = run_together([method], objective)
                objective.context.progress.start()
            if isinstance(outcome.error, RankLost):
                raise outcome.error
            for k, target in enumerate(self.targets):
                if outcome.result is not None:
                    maps[id(method), k] = outcome.result.maps[k]
                elif outcome.error is not None:
                    result.failed[f"{target}, {names[id(method)]}"] = named_reason(outcome.error)
            if outcome.result is not None and objective is self.objective:
                self.shared["explained", id(method)] = outcome.result.maps.double()
        return maps

    def _earlier(self, method: Method, objective: Objective) -> Explained | None:
        """Return the maps of all targets if every process that computes this case knows them, else None."""
        if self.known is None:
            return None
        known = [self.known(self.judged.record(method, k)) for k in range(len(objective.scores))]
        maps = [m.to(objective.image.device) for m in known if m is not None]
        everywhere = all(objective.context.processes.gather(len(maps) == len(known)))
        return Explained(torch.stack(maps)) if everywhere else None

    def subject(self, values: Tensor, k: int, method: Method) -> MetricInput | str:
        """Return the input of the metrics, or the reason why the map cannot be evaluated."""
        try:
            return MetricInput(
                values.to(self.objective.image.device),
                self.objective,
                k,
                method,
                label=self.cause(k),
                body=self.body,
                spacing=self.spacing,
                shared=self.shared,
            )
        except MetricError as error:
            return str(error)

    def cause(self, k: int) -> Tensor | None:
        """Return the mask (*spatial) of the cause for target k, or None without a label."""
        if self.label is None:
            return None
        if self.label_value is None:
            return self.label > 0
        index = self._score(k).class_index
        value = index if self.label_value == "class" else int(self.label_value)
        return torch.zeros_like(self.label, dtype=torch.bool) if value is None else self.label == value

    def origin(self, k: int) -> Tensor | None:
        """Return the mask (*spatial) from which distances are measured: the label, else the target's own voxels."""
        cause, score = self.cause(k), self._score(k)
        if cause is not None:
            return cause
        shape = tuple(self.image.shape[1:])
        if len(score.box) != len(shape) or any(b.stop > n for b, n in zip(score.box, shape)):
            return None
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[score.box] = score.shown.cpu()
        return mask

    def _score(self, k: int) -> Score:
        return self.objective.scores[k]


def alarm_share(share: float) -> float:
    """Return the share outside the body above which there is an alarm, as float.

    Raises:
        UsageError: it is not a number from 0 to 1; any other value would raise an alarm always or never.
    """
    if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
        raise UsageError(f"outside_alarm={share!r}: give a share from 0 to 1")
    return float(share)


def value_of_label(value: int | str | None) -> int | str | None:
    """Return the label value of the cause, see `Evaluator`; a number may be text, as shells pass it.

    Raises:
        UsageError: it is neither a whole number nor ``"class"``.
    """
    if value is None or value == "class" or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not str(value).isdigit():
        raise UsageError(f"label_value={value!r}: give a whole number, or 'class' for the target's own")
    return int(value)


def _plain(mask: Any, dims: int) -> Tensor | None:
    """Return a mask (*spatial) or (1, *spatial) of an image with ``dims`` spatial axes as (*spatial) on the CPU."""
    if mask is None:
        return None
    plain = torch.as_tensor(mask).as_subclass(Tensor).cpu()
    return plain[0] if plain.ndim == dims + 1 and len(plain) == 1 else plain


def _measured(metric: Metric, title: str, subject: MetricInput) -> dict[str, Any]:
    """Return a row: the value of the metric, or the reason why there is none."""
    monitor = subject.need_objective().context.progress
    monitor.start()
    began = time.monotonic()
    row: dict[str, Any] = {
        "metric": title,
        "group": metric.group,
        "value": None,
        "low": None,
        "high": None,
        "n": 0,
        "higher_is_better": metric.higher_is_better,
        "beats_controls": None,
        "status": "ok",
        "reason": None,
        "meaning": metric.meaning,
        "reference": metric.reference,
        "parameters": metric.parameters,
    }
    try:
        result = metric.update(subject)
        row |= {**result.as_json(), "used": used_parts(metric, subject)}
        if result.value is None:
            row |= {"status": "undefined", "reason": result.notes.get("undefined")}
    except MetricError as error:
        row |= {"status": "not applicable", "reason": str(error)}
    except RankLost:
        raise
    except Exception as error:  # one metric that fails leaves the others; its reason is in the table
        logger.debug("%s failed", title, exc_info=error)
        row |= {"status": "failed", "reason": named_reason(error)}
    return {**row, "seconds": round(time.monotonic() - began, 3), "passes": monitor.passes}


def _compare(rows: Sequence[dict[str, Any]], metrics: Mapping[str, Metric]) -> None:
    """Set ``beats_controls`` of the methods of one target: True if the value is better than that of every control."""
    for title, metric in metrics.items():
        results = [r for r in rows if r["metric"] == title]
        control_rows = [r for r in results if r["method"].startswith(CONTROL) and r["status"] in ("ok", "undefined")]
        if not metric.compared or metric.higher_is_better is None or not control_rows:
            continue
        for row in results:
            if not row["method"].startswith(CONTROL) and row["status"] in ("ok", "undefined"):
                row["beats_controls"] = all(better(metric, row["value"], other["value"]) for other in control_rows)
