"""The index of a report: a table of cases and targets, and one tidy table of all results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from esegeta_monai.files.privacy import private
from esegeta_monai.output.report import words
from esegeta_monai.output.report.collect import CaseResults, Result, Run
from esegeta_monai.output.report.embed import Embedded
from esegeta_monai.output.report.render import read_text, render, short
from esegeta_monai.output.report.thumbnails import thumbnail
from esegeta_monai.utils.csv_text import csv_text

__all__ = ["RESULT_COLUMNS", "CohortRow", "cohort_rows", "index_page", "results_csv"]

RESULT_COLUMNS = (
    *("case", "target", "method", "region", "metric", "value", "low", "high", "n"),
    *("higher_is_better", "beats_controls", "status"),
)
"""Columns of ``results.csv``."""
OF_RECORD = (
    *("value", "baseline_value", "sum", "completeness_gap", "blend_deviation", "coverage", "target_voxels", "seconds"),
    "predicted_probability",
)
"""Figures of every run, as metrics of ``results.csv`` with the prefix ``record.``."""


@dataclass(frozen=True)
class CohortRow:
    """A row of the index: one target of a case, or a case that failed as a whole.

    Attributes:
        case, href: name and page of the case.
        target, kind: name of the target as people say it, and its label; empty if the case failed.
        thumbnail: the scan at the target with a map, as a data URI.
        prediction, probability, label: what the network predicted, and what is known to be true, in words or numbers.
        counts: number of results by status.
        evaluation: metrics in words; ``evaluated`` is False where nothing was measured.
        alarms: problems and cautions that concern the target.
    """

    case: str
    href: str
    target: str
    kind: str
    thumbnail: str | None
    prediction: str
    probability: float | None
    label: str
    counts: dict[str, int]
    evaluated: bool
    evaluation: str
    alarms: list[words.Finding]


def cohort_rows(case: CaseResults, embedded: Embedded, href: str) -> list[CohortRow]:
    """Return the rows of a case, one for each target."""
    names = words.plain_names(case.targets)
    whole = [words.Finding("bad", f"The case failed: {r.reason}") for r in case.results if r.method is None]
    if not case.targets:
        counts = case.counts()
        return [CohortRow(case.name, href, "", "", None, "–", None, "–", counts, False, "not evaluated", whole)]
    about = {target.name: target for target in words.targets(case)}
    rows = []
    for target in case.targets:
        part = CaseResults(case.name, [r for r in case.explained if r.target == target])
        part.metrics = [row for row in case.metrics if row["target"] == target]
        part.regions = [row for row in case.regions if row["target"] == target]
        places = {case.explained.index(r): i for i, r in enumerate(part.explained)}
        entries = [m for m in embedded.data["maps"] if m["place"] in places]
        cautions = {places[m["place"]]: words.map_cautions(m) for m in entries}
        alarms = [f for f in words.findings(part, (), cautions) if f.level in ("bad", "warn")]
        evaluated = bool(part.metrics or part.regions)
        prediction, probability = _prediction(part, about[target])
        rows.append(
            CohortRow(
                case.name,
                href,
                names[target],
                target,
                thumbnail(embedded, target),
                prediction,
                probability,
                _label(part),
                part.counts(),
                evaluated,
                _evaluation(part) if evaluated else "not evaluated",
                [*whole, *alarms],
            )
        )
    return rows


def _prediction(part: CaseResults, target: words.Target) -> tuple[str, float | None]:
    """Return what was predicted: the class of a classifier with its probability, else the size of the target."""
    name = words.first(part, lambda r: r.predicted_class_name)
    number = words.first(part, lambda r: r.predicted_class)
    if name is not None or number is not None:
        return str(name if name is not None else number), words.first(part, lambda r: r.predicted_probability)
    if target.reason is not None:
        return "nothing", None
    if target.voxels is None:
        return "–", None
    size = words.count(target.voxels, "voxel").replace(str(target.voxels), f"{target.voxels:,}")
    return size + (f", {short(target.volume_ml, 3)} ml" if target.volume_ml is not None else ""), None


def _label(part: CaseResults) -> str:
    """Return the true class of the case, if it is known."""
    label = words.first(part, lambda r: r.label)
    names = {r.record.class_index: r.record.class_name for r in part.explained}
    names |= {r.record.predicted_class: r.record.predicted_class_name for r in part.explained}
    return "–" if label is None else str(names.get(label) or label)


def _evaluation(part: CaseResults) -> str:
    own = [row for row in part.metrics if not row["control"]]
    beaten = sum(row["beats_controls"] is False for row in own)
    text = words.count(len(own), "value")
    return f"{text}, {beaten} not better than controls" if beaten else text


def index_page(run: Run, rows: Sequence[CohortRow], table: str) -> str:
    """Return the HTML of the index.

    Args:
        run: the output folder.
        rows: rows of all cases, in the order of the run.
        table: name of the file with all results.
    """
    cases = run.cases
    counts = [case.counts() for case in cases]
    total = {status: sum(c.get(status, 0) for c in counts) for status in words.STATUS_WORDS}
    summary = words.listed(words.STATUS_WORDS[status](n) for status, n in total.items() if n)
    known = any(row.label != "–" for row in rows), any(row.probability is not None for row in rows)
    return render(
        "index.html",
        [read_text("theme.js"), read_text("cohort.js")],
        rows=rows,
        n_cases=len(cases),
        bundle=private(run.info.get("bundle")),
        summary=f"{summary}.",
        not_evaluated=sum(not row.evaluated for row in rows),
        has_label=known[0],
        has_probability=known[1],
        targets=sorted({row.target for row in rows if row.target}),
        statuses=[status for status, n in total.items() if n],
        table=table,
    )


def results_csv(cases: Sequence[CaseResults]) -> str:
    """Return all results as one tidy table: a row for each case, target, method, region and metric.

    ``region`` is empty for the whole map. Metrics ``record.…`` are figures of every run, ``region.…`` those of region
    tables; the others come from `evaluate`. A failed result has a row without metric.
    """
    rows: list[dict[str, Any]] = []
    for case in cases:
        for result in case.results:
            rows += _result_rows(case, result)
        for row in case.metrics:
            known = {key: row.get(key) for key in RESULT_COLUMNS if key not in ("case", "region", "status")}
            rows.append({"case": case.name, **known})
        for row in case.regions:
            place = {"case": case.name, **{key: row[key] for key in ("target", "method", "region")}}
            place["status"] = "alarm" if row["alarm"] else None
            for name in ("voxels", "volume_mm3", "sum", "abs_sum", "share_of_abs", "mean"):
                if row.get(name) is not None:
                    rows.append({**place, "metric": f"region.{name}", "value": row[name]})
    return csv_text(RESULT_COLUMNS, rows)


def _result_rows(case: CaseResults, result: Result) -> list[dict[str, Any]]:
    place = {"case": case.name, "target": result.target, "method": result.method, "status": result.status}
    figures = {name: getattr(result.record, name) for name in OF_RECORD}
    known = {name: value for name, value in figures.items() if isinstance(value, (int, float))}
    return [{**place, "metric": f"record.{name}", "value": value} for name, value in known.items()] or [place]
