"""The report of an output folder: one self-contained HTML page per case, and an index."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.layout import Layout
from esegeta_monai.files.maps import picture_path
from esegeta_monai.files.privacy import private
from esegeta_monai.output.report import words
from esegeta_monai.output.report.charts import charts
from esegeta_monai.output.report.cohort import CohortRow, cohort_rows, index_page, results_csv
from esegeta_monai.output.report.collect import ALTERED, CaseResults, Curve, Result, Run, read_output
from esegeta_monai.output.report.embed import BUDGET, Embedded, embed
from esegeta_monai.output.report.render import VIEWER, read_text, render, short
from esegeta_monai.output.report.thumbnails import picture_of
from esegeta_monai.output.report.viewer3d import HOW_TO_INSTALL, find_niivue
from esegeta_monai.utils.files import atomic, inside, refuse_remote
from esegeta_monai.utils.leftovers import remove_leftovers

__all__ = ["Written", "report_path", "viewer_context", "write_report"]

Convention = Literal["radiological", "neurological"]

LARGEST_PICTURE = 400_000
"""Largest number of bytes of a PNG that is embedded unchanged."""


@dataclass(frozen=True)
class Written:
    """A written report.

    Attributes:
        index: path of the index.
        table: path of the table of all results.
        cases: path of the page of each case, by its name.
        altered: one line for each map that is not the file that ``explain`` wrote, and is not shown.
    """

    index: Path
    cases: dict[str, Path]
    table: Path
    altered: list[str] = field(default_factory=list)


def report_path(output_dir: str | os.PathLike[str], case: str) -> Path:
    """Return the path of the page of a case.

    >>> report_path("out", "sub-01").as_posix()
    'out/sub-01/sub-01_report.html'
    """
    return Layout.of(output_dir).beside(case, "report.html")


def write_report(
    output_dir: str | os.PathLike[str], *, convention: Convention = "radiological", view_3d: bool = False
) -> Written:
    """Write ``<output>/<case>/<case>_report.html`` for each case, ``<output>/index.html`` and ``<output>/results.csv``.

    The index has a row for each case and target. The table has a row for each case, target, method, region and metric.

    Everything is read from ``output_dir``: the results of ``explain`` and, if it was run, of ``evaluate``. The pages
    work from disk without an internet connection. Each is at most 5 MB (without the 3D view, which adds 2.3 MB), so
    large volumes are shown as means over blocks of voxels. The pages contain no folder names, no names of scan files
    and nothing from a scan's header.

    Args:
        output_dir: the output folder of a run, which may have failed or been stopped.
        convention: ``radiological`` (the viewer's right is the patient's left) or ``neurological``.
        view_3d: add NiiVue and a 3D view to each page; a 3D view can make the patient recognisable.

    Raises:
        UsageError: the folder has no results or cannot be written, the convention is unknown, or ``view_3d`` is set and
            NiiVue is not installed.

    Example:
        >>> import json, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     entry = {"case": "sub-01", "target": None, "method": None, "status": "failed", "reason": "no scan"}
        ...     _ = (Path(folder) / "run.json").write_text(json.dumps({"results": [entry]}))
        ...     written = write_report(folder)
        ...     "no scan" in written.cases["sub-01"].read_text(encoding="utf-8")
        True
    """
    if convention not in ("radiological", "neurological"):
        raise UsageError(f"convention is radiological or neurological, not {convention!r}")
    refuse_remote(output_dir)
    remove_leftovers(output_dir)
    library = find_niivue().read_text(encoding="utf-8") if view_3d else None
    run = read_output(Path(output_dir))
    pages: dict[str, Path] = {}
    rows: list[CohortRow] = []
    for case in run.cases:
        images = {id(result): _synthesised(result, case.notes) for result in case.explained}
        budget = BUDGET - sum(len(image or "") for image in images.values())
        embedded = embed(case, radiological=convention == "radiological", budget=budget)
        path = report_path(output_dir, case.name)
        _write(path, _case_page(run, case, embedded, images, convention, library, path))
        pages[case.name] = path
        rows += cohort_rows(case, embedded, quote(path.relative_to(output_dir).as_posix()))
    index, table = Path(output_dir) / "index.html", Path(output_dir) / "results.csv"
    _write(table, results_csv(run.cases))
    _write(index, index_page(run, rows, table.name))
    altered = [f"{c.name}: {r.reason}" for c in run.cases for r in c.results if r.status == ALTERED]
    return Written(index, pages, table, altered)


def _write(path: Path, content: str) -> None:
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "backslashreplace"))


# ---- a case ----------------------------------------------------------------------------------------------------------


def _case_page(
    run: Run,
    case: CaseResults,
    embedded: Embedded,
    images: Mapping[int, str | None],
    convention: str,
    library: str | None,
    path: Path,
) -> str:
    scripts = [read_text("theme.js"), *([] if library is None else [library.replace("</script", "<\\/script")])]
    scripts += [read_text(name) for name in (*VIEWER, "page.js")]
    data = embedded.data
    viewer = viewer_context(case, embedded, images, path)
    cautions = {entry["place"]: words.map_cautions(entry) for entry in data["maps"]}
    findings = words.findings(case, [*case.notes, *embedded.notes], cautions)
    size = embedded.bytes + sum(map(len, scripts))
    return render(
        "case.html",
        scripts,
        three=library is not None,
        case=case,
        **viewer,
        index_href="../index.html",
        lead=words.lead(case, private(run.info)),
        counts=case.counts(),
        findings=findings,
        levels=words.levels(findings),
        targets=words.targets(case),
        score_means=words.SCORE,
        orientation=_orientation(embedded, convention),
        volumes=embedded.volumes,
        metrics=_metric_tables(case),
        charts=charts([*case.curves, *_synthesis_curves(case)]),
        compared=[r for r in case.explained if r.record.blend_deviation is not None],
        checks=_checks(case.results),
        agreement=_agreement(case.explained),
        training=_training(case),
        regions=_region_tables(case),
        problems=[r for r in case.results if r.status in words.PROBLEMS],
        warnings=_warnings(case.results),
        methods_text=words.methods_text(case, private(run.info)),
        references=words.references(case),
        run_facts=_facts(run, case),
        versions=list((run.info.get("versions") or words.first(case, lambda r: r.versions) or {}).items()),
        parameters=_parameters(case),
        view_3d=library is not None,
        size_text=_size_text(size, library),
        how_3d=HOW_TO_INSTALL,
    )


def viewer_context(
    case: CaseResults, embedded: Embedded, images: Mapping[int, str | None], path: Path
) -> dict[str, Any]:
    """Return what the templates ``viewer.html`` and ``grid.html`` need.

    Args:
        case: the case.
        embedded: its volumes; their maps get names.
        images: synthesised images by result (id), as data URIs; None where there is none.
        path: the page, to which the links to maps are relative.
    """
    data, view = embedded.data, embedded.view
    names = words.plain_names(case.targets)
    extents = [data["size"][p["across"]] * data["spacing"][p["across"]] for p in data.get("planes", [])]
    for result in case.explained:
        _annotate(result, path)
    for entry in data["maps"]:
        entry["name"] = names[entry["target"]]
    return {
        "names": names,
        "oriented": bool(view is not None and view.oriented and data["maps"]),
        "flat": view is not None and len(data.get("planes", [])) == 1,
        "data": data,
        "details": [_details(case.explained[entry["place"]], entry) for entry in data["maps"]],
        "extents": " ".join(f"minmax(0, {extent:.0f}fr)" for extent in extents),
        "grid": _grid(case, data, images, names),
    }


def _size_text(size: int, library: str | None) -> str:
    """Return the size of a page in words; a page states it in its provenance."""
    text = f"This page has {size / 1e6:.1f} MB"
    return text + (f"; NiiVue for the 3D view takes {len(library) / 1e6:.1f} MB of it." if library else ".")


def _details(result: Result, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts of a map below its large picture."""
    record = result.record
    gap, of_map = record.completeness_gap, record.completeness_gap_of_map
    facts: list[tuple[str, Any]] = [
        ("units", entry["units"]),
        ("end of the colours", f"{short(entry['limit'])}, the {entry['limit_is']}"),
        ("largest |value|", short(entry["extreme"])),
        ("strongest value", short(entry["value"])),
        ("rounding in this page", f"{100 * entry['error']:.2g} % of a value"),
        ("sum", short(record.sum)),
    ]
    if record.absorbed_share is not None:
        share = f"{short(100 * record.absorbed_share, 3)} % of the score"
        facts.append(("kept by biases", f"{short(record.more.get('booked'))} ({share})"))
    gap_text = "–" if gap is None else f"{short(100 * gap, 3)} %"
    facts += [
        ("score F(x)", short(record.value)),
        ("completeness gap", gap_text + ("" if of_map is None else f" ({short(100 * of_map, 3)} % of Σ |map|)")),
        ("parameters", result.parameters_text or "–"),
        ("paper", record.reference or "–"),
        ("seconds", short(result.seconds, 3)),
    ]
    texts = [text[0].upper() + text[1:] for text in words.map_cautions(entry)]
    return {"text": entry["text"], "cautions": texts, "facts": facts, "href": result.href, "file": result.file}


def _annotate(result: Result, page: Path) -> None:
    """Set the texts and flags of a result that the template shows besides its record."""
    result.parameters_text = words.parameters_text(result.record.parameters or {})
    result.gap_high = words.gap_is_high(result)
    if result.map is not None:
        result.file = result.map.name
        result.href = quote(os.path.relpath(result.map, page.parent).replace(os.sep, "/"))


def _orientation(embedded: Embedded, convention: str) -> str:
    if embedded.view is None or not embedded.view.oriented:
        return ""
    side = "left" if convention == "radiological" else "right"
    text = f"{convention.capitalize()} convention: the patient's {side} is on the viewer's right."
    if embedded.view.tilt > 1:
        text += f" Oblique scan: letters name the nearest axes, up to {embedded.view.tilt:.0f}° away."
    return text


def _grid(
    case: CaseResults, data: Mapping[str, Any], images: Mapping[int, str | None], targets_plain: Mapping[str, str]
) -> dict[str, Any]:
    """Return the table of targets by methods; the more numerous of the two are the columns, to fit on the screen."""
    places = {(r.method, r.target): i for i, r in enumerate(case.explained)}
    index = {m["place"]: i for i, m in enumerate(data["maps"])}

    def cell(method: str, target: str) -> dict[str, Any] | None:
        place = places.get((method, target))
        if place is None:
            return None
        result = case.explained[place]
        number = index.get(place)
        limit = None if number is None else data["maps"][number]["limit"]
        units = "" if number is None else data["maps"][number]["units"]
        names = {"method": method, "target": targets_plain[target], "status": result.status, "reason": result.reason}
        tags = [] if number is None else words.map_tags(result.status, data["maps"][number])
        return {**names, "index": number, "image": images[id(result)], "limit": limit, "units": units, "tags": tags}

    def head(method: str) -> dict[str, Any]:
        """Return the head of a method's row or column."""
        beaten = [r["metric"] for r in case.metrics if r["method"] == method and r["beats_controls"] is False]
        text = f"does not beat the control maps on {words.listed(dict.fromkeys(beaten))}" if beaten else ""
        unsigned = any(r.method == method and r.record.signed is False for r in case.explained)
        return {"name": method, "shown": method, "beaten": text, "unsigned": unsigned}

    methods = [head(method) for method in case.methods]
    targets: list[dict[str, Any]] = [
        {"name": t, "shown": targets_plain[t], "beaten": "", "unsigned": False} for t in case.targets
    ]
    across = len(methods) > len(targets)
    columns, rows = (methods, targets) if across else (targets, methods)
    cells = [[cell(c["name"], r["name"]) if across else cell(r["name"], c["name"]) for c in columns] for r in rows]
    return {"corner": "Target" if across else "Method", "columns": columns, "rows": list(zip(rows, cells))}


def _synthesised(result: Result, notes: list[str]) -> str | None:
    """Return a synthesised image as a data URI: the picture next to it, else its middle planes; None for a map."""
    if not result.synthesised or result.map is None:
        return None
    picture = picture_path(result.map)
    if picture.is_file() and inside(picture, result.map.parent) and picture.stat().st_size < LARGEST_PICTURE:
        return "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode("ascii")
    try:
        return picture_of(result.map)
    except InputError as error:
        notes.append(str(error))
        return None


def _metric_tables(case: CaseResults) -> list[dict[str, Any]]:
    """Return one table per target: methods and controls by metrics, in the order of the file, group by group."""
    tables = []
    for target in dict.fromkeys(row["target"] for row in case.metrics):
        of_target = [row for row in case.metrics if row["target"] == target]
        groups: dict[str, dict[str, bool | None]] = {}
        for row in of_target:
            groups.setdefault(row["group"] or "", {}).setdefault(row["metric"], row["higher_is_better"])
        names = [(name, higher) for group in groups.values() for name, higher in group.items()]
        cells = {(row["method"], row["metric"]): row for row in of_target}
        methods = sorted(dict.fromkeys(row["method"] for row in of_target), key=lambda m: m.startswith("control:"))
        tables.append(
            {
                "target": target,
                "groups": [(group, len(metrics)) for group, metrics in groups.items()],
                "metrics": [{"name": name, "higher": higher} for name, higher in names],
                "rows": [
                    {
                        "method": method,
                        "control": method.startswith("control:"),
                        "cells": [cells.get((method, name)) for name, _ in names],
                    }
                    for method in methods
                ],
            }
        )
    return tables


def _region_tables(case: CaseResults) -> list[dict[str, Any]]:
    keys = dict.fromkeys((row["target"], row["method"]) for row in case.regions)
    return [
        {
            "target": target,
            "method": method,
            "rows": [r for r in case.regions if (r["target"], r["method"]) == (target, method)],
            "alarm": any(r["alarm"] for r in case.regions if (r["target"], r["method"]) == (target, method)),
        }
        for target, method in keys
    ]


def _synthesis_curves(case: CaseResults) -> list[Curve]:
    """Return the optimisation curves of synthesised images: the objective (or loss) by step."""
    curves = []
    for result in case.explained:
        values = result.record.curve
        if result.synthesised and values is not None:
            kept = [(float(i), float(v)) for i, v in enumerate(values) if isinstance(v, (int, float))]
            name = "synthesis, loss" if result.record.distance_end is not None else "synthesis, objective"
            if kept:
                x, y = zip(*kept)
                curves.append(Curve(name, str(result.target), str(result.method), [*x], [*y]))
    return curves


def _checks(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return each result of a check once; with methods if others have another result; findings come first."""
    of_check: dict[str, set[str]] = {}
    once: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for check in (check for check in result.record.checks or [] if isinstance(check, dict)):
            name, text, method = str(check.get("check")), str(check.get("text")), str(result.method)
            of_check.setdefault(name, set()).add(method)
            once.setdefault((name, text), {**check, "methods": {}})["methods"][method] = None
    for (name, _), check in once.items():
        check["methods"] = "" if len(check["methods"]) == len(of_check[name]) else ", ".join(check["methods"])
    return sorted(once.values(), key=lambda check: check.get("verdict") == "passed")


def _agreement(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return a row per result and kind (members, views) whose maps were compared."""
    rows = []
    for result in results:
        for kind, single in (("members", "folds"), ("views", "views")):
            entry = (result.record.agreement or {}).get(kind)
            if isinstance(entry, dict) and "failed" not in entry:
                shuffled = entry.get("shuffled")
                rows.append(
                    {
                        "method": result.method,
                        "target": result.target,
                        "kind": single,
                        "values": {k: v for k, v in entry.items() if isinstance(v, (int, float))},
                        "shuffled": shuffled if isinstance(shuffled, dict) else {},
                        "map": entry.get("map"),
                    }
                )
    return rows


def _training(case: CaseResults) -> str:
    """State whether the case was in the training set of each fold; empty if that is not known."""
    folds = words.first(case, lambda r: r.training_folds)
    if not isinstance(folds, dict) or not folds:
        return ""
    return "; ".join(f"{name}: {text}" for name, text in folds.items())


def _warnings(results: Iterable[Result]) -> list[tuple[str, str]]:
    """Return each warning once, with the methods that gave it."""
    methods: dict[str, list[str]] = {}
    for result in results:
        for text in result.warnings:
            methods.setdefault(text, []).append(str(result.method or "the case"))
    return [(text, ", ".join(dict.fromkeys(who))) for text, who in methods.items()]


def _facts(run: Run, case: CaseResults) -> list[tuple[str, str]]:
    """Return the rows of the provenance table; hashes are not abbreviated."""
    info = private(run.info)
    facts: dict[str, Any] = {"case": case.name}
    for key, text in (
        ("bundle", "bundle"),
        ("bundle_version", "bundle version"),
        ("weights_sha256", "weights, SHA-256"),
    ):
        facts[text] = info.get(key) or words.first(case, attrgetter(key))
    facts["network"] = words.first(case, lambda r: (r.network or {}).get("name"))
    facts["scan, SHA-256"] = words.first(case, lambda r: r.scan_sha256)
    facts["network's input, SHA-256"] = words.first(case, lambda r: r.image_sha256)
    configs = info.get("configs_sha256") or words.first(case, lambda r: r.configs_sha256) or {}
    facts |= {f"{name}, SHA-256": value for name, value in configs.items()}
    inferer = words.first(case, lambda r: r.inferer)
    facts["inferer"] = words.parameters_text({"": inferer}).lstrip("=") if inferer else None
    facts["mixed precision"] = words.first(case, lambda r: r.amp)
    facts["seed"] = words.first(case, lambda r: r.seed)
    if info.get("overrides"):
        facts["overrides"] = words.parameters_text(info["overrides"])
    facts["started"], facts["finished"] = info.get("started"), info.get("finished") or "no: the run was stopped"
    return [(k, str(v)) for k, v in facts.items() if v is not None]


def _parameters(case: CaseResults) -> list[dict[str, Any]]:
    rows = []
    for method in case.methods:
        result = next((r for r in case.explained if r.method == method and r.record.method), None)
        if result is not None:
            rows.append(
                {
                    "method": method,
                    "text": words.parameters_text(result.record.parameters or {}),
                    "produces": result.record.produces or "",
                    "reference": result.record.reference,
                }
            )
    return rows
