"""Judges maps by metrics, the control maps beside them: what the `evaluate` command and the Ignite handler share.

evaluator = Evaluator(explainer, ["Deletion", "PointingGame"])
found = evaluator(image, methods=["Saliency"], targets=["MultiClassMask(1)"], label=label)
found.rows[0]["value"], found.rows[0]["beats_controls"]
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from monai.data import MetaTensor
from torch import Tensor

import esegeta_monai.storage as storage
from esegeta_monai.configurable import json_ready
from esegeta_monai.errors import MetricError, RankLost, named_reason
from esegeta_monai.explainer import Explainer, Judged
from esegeta_monai.features import foreground
from esegeta_monai.methods.base import METHODS, Explained, Method, run_together
from esegeta_monai.metrics.base import METRICS, Metric, Subject, asking, better
from esegeta_monai.metrics.controls import Control, controls
from esegeta_monai.metrics.regions import OUTSIDE_ALARM, region_table
from esegeta_monai.objective import Objective
from esegeta_monai.precision import full_precision
from esegeta_monai.storage.files import write_json
from esegeta_monai.targets.base import TARGETS, Score

__all__ = ["COLUMNS", "DEFAULT_METRICS", "REGION_COLUMNS", "EvaluationWriter", "Evaluator", "Found"]

logger = logging.getLogger("esegeta_monai")

_FIRST = ("case", "target", "method", "metric", "group", "value", "low", "high", "n", "higher_is_better")
COLUMNS: tuple[str, ...] = (*_FIRST, "beats_controls", "seconds", "passes")
"""Of ``metrics.csv``: one row a case, target, method and metric."""

_SUMS = ("voxels", "volume_mm3", "sum", "abs_sum", "share_of_abs", "mean")
REGION_COLUMNS: tuple[str, ...] = ("target", "method", "region", *_SUMS, "alarm")
"""Of ``<case>_regions.csv``."""

DEFAULT_METRICS = ("Deletion", "Insertion", "Infidelity", "FaithfulnessCorrelation", "Sparseness", "Entropy")
WITH_LABEL = ("PointingGame", "RelevanceMass", "RelevanceRank", "LocalisationAUC", "DistanceProfile")
"""Added by default where there is a label."""


@dataclass
class Found:
    """What was found of one case.

    Attributes:
        rows: one a target, method and metric: the columns of `COLUMNS` but ``case``, and ``status`` (ok, undefined, not
            applicable, failed), ``reason``, ``meaning``, ``parameters``, ``notes``, ``curve``.
        regions: one a target, method and region, the columns of `REGION_COLUMNS`.
        failed: reasons of methods and targets of which there was no map to judge, by ``target, method``.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    regions: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Evaluator:
    """Measures maps of an explainer's cases.

    Args:
        explainer: knows network, inferer and devices.
        metrics: instances, names or configs; None: `DEFAULT_METRICS`, with a label `WITH_LABEL` too. ``"all"``: every
            metric of the registry.
        with_controls: the control maps beside the methods; without them nothing can be said to beat them.
        outside_alarm: the share of a map outside the body above which a region table raises its alarm.

    Raises:
        UsageError: a wrong metric or parameter, or two metrics of one name.
    """

    def __init__(
        self,
        explainer: Explainer,
        metrics: Any = None,
        *,
        with_controls: bool = True,
        outside_alarm: float = OUTSIDE_ALARM,
    ) -> None:
        self.explainer, self.outside_alarm = explainer, outside_alarm
        everything = isinstance(metrics, str) and metrics.strip().lower() == "all"
        self.metrics = None if metrics is None else METRICS.create_all(list(METRICS) if everything else metrics)
        self.with_controls = with_controls
        if self.metrics is not None:
            storage.distinct_names(self.metrics)

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
        method_names: Sequence[str] | None = None,
        target_name: Any = None,
        **more: Any,
    ) -> Found:
        """Judges every method for every target of one case.

        Args:
            image: the preprocessed image (C, *spatial).
            methods, targets: instances, names or configs.
            label: label map (*spatial) or (1, *spatial) on the image's grid, where the cause is known to lie.
            label_value: which of its values is the cause: a number, ``"class"`` for the number of the target's class;
                None: every value above zero.
            regions: label map for the region tables; None: ``label``.
            region_names: of its values.
            body: mask of the patient; None: the image's foreground.
            maps: maps (C, *spatial) on the image's grid by target's and method's name, in place of computing them;
                methods without one are left out.
            method_names, target_name: how methods are called (default: their distinct names), and a function of target
                and label that says how targets are.
            more: ``data``, ``prediction``, ``network_args``, ``network_kwargs`` of `Explainer`, batch of one.

        Raises:
            EsegetaError: the case cannot be explained at all. What fails of a method or metric is in the result.
        """
        chosen, wanted = METHODS.create_all(methods), TARGETS.create_all(targets)
        names = list(method_names or storage.distinct_names(chosen))
        found = Found()
        label, regions = _plain(label), _plain(regions)
        if body is None:
            body = foreground(image.as_tensor().detach().cpu())
        for judged in self.explainer.judge(image[None], wanted, **more):
            for bound, reason in judged.left_out:
                found.failed[bound] = reason
            if judged.objective is None:
                continue
            case = _Case(judged, full_precision(judged.objective), image, label, label_value, _plain(body), target_name)
            self._case(case, chosen, names, maps, found, regions if regions is not None else label, region_names)
        return found

    def _case(
        self,
        case: _Case,
        methods: Sequence[Method],
        names: Sequence[str],
        maps: Mapping[tuple[str, str], Tensor] | None,
        found: Found,
        regions: Tensor | None,
        region_names: Mapping[int, str] | None,
    ) -> None:
        beside: list[Method] = list(controls()) if self.with_controls else []
        all_names = [*names, *(str(c.name) for c in beside)]
        everything = [*methods, *beside]
        computed = case.explain(
            everything if maps is None else beside, found, dict(zip(map(id, everything), all_names))
        )
        metrics = self.metrics
        if metrics is None:
            metrics = METRICS.create_all([*DEFAULT_METRICS, *(WITH_LABEL if case.label is not None else ())])
        titles = storage.distinct_names(metrics)
        for k in range(len(case.objective.scores)):
            target = case.names[k]
            rows: list[dict[str, Any]] = []
            for method, name in zip(everything, all_names):
                values = computed.get((id(method), k))
                if values is None and maps is not None:
                    values = maps.get((target, name))
                if values is None:
                    continue
                subject = case.subject(values, k, method)
                if isinstance(subject, str):
                    found.failed[f"{target}, {name}"] = subject
                    continue
                for metric, title in zip(metrics, titles):
                    rows.append({"target": target, "method": name, **_measured(metric, title, subject)})
                if not isinstance(method, Control):
                    table = region_table(
                        subject,
                        regions=regions,
                        names=region_names,
                        origin=case.origin(k),
                        channel_names=self.explainer.channel_names,
                        alarm=self.outside_alarm,
                    )
                    found.regions += [{"target": target, "method": name, **row} for row in table]
            _compare(rows, dict(zip(titles, metrics)))
            found.rows += rows


@dataclass
class _Case:
    """One case of one objective, and what is known of it.

    Metrics ask the network without autocast, whose noise is as large as the differences that they measure, and explain
    again without it; the maps that they judge are computed in the precision that is enough for them.
    """

    judged: Judged
    objective: Objective
    image: MetaTensor
    label: Tensor | None
    label_value: int | str | None
    body: Tensor | None
    target_name: Any
    shared: dict[Hashable, Any] = field(default_factory=dict)
    names: list[str] = field(init=False)
    spacing: list[float] = field(init=False)

    def __post_init__(self) -> None:
        pairs = zip(self.judged.targets, self.judged.labels)
        self.names = [self.target_name(t, text) if self.target_name else text for t, text in pairs]
        affine = torch.as_tensor(self.image.affine).double()
        dims = self.image.ndim - 1
        self.spacing = affine[:-1, :dims].norm(dim=0).tolist()

    def explain(
        self, methods: Sequence[Method], found: Found, names: Mapping[int, str]
    ) -> dict[tuple[int, int], Tensor]:
        """Maps (C, *spatial) by the method's id and target; what fails is noted."""
        maps: dict[tuple[int, int], Tensor] = {}
        for method in methods:
            objective = self.judged.objective
            assert objective is not None
            outcome: Explained | Exception
            if method.needs_linear and not objective.linear:
                outcome = MetricError(f"{names[id(method)]} needs targets that are linear: use output='logit'")
            else:
                objective.monitor.start(self.judged.time_limit)
                with asking(objective):
                    outcome = run_together([method], objective)[0]
                objective.monitor.start()
            if isinstance(outcome, RankLost):
                raise outcome
            for k, target in enumerate(self.names):
                if isinstance(outcome, Explained):
                    maps[id(method), k] = outcome.maps[k]
                else:
                    found.failed[f"{target}, {names[id(method)]}"] = named_reason(outcome)
            if isinstance(outcome, Explained) and objective is self.objective:
                self.shared["explained", id(method)] = outcome.maps.double()
        return maps

    def subject(self, values: Tensor, k: int, method: Method) -> Subject | str:
        """What metrics look at, or why there is nothing to look at."""
        try:
            return Subject(
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
        """Where the cause lies, of target k."""
        if self.label is None:
            return None
        if self.label_value is None:
            return self.label > 0
        index = self._score(k).class_index
        value = index if self.label_value == "class" else int(self.label_value)
        return torch.zeros_like(self.label, dtype=torch.bool) if value is None else self.label == value

    def origin(self, k: int) -> Tensor | None:
        """What distances are measured from: the label, else the target's own voxels."""
        cause, score = self.cause(k), self._score(k)
        if cause is not None:
            return cause
        shape = tuple(self.image.shape[1:])
        if len(score.box) != len(shape) or any(b.stop > n for b, n in zip(score.box, shape)):
            return None
        mask = torch.zeros(shape, dtype=torch.bool)
        mask[score.box] = score.mask.cpu()
        return mask

    def _score(self, k: int) -> Score:
        return self.objective.scores[k]


def _plain(mask: Any) -> Tensor | None:
    if mask is None:
        return None
    plain = torch.as_tensor(mask).as_subclass(Tensor).cpu()
    return plain[0] if plain.ndim > 2 and len(plain) == 1 else plain


def _measured(metric: Metric, title: str, subject: Subject) -> dict[str, Any]:
    """A row: what the metric found, or why it found nothing."""
    monitor = subject.need_objective().monitor
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
        metric.reset()
        found = metric.update(subject)
        row |= found.as_json()
        if found.value is None:
            row |= {"status": "undefined", "reason": found.notes.get("undefined")}
    except MetricError as error:
        row |= {"status": "not applicable", "reason": str(error)}
    except RankLost:
        raise
    except Exception as error:  # one metric that fails leaves the others; its reason is in the table
        logger.debug("%s failed", title, exc_info=error)
        row |= {"status": "failed", "reason": named_reason(error)}
    return {**row, "seconds": round(time.monotonic() - began, 3), "passes": monitor.passes}


def _compare(rows: Sequence[dict[str, Any]], metrics: Mapping[str, Metric]) -> None:
    """Marks the methods of one target that do better than every control."""
    prefix = "control:"
    for title, metric in metrics.items():
        mine = [r for r in rows if r["metric"] == title]
        against = [r for r in mine if r["method"].startswith(prefix) and r["status"] in ("ok", "undefined")]
        if not metric.compared or metric.higher_is_better is None or not against:
            continue
        for row in mine:
            if not row["method"].startswith(prefix) and row["status"] in ("ok", "undefined"):
                row["beats_controls"] = all(better(metric, row["value"], other["value"]) for other in against)


class EvaluationWriter:
    """Writes ``<output>/metrics.csv`` (tidy, all cases) and for each case ``<case>_metrics.json``,
    ``<case>_regions.csv`` and ``<case>_regions.json``. Cases of earlier runs into the same folder stay.

    Args:
        output_dir: made if it does not exist.
        provenance: what every JSON records beside versions.

    Raises:
        UsageError: an unwritable folder.
    """

    def __init__(self, output_dir: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        self.output_dir = storage.writable_folder(output_dir)
        self.provenance = dict(provenance or {})
        self.path = self.output_dir / "metrics.csv"
        self.problems: list[str] = []
        self.not_beating: list[str] = []

    def write(self, case: str, found: Found) -> Path:
        """Writes one case; returns the path of its JSON."""
        self.problems += [f"{case}: {what}: {why}" for what, why in found.failed.items()]
        for row in found.rows:
            if row["status"] == "failed":
                self.problems.append(f"{case}: {row['target']}, {row['method']}, {row['metric']}: {row['reason']}")
            if row["beats_controls"] is False:
                self.not_beating.append(f"{case}: {row['target']}, {row['method']}, {row['metric']}")
        base = self.output_dir / storage.safe_name(case) / storage.safe_name(case)
        region_rows = [{c: row.get(c) for c in REGION_COLUMNS} for row in found.regions]
        _write_text(base.with_name(f"{base.name}_regions.csv"), _csv(REGION_COLUMNS, region_rows))
        write_json(base.with_name(f"{base.name}_regions.json"), {"case": case, "regions": region_rows})
        self._table([{"case": case, **row} for row in found.rows], case)
        curves = [
            {"target": r["target"], "method": r["method"], "metric": r["metric"], **r["curve"]}
            for r in found.rows
            if r.get("curve")
        ]
        record = {
            **self.provenance,
            "case": case,
            "metrics": [{k: v for k, v in row.items() if k != "curve"} for row in found.rows],
            "curves": curves,
            "failed": found.failed,
            "intended_use": storage.INTENDED_USE,
            "versions": storage.versions(),
        }
        return write_json(base.with_name(f"{base.name}_metrics.json"), json_ready(record))

    def _table(self, rows: list[dict[str, Any]], case: str) -> None:
        earlier: list[dict[str, Any]] = []
        if self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                earlier = [row for row in csv.DictReader(file) if row.get("case") != case]
        _write_text(self.path, _csv(COLUMNS, [*earlier, *rows]))


def _csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(c)) for c in columns] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, (bool, float)) else value


def _write_text(path: Path, text: str) -> None:
    with storage.atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
