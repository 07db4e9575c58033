"""Write the page of a cohort, its tables, and its maps in the common space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from esegeta_monai.errors import UsageError
from esegeta_monai.files.maps import save_map
from esegeta_monai.files.privacy import private
from esegeta_monai.output.cohort.clusters import FAR, LEAST_CASES
from esegeta_monai.output.cohort.maps import map_hash
from esegeta_monai.output.cohort.pictures import HEIGHT, WIDTH, Dot, dots, matrix_picture, similarity_order, slices
from esegeta_monai.output.cohort.results import Cohort, FamilyResult
from esegeta_monai.output.report.render import read_text, render
from esegeta_monai.utils.csv_text import csv_text
from esegeta_monai.utils.files import atomic, inside, sha256_file, versions, writable_folder, write_json
from esegeta_monai.utils.names import safe_name

__all__ = ["WrittenCohort", "write_cohort"]

FOLDER = "cohort"
LISTED = 12
"""Rows of a table on the page; the CSV has all."""


@dataclass(frozen=True)
class WrittenCohort:
    """Paths of the page, and of all files beside it."""

    page: Path
    files: list[Path]


@dataclass
class _Section:
    """A family on the page."""

    result: FamilyResult
    dots: list[Dot]
    outliers: list[tuple[str, float]]
    similarity: str
    pictures: list[tuple[str, str]] = field(default_factory=list)
    regions: list[Any] = field(default_factory=list)
    more_regions: int = 0
    tests: list[dict[str, Any]] = field(default_factory=list)
    members: list[list[str]] = field(default_factory=list)
    peaks: list[dict[str, Any]] = field(default_factory=list)


def write_cohort(cohort: Cohort, output: str | Path | None = None) -> WrittenCohort:
    """Write ``cohort.html``, ``cohort.json``, tables (CSV) and, with a common space, maps (NIfTI, PNG).

    Args:
        cohort: results.
        output: folder of the files; None: ``cohort`` in the folder of the maps.

    Raises:
        UsageError: the folder cannot be written, or leads out of the folder of the maps.

    >>> import json, tempfile
    >>> from esegeta_monai.output.cohort.results import CohortOptions
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     empty = Cohort(Path(folder), CohortOptions(), [], [], [], None)
    ...     write_cohort(empty).page.relative_to(folder).as_posix()
    'cohort/cohort.html'
    """
    folder = cohort.folder / FOLDER if output is None else Path(output)
    if output is None and not inside(folder, cohort.folder):
        raise UsageError(f"{folder} is a link to another folder: remove it, or give --output")
    writable_folder(folder)
    written: list[Path] = []
    tables = {
        "cases.csv": _cases(cohort),
        "regions.csv": _summaries(cohort),
        "regions_by_case.csv": _region_rows(cohort),
        "clusters.csv": _associations(cohort),
        "groups.csv": _tests(cohort),
        "voxels.csv": _voxels(cohort),
    }
    for name, (columns, rows) in tables.items():
        if rows:
            written.append(_write(folder / name, csv_text(columns, rows)))
    sections, taken = [], set[str]()
    for number, result in enumerate(cohort.families, 1):
        stem = f"{safe_name(result.family.target)}_{safe_name(result.family.method)}"
        stem = f"{stem}_{number}" if stem.casefold() in taken else stem
        taken.add(stem.casefold())
        order = similarity_order(result)
        names = [result.cases[i] for i in order]
        matrix = result.similarity[np.ix_(order, order)]
        rows = [{"case": name, **dict(zip(names, row))} for name, row in zip(names, matrix.tolist())]
        written.append(_write(folder / f"similarity_{stem}.csv", csv_text(["case", *names], rows)))
        section = _section(cohort, result, matrix)
        section.pictures = _maps(cohort, result, folder, stem, written)
        sections.append(section)
    _record(cohort, folder / "cohort.json")
    page = _write(
        folder / "cohort.html",
        render(
            "cohort.html",
            [read_text("theme.js")],
            sections=sections,
            left_out=cohort.left_out,
            notes=private(cohort.notes),
            options=cohort.options,
            space=cohort.space is not None,
            cases=len({c for r in cohort.families for c in r.cases}),
            files=sorted(p.name for p in written if p.suffix == ".csv"),
            width=WIDTH,
            height=HEIGHT,
            least_cases=LEAST_CASES,
        ),
    )
    return WrittenCohort(page, [*written, folder / "cohort.json"])


def _write(path: Path, text: str) -> Path:
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    return path


def _section(cohort: Cohort, result: FamilyResult, matrix: np.ndarray) -> _Section:
    far = [score > FAR for score in result.outliers.tolist()]
    outliers = sorted(
        ((case, score) for case, score, is_far in zip(result.cases, result.outliers.tolist(), far) if is_far),
        key=lambda entry: -entry[1],
    )
    section = _Section(result, dots(result, far), outliers, matrix_picture(matrix))
    section.regions = result.table[:LISTED]
    section.more_regions = max(0, len(result.table) - LISTED)
    if result.clusters.labels is not None:
        labels = result.clusters.labels.tolist()
        section.members = [
            [case for case, label in zip(result.cases, labels) if label == k] for k in range(1, max(labels) + 1)
        ]
    section.tests = sorted(_test_rows(result), key=lambda row: (row["p_adjusted"], row["p"], row["region"]))[:LISTED]
    section.peaks = list(_voxel_rows(cohort, result))[:LISTED]
    return section


def _maps(cohort: Cohort, result: FamilyResult, folder: Path, stem: str, written: list[Path]) -> list[tuple[str, str]]:
    """Write the maps in the common space; return titles and pictures."""
    if cohort.space is None or result.moments is None:
        return []
    moments, space = result.moments, cohort.space
    family = result.family
    maps = [("mean", "Mean map", moments.mean, True), ("variance", "Variance map", moments.variance, False)]
    maps += [("cases", "Cases per voxel", moments.count.astype(np.float64), False)]
    if result.groups is not None and result.groups.voxels is not None:
        test = result.groups.voxels
        maps += [
            ("t", f"t, {result.groups.names[1]} − {result.groups.names[0]}", test.t, True),
            ("p", "Family-wise p", test.p, False),
        ]
    pictures = []
    for name, title, values, signed in maps:
        path = folder / f"{name}_{stem}.nii.gz"
        grid_values = values.reshape((1, *space.grid.shape[:3], *[1] * (3 - len(space.grid.shape[:3]))))
        save_map(
            path,
            grid_values.squeeze(-1) if len(space.grid.shape) == 2 else grid_values,
            _grid(space),
            method=family.method,
        )
        written.append(path)
        if name in ("mean", "variance", "t") and values.any():
            units = {"mean": "share of Σ|a|", "variance": "share²", "t": "t"}[name]
            png = path.with_name(f"{name}_{stem}.png")
            title_of_picture = f"{title}, {len(result.cases)} cases"
            pictures.append(
                (
                    title,
                    slices(
                        png,
                        space.reference,
                        values,
                        what=title_of_picture,
                        signed=signed,
                        target=family.target,
                        method=family.method,
                        units=units,
                    ),
                )
            )
            written.append(png)
    return pictures


def _grid(space: Any) -> Any:
    """Return the grid of the reference without channels."""
    grid = space.grid
    return grid if len(grid.shape) <= 3 else type(grid)(grid.shape[:3], grid.header)


# -- tables ------------------------------------------------------------------------------------------------------------

Table = tuple[Sequence[str], list[dict[str, Any]]]


def _of(result: FamilyResult) -> dict[str, str]:
    return {"target": result.family.target, "method": result.family.method}


def _cases(cohort: Cohort) -> Table:
    rows: list[dict[str, Any]] = []
    for result in cohort.families:
        labels = result.clusters.labels
        for i, case in enumerate(result.cases):
            own: dict[str, Any] = {
                "case": case,
                "status": "used",
                "cluster": None if labels is None else int(labels[i]),
            }
            own |= {"outlier": float(result.outliers[i]), "x": float(result.points[i, 0])}
            own |= {"y": float(result.points[i, 1]), "kept": float(result.kept[i])}
            rows.append({**_of(result), **own})
    for entry in cohort.left_out:
        left = {"case": entry.case, "target": entry.target, "method": entry.method, "status": entry.status}
        rows.append({**left, "reason": private(entry.reason)})
    return ("case", "target", "method", "status", "reason", "cluster", "outlier", "x", "y", "kept"), rows


def _summaries(cohort: Cohort) -> Table:
    names = ("region", "cases", "mean", "sd", "median", "low", "high", "signed")
    rows = [{**_of(r), **{name: getattr(row, name) for name in names}} for r in cohort.families for row in r.table]
    return ("target", "method", *names), rows


def _region_rows(cohort: Cohort) -> Table:
    names = ("case", "region", "share_of_abs", "signed_share")
    rows = [{**_of(r), **{name: getattr(row, name) for name in names}} for r in cohort.families for row in r.regions]
    return ("target", "method", *names), rows


def _associations(cohort: Cohort) -> Table:
    rows = [
        {**_of(r), **{n: getattr(a, n) for n in ("variable", "kind", "strength", "p")}}
        | {"by_cluster": " | ".join(a.by_cluster)}
        for r in cohort.families
        for a in r.associations
    ]
    return ("target", "method", "variable", "kind", "strength", "p", "by_cluster"), rows


def _test_rows(result: FamilyResult) -> Iterable[dict[str, Any]]:
    groups = result.groups
    if groups is None or groups.tests is None:
        return
    for k, region in enumerate(groups.regions):
        row: dict[str, Any] = {"region": region, "first": groups.names[0], "second": groups.names[1]}
        row |= {"mean_first": float(groups.means[0, k]), "mean_second": float(groups.means[1, k])}
        tests = groups.tests
        numbers = {"difference": tests.difference, "t": tests.t, "p": tests.p, "p_adjusted": tests.p_adjusted}
        yield row | {name: float(values[k]) for name, values in numbers.items()}


def _tests(cohort: Cohort) -> Table:
    names = ("region", "first", "second", "mean_first", "mean_second", "difference", "t", "p", "p_adjusted")
    return ("target", "method", *names), [{**_of(r), **row} for r in cohort.families for row in _test_rows(r)]


def _voxel_rows(cohort: Cohort, result: FamilyResult) -> Iterable[dict[str, Any]]:
    if cohort.space is None or result.groups is None or result.groups.voxels is None:
        return
    affine = np.asarray(cohort.space.grid.affine)
    for cluster in result.groups.voxels.clusters:
        place = affine[:3, :3] @ np.asarray(cluster.peak) + affine[:3, 3]
        yield {
            **{"voxels": cluster.voxels, "t": cluster.t, "p": cluster.p},
            **dict(zip(("x_mm", "y_mm", "z_mm"), place.tolist())),
        }


def _voxels(cohort: Cohort) -> Table:
    rows = [{**_of(r), **row} for r in cohort.families for row in _voxel_rows(cohort, r)]
    return ("target", "method", "voxels", "t", "p", "x_mm", "y_mm", "z_mm"), rows


def _record(cohort: Cohort, path: Path) -> None:
    """Write what the results were computed from: options, hashes, figures of the clusters."""
    options = cohort.options
    families = []
    for result in cohort.families:
        clusters = result.clusters
        hashes = {m.case: map_hash(m) for m in result.family.maps if m.case in set(result.cases)}
        entry: dict[str, Any] = {**_of(result), "maps_sha256": hashes, "cells": list(result.cells.shape)}
        entry |= {"cell_mm": result.cells.edge, "centre": result.around, "notes": private(result.notes)}
        entry["clusters"] = {
            **{"number": clusters.number, "reason": clusters.reason, "gaps": clusters.gaps},
            **{"gaps_of_copies_95": clusters.null, "p": clusters.p, "stability": clusters.stability},
        }
        if result.groups is not None:
            entry["least_p"] = result.groups.least_p
            entry["patients"] = dict(zip(result.groups.names, result.groups.patients))
        families.append(entry)
    record: Mapping[str, Any] = {
        "families": families,
        "left_out": [
            {"case": e.case, "target": e.target, "method": e.method, "status": e.status, "reason": private(e.reason)}
            for e in cohort.left_out
        ],
        "notes": private(cohort.notes),
        "options": {
            **{"correction": options.correction, "voxels": options.voxels, "level": options.level},
            **{"permutations": options.permutations, "extent": options.extent, "seed": options.seed},
        },
        "reference_sha256": None if cohort.space is None else sha256_file(cohort.space.reference),
        "versions": versions(),
    }
    write_json(path, record)
