"""The report of an output folder: one self-contained HTML page per case, and an index."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.resources import files
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

import esegeta_monai
from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.files.maps import picture_path
from esegeta_monai.files.privacy import private
from esegeta_monai.output.report import words
from esegeta_monai.output.report.charts import charts
from esegeta_monai.output.report.collect import CaseResults, Curve, Result, Run, read_output
from esegeta_monai.output.report.embed import BUDGET, Embedded, embed, picture_of, thumbnail
from esegeta_monai.output.report.viewer3d import HOW_TO_INSTALL, find_niivue
from esegeta_monai.utils.files import INTENDED_USE, atomic
from esegeta_monai.utils.names import safe_name

__all__ = ["Written", "report_path", "write_report"]

Convention = Literal["radiological", "neurological"]

LARGEST_PICTURE = 400_000
"""Largest number of bytes of a PNG that is embedded unchanged."""
MARKS = {"good": "Good", "note": "Note", "warn": "Careful", "bad": "Problem"}


@dataclass(frozen=True)
class Written:
    """Paths of a written report: the index, and one page per case, by name of the case."""

    index: Path
    cases: dict[str, Path]


def report_path(output_dir: str | os.PathLike[str], case: str) -> Path:
    """Return the path of the page of a case.

    >>> report_path("out", "sub-01").as_posix()
    'out/sub-01/sub-01_report.html'
    """
    return Path(output_dir) / safe_name(case) / f"{safe_name(case)}_report.html"


def write_report(
    output_dir: str | os.PathLike[str], *, convention: Convention = "radiological", view_3d: bool = False
) -> Written:
    """Write ``<output>/<case>/<case>_report.html`` for each case, and ``<output>/index.html``.

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
    library = find_niivue().read_text(encoding="utf-8") if view_3d else None
    run = read_output(Path(output_dir))
    pages: dict[str, Path] = {}
    rows: list[dict[str, Any]] = []
    for case in run.cases:
        images = {id(result): _synthesised(result, case.notes) for result in case.explained}
        budget = BUDGET - sum(len(image or "") for image in images.values())
        embedded = embed(case, radiological=convention == "radiological", budget=budget)
        path = report_path(output_dir, case.name)
        content = _case_page(run, case, embedded, images, convention, library, path)
        _write(path, content)
        pages[case.name] = path
        rows.append(_row(case, embedded, path, Path(output_dir)))
    index = Path(output_dir) / "index.html"
    _write(index, _index_page(run, rows))
    return Written(index, pages)


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
    scripts = [_text("theme.js"), *([] if library is None else [library.replace("</script", "<\\/script")])]
    scripts.append(_text("viewer.js"))
    data = embedded.data
    view = embedded.view
    extents = [data["size"][p["across"]] * data["spacing"][p["across"]] for p in data.get("planes", [])]
    for result in case.explained:
        _annotate(result, path)
    return _render(
        "case.html",
        scripts,
        three=library is not None,
        case=case,
        index_href="../index.html",
        lead=words.lead(case, private(run.info)),
        counts=case.counts(),
        findings=words.findings(case, [*case.notes, *embedded.notes]),
        targets=words.targets(case),
        orientation=_orientation(embedded, convention),
        oriented=bool(view is not None and view.oriented and data["maps"]),
        flat=view is not None and len(data.get("planes", [])) == 1,
        data=data,
        extents=" ".join(f"minmax(0, {extent:.0f}fr)" for extent in extents),
        volumes=embedded.volumes,
        grid=_grid(case, data, images),
        metrics=_metric_tables(case),
        charts=charts([*case.curves, *_synthesis_curves(case)]),
        compared=[r for r in case.explained if r.record.blend_deviation is not None],
        checks=_checks(case.results),
        regions=_region_tables(case),
        problems=[r for r in case.results if r.status in ("failed", "timeout")],
        warnings=_warnings(case.results),
        methods_text=words.methods_text(case, private(run.info)),
        references=words.references(case),
        run_facts=_facts(run, case),
        versions=list((run.info.get("versions") or words.first(case, lambda r: r.versions) or {}).items()),
        parameters=_parameters(case),
        view_3d=library is not None,
        how_3d=HOW_TO_INSTALL,
    )


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


def _grid(case: CaseResults, data: Mapping[str, Any], images: Mapping[int, str | None]) -> dict[str, Any]:
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
        names = {"method": method, "target": target, "status": result.status, "reason": result.reason}
        return {**names, "index": number, "image": images[id(result)], "limit": limit, "units": units}

    def head(method: str) -> dict[str, Any]:
        beaten = [r["metric"] for r in case.metrics if r["method"] == method and r["beats_controls"] is False]
        text = f"does not beat the control maps on {words.listed(dict.fromkeys(beaten))}" if beaten else ""
        unsigned = any(r.method == method and r.record.signed is False for r in case.explained)
        return {"name": method, "beaten": text, "unsigned": unsigned}

    methods = [head(method) for method in case.methods]
    targets: list[dict[str, Any]] = [{"name": target, "beaten": "", "unsigned": False} for target in case.targets]
    across = len(methods) > len(targets)
    columns, rows = (methods, targets) if across else (targets, methods)
    cells = [[cell(c["name"], r["name"]) if across else cell(r["name"], c["name"]) for c in columns] for r in rows]
    return {"corner": "Target" if across else "Method", "columns": columns, "rows": list(zip(rows, cells))}


def _synthesised(result: Result, notes: list[str]) -> str | None:
    """Return a synthesised image as a data URI: the picture next to it, else its middle planes; None for a map."""
    if not result.synthesised or result.map is None:
        return None
    picture = picture_path(result.map)
    if picture.is_file() and picture.stat().st_size < LARGEST_PICTURE:
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
    """Return each result of a check once; those that found something come first."""
    entries = [check for result in results for check in result.record.checks or [] if isinstance(check, dict)]
    once = {(check.get("check"), check.get("text")): check for check in entries}
    return sorted(once.values(), key=lambda check: check.get("verdict") == "passed")


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


# ---- the index -------------------------------------------------------------------------------------------------------


def _row(case: CaseResults, embedded: Embedded, page: Path, root: Path) -> dict[str, Any]:
    return {
        "name": case.name,
        "href": quote(page.relative_to(root).as_posix()),
        "targets": case.targets,
        "counts": case.counts(),
        "findings": [f for f in words.findings(case) if f.level in ("bad", "warn")],
        "thumbnail": thumbnail(embedded),
    }


def _index_page(run: Run, rows: list[dict[str, Any]]) -> str:
    total = {status: sum(row["counts"].get(status, 0) for row in rows) for status in words.STATUS_WORDS}
    counts = words.listed(words.STATUS_WORDS[status](n) for status, n in total.items() if n)
    bundle = private(run.info.get("bundle"))
    return _render("index.html", [_text("theme.js")], cases=rows, bundle=bundle, summary=f"{counts}.")


# ---- rendering -------------------------------------------------------------------------------------------------------


def _text(name: str) -> str:
    return (files("esegeta_monai.output.report") / name).read_text(encoding="utf-8")


def _short(value: Any, digits: int = 4) -> str:
    """Format a number with few digits, and with an exponent only if it is shorter.

    >>> _short(0.000012345), _short(484714.17), _short(12.0), _short(None), _short(-0.0)
    ('1.234e-05', '484,700', '12', '–', '0')
    """
    if not isinstance(value, (int, float)):
        return "–"
    value += 0.0  # -0.0 becomes 0.0
    if abs(value) >= 1000 and abs(value) < 1e9:
        rounded = float(f"{value:.{digits}g}")
        return f"{rounded:,.0f}"
    return f"{value:.{digits}g}"


def _whole(value: Any) -> str:
    return f"{int(value):,}" if isinstance(value, (int, float)) else "–"


def _soft(name: str) -> Markup:
    """Return a name as HTML that may break between its words.

    >>> str(_soft("MultiClassMask-<b>"))
    'Multi<wbr>Class<wbr>Mask-<wbr>&lt;b&gt;'
    """
    parts = re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[-_])(?=\w|<)", name)
    return Markup("<wbr>").join(parts)


def render(template: str, **context: Any) -> str:
    """Return a page of this package's own templates, which extend ``base.html``, with the script of the theme."""
    return _render(template, [_text("theme.js")], **context)


def _render(template: str, scripts: Sequence[str], *, three: bool = False, **context: Any) -> str:
    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"short": _short, "whole": _whole, "soft": _soft}
    return environment.get_template(template).render(
        css=Markup(_text("report.css")),  # safe: our own files, and NiiVue, whose hash is in the page's policy
        scripts=[Markup(script) for script in scripts],
        csp=_policy(scripts, three),
        intended_use=INTENDED_USE,
        version=esegeta_monai.__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        words={status: counted(1).removeprefix("1 ") for status, counted in words.STATUS_WORDS.items()},
        counted=words.STATUS_WORDS,
        marks=MARKS,
        **context,
    )


def _policy(scripts: Sequence[str], three: bool) -> str:
    """Return a content security policy that allows only these scripts and loads nothing."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    more = " connect-src data: blob:; worker-src blob:; font-src data:;" if three else ""
    eval_ = " 'wasm-unsafe-eval'" if three else ""
    return f"default-src 'none'; script-src {hashes}{eval_}; style-src 'unsafe-inline'; img-src data: blob:;{more}"
